"""Cuts of several groups (of other dims or optimizers) that share memory.

Each group has options (planner/cut_options.py): pairs of cut points from a
grid, with each way in which rows travel. With one option a group, or a mix of
neighbours, a linear program gives every group its share of both memories; its
dual values are the prices of device and host memory, and of time on the
devices and on the hosts, of which the longer counts. Latencies of a tier that
has rows at all, and those that groups share, make it one program for every
choice of tiers: they are tried in the order of their bound at those prices, as
long as it is below the best. Each group then takes the best cuts for its share
(`cut_points.best_cuts`), beside what the others do, and what is left over goes
to the group that gains most. Where hosts have SSDs, the rows that are frozen
are those of some cuts that fit, then those of the cuts found
(`memory_budgets.stored`): they hardly depend on which group has which part of
the devices' memory.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from recjax.planner import cut_options as options_lib
from recjax.planner import cut_points, host_path
from recjax.planner import memory_budgets as budgets_lib
from recjax.planner.cut_options import Share
from recjax.planner.host_path import Paths
from recjax.planner.memory_budgets import Budgets, Given
from recjax.planner.problem import Cuts, Problem, joint_paths
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
  found = min([tuple(fitting), *planner.by_shares(fitting)], key=planner.cost)
  if planner.frozen(found):
    found = min([found, *planner.by_shares(found)], key=planner.cost)
  return planner.filled(found)


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
    ssd_rows=budgets.all_ssds // size,
    hot_rows=given.hot_rows,
    warm_rows=given.warm_rows,
    cold_rows=given.cold_rows,
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

  def paths(self, cuts: Sequence[Cuts]) -> Paths:
    """Seconds or bytes of both paths of a step of all groups."""
    pairs = zip(self.problems, cuts, strict=True)
    return joint_paths(self.problems, [p.traffic(c) for p, c in pairs])

  def cost(self, cuts: Sequence[Cuts]) -> float:
    """What is minimised: seconds or bytes of a step of all groups."""
    return float(self.paths(cuts).cost)

  def frozen(self, cuts: Sequence[Cuts]) -> int:
    """Frozen rows of all groups."""
    pairs = zip(self.problems, cuts, strict=True)
    return sum(int(c.frozen(p.profile.rows)) for p, c in pairs)

  def _waits(self, frozen: Sequence[Cuts]) -> float:
    """Seconds of the hosts that all groups with frozen rows pay once."""
    p = self.problems[0]
    if p.objective == "bytes" or not self.frozen(frozen):
      return 0.0
    return host_path.page_latency(p.shape, p.topology)

  def _stored(self, cuts: Sequence[Cuts]) -> tuple[Cuts, ...]:
    """The cuts with the hosts' memory shared out, where they have SSDs."""
    if not self.budgets.ssd_bytes and self.given.cold_rows < 0:
      return tuple(cuts)
    return budgets_lib.stored(self.problems, cuts, self.budgets, self.given)

  def _given_cold(self, cuts: Cuts) -> int:
    """A group's part of the cold rows that are given; -1 = none are."""
    return -1 if self.given.cold_rows < 0 else int(cuts.cold_rows)

  def _fit(self, cuts: Sequence[Cuts]) -> bool:
    device = budgets_lib.all_bytes(self.problems, cuts, budgets_lib.shard_bytes)
    return device <= self.budgets.device_bytes and budgets_lib.fit(
      self.problems, cuts, self.budgets
    )

  def by_shares(self, frozen: Sequence[Cuts]) -> list[tuple[Cuts, ...]]:
    """Cuts that are best for each group's share of the memory.

    With any transport for each group, and with the same one for all: padding
    of buffers and what groups share make either better than a program shows.

    Args:
      frozen: cuts whose frozen rows are frozen in what is shared out.
    """
    options = [
      options_lib.of_problem(
        p, hot, self.hot_syncs, self.transports, c.cold_end
      )
      for p, hot, c in zip(self.problems, self.given.hot(), frozen, strict=True)
    ]
    of_hosts = self.budgets.all_hosts + self.budgets.all_ssds
    budgets = self.budgets.device_bytes, of_hosts
    chosen = [options]
    if len(self.transports) > 1:
      chosen += [
        [[o for o in kinds if o.transport == t] for kinds in options]
        for t in self.transports
      ]
    found = []
    for of in chosen:
      shares = options_lib.best_shares(
        self.problems, of, budgets, _REALISED, self._waits(frozen)
      )
      found += [self._realised(x, frozen) for x in shares]
    return [x for x in found if x is not None and self._fit(x)]

  def _realised(
    self, shares: Sequence[Share], frozen: Sequence[Cuts]
  ) -> tuple[Cuts, ...] | None:
    """The groups' best cuts, each for its share and what is left so far.

    None where one finds no place.
    """
    found = []
    on_ssd = [
      int(budgets_lib.frozen_bytes(p, c))
      for p, c in zip(self.problems, frozen, strict=True)
    ]
    device = self.budgets.device_bytes - sum(x.device for x in shares)
    host = self.budgets.all_hosts - sum(x.host for x in shares) + sum(on_ssd)
    ssd = self.budgets.all_ssds - sum(on_ssd)
    for p, share, hot, on, now in zip(
      self.problems, shares, self.given.hot(), on_ssd, frozen, strict=True
    ):
      device += share.device
      host, ssd = host + share.host - on, ssd + on
      size = p.shape.stored_bytes
      cuts = cut_points.best_cuts(
        dataclasses.replace(p, rest=share.rest),
        int(device) // size,
        max(int(host), 0) // size,
        ssd_rows=max(ssd, 0) // size,
        hot_rows=hot,
        cold_rows=self._given_cold(now),
        hot_syncs=self.hot_syncs,
        transports=(share.transport,),
      )
      if cuts is None:
        return None
      found.append(cuts)
      device -= int(budgets_lib.shard_bytes(p, cuts))
      host -= int(budgets_lib.cold_bytes(p, cuts))
      ssd -= int(budgets_lib.frozen_bytes(p, cuts))
    return self._stored(found)

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
    p, budgets = self.problems[i], self.budgets
    fit, host_rows, ssd_rows = (
      (
        budget
        - budgets_lib.all_bytes(self.problems, cuts, of)
        + int(of(p, cuts[i]))
      )
      // p.shape.stored_bytes
      for budget, of in (
        (budgets.device_bytes, budgets_lib.shard_bytes),
        (budgets.all_hosts, budgets_lib.cold_bytes),
        (budgets.all_ssds, budgets_lib.frozen_bytes),
      )
    )
    together, own = self.paths(cuts), p.paths(p.traffic(cuts[i]))
    rest = Paths(together.device - own.device, together.host - own.host)
    found = cut_points.best_cuts(
      dataclasses.replace(p, rest=rest),
      fit,
      host_rows,
      ssd_rows=ssd_rows,
      hot_rows=self.given.hot()[i],
      cold_rows=self._given_cold(cuts[i]),
      hot_syncs=self.hot_syncs,
      transports=self.transports,
    )
    if found is None:
      return cuts
    offer = self._stored((*cuts[:i], found, *cuts[i + 1 :]))
    return offer if self._fit(offer) else cuts

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
        cuts = self._stored(cuts)
        if self._fit(cuts):
          found.append(cuts)
    return found

  def _cheapest_sync(
    self, problem: Problem, hot: int, warm_end: int, transport: Transport
  ) -> Cuts:
    offers = [Cuts(hot, warm_end, s, transport) for s in self.hot_syncs]
    return min(offers, key=problem.cost)
