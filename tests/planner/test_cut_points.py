"""The cuts against all placements, row by row, and against linear programs."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers_planner import (
  buckets_of,
  free_of_latencies,
  probabilities,
  shape_of,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from recjax.planner import cut_points, frequency_buckets, lower_bound, presets
from recjax.planner.buffer_sizes import DistinctRows
from recjax.planner.frequency_buckets import Table
from recjax.planner.problem import HOT_SYNCS, Cuts, Problem
from recjax.planner.traffic import Traffic
from recjax.planner.transport import TRANSPORTS, Transport

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
  objective = draw(st.sampled_from(["time", "bytes"]))
  problem = Problem(buckets_of(p), shape, t, None, objective)
  fit = draw(st.integers(0, 9))
  return problem, fit, draw(st.integers(0, 9)) * devices


def costs_of_all(problem, fit, host_rows, inter_node=None) -> np.ndarray:
  """Of every assignment of rows to tiers that respects the budgets."""
  s, n = problem.profile, problem.shape.devices
  pi = problem.of_device.pi
  tiers = np.array(list(itertools.product(range(3), repeat=s.rows)))
  hot, warm, cold = (tiers == k for k in range(3))
  rows = hot.sum(1), warm.sum(1), cold.sum(1)
  fits = rows[0] + -(-rows[1] // n) <= fit
  fits &= -(-rows[2] // n) * n <= host_rows
  tops = [np.max(np.where(x, pi, 0), axis=1) for x in (warm, cold)]
  buffers = [
    problem.buffers_of(DistinctRows(x @ pi, x @ (pi * (1 - pi)), top, size))
    for x, top, size in zip((warm, cold), tops, rows[1:], strict=True)
  ]
  traffic = Traffic(rows[0], *buffers)
  if inter_node is not None:
    traffic = dataclasses.replace(
      traffic,
      inter_node_warm=inter_node(warm),
      inter_node_cold=inter_node(cold),
    )
  return problem.evaluate(traffic)[fits]


def row_cost(problem) -> float:
  """The cost of a row in the dearest tier, with the tier's latencies."""
  n = problem.shape.devices
  one = [
    problem.evaluate(Traffic(*x)) for x in ((1, 0, 0), (0, n, 0), (0, 0, n))
  ]
  return max(one) - problem.evaluate(Traffic())


def least_cost(problem, least: float):
  """That cost, up to rounding.

  A tier with rows counts a billionth touched row at least, so costs are linear
  up to that much of a row's.
  """
  return pytest.approx(least, rel=1e-9, abs=2e-9 * row_cost(problem))


NEVER_USED = Problem(  # all cost is that of next to no rows
  buckets_of([1, 1, 1, 1, 2.0**-52]),
  shape_of(1, 8, lookups=1, train=False),
  presets.get("cpu", 1),
  None,
  "bytes",
)
HARDLY_USED = Problem(  # a row that is touched a billionth time a sample
  buckets_of([1, 1, 1, 1, 0.5, 0.5, 1e-9, 0]),
  shape_of(3, 1, lookups=1, train=False),
  presets.get("cpu", 3),
  None,
  "bytes",
)


@pytest.mark.slow
@settings(max_examples=1_200, deadline=None)
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


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
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
  objective = draw(st.sampled_from(["time", "bytes"]))
  problem = Problem(buckets_of(p), shape, t, None, objective)
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


def test_rare_rows_need_no_copies():
  """Neither all that fit nor none: what the network or the hosts ask for."""
  for exchange, end in (("flat", 4), ("two_stage", 1)):
    transport = Transport(exchange, "node")
    found = cut_points.best_cuts(*slow_network(), transports=(transport,))
    assert (found.hot, found.warm_end) == (0, end)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(node_problems())
@example(slow_network())
def test_no_cuts_are_cheaper_with_any_transport(case):
  problem, fit, host_rows = case
  n, rows = problem.shape.devices, problem.profile.rows
  every = [(h, e) for h in range(rows + 1) for e in range(h, rows + 1)]
  least = {}
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
    least[transport] = min(
      problem.cost(Cuts(hot, end, sync, transport)).min() for sync in HOT_SYNCS
    )
    got = float(problem.cost(found))
    assert got == least_cost(problem, least[transport])
  best = cut_points.best_cuts(problem, fit, host_rows)
  assert (best is None) == (not least)
  if best is not None:
    got = float(problem.cost(best))
    assert got == least_cost(problem, min(least.values()))


@settings(max_examples=20, deadline=None)
@given(node_problems(), st.sampled_from(TRANSPORTS))
def test_the_bound_holds_with_any_transport(case, transport):
  problem, fit, host_rows = case
  found = cut_points.best_cuts(
    problem, fit, host_rows, hot_syncs=ALL_REDUCED, transports=(transport,)
  )
  if found is not None:
    bound = lower_bound.lower_bound(problem, fit, host_rows, transport)
    got = float(problem.cost(found))
    tiny = 1e-12 if problem.objective == "time" else 1e-6  # 1e-9 rows
    assert bound <= got * (1 + 1e-6) + tiny


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


# ---- At scale


def by_linear_program(problem, fit, host_rows) -> float:
  """The least cost of rows that may be split between tiers.

  A linear program for each set of tiers that are there at all, because of the
  latencies of a tier.
  """
  s, n = problem.profile, problem.shape.devices
  pi = problem.of_device.pi
  rows = s.count.astype(np.float64)
  memory = np.array([[1, 1 / n, 0], [0, 0, 1]])  # device, hosts
  budgets = np.array([fit, host_rows], np.float64)
  best = np.inf
  for size in (1, 2, 3):
    for there in itertools.combinations(range(3), size):
      tiny = np.zeros(3)
      tiny[list(there)] = 1e-9
      fixed = float(problem.evaluate(Traffic(*tiny)))
      slopes = [
        (float(problem.evaluate(Traffic(*(tiny + 1e6 * unit)))) - fixed) / 1e6
        for unit in np.eye(3)
      ]
      each = np.stack([slopes[0] + 0 * pi, slopes[1] * pi, slopes[2] * pi])
      costs = (each * rows)[list(there)].ravel()
      scale = np.abs(costs).max() or 1.0
      result = optimize.linprog(
        costs / scale,
        A_ub=np.kron(memory[:, there], rows) / np.maximum(budgets, 1)[:, None],
        b_ub=budgets / np.maximum(budgets, 1),
        A_eq=sparse.hstack([sparse.identity(len(pi))] * size),
        b_eq=np.ones(len(pi)),
      )
      if result.status == 0:
        best = min(best, fixed + result.fun * scale)
  return best


@settings(max_examples=30, deadline=None)
@example((NEVER_USED, 4, 1))
@example((NEVER_USED, 4, 2))
@given(problems())
def test_the_bound_is_that_of_a_linear_program(case):
  problem, fit, host_rows = case
  found = cut_points.best_cuts(problem, fit, host_rows, hot_syncs=ALL_REDUCED)
  if found is not None:
    bound = lower_bound.lower_bound(problem, fit, host_rows)
    program = by_linear_program(problem, fit, host_rows)
    tiny = 2e-9 * row_cost(problem)  # see least_cost
    assert bound == pytest.approx(program, rel=1e-5, abs=tiny)
    # The price of memory is searched, so the bound is good to some 1e-7.
    got = float(problem.cost(found))
    assert bound <= got * (1 + 1e-6) + tiny


@pytest.mark.parametrize("exponent", [1.05, 1.15, 1.45])
@pytest.mark.parametrize("devices", [1, 8, 1_024])
def test_near_the_lower_bound(exponent, devices):
  """A small form of scripts/bench_plan.py."""
  tables = tuple(Table(f"t{i}", 10**i) for i in range(1, 7))
  s = frequency_buckets.power_law(tables, exponent)
  shape = shape_of(devices, 1_024, lookups=6)
  t = presets.get("dgx_h200", devices)
  problem = Problem(s, shape, t, None)
  fit = s.rows // 4 // devices + 1_000
  found = cut_points.best_cuts(problem, fit, 2 * s.rows, hot_syncs=ALL_REDUCED)
  got = float(problem.cost(found))
  assert got <= 1.001 * lower_bound.lower_bound(problem, fit, 2 * s.rows)
