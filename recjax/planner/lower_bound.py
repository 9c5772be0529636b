"""What no placement can cost less than: the dual of where rows may be."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from recjax.planner.host_path import HIDDEN, Paths
from recjax.planner.problem import Problem, joint_paths
from recjax.planner.traffic import Traffic
from recjax.planner.transport import FLAT, Transport

_CUTTING_PLANES = 200  # at most
_CLOSE = 1e-9  # of the bound, to what no prices can pass


def lower_bound(
  problem: Problem,
  fit: int,
  host_rows: int,
  transport: Transport = FLAT,
  ssd_rows: int = 0,
) -> float:
  """The bound for one group, with budgets in rows; see `joint_bound`."""
  rows = (fit, host_rows, ssd_rows)
  budgets = [x * problem.shape.stored_bytes for x in rows]
  return joint_bound([problem], *budgets[:2], transport, budgets[2])


def joint_bound(
  problems: Sequence[Problem],
  device_bytes: int,
  host_bytes: int,
  transport: Transport = FLAT,
  ssd_bytes: int = 0,
) -> float:
  """No placement costs less, not even with rows split between tiers.

  The Lagrangian dual. The step takes the longer of two paths, which is no
  shorter than any mean of both; with prices of device and host memory and of
  SSDs each row takes its cheapest tier. Any weight of the paths and any prices
  give a bound; the best are searched for. The latencies of a tier that has rows
  at all make it one dual for every choice of tiers. For problems without
  padding, whose paths are linear.

  Args:
    problems: of the groups, the dense part in one of them.
    device_bytes: budget of a device for all groups.
    host_bytes: budget of all hosts' memories for all groups.
    transport: of all groups.
    ssd_bytes: budget of all hosts' SSDs for all groups.

  Returns:
    What is minimised, in seconds or bytes; infinity where nothing fits.
  """
  budgets = np.array([device_bytes, host_bytes, ssd_bytes], np.float64)
  tiers = [
    np.array([bool(chosen >> k & 1) for k in range(4)])
    for chosen in range(1, 16 if ssd_bytes else 8)
  ]
  tiers = [on for on in tiers if on[2] >= on[3]]  # one may have few cold rows
  by_tiers = [[_Rows(p, on, transport) for on in tiers] for p in problems]
  duals = [
    _Dual(groups, budgets)
    for groups in itertools.product(*by_tiers)
    if _fit(groups, budgets)
  ]
  # The least of the greatest values: a dual above it anywhere is out.
  at, best = _Dual.START, np.inf
  for dual in sorted(duals, key=lambda d: d.at(at)[0]):
    if dual.at(at)[0] < best:
      at, value = dual.highest(best)
      best = min(best, value)
  return best


class _RowCosts(NamedTuple):
  """What a group's rows cost, T of its tiers having rows."""

  rows: np.ndarray  # [K] of a bucket
  paths: Paths  # [T, K] of a row of each bucket, in each tier
  held: np.ndarray  # [3, T] bytes of a device, of the hosts, of SSDs for a row


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
  """A group's rows, with some in each of the tiers `on`: [4] bool."""

  problem: Problem
  on: np.ndarray
  transport: Transport

  @property
  def owners(self) -> int:
    """Devices that share the warm rows out."""
    return self.transport.warm_owners(self.problem.shape)

  @property
  def bytes(self) -> int:
    """Bytes of all rows, each once."""
    return self.problem.profile.rows * self.problem.shape.stored_bytes

  @property
  def device_rate(self) -> float:
    """Bytes of a device for a byte that no host holds; none: infinity."""
    hot, warm = self.on[:2]
    return 1 / self.owners if warm else 1.0 if hot else np.inf

  @property
  def tiny(self) -> np.ndarray:
    """Next to no rows in the tiers that are on: [7], see `traffic`."""
    return np.where(self.on, 1e-9, 0.0)[[0, 1, 2, 1, 2, 2, 3]]

  def traffic(self, x: np.ndarray) -> Traffic:
    """Traffic of rows.

    Args:
      x: [7] hot; of the buffers, warm and stored; between nodes, both; an
        owner's visitors; the pages of frozen ones.
    """
    united = self.transport.copies or self.transport.two_stage
    return Traffic(
      *x[:3],
      gathered=None,
      inter_node_warm=x[3] if united else None,
      inter_node_cold=x[4] if self.transport.two_stage else None,
      copies=self.transport.copies,
      visitors=x[5],
      pages=x[6],
    )

  @functools.cached_property
  def costs(self) -> "_RowCosts":
    """What the rows cost in each of the tiers that are on."""
    p, shape = self.problem, self.problem.shape
    at = lambda x: np.array(p.paths(self.traffic(x)), np.float64)
    fixed = at(self.tiny)
    slopes = np.array(
      [(at(self.tiny + 1e6 * unit) - fixed) / 1e6 for unit in np.eye(7)]
    )
    pi, united = p.of_device.pi, 0.0 * p.of_device.pi
    if self.transport.copies or self.transport.two_stage:
      united = p.of_node.pi / (shape.devices // shape.nodes)
    of_copies = united * (shape.nodes if self.transport.copies else 1)
    n, no = shape.devices, 0 * pi
    visits, pages = p.of_batch.pi / n, p.pages_of_row / n
    asked = np.array(  # [4, 7, K] of a row of each bucket in each tier
      [
        [1 + no, no, no, no, no, no, no],
        [no, pi, no, of_copies, no, no, no],
        [no, no, pi, no, united, visits, no],
        [no, no, pi, no, united, visits, pages],
      ]
    )[self.on]
    each = Paths(*(np.einsum("txk,x->tk", asked, s) for s in slopes.T))
    size = shape.stored_bytes
    held = size * np.array(
      [[1, 1 / self.owners, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    return _RowCosts(p.profile.count.astype(np.float64), each, held[:, self.on])


def _fit(groups: Sequence[_Rows], budgets: np.ndarray) -> bool:
  """Whether all rows may have a place, hosts relieving the dearest first."""
  need, (device_bytes, host_bytes, ssd_bytes) = 0.0, budgets
  left = host_bytes + ssd_bytes
  for g in sorted(groups, key=lambda g: -g.device_rate):
    of_group = left if g.on[3] else min(left, host_bytes)
    on_hosts = min(g.bytes, of_group) if g.on[2] else 0
    left -= on_hosts
    if g.bytes > on_hosts:
      need += (g.bytes - on_hosts) * g.device_rate
  return need <= device_bytes * (1 + 1e-12)


class _Dual:
  """The dual function of the paths' weights and the memories' prices.

  A point is [4]: the devices' weight, which leaves the hosts the rest to 1 and
  HIDDEN, and the prices of a byte of a device's memory, of the hosts', and of
  their SSDs.
  """

  START = np.array([1.0, 0.0, 0.0, 0.0])

  def __init__(self, groups: Sequence[_Rows], budgets: np.ndarray):
    self.budgets = budgets
    problems = [g.problem for g in groups]
    traffics = [g.traffic(g.tiny) for g in groups]
    self.fixed = np.array(joint_paths(problems, traffics), np.float64)
    self.groups = [g.costs for g in groups]
    dearest = max(
      float(max(np.abs(x).max() for x in g.costs.paths))
      / g.problem.shape.stored_bytes
      for g in groups
    )
    self.dearest = max(dearest, 1e-30) * problems[0].shape.devices

  def at(self, point: np.ndarray) -> tuple[float, np.ndarray]:
    """(bound at a point, its gradient [4] there)."""
    weights, prices = np.array([point[0], 1 - point[0] + HIDDEN]), point[1:]
    paths, held = self.fixed.copy(), -self.budgets
    for rows, each, of_row in self.groups:
      cost = weights[0] * each.device + weights[1] * each.host
      tier = (cost + (prices @ of_row)[:, None]).argmin(axis=0)
      k = np.arange(len(rows))
      # No dot products: BLAS would start threads for a few thousand buckets.
      paths += [float(np.sum(rows * x[tier, k])) for x in each]
      held = held + np.sum(rows * of_row[:, tier], axis=1)
    value = float(np.sum(weights * paths) + np.sum(prices * held))
    return value, np.append(paths[0] - paths[1], held)

  def highest(self, enough: float) -> tuple[np.ndarray, float]:
    """(point, value) where the bound is highest, or above `enough`.

    By cutting planes (Kelley, 1960): where the planes that touch the function
    at the points so far, none of which it passes, are highest is the next one.
    """
    unit = np.append(1.0, np.full(3, self.dearest))
    grid = [np.zeros(3), *np.diag([1e-4, 1e-4, 1e-4])]
    grid += [10.0**k * np.array([1.0, x, 0.0])
             for k in range(-8, 1) for x in (0.0, 0.1)]  # fmt: skip
    points = [
      np.append(w, self.dearest * x) for x in grid for w in (1.0, 0.5, 0.0)
    ]
    known = [(p, *self.at(p)) for p in points]
    best = max(known, key=lambda x: x[1])
    for _ in range(_CUTTING_PLANES):
      scale = max(abs(best[1]), 1e-30)
      rows = np.array([np.append(g * unit, -scale) for _, _, g in known])
      ends = np.array([g @ p - value for p, value, g in known])
      found = optimize.linprog(
        np.array([0, 0, 0, 0, -1.0]),
        A_ub=-rows / scale,
        b_ub=-ends / scale,
        bounds=[(0, 1), (0, 1e3), (0, 1e3), (0, 1e3), (None, None)],
      )
      if found.status != 0:
        break
      point = found.x[:4] * unit
      known.append((point, *self.at(point)))
      best = max(best, known[-1], key=lambda x: x[1])
      if -found.fun * scale - best[1] <= _CLOSE * scale or best[1] > enough:
        break
    return best[0], best[1]
