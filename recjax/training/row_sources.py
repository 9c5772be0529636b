"""Where a run's rows are in a checkpoint, whatever tiers and ranks they had.

A row's position in its group is that of its rank, now and there; and where the
checkpoint is of another vocabulary, its rank there is that of the same table
and value (data/old_vocabulary.py).
"""

from typing import NamedTuple

import numpy as np

from recjax.errors import UserError
from recjax.frequency import Profile, group_ranks
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.plan.positions import NO_ROW, GroupPositions

_SLICE = 1 << 24  # ranks at a time, so that temporaries stay small


class Carried(NamedTuple):
  """How the rows of another vocabulary go on as those of a run's own."""

  profile: Profile  # of the checkpoint's rows
  ranks: np.ndarray  # [R] int32, of each row now its rank there; -1 = none
  init_scale: float  # of rows that were not there


class Source(NamedTuple):
  """Where the rows of a group are in a checkpoint."""

  now: GroupPositions | None  # None: positions are ranks
  then: GroupPositions | None
  before: np.ndarray | None  # [rows] int32: ranks there, or -1; None: the same

  def ranks(self, at: np.ndarray) -> np.ndarray:
    """Turns positions now, ascending [m], into ranks; -1 where no row is."""
    if self.now is None:
      return at
    first, stop = int(at[0]), int(at[-1]) + 1
    return self.now.ranks_of(first, stop)[at - first]

  def places(self, ranks: np.ndarray) -> np.ndarray:
    """Turns ranks now [m] into positions in the checkpoint; -1 = nowhere."""
    if self.before is not None:
      ranks = np.where(ranks < 0, NO_ROW, self.before[ranks])
    return ranks if self.then is None else self.then.positions_of(ranks)

  def goes_on(self, rows: int) -> np.ndarray:
    """Returns which of so many positions in the checkpoint are rows now."""
    found = np.zeros(rows, bool)
    assert self.before is not None
    for first in range(0, len(self.before), _SLICE):
      ranks = np.arange(first, min(first + _SLICE, len(self.before)))
      places = self.places(ranks)
      found[places[places >= 0]] = True
    return found


def check_groups(plan: Plan, now: Plan) -> None:
  """Raises UserError where a table's rows are in a group of another name.

  Args:
    plan: of a checkpoint whose tables have the dims, dtypes and optimizers of
      the run's; groups may differ in the learning rate as well.
    now: the run's.
  """
  was = {table: g.name for g in plan.groups for table in g.tables}
  for g in now.groups:
    for table in g.tables:
      if was.get(table, g.name) != g.name:
        raise UserError(
          f"train.start_from: table {table} is in group {was[table]} there and "
          f"in {g.name} in this config, as embedding.rules give other tables "
          "other learning rates: set those back"
        )


def sources(
  plan: Plan, now: Plan, profile: Profile | None, carried: Carried | None
) -> dict[str, Source]:
  """Returns where the rows of each group are, by its name.

  Args:
    plan: of the checkpoint.
    now: the run's.
    profile: of the run's rows; None where no plan has table-wise tables.
    carried: where the checkpoint is of another vocabulary.
  """
  places = {} if profile is None else positions.of_groups(now, profile)
  before = {}
  if carried is not None:
    assert profile is not None
    before = _ranks_before(plan, now, profile, carried)
    profile = carried.profile
  then = {} if profile is None else positions.of_groups(plan, profile)
  return {
    g.name: Source(places.get(g.name), then.get(g.name), before.get(g.name))
    for g in now.groups
  }


def _ranks_before(
  plan: Plan, now: Plan, profile: Profile, carried: Carried
) -> dict[str, np.ndarray]:
  """Returns, of each rank in a group now, its rank in the group there."""
  there = group_ranks(carried.profile, [g.tables for g in plan.groups])
  found = {}
  for g in now.groups:
    mine = np.isin(profile.table, [profile.tables.index(t) for t in g.tables])
    ranks = carried.ranks[mine]
    found[g.name] = np.where(ranks < 0, NO_ROW, there[ranks])
  return found
