"""Where a batch's ids lie: ranks of the prepared data <-> positions in groups.

Prepared data holds the ranks of all tables' rows together, whatever the groups.
A group's rows keep their order: a row's rank in its group is the number of the
group's rows before it. Its *position* in the group is that rank too, unless
tables are table-wise:

Positions of warm rows belong to owners in turn. A table-wise table's warm rows
lie at its owner's positions, hottest first, as many as there is room for; the
other rows take the positions that are left in rank order, each owner in turn
while it has one. Hot rows stay at their ranks; cold rows follow the warm tier.
All owners hold equally many positions, of which `Group.padding_rows` hold no
row.
"""

import functools
from typing import NamedTuple

import numpy as np

from recjax.frequency import Profile, group_ranks
from recjax.plan import layout
from recjax.plan.plan import Group, Plan
from recjax.schema import Feature, columns_of

_SLICE = 1 << 24  # rows at a time, so that temporaries stay small
NO_ROW = -1


class GroupPositions(NamedTuple):
  """The positions of a group's table-wise tier, and their inverse."""

  first: int  # of the tier
  padding_rows: int
  positions: np.ndarray  # [rows] int32, of ranks first, first + 1, ...
  ranks: np.ndarray  # [positions] int32; NO_ROW where there is none

  def positions_of(self, ranks: np.ndarray) -> np.ndarray:
    """Turns ranks [...] int32 into positions; -1 (no lookup) stays."""
    stop = self.first + len(self.positions)
    at = np.clip(ranks - self.first, 0, max(len(self.positions) - 1, 0))
    other = ranks + np.where(ranks >= stop, self.padding_rows, 0)
    if not len(self.positions):
      return other.astype(np.int32)
    inside = (ranks >= self.first) & (ranks < stop)
    return np.where(inside, self.positions[at], other).astype(np.int32)

  def ranks_of(self, first: int, stop: int) -> np.ndarray:
    """Returns the ranks [stop - first] int64 of positions; NO_ROW if none."""
    at = np.arange(first, stop)
    end = self.first + len(self.ranks)
    inside = (at >= self.first) & (at < end)
    ranks = at - np.where(at >= end, self.padding_rows, 0)
    ranks[inside] = self.ranks[at[inside] - self.first]
    return ranks


class Positions(NamedTuple):
  """What maps a batch's ids to the positions of their rows."""

  group_ranks: np.ndarray | None  # [R] int32 of the profile's; None: the same
  groups: dict[str, GroupPositions]  # those with table-wise tables
  columns: dict[str, tuple[slice, ...]]  # of the ids, of those groups

  def of_batch(self, ids: np.ndarray) -> np.ndarray:
    """Turns ids [b, S] int32, ranks of the prepared data, into positions."""
    if self.group_ranks is not None:
      ids = np.where(ids < 0, NO_ROW, self.group_ranks[ids])
    if self.groups:
      ids = ids.copy()
    for name, where in self.groups.items():
      for at in self.columns[name]:
        ids[:, at] = where.positions_of(ids[:, at])
    return ids


def of_groups(plan: Plan, profile: Profile) -> dict[str, GroupPositions]:
  """Returns the positions of each group that has table-wise tables."""
  found = {}
  for group in plan.groups:
    if group.table_wise:
      found[group.name] = _of_group(group, profile)
  return found


def of_batches(
  plan: Plan, profile: Profile, features: tuple[Feature, ...]
) -> Positions | None:
  """Returns what maps the ids of batches; None where they are positions."""
  several = len(plan.groups) > 1
  groups = of_groups(plan, profile)
  if not several and not groups:
    return None
  columns = columns_of(features)
  return Positions(
    group_ranks(profile, [g.tables for g in plan.groups]) if several else None,
    groups,
    {
      g.name: tuple(columns[f.name] for f in features if f.table in g.tables)
      for g in plan.groups
      if g.name in groups
    },
  )


def name_row(group: Group, position: int, profile: Profile | None) -> str:
  """Names the row at a position for a user, by its table where that is known.

  Args:
    group: whose row it is.
    position: in the group.
    profile: of all rows.
  """
  if profile is None:
    return f"the row at position {position} of group {group.name}"
  rank = position
  if group.table_wise:
    where = _of_group(group, profile)
    rank = int(where.ranks_of(position, position + 1)[0])
  table = group.tables[profile.of_tables(group.tables).table[rank]]
  return f"the row of rank {rank} in table {table}"


@functools.lru_cache(maxsize=8)  # a run's groups, and those of what it restores
def _of_group(group: Group, profile: Profile) -> GroupPositions:
  """Lays a group's table-wise rows out, from which table each rank is of."""
  tier = group.table_wise_tier
  assert tier is not None
  of_table = profile.of_tables(group.tables)
  n, rows = tier.owners, tier.rows - group.padding_rows
  owner_of = np.full(len(group.tables), -1, np.int16)
  for name, owner in group.table_wise:
    owner_of[group.tables.index(name)] = owner
  table = of_table.table[tier.first : tier.first + rows]
  room, wanted = layout.room(tier.rows, n), np.zeros(n, np.int64)
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
      local = np.arange(held[o], held[o] + len(mine))
      positions[first + mine] = tier.first + local * n + o
    held += counts
  ranks = np.full(tier.rows, NO_ROW, np.int32)
  ranks[positions - tier.first] = np.arange(tier.first, tier.first + rows)
  return GroupPositions(tier.first, group.padding_rows, positions, ranks)


def _counts(x: np.ndarray, size: int) -> np.ndarray:  # [m] -> [size] int64
  return sum(
    (
      np.bincount(x[at : at + _SLICE], minlength=size)
      for at in range(0, len(x), _SLICE)
    ),
    np.zeros(size, np.int64),
  )
