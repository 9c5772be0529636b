"""The rows of all groups in one order, most used first."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from recjax.frequency import Profile
from recjax.planner.frequency_buckets import BucketedProfile
from recjax.schema import TableGroup

_SLICE = 1 << 24  # rows at a time, so that temporaries stay small


@dataclasses.dataclass(frozen=True, eq=False)
class CommonOrder:
  """How many rows of each group are among the most used of all groups."""

  group: np.ndarray  # [M], of a run of rows that follow each other
  ends: np.ndarray  # [M + 1] int64: the common rank where each run begins
  groups: int  # G

  @property
  def rows(self) -> int:
    """Rows of all groups."""
    return int(self.ends[-1])

  def below(self, ranks) -> np.ndarray:
    """Rows of each group below common ranks: [m] -> [G, m] int64."""
    ranks = np.asarray(ranks, np.int64)
    if self.groups == 1:
      return np.minimum(ranks, self.rows)[None]
    found = []
    for g in range(self.groups):
      own = np.where(self.group == g, np.diff(self.ends), 0)
      sums = np.concatenate([[0], np.cumsum(own)])
      k = np.searchsorted(self.ends, ranks, side="right") - 1
      k = np.minimum(k, len(self.group) - 1)
      inside = np.minimum(ranks, self.rows) - self.ends[k]
      found.append(sums[k] + np.where(self.group[k] == g, inside, 0))
    return np.stack(found)

  def split(self, rank: int) -> tuple[int, ...]:
    """Rows of each group among the `rank` most used of all."""
    return tuple(int(x) for x in self.below([rank])[:, 0])


def of_buckets(profiles: Sequence[BucketedProfile]) -> CommonOrder:
  """The order of the groups' buckets, by their rows' lookups a sample."""
  count = np.concatenate([p.count for p in profiles])
  group = np.repeat(np.arange(len(profiles)), [len(p.count) for p in profiles])
  # A group's own order, by its rows' probability of a touch, is kept.
  uses = np.concatenate([np.minimum.accumulate(p.uses) for p in profiles])
  order = np.argsort(-uses, kind="stable")
  ends = np.concatenate([[0], np.cumsum(count[order])])
  return CommonOrder(group[order], ends, len(profiles))


def of_profile(profile: Profile, groups: Sequence[TableGroup]) -> CommonOrder:
  """The order of a counted row space of all groups' tables, exactly."""
  group_of = np.zeros(len(profile.tables), np.int16)
  for g, group in enumerate(groups):
    for name in group.tables:
      group_of[profile.tables.index(name)] = g
  if len(groups) == 1:
    ends = np.array([0, profile.rows])
    return CommonOrder(np.zeros(1, np.int16), ends, 1)
  whose, starts, last = [], [], -1
  for at in range(0, profile.rows, _SLICE):
    part = group_of[profile.table[at : at + _SLICE]]
    new = np.flatnonzero(np.diff(part, prepend=last))
    starts.append(new + at)
    whose.append(part[new])
    last = int(part[-1])
  ends = np.concatenate([*starts, [profile.rows]]).astype(np.int64)
  return CommonOrder(np.concatenate(whose), ends, len(groups))
