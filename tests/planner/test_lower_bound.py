"""The lower bound against linear programs, and plans against it."""

import itertools

import numpy as np
import pytest
from helpers_cuts import ALL_REDUCED, problems, problems_with_ssds, row_cost
from helpers_planner import buckets_of, free_of_latencies, shape_of
from hypothesis import example, given, settings
from scipy import optimize, sparse

from recjax.planner import cut_points, frequency_buckets, lower_bound, presets
from recjax.planner.frequency_buckets import Table
from recjax.planner.host_path import HIDDEN
from recjax.planner.problem import Problem
from recjax.planner.traffic import Traffic

NEVER_USED = Problem(  # all cost is that of next to no rows
  buckets_of([1, 1, 1, 1, 2.0**-52]),
  shape_of(1, 8, lookups=1, train=False),
  presets.get("cpu", 1),
  None,
  "bytes",
)
LATENCIES = Problem(  # the rows cost nothing beside them
  buckets_of([0.0]),
  shape_of(1, 1, lookups=1, train=False),
  free_of_latencies(presets.get("cpu", 1)),
  None,
)


def by_linear_program(problem, fit, host_rows, ssd_rows=0) -> float:
  """The least cost of rows that may be split between tiers.

  A linear program for each set of tiers that are there at all, because of the
  latencies of a tier.
  """
  s, n = problem.profile, problem.shape.devices
  pi = problem.of_device.pi
  rows = s.count.astype(np.float64)
  memory = np.array(  # device, hosts, SSDs
    [[1, 1 / n, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
  )
  budgets = np.array([fit, host_rows, ssd_rows], np.float64)
  asked = lambda x: Traffic(*x[:3], visitors=x[3], pages=x[4])
  visits, pages, no = problem.of_batch.pi / n, problem.pages_of_row / n, 0 * pi
  of_row = np.array(
    [
      [1 + no, no, no, no, no],
      [no, pi, no, no, no],
      [no, no, pi, visits, no],
      [no, no, pi, visits, pages],
    ]
  )
  best = np.inf
  for size in range(1, 5 if ssd_rows else 4):
    for there in itertools.combinations(range(4 if ssd_rows else 3), size):
      hot, warm, cold, frozen = (k in there for k in range(4))
      stored = cold or frozen
      tiny = 1e-9 * np.array([hot, warm, stored, stored, frozen])
      at = lambda x: np.array(problem.paths(asked(x)), np.float64)
      fixed = at(tiny)
      slopes = np.array([(at(tiny + 1e6 * u) - fixed) / 1e6 for u in np.eye(5)])
      each = np.einsum("txk,xp->ptk", of_row[list(there)], slopes)  # [2, T, K]
      costs = (each * rows).reshape(2, -1)
      # Of what is the most: below 1e-7, HiGHS takes all for nothing.
      scale = max(np.abs(costs).max(), np.abs(fixed).max()) or 1.0
      held = np.kron(memory[:, there], rows) / np.maximum(budgets, 1)[:, None]
      whole = sparse.hstack([sparse.identity(len(pi))] * size)
      result = optimize.linprog(  # the last variable is above both paths
        np.append(HIDDEN * costs[1] / scale, 1.0),
        A_ub=np.block(
          [[costs / scale, -np.ones((2, 1))], [held, np.zeros((3, 1))]]
        ),
        b_ub=np.concatenate([-fixed / scale, budgets / np.maximum(budgets, 1)]),
        A_eq=sparse.hstack([whole, sparse.coo_array((len(pi), 1))]),
        b_eq=np.ones(len(pi)),
      )
      if result.status == 0:
        best = min(best, result.fun * scale + HIDDEN * fixed[1])
  return best


@settings(max_examples=30, deadline=None)
@example((NEVER_USED, 4, 1))
@example((NEVER_USED, 4, 2))
@example((LATENCIES, 1, 0))
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


@settings(max_examples=20, deadline=None)
@given(problems_with_ssds())
def test_the_bound_with_ssds_is_that_of_a_linear_program(case):
  problem, fit, host_rows, ssd_rows = case
  program = by_linear_program(problem, fit, host_rows, ssd_rows)
  if np.isfinite(program):
    bound = lower_bound.lower_bound(problem, fit, host_rows, ssd_rows=ssd_rows)
    tiny = 2e-9 * row_cost(problem)
    assert bound == pytest.approx(program, rel=1e-5, abs=tiny)


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
