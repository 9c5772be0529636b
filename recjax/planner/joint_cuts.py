"""Cuts of several groups (of other dims or optimizers) that share memory.

Each group has options (planner/cut_options.py): pairs of cut points from a
grid, with each way in which rows travel. With one option a group, or a mix of
neighbours, a linear program gives every group its share of both memories; its
dual values are the prices of device and host memory. Latencies of a tier that
has rows at all, and those that groups share, make it one program for every
choice of tiers: they are tried in the order of their bound at those prices, as
long as it is below the best. Each group then takes the best cuts for its share
(`cut_points.best_cuts`), and what is left over goes to the group that gains
most.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from recjax.planner import cut_options as options_lib
from recjax.planner import cut_points
from recjax.planner import memory_budgets as budgets_lib
from recjax.planner.cut_options import Share
from recjax.planner.memory_budgets import Budgets, Given
from recjax.planner.problem import Cuts, Problem, joint_cost
from recjax.planner.transport import Transport

_REALISED = 2  # choices of tiers whose best cuts are worked out
_HOTS = 40  # numbers of hot rows that are tried where the warm ones are given


def best_cuts(
  problems: Sequence[Problem],
  budgets: Budgets,
  given: Given,
  *,
  fitting: Sequence[Cuts],
  hot_syncs: tuple[str, ...],
  transports: tuple[Transport, ...],
) -> tuple[Cuts, ...]:
  """The groups' cuts of least cost of the step.

  Args:
    problems: the groups', with the same devices and objective; the dense part
      in one of them.
    budgets: that they share.
    given: cuts to keep.
    fitting: some cuts within the budgets.
    hot_syncs, transports: to choose from.
  """
  fitting = [dataclasses.replace(c, hot_sync=hot_syncs[0]) for c in fitting]
  if len(problems) == 1:
    found = _alone(problems[0], budgets, given, hot_syncs, transports)
    return (found or fitting[0],)
  problems = [dataclasses.replace(p, further=True) for p in problems]
  planner = _Planner(problems, budgets, given, hot_syncs, transports)
  if given.warm_rows >= 0:
    return min([tuple(fitting), *planner.at_given_cuts()], key=planner.cost)
  tried = [tuple(fitting), *planner.by_shares()]
  return planner.filled(min(tried, key=planner.cost))


def _alone(
  problem: Problem,
  budgets: Budgets,
  given: Given,
  hot_syncs: tuple[str, ...],
  transports: tuple[Transport, ...],
) -> Cuts | None:
  size = problem.shape.stored_bytes
  return cut_points.best_cuts(
    problem,
    budgets.device_bytes // size,
    budgets.all_hosts // size,
    hot_rows=given.hot_rows,
    warm_rows=given.warm_rows,
    hot_syncs=hot_syncs,
    transports=transports,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Planner:
  """The joint problem of several groups."""

  problems: list[Problem]
  budgets: Budgets
  given: Given
  hot_syncs: tuple[str, ...]
  transports: tuple[Transport, ...]

  def cost(self, cuts: Sequence[Cuts]) -> float:
    """Seconds or bytes of a step of all groups."""
    pairs = zip(self.problems, cuts, strict=True)
    return float(joint_cost(self.problems, [p.traffic(c) for p, c in pairs]))

  def _held(self, cuts: Sequence[Cuts]) -> tuple[int, int]:
    """Bytes of a device, and of all hosts."""
    pairs = list(zip(self.problems, cuts, strict=True))
    device = sum(int(budgets_lib.shard_bytes(*x)) for x in pairs)
    return device, sum(int(budgets_lib.cold_bytes(*x)) for x in pairs)

  def by_shares(self) -> list[tuple[Cuts, ...]]:
    """Cuts that are best for each group's share of the memory.

    With any transport for each group, and with the same one for all: padding
    of buffers and what groups share make either better than a program shows.
    """
    options = [
      options_lib.of_problem(p, hot, self.hot_syncs, self.transports)
      for p, hot in zip(self.problems, self.given.hot(), strict=True)
    ]
    budgets = self.budgets.device_bytes, self.budgets.all_hosts
    chosen = [options]
    if len(self.transports) > 1:
      chosen += [
        [[o for o in kinds if o.transport == t] for kinds in options]
        for t in self.transports
      ]
    found = []
    for of in chosen:
      shares = options_lib.best_shares(self.problems, of, budgets, _REALISED)
      found += [self._realised(x) for x in shares]
    return [x for x in found if x is not None]

  def _realised(self, shares: Sequence[Share]) -> tuple[Cuts, ...] | None:
    """The groups' best cuts, each for its share and what is left so far.

    None where one finds no place.
    """
    found = []
    device = self.budgets.device_bytes - sum(x.device for x in shares)
    host = self.budgets.all_hosts - sum(x.host for x in shares)
    for p, share, hot in zip(
      self.problems, shares, self.given.hot(), strict=True
    ):
      device, host = device + share.device, host + share.host
      size = p.shape.stored_bytes
      cuts = cut_points.best_cuts(
        p,
        int(device) // size,
        int(host) // size,
        hot_rows=hot,
        hot_syncs=self.hot_syncs,
        transports=(share.transport,),
      )
      if cuts is None:
        return None
      found.append(cuts)
      device -= int(budgets_lib.shard_bytes(p, cuts))
      host -= int(budgets_lib.cold_bytes(p, cuts))
    return tuple(found)

  # ---- What is left over

  def filled(self, cuts: tuple[Cuts, ...]) -> tuple[Cuts, ...]:
    """Gives the memory that is left to one group after the other.

    Each time to the one whose best cuts then save most, until none saves.
    """
    now = self.cost(cuts)
    for _ in range(4 * len(cuts)):
      offers = [self._offer(cuts, i) for i in range(len(cuts))]
      best = min(offers, key=self.cost)
      cost = self.cost(best)
      if cost >= now * (1 - 1e-9):
        break
      cuts, now = best, cost
    return cuts

  def _offer(self, cuts: tuple[Cuts, ...], i: int) -> tuple[Cuts, ...]:
    """The cuts with group i's best ones in all memory that others leave."""
    p = self.problems[i]
    device, host = self._held(cuts)
    left = self.budgets.device_bytes - device, self.budgets.all_hosts - host
    own = (
      int(budgets_lib.shard_bytes(p, cuts[i])),
      int(budgets_lib.cold_bytes(p, cuts[i])),
    )
    fit, host_rows = (
      (a + b) // p.shape.stored_bytes for a, b in zip(left, own, strict=True)
    )
    found = cut_points.best_cuts(
      p,
      fit,
      host_rows,
      hot_rows=self.given.hot()[i],
      hot_syncs=self.hot_syncs,
      transports=self.transports,
    )
    return cuts if found is None else (*cuts[:i], found, *cuts[i + 1 :])

  # ---- Given cuts

  def at_given_cuts(self) -> list[tuple[Cuts, ...]]:
    """Cuts at common ranks, within the budgets.

    Where only the warm rows are given, with several numbers of hot rows.
    """
    order, given = self.given.order, self.given
    hots = [given.hot_rows]
    if given.hot_rows < 0:
      grid = np.geomspace(1, max(order.rows, 1), _HOTS).astype(np.int64)
      hots = np.unique(np.append(0, grid)).tolist()
    found = []
    for hot_rows in hots:
      ends = list(zip(order.split(hot_rows), given.warm(hot_rows), strict=True))
      for transport in self.transports:
        cuts = tuple(
          self._cheapest_sync(p, hot, hot + warm, transport)
          for p, (hot, warm) in zip(self.problems, ends, strict=True)
        )
        device, host = self._held(cuts)
        if device <= self.budgets.device_bytes and (
          host <= self.budgets.all_hosts
        ):
          found.append(cuts)
    return found

  def _cheapest_sync(
    self, problem: Problem, hot: int, warm_end: int, transport: Transport
  ) -> Cuts:
    offers = [Cuts(hot, warm_end, s, transport) for s in self.hot_syncs]
    return min(offers, key=problem.cost)
