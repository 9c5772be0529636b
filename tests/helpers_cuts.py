"""Random problems of a few rows in memories of few, and what rows cost."""

import dataclasses

import pytest
from helpers_planner import (
  RATIOS,
  buckets_of,
  free_of_latencies,
  probabilities,
  shape_of,
  with_host_path,
)
from hypothesis import strategies as st

from recjax.planner import presets
from recjax.planner.problem import Problem
from recjax.planner.traffic import Traffic

ALL_REDUCED = ("all_reduce",)


@st.composite
def problems(draw):
  """(problem, rows a device holds, rows that the hosts hold)."""
  p = draw(st.lists(probabilities(), min_size=1, max_size=8))
  if draw(st.booleans()):  # many equal rows
    p = [round(x, 1) for x in p]
  devices = draw(st.sampled_from([1, 2, 3, 16]))
  name = draw(st.sampled_from(["cpu", "dgx_h200", "a100", "tpu_v6e"]))
  t = presets.get(name, devices)
  if draw(st.booleans()):  # a step that latencies do not decide
    t = free_of_latencies(t)
  shape = shape_of(
    devices,
    draw(st.sampled_from([1, 8, 1_000])),
    lookups=draw(st.sampled_from([1, 100])),
    train=draw(st.booleans()),
  )
  objective = draw(st.sampled_from(["time", "time", "bytes"]))
  problem = Problem(buckets_of(p), shape, t, None, objective)
  ratio = draw(st.sampled_from(RATIOS))
  if ratio is not None:
    problem = with_host_path(problem, ratio)
  fit = draw(st.integers(0, 9))
  return problem, fit, draw(st.integers(0, 9)) * devices


@st.composite
def problems_with_ssds(draw):
  """(problem, rows of a device, of the hosts' memory, of their SSDs)."""
  problem, fit, host_rows = draw(problems())
  p = problem.profile.p[:6]
  t = problem.topology  # where a page is a row of the network, or a lot more
  t = dataclasses.replace(
    t, ssd_read=t.ssd_read * draw(st.sampled_from([1, 1e4]))
  )
  problem = dataclasses.replace(problem, profile=buckets_of(p), topology=t)
  fit, host = min(fit, 3), min(host_rows, 2 * problem.shape.devices)
  return problem, fit, host, draw(st.integers(0, 9)) * problem.shape.devices


def row_cost(problem) -> float:
  """The cost of a row in the dearest tier, with the tier's latencies."""
  n = problem.shape.devices
  sizes = problem.shape.files
  # Of one device: what is next to no rows there is no less on many.
  page = sum(1 + size / 4096 for size in sizes)
  one = [
    problem.evaluate(Traffic(1)),
    problem.evaluate(Traffic(0, n)),
    problem.evaluate(Traffic(0, 0, n, visitors=1, pages=page)),
  ]
  return max(one) - problem.evaluate(Traffic())


def least_cost(problem, least: float):
  """That cost, up to rounding.

  A tier with rows counts a billionth touched row at least, so costs are linear
  up to that much of a row's.
  """
  return pytest.approx(least, rel=1e-9, abs=2e-9 * row_cost(problem))
