"""The cuts against all placements, row by row."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers_cuts import (
  ALL_REDUCED,
  least_cost,
  problems,
  problems_with_ssds,
  row_cost,
)
from helpers_planner import (
  RATIOS,
  buckets_of,
  free_of_latencies,
  probabilities,
  shape_of,
  with_host_path,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recjax.planner import buffer_sizes, cut_points, lower_bound, presets
from recjax.planner.buffer_sizes import DistinctRows
from recjax.planner.problem import HOT_SYNCS, Cuts, Problem
from recjax.planner.traffic import Traffic
from recjax.planner.transport import TRANSPORTS, Transport


def distinct_of(there, pi) -> DistinctRows:
  """Distinct rows of placements that have the rows there: [P, R] bool."""
  top = np.max(np.where(there, pi, 0), axis=1)
  return DistinctRows(there @ pi, there @ (pi * (1 - pi)), top, there.sum(1))


def costs_of_all(
  problem, fit, host_rows, inter_node=None, ssd_rows=0
) -> np.ndarray:
  """Of every assignment of rows to tiers that respects the budgets."""
  s, n = problem.profile, problem.shape.devices
  pi, b = problem.of_device.pi, problem.shape.batch_size
  several = range(4 if ssd_rows else 3)
  tiers = np.array(list(itertools.product(several, repeat=s.rows)))
  hot, warm, cold, frozen = (tiers == k for k in range(4))
  rows = [x.sum(1) for x in (hot, warm, cold, frozen)]
  fits = rows[0] + -(-rows[1] // n) <= fit
  fits &= -(-rows[2] // n) * n <= host_rows
  fits &= -(-rows[3] // n) * n <= ssd_rows
  fits &= (rows[3] == 0) | (rows[2] % n == 0)  # owners go on in turn
  cold, of_batch = cold | frozen, problem.of_batch.pi
  warm_buffer, cold_buffer = (
    problem.buffers_of(distinct_of(x, pi)) for x in (warm, cold)
  )
  chance = problem.overflow_probability
  visitors = buffer_sizes.buffer_rows(
    distinct_of(cold, of_batch),
    n,
    b * problem.shape.lookups,
    None if chance is None else chance / n,
  )
  pages = np.maximum(frozen @ problem.pages_of_row, 1e-9) / n
  traffic = Traffic(
    rows[0],
    warm_buffer,
    np.minimum(cold_buffer, visitors),
    visitors=visitors / n,
    pages=np.where(rows[3] > 0, pages, 0.0),
  )
  if inter_node is not None:
    traffic = dataclasses.replace(
      traffic,
      inter_node_warm=inter_node(warm),
      inter_node_cold=inter_node(cold),
    )
  return problem.evaluate(traffic)[fits]


HARDLY_USED = Problem(  # a row that is touched a billionth time a sample
  buckets_of([1, 1, 1, 1, 0.5, 0.5, 1e-9, 0]),
  shape_of(3, 1, lookups=1, train=False),
  presets.get("cpu", 3),
  None,
  "bytes",
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@example((HARDLY_USED, 5, 3))
@given(problems())
def test_no_placement_is_cheaper(case):
  problem, fit, host_rows = case
  costs = costs_of_all(problem, fit, host_rows)
  found = cut_points.best_cuts(problem, fit, host_rows, hot_syncs=ALL_REDUCED)
  assert (found is None) == (len(costs) == 0)
  if found is not None:
    got = float(problem.cost(found))
    assert got == least_cost(problem, costs.min())


def test_the_host_path_is_hidden_in_part_wholly_or_not_at_all():
  """Few replicas, whose memory the host misses; as many as the devices want;
  or what is between, where both paths take as long."""
  p = np.linspace(0.9, 0.01, 400)
  shape = shape_of(2, 64, dim=64, row_bytes=256, slot_bytes=256)
  t = free_of_latencies(presets.get("dgx_h200", 2))
  t = dataclasses.replace(t, link=1e8)
  problem = Problem(buckets_of(p), shape, t, None)
  hot, behind = {}, {}
  for ratio in (0.1, 0.8, 1.0, 1.2, 10.0):
    of = with_host_path(problem, ratio)
    found = cut_points.best_cuts(of, 150, 1_000, hot_syncs=ALL_REDUCED)
    paths = of.paths(of.traffic(found))
    hot[ratio], behind[ratio] = found.hot, float(paths.host / paths.device)
    every = np.arange(151)
    most = Cuts(every, np.minimum(2 * 150 - every, 400))
    assert float(of.cost(found)) == pytest.approx(of.cost(most).min())
  assert hot[0.1] > hot[10.0] == 0
  assert behind[0.1] < 0.5 and behind[10.0] > 2
  between = [r for r in hot if 0 < hot[r] < hot[0.1]]
  assert between
  for ratio in between:
    assert behind[ratio] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(problems_with_ssds())
def test_no_placement_is_cheaper_with_ssds(case):
  problem, fit, host_rows, ssd_rows = case
  costs = costs_of_all(problem, fit, host_rows, ssd_rows=ssd_rows)
  found = cut_points.best_cuts(
    problem, fit, host_rows, ssd_rows=ssd_rows, hot_syncs=ALL_REDUCED
  )
  assert (found is None) == (len(costs) == 0)
  if found is not None:
    got = float(problem.cost(found))
    assert got == least_cost(problem, costs.min())
    bound = lower_bound.lower_bound(problem, fit, host_rows, ssd_rows=ssd_rows)
    assert bound <= got * (1 + 1e-6) + 2e-9 * row_cost(problem)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from([1e-9, 1e-3, 0.5]))
def test_with_padded_buffers_within_a_row(case, chance):
  """Padding grows like a root, so a row more or less may be better."""
  problem, fit, host_rows = case
  problem = dataclasses.replace(problem, overflow_probability=chance)
  costs = costs_of_all(problem, fit, host_rows)
  found = cut_points.best_cuts(problem, fit, host_rows, hot_syncs=ALL_REDUCED)
  assert (found is None) == (len(costs) == 0)
  if found is not None:
    got = float(problem.cost(found))
    assert got <= costs.min() + row_cost(problem) * (1 + 1e-9)


@settings(max_examples=500, deadline=None)
@given(problems())
def test_no_cuts_are_cheaper_where_touched_rows_are_exchanged(case):
  problem, fit, host_rows = case
  n, rows = problem.shape.devices, problem.profile.rows
  every = [(h, e) for h in range(rows + 1) for e in range(h, rows + 1)]
  fits = [
    (h, e)
    for h, e in every
    if h + -(-(e - h) // n) <= fit and -(-(rows - e) // n) * n <= host_rows
  ]
  found = cut_points.best_cuts(problem, fit, host_rows)
  assert (found is None) == (not fits)
  if found is not None:
    hot, end = np.array(fits).T
    least = min(problem.cost(Cuts(hot, end, sync)).min() for sync in HOT_SYNCS)
    got = float(problem.cost(found))
    assert got == least_cost(problem, least)


# ---- Several nodes


@st.composite
def node_problems(draw):
  """(problem, rows a device holds, rows that the hosts hold); no padding."""
  p = draw(st.lists(probabilities(), min_size=1, max_size=7))
  devices, g = draw(st.sampled_from([(4, 2), (6, 3), (16, 8), (16, 2)]))
  t = presets.get(draw(st.sampled_from(["dgx_h200", "tpu_v6e"])), devices)
  t = dataclasses.replace(t, node_devices=g)
  if draw(st.booleans()):  # a step that latencies do not decide
    t = free_of_latencies(t)
  if draw(st.booleans()):  # a host half as fast, and a slow network
    gather = t.gather * min(devices, t.host_devices) / 2
    t = dataclasses.replace(t, host_link=1e15, host_gather=gather, network=1e6)
  shape = shape_of(
    devices,
    draw(st.sampled_from([1, 8, 1_000])),
    train=draw(st.booleans()),
    node_devices=g,
  )
  objective = draw(st.sampled_from(["time", "time", "bytes"]))
  problem = Problem(buckets_of(p), shape, t, None, objective)
  ratio = draw(st.sampled_from(RATIOS))
  if ratio is not None:
    problem = with_host_path(problem, ratio)
  return problem, draw(st.integers(0, 8)), draw(st.integers(0, 8)) * devices


def slow_network():
  """Where rare rows are better cold than with a copy in either node."""
  t = presets.get("dgx_h200", 4)
  t = dataclasses.replace(
    t,
    node_devices=2,
    link_latency=0.0,
    ring_latency=0.0,
    network_latency=0.0,
    host_latency=0.0,
    tier_latency=0.0,
    host_link=1e15,
    host_gather=2 * t.gather,
    network=1e6,
  )
  shape = shape_of(4, 1, node_devices=2)
  s = buckets_of([0.6, 0.5, 0.3, 0.2, 0.1])
  return Problem(s, shape, t, None), 3, 4


def hidden_hosts():
  """Where the hosts' seconds decide, though a step does not wait for them."""
  t = dataclasses.replace(presets.get("dgx_h200", 4), node_devices=2)
  shape = shape_of(4, 1, node_devices=2)
  s = buckets_of([1.0, 0.5, 0.25])
  return Problem(s, shape, free_of_latencies(t), None), 2, 4


def slow_hosts():
  """Where the billionth part of an untouched row takes the hosts long."""
  t = dataclasses.replace(presets.get("dgx_h200", 4), node_devices=2)
  shape = shape_of(4, 1, train=False, node_devices=2)
  problem = Problem(buckets_of([0.0]), shape, free_of_latencies(t), None)
  return with_host_path(problem, 1.5), 0, 4


def test_rare_rows_need_no_copies():
  """Neither all that fit nor none: what the network or the hosts ask for."""
  for exchange, end in (("flat", 4), ("two_stage", 1)):
    transport = Transport(exchange, "node")
    found = cut_points.best_cuts(*slow_network(), transports=(transport,))
    assert (found.hot, found.warm_end) == (0, end)


@pytest.mark.parametrize("make", [slow_network, hidden_hosts])
def test_no_cuts_are_cheaper_where_networks_or_hosts_decide(make):
  check_all_transports(make())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(node_problems())
def test_no_cuts_are_cheaper_with_any_transport(case):
  check_all_transports(case)


def check_all_transports(case):
  """Asserts that no cuts are cheaper, with each transport and with any."""
  problem, fit, host_rows = case
  n, rows = problem.shape.devices, problem.profile.rows
  every = [(h, e) for h in range(rows + 1) for e in range(h, rows + 1)]
  got = {}
  for transport in TRANSPORTS:
    owners = transport.warm_owners(problem.shape)
    fits = [
      (h, e)
      for h, e in every
      if h + -(-(e - h) // owners) <= fit
      and -(-(rows - e) // n) * n <= host_rows
    ]
    found = cut_points.best_cuts(
      problem, fit, host_rows, transports=(transport,)
    )
    assert (found is None) == (not fits)
    if found is None:
      continue
    hot, end = np.array(fits).T
    costs = [problem.cost(Cuts(hot, end, x, transport)) for x in HOT_SYNCS]
    got[transport] = float(problem.cost(found))
    assert got[transport] == least_cost(problem, np.min(costs))
  best = cut_points.best_cuts(problem, fit, host_rows)
  assert (best is None) == (not got)
  if best is not None:
    assert float(problem.cost(best)) == least_cost(problem, min(got.values()))


@settings(max_examples=20, deadline=None)
@given(node_problems(), st.sampled_from(TRANSPORTS))
@example(slow_hosts(), TRANSPORTS[0])
def test_the_bound_holds_with_any_transport(case, transport):
  problem, fit, host_rows = case
  found = cut_points.best_cuts(
    problem, fit, host_rows, hot_syncs=ALL_REDUCED, transports=(transport,)
  )
  if found is not None:
    bound = lower_bound.lower_bound(problem, fit, host_rows, transport)
    got = float(problem.cost(found))
    # A tier with rows counts a billionth touched row at least; see least_cost.
    assert bound <= got * (1 + 1e-6) + 2e-9 * row_cost(problem)


@settings(max_examples=200, deadline=None)
@given(node_problems())
def test_no_placement_is_cheaper_in_two_stages(case):
  """Row by row, as with all devices asking the owners."""
  problem, fit, host_rows = case
  transport, shape = Transport("two_stage"), problem.shape
  g = shape.devices // shape.nodes
  pi = problem.profile.touched(g * shape.local)

  def inter_node(there):  # [placements, R] bool -> rows N C_far
    return np.where(there.any(1), np.maximum(there @ pi, 1e-9), 0) / g

  costs = costs_of_all(problem, fit, host_rows, inter_node)
  found = cut_points.best_cuts(
    problem, fit, host_rows, hot_syncs=ALL_REDUCED, transports=(transport,)
  )
  assert (found is None) == (len(costs) == 0)
  if found is not None:
    got = float(problem.cost(found))
    assert got == least_cost(problem, costs.min())
