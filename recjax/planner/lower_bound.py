"""What no placement can cost less than: the dual of where rows may be."""

import numpy as np

from recjax.planner.cut_points import FLAT, Problem, Transport
from recjax.planner.step_cost import Load


def lower_bound(
  problem: Problem, fit: int, host_rows: int, way: Transport = FLAT
) -> float:
  """No placement costs less, not even with rows split between tiers.

  The Lagrangian dual: with prices of device and host memory each row takes its
  cheapest tier, and any prices give a bound; the best are searched for. The
  latencies of a tier that has rows at all make it one dual for every set of
  tiers. For problems without padding, whose costs are linear.
  """
  owners, rows = way.warm_owners(problem.work), problem.spectrum.rows
  best = np.inf
  for tiers in range(1, 8):
    hot, warm, cold = (bool(tiers >> k & 1) for k in range(3))
    room = (owners * fit if warm else fit if hot else 0) + cold * host_rows
    if rows <= room:
      on = np.array([hot, warm, cold])
      best = min(best, _bound(problem, fit, host_rows, on, way))
  return best


def _row_costs(problem, on, way):
  """(cost of next to no rows in the tiers `on`, [3, K] of a row in each)."""
  g = problem.work.devices // problem.work.nodes
  copies, two_stage = way.warm_copies == "node", way.exchange == "two_stage"

  def at(x):  # rows: hot; of the buffers: warm, cold; between nodes: the same
    far_warm = x[3] if copies or two_stage else None
    far_cold = x[4] if two_stage else None
    load = Load(*x[:3], None, far_warm, far_cold, copies)
    return float(problem.evaluate(load))

  tiny = np.where(on, 1e-9, 0.0)[[0, 1, 2, 1, 2]]
  fixed = at(tiny)
  slopes = [(at(tiny + 1e6 * unit) - fixed) / 1e6 for unit in np.eye(5)]
  pi, pi_far = problem.pi, 0.0
  if copies or two_stage:
    pi_far = problem.of_node[0] / g
  far_warm = pi_far * (problem.work.nodes if copies else 1)
  hot = slopes[0] + 0 * pi
  warm = slopes[1] * pi + slopes[3] * far_warm
  return fixed, np.stack([hot, warm, slopes[2] * pi + slopes[4] * pi_far])


def _bound(problem, fit, host_rows, on, way) -> float:
  """`lower_bound` with rows in the tiers `on` [3] bool."""
  s, n = problem.spectrum, problem.work.devices
  rows = s.count.astype(np.float64)
  fixed, each = _row_costs(problem, on, way)
  each = each[on]
  owners = way.warm_owners(problem.work)
  of_device = np.array([1, 1 / owners, 0])[on][:, None]  # of a row of the tier
  of_host = np.array([0, 0, 1])[on][:, None]
  top = max(float(np.abs(each).max()), 1e-30) * n

  def dual(price, host_price):
    costs = each + price * of_device + host_price * of_host
    paid = price * fit + host_price * host_rows
    return fixed + float(rows @ costs.min(axis=0)) - paid

  def search(f):
    return _highest(f, 1e-12 * top, 1e3 * top)

  if host_rows >= s.rows:
    return search(lambda price: dual(price, 0.0))
  return search(lambda host: search(lambda price: dual(price, host)))


def _highest(f, low: float, high: float) -> float:
  """The largest value of a concave f on 0 and [low, high]; golden section."""
  ratio = (np.sqrt(5) - 1) / 2
  a, b = np.log(low), np.log(high)
  x, y = b - ratio * (b - a), a + ratio * (b - a)
  fx, fy = f(np.exp(x)), f(np.exp(y))
  best = max(f(0.0), fx, fy)
  for _ in range(75):
    if fx >= fy:
      b, y, fy = y, x, fx
      x = b - ratio * (b - a)
      fx = f(np.exp(x))
    else:
      a, x, fx = x, y, fy
      y = a + ratio * (b - a)
      fy = f(np.exp(y))
    best = max(best, fx, fy)
  return best
