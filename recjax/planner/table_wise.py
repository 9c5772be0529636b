"""What a step costs where some tables are table-wise: pooled by one owner.

A table-wise table has one owner: the others send it their bags' ids and get
one vector a bag back (embedding/table_wise.py), which wins for long bags that
seldom share rows. Its warm rows lie with the owner, hottest first, as many as
there is room for; those beyond travel one by one, as the rows of other tables
do. Those take turns among the owners that have room, in rank order.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from recjax.plan import layout
from recjax.planner import buffer_sizes
from recjax.planner.problem import Cuts, Problem
from recjax.planner.traffic import TableWise, Traffic


class Choice(NamedTuple):
  """The table-wise tables of a plan, and what they ask of it."""

  owner: dict[int, int]  # of each table-wise table, by its index
  padding_rows: int  # warm positions without a row
  traffic: Traffic
  distinct: float  # warm rows that a device asks for one by one


class _Held(NamedTuple):
  """What the owners hold of the table-wise tables."""

  kept: np.ndarray  # [n] rows with their owner
  free: np.ndarray  # [K] rows of each bucket that take turns
  whole: np.ndarray  # [T] bool, tables whose rows are all with their owner
  updated: float  # expected rows that the busiest owner updates in a step


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
  """The cut points at which table-wise tables are chosen."""

  problem: Problem
  cuts: Cuts
  most: int  # warm positions that a device has memory for

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """[T, K] float64: warm rows of each table and bucket."""
    return self.problem.profile.of_tables(self.cuts.hot, self.cuts.warm_end)

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """[T] float64: warm rows of each table."""
    return self.rows.sum(axis=1)

  def owners(self, tables: Iterable[int]) -> tuple[dict[int, int], int]:
    """Assigns tables to owners, the longest bags first.

    To the owner of the fewest columns that has room for all rows of the
    table; where there is none, to the one with most room.

    Returns:
      (owner of each table, padding rows).
    """
    n, of = self.problem.shape.devices, self.problem.profile.tables
    columns, held, owner = np.zeros(n), np.zeros(n), {}
    for t in sorted(tables, key=lambda t: (-of[t].hotness, -self.sizes[t])):
      left = self.most - held - self.sizes[t]
      fits = left >= 0
      o = int(np.lexsort((held, columns if fits.any() else -left, ~fits))[0])
      owner[t] = o
      columns[o] += of[t].hotness
      held[o] += self.sizes[t]
    need = int(np.ceil(min(held.max(), self.most)))
    return owner, max(need * n - self.cuts.warm, 0)

  def choice(self, tables: Iterable[int]) -> Choice:
    """What these table-wise tables ask of a step."""
    problem, shape = self.problem, self.problem.shape
    n, warm = shape.devices, self.cuts.warm
    owner, padding_rows = self.owners(tables)
    traffic = problem.traffic(self.cuts)
    if not owner:
      distinct = float(problem.distinct(self.cuts.hot, self.cuts.warm_end))
      return Choice(owner, 0, traffic, distinct)
    room = layout.room(warm + padding_rows, n)
    held = self._held(owner, room)
    columns = shape.lookups - sum(
      t.hotness
      for t, gone in zip(problem.profile.tables, held.whole, strict=True)
      if gone
    )
    buffer = self._buffer(
      held.free, room - held.kept, max(columns, 1) * shape.local
    )
    rows = float(held.free.sum())
    traffic = dataclasses.replace(
      traffic,
      warm=buffer if rows > 0.5 else float(n * (warm > 0)),
      table_wise=self._asked(owner, held.updated),
    )
    distinct = float(np.sum(held.free * problem.of_device.pi))
    return Choice(owner, padding_rows, traffic, distinct)

  def _held(self, owner: dict[int, int], room: np.ndarray) -> _Held:
    """Who has which rows; room: [n] positions of each owner."""
    free, kept = self.rows.sum(axis=0), np.zeros(len(room))
    whole, updated = np.ones(len(self.rows), bool), 0.0
    for o in set(owner.values()):
      mine = [t for t in owner if owner[t] == o]
      rows = self.rows[mine].sum(axis=0)
      most = np.minimum(np.cumsum(rows), room[o])
      held = np.diff(most, prepend=0.0)
      kept[o] = most[-1]
      free = free - held
      updated = max(updated, float(np.sum(held * self.problem.of_batch.pi)))
      whole[mine] = rows.sum() <= room[o]
    whole &= [t in owner for t in range(len(whole))]
    return _Held(kept, free, whole, updated)

  def _asked(self, owner: dict[int, int], updated: float) -> TableWise:
    """Bags and vectors that travel to and from the owners."""
    shape, tables = self.problem.shape, self.problem.profile.tables
    columns, vectors = np.zeros((2, shape.devices), np.int64)
    for t, o in owner.items():
      columns[o] += tables[t].hotness
      vectors[o] += tables[t].bags
    return TableWise(
      ids=float(shape.local * columns.sum()),
      vectors=float(shape.local * vectors.sum()),
      owner_ids=float(shape.batch_size * columns.max()),
      owner_vectors=float(shape.batch_size * vectors.max()),
      distinct=updated,
      calls=(_calls(columns.tolist()), _calls(vectors.tolist())),
    )

  def _buffer(self, free: np.ndarray, left: np.ndarray, lookups: int) -> float:
    """Rows n C of the warm exchange buffer, as Problem.buffers.

    The owner with most room takes part in all turns: its rows bound those of
    every other. Of each turn it has its part and, as buffer_sizes.buffer_rows
    has it, at most a row more of the mean and twice the largest of the
    variance.

    Args:
      free: [K] rows that take turns.
      left: [n] room for them.
      lookups: of a device that may ask for them.
    """
    problem = self.problem
    pi, n = problem.of_device.pi, problem.shape.devices
    each = problem.overflow_probability
    if each is None:
      return float(max(np.sum(free * pi), 1e-9))
    starts, members = layout.turns(np.round(left).astype(np.int64))
    parts = np.array([len(m) for m in members])
    if not len(parts):
      return float(n)
    ends = np.concatenate([[0.0], np.cumsum(free)])
    below = lambda values: np.interp(
      starts, ends, np.concatenate([[0.0], np.cumsum(free * values)])
    )
    k = np.searchsorted(ends, starts[:-1], side="right") - 1
    top = np.append(pi, 0.0)[k]
    largest = np.where(top > 0.5, 0.25, top * (1 - top))
    mean = np.sum(np.diff(below(pi)) / parts + np.where(parts > 1, top, 0))
    variance = np.diff(below(pi * (1 - pi))) / parts
    variance = np.sum(variance + np.where(parts > 1, 2 * largest, 0))
    c = buffer_sizes.capacity(float(mean), each / (2 * n * n), float(variance))
    return float(n * max(min(c, int(np.ceil(left.max())), lookups), 1))


def _calls(counts: list[int]) -> int:
  """Collectives, one after the other, in which the owners' columns travel."""
  n = len(counts)
  return sum(1 if len(o) == n else n - 1 for *_, o in layout.layers(counts))
