"""What no placement can cost less than: the dual of where rows may be."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from recjax.planner.problem import Problem, joint_cost
from recjax.planner.traffic import Traffic
from recjax.planner.transport import FLAT, Transport

Costs = Callable[[float], float]


def lower_bound(
  problem: Problem, fit: int, host_rows: int, transport: Transport = FLAT
) -> float:
  """The bound for one group, with budgets in rows; see `joint_bound`."""
  size = problem.shape.stored_bytes
  return joint_bound([problem], fit * size, host_rows * size, transport)


def joint_bound(
  problems: Sequence[Problem],
  device_bytes: int,
  host_bytes: int,
  transport: Transport = FLAT,
) -> float:
  """No placement costs less, not even with rows split between tiers.

  The Lagrangian dual: with prices of device and host memory each row takes its
  cheapest tier, and any prices give a bound; the best are searched for. The
  latencies of a tier that has rows at all make it one dual for every choice of
  tiers. For problems without padding, whose costs are linear.

  Args:
    problems: of the groups, the dense part in one of them.
    device_bytes: budget of a device for all groups.
    host_bytes: budget of all hosts for all groups.
    transport: of all groups.

  Returns:
    Seconds or bytes of a step; infinity where nothing fits.
  """
  tiers = [
    np.array([bool(chosen >> k & 1) for k in range(3)])
    for chosen in range(1, 8)
  ]
  by_tiers = [[_Rows(p, on, transport) for on in tiers] for p in problems]
  duals = []
  for groups in itertools.product(*by_tiers):
    if _fit(groups, device_bytes, host_bytes):
      duals.append(_Dual(groups, device_bytes, host_bytes))
  # The least of the greatest values: a dual above it anywhere is out.
  prices, best = (0.0, 0.0), np.inf
  for dual in sorted(duals, key=lambda d: d.at(*prices)):
    if dual.at(*prices) < best:
      prices, value = dual.highest()
      best = min(best, value)
  return best


class _RowCosts(NamedTuple):
  """What a group's rows cost, T of its tiers having rows."""

  rows: np.ndarray  # [K] of a bucket
  cost: np.ndarray  # [T, K] of a row of each bucket, in each tier
  device: np.ndarray  # [T] bytes of a device for a row
  host: np.ndarray  # [T] bytes of the hosts for a row


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
  """A group's rows, with some in each of the tiers `on`: [3] bool."""

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
    hot, warm, _ = self.on
    return 1 / self.owners if warm else 1.0 if hot else np.inf

  @property
  def tiny(self) -> np.ndarray:
    """Next to no rows in the tiers that are on: [5], see `traffic`."""
    return np.where(self.on, 1e-9, 0.0)[[0, 1, 2, 1, 2]]

  def traffic(self, x: np.ndarray) -> Traffic:
    """Traffic of rows: hot; of the buffers, warm, cold; between nodes, both."""
    united = self.transport.copies or self.transport.two_stage
    return Traffic(
      *x[:3],
      gathered=None,
      inter_node_warm=x[3] if united else None,
      inter_node_cold=x[4] if self.transport.two_stage else None,
      copies=self.transport.copies,
    )

  @functools.cached_property
  def costs(self) -> "_RowCosts":
    """What the rows cost in each of the tiers that are on."""
    p, shape = self.problem, self.problem.shape
    at = lambda x: float(p.evaluate(self.traffic(x)))
    fixed = at(self.tiny)
    slopes = [(at(self.tiny + 1e6 * unit) - fixed) / 1e6 for unit in np.eye(5)]
    pi, united = p.of_device.pi, 0.0
    if self.transport.copies or self.transport.two_stage:
      united = p.of_node.pi / (shape.devices // shape.nodes)
    of_copies = united * (shape.nodes if self.transport.copies else 1)
    hot = slopes[0] + 0 * pi
    warm = slopes[1] * pi + slopes[3] * of_copies
    cold = slopes[2] * pi + slopes[4] * united
    size = shape.stored_bytes
    return _RowCosts(
      p.profile.count.astype(np.float64),
      np.stack([hot, warm, cold])[self.on],
      size * np.array([1, 1 / self.owners, 0])[self.on],
      size * np.array([0.0, 0, 1])[self.on],
    )


def _fit(groups: Sequence[_Rows], device_bytes: int, host_bytes: int) -> bool:
  """Whether all rows have a place, the hosts relieving the dearest first."""
  need = 0.0
  for g in sorted(groups, key=lambda g: -g.device_rate):
    on_hosts = min(g.bytes, host_bytes) if g.on[2] else 0
    host_bytes -= on_hosts
    if g.bytes > on_hosts:
      need += (g.bytes - on_hosts) * g.device_rate
  return need <= device_bytes * (1 + 1e-12)


class _Dual:
  """The dual function of the prices of device and host memory."""

  def __init__(
    self, groups: Sequence[_Rows], device_bytes: int, host_bytes: int
  ):
    self.budgets = device_bytes, host_bytes
    self.hosts_bind = host_bytes < sum(g.bytes for g in groups)
    problems = [g.problem for g in groups]
    self.fixed = float(
      joint_cost(problems, [g.traffic(g.tiny) for g in groups])
    )
    self.groups = [g.costs for g in groups]
    dearest = max(
      float(np.abs(g.costs.cost).max()) / g.problem.shape.stored_bytes
      for g in groups
    )
    self.dearest = max(dearest, 1e-30) * problems[0].shape.devices

  def at(self, price: float, host_price: float) -> float:
    """The bound at prices of a byte of device and of host memory."""
    device_bytes, host_bytes = self.budgets
    value = self.fixed - price * device_bytes - host_price * host_bytes
    for rows, cost, device, host in self.groups:
      rents = price * device + host_price * host
      # No dot product: BLAS would start threads for a few thousand buckets.
      value += float(np.sum(rows * (cost + rents[:, None]).min(axis=0)))
    return value

  def highest(self) -> tuple[tuple[float, float], float]:
    """((price, host price), value) where the bound is highest."""
    if not self.hosts_bind:
      price, value = self._search(lambda price: self.at(price, 0.0))
      return (price, 0.0), value
    best = lambda host: self._search(lambda price: self.at(price, host))
    host, value = self._search(lambda host: best(host)[1])
    return (best(host)[0], host), value

  def _search(self, f: Costs) -> tuple[float, float]:
    """(price, value) of the largest value of a concave f, at 0 or above."""
    low, high = np.log(1e-12 * self.dearest), np.log(1e3 * self.dearest)
    found = optimize.minimize_scalar(
      lambda x: -f(float(np.exp(x))),
      bounds=(low, high),
      method="bounded",
      options={"xatol": 1e-10},
    )
    tried = [(0.0, f(0.0)), (float(np.exp(found.x)), float(-found.fun))]
    return max(tried, key=lambda x: x[1])
