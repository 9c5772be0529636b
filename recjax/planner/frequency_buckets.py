"""A frequency profile in a few thousand buckets, for plans in milliseconds.

Rows of almost the same count form a bucket with their mean probability. Counts
up to 1,024 have a bucket each, above that a bucket's counts differ by at most
EPS = 2^-10. A sum of pi(m) = 1 - (1-p)^m over a bucket is then at most
0.081 EPS^2 < 1e-7 too large: by Taylor, half the variance of p, at most
(EPS p)^2 / 4, times |pi''| <= 0.648 pi / p^2.
"""

import dataclasses
import functools
import math

import numpy as np

from recjax.frequency import Profile
from recjax.planner import formulas

EPS = 2.0**-10
_SLICE = 1 << 24  # rows at a time, so that temporaries stay small
_EXACT = 1 << 14  # ranks of a power law that are added one by one


@dataclasses.dataclass(frozen=True)
class Table:
  """Any table that samples look rows up in."""

  name: str
  rows: int
  hotness: int = 1  # lookups of a sample, at most
  bags: int = 1  # features that look it up; 0: its owner cannot pool them
  sizes: tuple[float, ...] = ()  # P(0, 1, ... lookups); () = always hotness

  @property
  def lookups(self) -> float:
    """Of a sample, expected."""
    if not self.sizes:
      return self.hotness
    return float(np.arange(len(self.sizes)) @ self.sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
  """Rows in rank order, as K buckets of equal rows."""

  tables: tuple[Table, ...]
  count: np.ndarray  # [K] int64, rows of a bucket
  p: np.ndarray  # [K] float64, P(a sample touches one of its rows)
  uses: np.ndarray  # [K] float64, a row's lookups a sample
  measured: "Measured | None" = None
  assumed: str = ""  # where no data was counted: what was assumed
  # Where a table has several lookups: [T, K] int64, whose rows a bucket's are,
  # and [R] int16, each row's table, where rows were counted.
  of_table: np.ndarray | None = None
  table: np.ndarray | None = None

  @property
  def rows(self) -> int:
    return int(self.ends[-1])

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """[K + 1] int64: the first rank of each bucket, and the end."""
    return np.concatenate([[0], np.cumsum(self.count)])

  def touched(self, samples: int) -> np.ndarray:  # [K]
    """pi(m) of a row of each bucket, as measured where batches were."""
    pi = formulas.touch_probability(self.p, samples)
    if self.measured is not None:
      pi = np.minimum(pi * self.measured.ratio(self, samples), 1.0)
    return pi

  def of_tables(self, start: int, stop: int) -> np.ndarray:
    """[T, K] float64: rows of each table and bucket, of ranks [start, stop)."""

    def below(rank):
      k = int(np.searchsorted(self.ends, rank, side="right")) - 1
      rows = np.where(np.arange(len(self.count)) < k, self.of_table, 0.0)
      if k < len(self.count):
        first = int(self.ends[k])
        part = self.of_table[:, k] * ((rank - first) / self.count[k])
        if self.table is not None:  # rows of equal counts are in no mixed order
          part = np.bincount(self.table[first:rank], minlength=len(part))
        rows[:, k] = part
      return rows

    return below(stop) - below(start)

  def below(self, values) -> "Below":
    """The sum of a bucket's value over all rows of rank < r, for any r."""
    return Below(self.ends, np.concatenate([[0.0], _sums(values, self.count)]))

  def at(self, values, rank):
    """The value of the row of that rank; 0 past the end."""
    k = np.searchsorted(self.ends, rank, side="right") - 1
    return np.append(values, 0.0)[k]


def _sums(values, count):
  return np.cumsum(values * count)


@dataclasses.dataclass(frozen=True, eq=False)
class Below:
  ends: np.ndarray
  sums: np.ndarray

  def __call__(self, rank):
    return np.interp(rank, self.ends, self.sums)

  def between(self, start, stop):
    return np.maximum(self(stop) - self(start), 0.0)


# ---- From counts


def of_profile(
  profile: Profile,
  hotness: tuple[int, ...] = (),
  measured=None,
  bags: tuple[int, ...] = (),
) -> Spectrum:
  """One pass over the counts.

  Args:
    profile: the row space.
    hotness: lookups of a sample, a table; () = one each.
    measured: distinct rows of real batches, to correct pi with.
    bags: features that look a table up, see Table; () = one each.
  """
  counts, samples = profile.counts, max(profile.samples, 1)
  top = int(counts[0])
  # Descending lower edges of the buckets: ..., 1026, 1025, 1024, ..., 1, 0.
  edges = np.arange(min(top, 1 / EPS) + 1)
  if top > 1 / EPS:
    steps = math.ceil(math.log(top * EPS) / math.log1p(EPS)) + 1
    edges = np.append(edges, (1 + EPS) ** np.arange(1, steps + 1) / EPS)
  ends = np.unique(_at_least(counts, np.ceil(edges).astype(np.int64)))
  ends = ends[ends > 0]
  starts = np.concatenate([[0], ends[:-1]])
  sums = np.zeros(len(ends))
  hotness = hotness or (1,) * len(profile.tables)
  plain, width = max(hotness) == 1, len(hotness)
  bags = bags or (1,) * width
  of_table = None if plain else np.zeros((width, len(ends)), np.int64)
  for at in range(0, len(counts), _SLICE):
    part = counts[at : at + _SLICE]
    first, last = np.searchsorted(ends, [at, at + len(part) - 1], "right")
    cuts = np.maximum(starts[first : last + 1] - at, 0)
    sums[first : last + 1] += np.add.reduceat(part, cuts)
    if of_table is not None:
      table = profile.table[at : at + len(part)]
      for k, rows in enumerate(np.split(table, cuts[1:]), int(first)):
        of_table[:, k] += np.bincount(rows, minlength=width)
  count = ends - starts
  uses = sums / count / samples
  p = np.minimum(uses, 1.0)
  if of_table is not None:
    h = np.asarray(hotness)[:, None]
    each = formulas.touch_probability(np.minimum(uses / h, 1.0), h)  # [T, K]
    p = np.minimum(np.sum(of_table * each, axis=0) / count, 1.0)
  rows = np.bincount(profile.table, minlength=len(profile.tables))
  tables = tuple(
    Table(*x)
    for x in zip(profile.tables, rows.tolist(), hotness, bags, strict=True)
  )
  whose = None if plain else profile.table
  return Spectrum(tables, count, p, uses, measured, "", of_table, whose)


def _at_least(counts, edges):  # [R] descending, [E] -> [E]
  """How many counts are >= each edge, by bisection and without a copy."""
  low, high = np.zeros(len(edges), np.int64), np.full(len(edges), len(counts))
  while np.any(low < high):
    middle = (low + high) // 2
    more = counts[np.minimum(middle, len(counts) - 1)] >= edges
    more &= low < high
    low = np.where(more, middle + 1, low)
    high = np.where(more, high, middle)
  return low


# ---- From an assumption


def power_law(tables: tuple[Table, ...], exponent: float) -> Spectrum:
  """Every table's rows are used with P(rank r) = r^-s / H(R, s).

  A billion rows take no longer than the buckets: the ranks of a bucket follow
  from its edges, and sums past 16,384 ranks are integrals (midpoint rule).
  """
  s = exponent
  parts = []
  for table in tables:
    head = min(table.rows, _EXACT)
    weights = np.arange(1, head + 1, dtype=np.float64) ** -s
    norm = weights.sum() + _integral(head, table.rows, s)
    starts = np.arange(head + 1)
    if table.rows > head:  # geometric from there; p falls by EPS a bucket
      steps = math.ceil(math.log(table.rows / head) * s / EPS)
      tail = head * (table.rows / head) ** (np.arange(1, steps + 1) / steps)
      starts = np.append(starts, np.unique(np.round(tail)).astype(np.int64))
      starts = np.unique(starts)
    a, b = starts[:-1], starts[1:]
    mass = _integral(a, b, s)
    mass[:head] = weights
    r = np.minimum(mass / norm / (b - a), 1.0)
    p = formulas.bag_probability(r, table.sizes or table.hotness)
    parts.append((b - a, p, table.lookups * r))
  count, p, uses = (np.concatenate(x) for x in zip(*parts, strict=True))
  order = np.argsort(-p, kind="stable")
  whose = np.repeat(np.arange(len(parts)), [len(x[0]) for x in parts])[order]
  size = count[order]
  count, p, uses, starts = _merge(size, p[order], uses[order])
  of_table = None
  if any(t.hotness > 1 for t in tables):
    bucket = np.searchsorted(starts, np.arange(len(size)), side="right") - 1
    of_table = np.zeros((len(tables), len(count)), np.int64)
    np.add.at(of_table, (whose, bucket), size)
  return Spectrum(
    tables,
    count,
    p,
    uses,
    assumed=f"no data counted: every table a power law of exponent {s:g}",
    of_table=of_table,
  )


def _integral(a, b, s):
  """sum of r^-s over ranks r in (a, b], a >= 1 or so; midpoint rule."""
  a, b = np.asarray(a, np.float64) + 0.5, np.asarray(b, np.float64) + 0.5
  if abs(s - 1) < 1e-9:
    return np.log(b / a)
  return (a ** (1 - s) - b ** (1 - s)) / (s - 1)


def _merge(count, p, uses):
  """Neighbours whose p is within EPS become one bucket; where each starts."""
  key = np.floor(np.log(np.maximum(p, 1e-300)) / math.log1p(EPS))
  starts = np.flatnonzero(np.concatenate([[True], np.diff(key) != 0]))
  rows = np.add.reduceat(count, starts)
  mean = lambda x: np.add.reduceat(x * count, starts) / rows
  return rows, mean(p), mean(uses), starts


# ---- Batches that are not independent


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Distinct rows of real batches, over those expected of independent ones."""

  samples: np.ndarray  # [M] ascending batch sizes
  ranks: np.ndarray  # [E + 1] ascending, 0 ... R
  ratios: np.ndarray  # [M, E]

  def ratio(self, spectrum: Spectrum, samples: int) -> np.ndarray:  # [K]
    """Linear in the logarithm of the batch size, constant outside."""
    x = math.log(samples)
    by_rank = np.array(
      [np.interp(x, np.log(self.samples), r) for r in self.ratios.T]
    )
    middle = (spectrum.ends[:-1] + spectrum.ends[1:]) // 2
    k = np.searchsorted(self.ranks, middle, side="right") - 1
    return by_rank[np.clip(k, 0, len(by_rank) - 1)]


def measure(spectrum: Spectrum, batches, parts: int = 12) -> Measured:
  """Counts the distinct rows of real batches.

  Args:
    spectrum: of the same row space, not corrected itself.
    batches: batch size -> arrays of ranks [that many, S] int32, -1 = none.
    parts: of the rows, geometric in rank, each with a ratio of its own.
  """
  edges = np.round(spectrum.rows ** (np.arange(1, parts + 1) / parts))
  ranks = np.unique(np.append(0, edges)).astype(np.int64)
  sizes = sorted(batches)
  ratios = np.ones((len(sizes), len(ranks) - 1))
  for i, size in enumerate(sizes):
    found = np.zeros(len(ranks) - 1)
    for ids in batches[size]:
      distinct = np.unique(ids[ids >= 0])
      found += np.histogram(distinct, ranks)[0]
    below = spectrum.below(formulas.touch_probability(spectrum.p, size))
    expected = below.between(ranks[:-1], ranks[1:]) * len(batches[size])
    enough = expected > 0
    ratios[i, enough] = found[enough] / expected[enough]
  return Measured(np.asarray(sizes), ranks, ratios)
