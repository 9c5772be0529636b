"""Which position a warm row has where tables are pooled at their owners.

Positions of warm rows belong to owners in turn, and normally a row's position
is its rank. A pooled table's warm rows lie at its owner's positions instead,
hottest first, as many as there is room for; the other rows take the positions
that are left in rank order, each owner in turn while it has one. Hot rows stay
at their ranks; cold rows follow the warm tier. All owners hold equally many
positions, of which `Plan.spare` hold no row.
"""

import functools
from typing import NamedTuple

import numpy as np

from recjax.frequency import Profile
from recjax.plan import layout
from recjax.plan.plan import Plan

_SLICE = 1 << 24  # rows at a time, so that temporaries stay small
NO_ROW = -1


class Layout(NamedTuple):
  """The warm rows' positions, and their inverse, both from `hot` on."""

  hot: int
  spare: int
  positions: np.ndarray  # [warm - spare] int32, of ranks hot, hot + 1, ...
  ranks: np.ndarray  # [warm] int32, of positions; NO_ROW where there is none

  def positions_of(self, ranks: np.ndarray) -> np.ndarray:
    """ranks [...] int32 -> positions [...] int32; -1 (no lookup) stays."""
    stop = self.hot + len(self.positions)
    at = np.clip(ranks - self.hot, 0, max(len(self.positions) - 1, 0))
    other = ranks + np.where(ranks >= stop, self.spare, 0)
    if not len(self.positions):
      return other.astype(np.int32)
    warm = (ranks >= self.hot) & (ranks < stop)
    return np.where(warm, self.positions[at], other).astype(np.int32)

  def ranks_of(self, first: int, stop: int) -> np.ndarray:
    """Of positions [first, stop): [stop - first] int64; NO_ROW if none."""
    at = np.arange(first, stop)
    end = self.hot + len(self.ranks)
    warm = (at >= self.hot) & (at < end)
    ranks = at - np.where(at >= end, self.spare, 0)
    ranks[warm] = self.ranks[at[warm] - self.hot]
    return ranks


@functools.lru_cache(maxsize=2)  # a run's, and that of what it restores
def of(plan: Plan, profile: Profile | None) -> Layout | None:
  """The layout of a plan's rows; None where positions are ranks.

  A function of the plan and of which table each rank belongs to; `profile` may
  be None where no table is pooled.
  """
  if not plan.pooled:
    return None
  assert profile is not None
  n, rows = plan.devices, plan.warm - plan.spare
  owner_of = np.full(len(profile.tables), -1, np.int16)
  for name, owner in plan.pooled:
    owner_of[profile.tables.index(name)] = owner
  table = profile.table[plan.hot : plan.hot + rows]
  room, wanted = layout.room(plan.warm, n), np.zeros(n, np.int64)
  for t, count in enumerate(_counts(table, len(owner_of))):
    if owner_of[t] >= 0:
      wanted[owner_of[t]] += count
  left = np.minimum(wanted, room)  # rows of its tables that an owner takes
  starts, members = layout.turns(room - left)

  positions = np.empty(rows, np.int32)
  held = np.zeros(n, np.int64)  # positions of an owner that are taken
  free = 0  # rows that took turns
  for first in range(0, rows, _SLICE):
    owner = owner_of[table[first : first + _SLICE]]
    for o in np.flatnonzero(wanted):
      mine = np.flatnonzero(owner == o)
      owner[mine[left[o] :]] = -1
      left[o] -= min(len(mine), left[o])
    turn = np.flatnonzero(owner < 0)
    owner[turn] = layout.take_turns(starts, members, free, len(turn))
    free += len(turn)
    counts = np.bincount(owner, minlength=n)
    order = np.argsort(owner, kind="stable")  # of 16 bits: a radix sort
    for o, mine in enumerate(np.split(order, np.cumsum(counts)[:-1])):
      slot = np.arange(held[o], held[o] + len(mine))
      positions[first + mine] = plan.hot + slot * n + o
    held += counts
  ranks = np.full(plan.warm, NO_ROW, np.int32)
  ranks[positions - plan.hot] = np.arange(plan.hot, plan.hot + rows)
  return Layout(plan.hot, plan.spare, positions, ranks)


def from_ranks(plan: Plan, profile: Profile):
  """What maps a batch's ids, ranks, to positions; None: nothing to do."""
  where = of(plan, profile)
  return where and where.positions_of


def warm_ranks(plan: Plan, profile: Profile) -> np.ndarray | None:
  """[warm] int32: the rank of each warm position; None: they are in order."""
  where = of(plan, profile)
  return where and where.ranks


def _counts(x: np.ndarray, size: int) -> np.ndarray:  # [m] -> [size] int64
  return sum(
    (
      np.bincount(x[at : at + _SLICE], minlength=size)
      for at in range(0, len(x), _SLICE)
    ),
    np.zeros(size, np.int64),
  )
