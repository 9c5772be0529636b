"""The cuts of buckets of many equal rows, against all cuts."""

import dataclasses

import numpy as np
import pytest
from helpers_cuts import ALL_REDUCED, least_cost
from helpers_planner import (
  RATIOS,
  free_of_latencies,
  probabilities,
  shape_of,
  with_host_path,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.planner import cut_points, presets
from recjax.planner.frequency_buckets import BucketedProfile, Table
from recjax.planner.problem import Cuts, Problem
from recjax.planner.transport import FLAT, Transport

ALL_CHOSEN = (-1, -1, -1)  # hot, warm and cold rows
COPIES = Transport("flat", "node")


def problem_of(buckets, shape, t, ratio=None) -> Problem:
  """buckets: (chance of a row, rows); ratio: see with_host_path."""
  p, count = np.array(sorted(buckets, reverse=True)).T
  table = Table("t", int(count.sum()))
  s = BucketedProfile((table,), count.astype(np.int64), p, p)
  problem = Problem(s, shape, free_of_latencies(t), None)
  return problem if ratio is None else with_host_path(problem, ratio)


def check(problem, room, kept=ALL_CHOSEN, transport=FLAT) -> Cuts | None:
  """No cuts are cheaper; returns those that were found.

  Args:
    problem: of few rows.
    room: rows of a device, and of each device's share of the hosts and SSDs.
    kept: hot, warm and cold rows that are given, -1 = to be chosen.
    transport: of the sharded rows.
  """
  n, rows = problem.shape.devices, problem.profile.rows
  owners = transport.warm_owners(problem.shape)
  fit, host, ssd = room[0], room[1] * n, room[2] * n
  hot, end = np.indices((rows + 1, rows + 1)).reshape(2, -1)
  kept_hot, kept_warm, kept_cold = kept
  stored = rows - end
  cold = np.minimum(stored, host) if ssd else stored
  if kept_cold >= 0:
    cold = np.where(stored <= kept_cold, stored, kept_cold // n * n)
  fits = (hot <= end) & (hot + -(-(end - hot) // owners) <= fit)
  fits &= (-(-cold // n) * n <= host) & (-(-(stored - cold) // n) * n <= ssd)
  if kept_hot >= 0:
    fits &= hot == min(kept_hot, rows)
  if kept_warm >= 0:
    fits &= end - hot == np.minimum(kept_warm, rows - hot)
  found = cut_points.best_cuts(
    problem,
    fit,
    host,
    ssd_rows=ssd,
    hot_rows=kept_hot,
    warm_rows=kept_warm,
    cold_rows=kept_cold,
    hot_syncs=ALL_REDUCED,
    transports=(transport,),
  )
  assert (found is None) == (not fits.any())
  if found is not None:
    every = Cuts(
      hot[fits],
      end[fits],
      transport=transport,
      cold_end=(end + cold)[fits],
    )
    least = problem.cost(every).min()
    assert float(problem.cost(found)) == least_cost(problem, least)
  return found


# Machine, devices, those of a node (0: all).
ONE_NODE, NODES = ("dgx_h200", 2, 0), ("dgx_h200", 16, 2)
TORUS = ("tpu_v6e", 6, 3)
# Ratio of both paths, buckets, room of a device and of its share of the hosts,
# and what is given.
CASES = {
  "crossing": (ONE_NODE, 0.3, [(0.1, 15), (1.0, 30), (1e-3, 20)], (32, 15)),
  "crossing_with_copies": (NODES, 1.5, [(0.25, 20)], (27, 27)),
  "fewer_copies": (NODES, 4.0, [(0.1, 15)], (12, 31)),
  "hot_given": (ONE_NODE, 0.3, [(1.0, 30), (0.1, 9)], (32, 15), (7, -1, -1)),
  "cold_given": (TORUS, 0.8, [(0.25, 39), (0.25, 26)], (35, 3), (-1, -1, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_cuts_are_cheaper(name):
  """Where the paths cross, or take as long, within a bucket, and at limits."""
  (machine, devices, g), ratio, buckets, room, *kept = CASES[name]
  t, shape = presets.get(machine, devices), shape_of(devices, 1)
  if g:
    t = dataclasses.replace(t, node_devices=g)
    shape = shape_of(devices, 1, node_devices=g)
  problem, transport = (
    problem_of(buckets, shape, t, ratio),
    COPIES if g else FLAT,
  )
  assert check(problem, (*room, 0), *kept, transport=transport)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
  st.lists(
    st.tuples(probabilities(), st.integers(1, 40)), min_size=1, max_size=4
  ),
  st.sampled_from([1, 2, 3]),
  st.sampled_from(RATIOS),
  st.tuples(*[st.integers(0, 60)] * 2, st.sampled_from([0, 10, 200])),
  st.tuples(*[st.sampled_from([-1, -1, 7, 20])] * 3),
)
def test_no_cuts_are_cheaper_within_buckets_of_equal_rows(
  buckets, devices, ratio, room, kept
):
  """Where the paths cross, where memories end, where other cuts are kinks."""
  t = presets.get("dgx_h200", devices)
  # Hot rows are worth their memory, and pages of SSDs are no dearer than rows.
  t = dataclasses.replace(t, link=1e7, ssd_read=1e13)
  check(problem_of(buckets, shape_of(devices, 20), t, ratio), room, kept)
