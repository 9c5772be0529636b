"""Which tables their owners pool, and what each owner then holds.

A pooled table has one owner: the others send it their bags' ids and get one
vector a bag back (recjax/embedding/table_wise.py), which wins for long bags that seldom
share rows. Its warm rows lie with the owner, hottest first, as many as there
is room for; those beyond travel one by one, as the rows of other tables do.
Those take turns among the owners that have room, in rank order.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from recjax.plan import layout
from recjax.planner import formulas
from recjax.planner.cut_points import Problem
from recjax.planner.step_cost import Load, Pooled

_CUTS = 24  # hot cuts that are tried with pooled tables
_PAIRS = 8  # tables of which pairs are tried, too


def _calls(counts) -> int:
  """Collectives, one after the other, in which the columns travel."""
  n = len(counts)
  return sum(1 if len(o) == n else n - 1 for *_, o in layout.layers(counts))


# ---- What pooling tables costs


class Choice(NamedTuple):
  """Pooled tables of a plan, and what they ask of it."""

  owner: dict[int, int]  # of each pooled table, by its index
  spare: int  # warm positions without a row
  load: Load
  distinct: float  # warm rows that a device asks for one by one


@dataclasses.dataclass(frozen=True, eq=False)
class Pooling:
  """The cut points at which tables are chosen."""

  problem: Problem
  hot: int
  warm_end: int
  sync: str
  most: int  # warm positions that a device has memory for

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """[T, K] float64: warm rows of each table and bucket."""
    return self.problem.spectrum.of_tables(self.hot, self.warm_end)

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """[T] float64: warm rows of each table."""
    return self.rows.sum(axis=1)

  @functools.cached_property
  def touched(self) -> np.ndarray:
    """[K]: P(the global batch touches a row of the bucket)."""
    return self.problem.spectrum.touched(self.problem.work.batch_size)

  def owners(self, tables: Iterable[int]) -> tuple[dict[int, int], int]:
    """(Owner of each table, spare positions): the longest bags first.

    To the owner of the fewest columns that has room for all rows of the
    table; where there is none to the one with most room.
    """
    n, of = self.problem.work.devices, self.problem.spectrum.tables
    loads, held, owner = np.zeros(n), np.zeros(n), {}
    for t in sorted(tables, key=lambda t: (-of[t].hotness, -self.sizes[t])):
      left = self.most - held - self.sizes[t]
      fits = left >= 0
      o = int(np.lexsort((held, loads if fits.any() else -left, ~fits))[0])
      owner[t] = o
      loads[o] += of[t].hotness
      held[o] += self.sizes[t]
    warm = self.warm_end - self.hot
    need = int(np.ceil(min(held.max(), self.most)))
    return owner, max(need * n - warm, 0)

  def choice(self, tables: Iterable[int]) -> Choice:
    """What pooling these tables asks of a step."""
    problem, work, s = self.problem, self.problem.work, self.problem.spectrum
    n, warm = work.devices, self.warm_end - self.hot
    owner, spare = self.owners(tables)
    if not owner:
      load = problem.load_of_cuts(self.hot, self.warm_end, self.sync)
      distinct = float(problem.distinct(self.hot, self.warm_end))
      return Choice(owner, 0, load, distinct)

    # ---- Who has which rows
    rooms = layout.room(warm + spare, n)
    free, kept = self.rows.sum(axis=0), np.zeros(n)
    whole, updated = np.ones(len(s.tables), bool), 0.0
    for o in set(owner.values()):
      mine = [t for t in owner if owner[t] == o]
      rows = self.rows[mine].sum(axis=0)
      most = np.minimum(np.cumsum(rows), rooms[o])
      held = np.diff(most, prepend=0.0)
      kept[o] = most[-1]
      free = free - held
      updated = max(updated, float(np.sum(held * self.touched)))
      whole[mine] = rows.sum() <= rooms[o]
    whole &= [t in owner for t in range(len(whole))]

    # ---- What travels row by row
    columns = work.lookups - sum(
      t.hotness for t, gone in zip(s.tables, whole, strict=True) if gone
    )
    mean, rows = float(np.sum(free * problem.pi)), float(free.sum())
    buffer = self._buffer(free, rooms - kept, max(columns, 1) * work.local)
    tiers = problem.load_of_cuts(self.hot, self.warm_end, self.sync)
    loads, vectors = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for t, o in owner.items():
      loads[o] += s.tables[t].hotness
      vectors[o] += s.tables[t].bags
    pooled = Pooled(
      ids=float(work.local * loads.sum()),
      vectors=float(work.local * vectors.sum()),
      owner_ids=float(work.batch_size * loads.max()),
      owner_vectors=float(work.batch_size * vectors.max()),
      distinct=updated,
      calls=(_calls(loads.tolist()), _calls(vectors.tolist())),
    )
    warm_buffer = buffer if rows > 0.5 else float(n * (warm > 0))
    load = dataclasses.replace(tiers, warm=warm_buffer, pooled=pooled)
    return Choice(owner, spare, load, mean)

  def _buffer(self, free, left, lookups) -> float:
    """Rows n C of the warm exchange buffer, as Problem.buffers.

    The owner with most room takes part in all turns: its rows bound those of
    every other. Of each turn it has its part and, as formulas.buffer_rows has
    it, at most a row more of the mean and twice the largest of the variance.

    Args:
      free: [K] rows that take turns; left: [n] room for them.
      lookups: of a device that may ask for them.
    """
    problem = self.problem
    pi, n = problem.pi, problem.work.devices
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
    spread = pi * (1 - pi)
    k = np.searchsorted(ends, starts[:-1], side="right") - 1
    top = np.append(pi, 0.0)[k]
    largest = np.where(top > 0.5, 0.25, top * (1 - top))
    mean = np.sum(np.diff(below(pi)) / parts + np.where(parts > 1, top, 0))
    variance = np.diff(below(spread)) / parts
    variance = np.sum(variance + np.where(parts > 1, 2 * largest, 0))
    c = formulas.capacity(float(mean), each / (2 * n * n), float(variance))
    return float(n * max(min(c, int(np.ceil(left.max())), lookups), 1))


# ---- The choice


def candidates(problem: Problem) -> list[int]:
  """Tables that may be worth pooling: one lookup a sample never is."""
  return [
    i for i, t in enumerate(problem.spectrum.tables) if t.hotness > t.bags > 0
  ]


def choose(pooling: Pooling) -> Choice:
  """The tables of least cost: toggled one by one, and two by two if few.

  From no table, all tables, and those that are worth it on their own.
  """
  able = [t for t in candidates(pooling.problem) if pooling.sizes[t] > 0]
  known: dict[frozenset[int], float] = {}

  def price(tables: frozenset[int]) -> float:
    if tables not in known:
      load = pooling.choice(tables).load
      known[tables] = float(pooling.problem.evaluate(load))
    return known[tables]

  none = frozenset[int]()
  alone = frozenset(t for t in able if price(frozenset([t])) < price(none))
  best = min(
    (_improve(start, able, price) for start in (none, alone, frozenset(able))),
    key=price,
  )
  return pooling.choice(best)


def _improve(
  now: frozenset[int],
  able: list[int],
  price: Callable[[frozenset[int]], float],
) -> frozenset[int]:
  moves = [frozenset([t]) for t in able]
  if len(able) <= _PAIRS:
    moves += [frozenset(p) for p in itertools.combinations(able, 2)]
  while moves:
    best = min((now ^ move for move in moves), key=price)
    if price(best) >= price(now):
      break
    now = best
  return now


_price = operator.itemgetter(0)


def best(
  problem: Problem,
  found: tuple[int, int, str],
  fit: int,
  host_rows: int,
  fixed: bool,
  tables: tuple[int, ...] | None = None,
) -> tuple[int, int, str, Choice | None]:
  """Cut points and pooled tables of least cost.

  Args:
    problem: what is minimised.
    found: cut points and sync that are best without pooled tables.
    fit, host_rows: rows that a device, and all hosts, can hold.
    fixed: the cut points are given.
    tables: that are pooled; None = those of least cost.

  Returns:
    (hot, warm_end, sync, choice); the choice is None where none is pooled.
  """
  s, n = problem.spectrum, problem.work.devices
  wanted = candidates(problem) if tables is None else tables
  if n == 1 or not wanted or s.of_table is None:
    return *found, None
  *cut, sync = found
  # Rows that are pooled may need no replica: fewer hot rows are tried as well.
  tried = np.array([cut])
  if cut[0] and not fixed:
    lower = s.ends[s.ends < cut[0]]
    hots = lower[np.linspace(0, len(lower) - 1, _CUTS).astype(int)]
    ends = hots + layout.most_sharded(s.rows, hots, fit, n)
    fits = layout.shard_rows(s.rows - ends, n) * n <= host_rows
    tried = np.append(tried, np.stack([hots, ends], axis=1)[fits], axis=0)
  tried = [(int(a), int(b)) for a, b in np.unique(tried, axis=0) if a < b]

  def at(hot: int, warm_end: int) -> Pooling:
    most = -(-(warm_end - hot) // n)
    if warm_end == s.rows:  # memory that no row needs is there to be used
      most = max(most, int(layout.most_sharded(1 << 62, hot, fit, n)) // n)
    return Pooling(problem, hot, warm_end, sync, most)

  def offer(ends, owner: Iterable[int] | None):
    """(cost, cuts, choice) of these tables, or of the best there."""
    choice = at(*ends).choice(owner) if owner else choose(at(*ends))
    return float(problem.evaluate(choice.load)), ends, choice

  least = np.inf if tables else float(problem.cost_of_cuts(*found))
  offers = [offer(ends, tables) for ends in {*tried[:1], *tried[-1:]}]
  if len(tried) > 1:
    owner = min(offers, key=_price)[2].owner
    offers += [offer(ends, owner) for ends in tried if owner]
    offers.append(offer(min(offers, key=_price)[1], tables))
  price, ends, choice = min(offers, key=_price, default=(np.inf, cut, None))
  if choice is None or not choice.owner or price >= least:
    return *found, None
  return *ends, sync, choice
