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
from collections.abc import Mapping, Sequence

import numpy as np

from recjax.frequency import Profile
from recjax.planner import buffer_sizes

EPS = 2.0**-10
_SLICE = 1 << 24  # rows at a time, so that temporaries stay small
_EXACT = 1 << 14  # ranks of a power law that are added one by one


@dataclasses.dataclass(frozen=True)
class Table:
  """A table that samples look rows up in."""

  name: str
  rows: int
  hotness: int = 1  # lookups of a sample, at most
  bags: int = 1  # features that look it up; 0: its owner cannot pool them
  sizes: tuple[float, ...] = ()  # P(0, 1, ... lookups); () = always hotness

  @property
  def lookups(self) -> float:
    """Expected lookups of a sample."""
    if not self.sizes:
      return self.hotness
    return float(np.arange(len(self.sizes)) @ self.sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedProfile:
  """A group's rows in rank order, as K buckets of equal rows."""

  tables: tuple[Table, ...]
  count: np.ndarray  # [K] int64, rows of a bucket
  p: np.ndarray  # [K] float64, P(a sample touches one of its rows)
  uses: np.ndarray  # [K] float64, a row's lookups a sample
  measured: "DistinctRatios | None" = None
  assumed: str = ""  # where no data was counted: what was assumed
  # By table, where one has several lookups or an owner: [T, K] int64, whose
  # rows a bucket's are, and [R] int16, each row's table, where rows were
  # counted.
  of_table: np.ndarray | None = None
  table: np.ndarray | None = None

  @property
  def rows(self) -> int:
    """Rows of the group."""
    return int(self.ends[-1])

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """[K + 1] int64: the first rank of each bucket, and the end."""
    return np.concatenate([[0], np.cumsum(self.count)])

  def touched(self, samples: int) -> np.ndarray:  # [K]
    """Probability that `samples` touch a row of each bucket.

    pi(m), corrected by what real batches showed where they were measured.
    """
    pi = buffer_sizes.touch_probability(self.p, samples)
    if self.measured is not None:
      pi = np.minimum(pi * self.measured.ratio(self, samples), 1.0)
    return pi

  def of_tables(self, start: int, stop: int) -> np.ndarray:
    """Rows of each table and bucket among ranks [start, stop): [T, K] float64.

    Raises:
      ValueError: it isn't known whose rows the buckets hold.
    """
    if self.of_table is None:
      raise ValueError("of_profile was to keep nothing by table")
    of_table = self.of_table

    def below(rank: int) -> np.ndarray:
      k = int(np.searchsorted(self.ends, rank, side="right")) - 1
      rows = np.where(np.arange(len(self.count)) < k, of_table, 0.0)
      if k < len(self.count):
        first = int(self.ends[k])
        part = of_table[:, k] * ((rank - first) / self.count[k])
        if self.table is not None:  # rows of equal counts are in no mixed order
          part = np.bincount(self.table[first:rank], minlength=len(part))
        rows[:, k] = part
      return rows

    return below(stop) - below(start)

  def cumulative(self, values: np.ndarray) -> "CumulativeSum":
    """The sum of a bucket's value over all rows of rank < r, for any r."""
    sums = np.concatenate([[0.0], np.cumsum(values * self.count)])
    return CumulativeSum(self.ends, sums)

  def at(self, values: np.ndarray, rank):
    """The value of the row of that rank (or ranks); 0 past the end."""
    k = np.searchsorted(self.ends, rank, side="right") - 1
    return np.append(values, 0.0)[k]


@dataclasses.dataclass(frozen=True, eq=False)
class CumulativeSum:
  """The sum of a value over all rows below a rank, linear within a bucket."""

  ends: np.ndarray  # [K + 1]
  sums: np.ndarray  # [K + 1]

  def __call__(self, rank):
    """The sum over rows of rank < `rank`, a number or an array."""
    return np.interp(rank, self.ends, self.sums)

  def between(self, start, stop):
    """The sum over rows of ranks [start, stop)."""
    return np.maximum(self(stop) - self(start), 0.0)


# ---- From counts


def of_profile(
  profile: Profile,
  hotness: tuple[int, ...] = (),
  bags: tuple[int, ...] = (),
  *,
  by_table: bool = False,
) -> BucketedProfile:
  """Buckets the counts of a row space, in one pass over them.

  Args:
    profile: the row space.
    hotness: lookups of a sample, a table; () = one each.
    bags: features that look a table up, see Table; () = one each.
    by_table: whether to know whose rows the buckets hold; where a table has
      several lookups, they are known.
  """
  samples = max(profile.samples, 1)
  hotness = hotness or (1,) * len(profile.tables)
  bags = bags or (1,) * len(hotness)
  by_table |= max(hotness) > 1
  ends = _bucket_ends(profile.counts)
  sums, of_table = _bucket_sums(profile, ends, by_table)
  count = np.diff(ends, prepend=0)
  uses = sums / count / samples
  p = np.minimum(uses, 1.0)
  if of_table is not None:
    h = np.asarray(hotness)[:, None]
    each = buffer_sizes.touch_probability(
      np.minimum(uses / h, 1.0), h
    )  # [T, K]
    p = np.minimum(np.sum(of_table * each, axis=0) / count, 1.0)
  rows = np.bincount(profile.table, minlength=len(profile.tables))
  tables = tuple(
    Table(*x)
    for x in zip(profile.tables, rows.tolist(), hotness, bags, strict=True)
  )
  return BucketedProfile(
    tables,
    count,
    p,
    uses,
    of_table=of_table,
    table=profile.table if by_table else None,
  )


def _bucket_ends(counts: np.ndarray) -> np.ndarray:  # [R] -> [K]
  """The rank where each bucket of almost equal counts ends."""
  top = int(counts[0])
  # Descending lower edges of the buckets: ..., 1026, 1025, 1024, ..., 1, 0.
  edges = np.arange(min(top, 1 / EPS) + 1)
  if top > 1 / EPS:
    steps = math.ceil(math.log(top * EPS) / math.log1p(EPS)) + 1
    edges = np.append(edges, (1 + EPS) ** np.arange(1, steps + 1) / EPS)
  ends = np.unique(_at_least(counts, np.ceil(edges).astype(np.int64)))
  return ends[ends > 0]


def _bucket_sums(
  profile: Profile, ends: np.ndarray, by_table: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """Lookups of each bucket [K], and `by_table` its rows a table [T, K]."""
  starts = np.concatenate([[0], ends[:-1]])
  width = len(profile.tables)
  sums = np.zeros(len(ends))
  of_table = np.zeros((width, len(ends)), np.int64) if by_table else None
  for at in range(0, len(profile.counts), _SLICE):
    part = profile.counts[at : at + _SLICE]
    first, last = np.searchsorted(ends, [at, at + len(part) - 1], "right")
    cuts = np.maximum(starts[first : last + 1] - at, 0)
    sums[first : last + 1] += np.add.reduceat(part, cuts)
    if of_table is not None:
      table = profile.table[at : at + len(part)]
      for k, rows in enumerate(np.split(table, cuts[1:]), int(first)):
        of_table[:, k] += np.bincount(rows, minlength=width)
  return sums, of_table


def _at_least(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """How many counts are >= each edge, by bisection and without a copy.

  Args:
    counts: [R] descending.
    edges: [E].

  Returns:
    [E] int64.
  """
  low, high = np.zeros(len(edges), np.int64), np.full(len(edges), len(counts))
  while np.any(low < high):
    middle = (low + high) // 2
    more = counts[np.minimum(middle, len(counts) - 1)] >= edges
    more &= low < high
    low = np.where(more, middle + 1, low)
    high = np.where(more, high, middle)
  return low


# ---- From an assumption


def power_law(
  tables: tuple[Table, ...], exponent: float, *, by_table: bool = False
) -> BucketedProfile:
  """Buckets tables whose rows are used with P(rank r) = r^-s / H(R, s).

  A billion rows take no longer than the buckets: the ranks of a bucket follow
  from its edges, and sums past 16,384 ranks are integrals (midpoint rule).
  """
  parts = [_power_law_buckets(table, exponent) for table in tables]
  count, p, uses = (np.concatenate(x) for x in zip(*parts, strict=True))
  order = np.argsort(-p, kind="stable")
  whose = np.repeat(np.arange(len(parts)), [len(x[0]) for x in parts])[order]
  size = count[order]
  count, p, uses, starts = _merge(size, p[order], uses[order])
  of_table = None
  if by_table or any(t.hotness > 1 for t in tables):
    bucket = np.searchsorted(starts, np.arange(len(size)), side="right") - 1
    of_table = np.zeros((len(tables), len(count)), np.int64)
    np.add.at(of_table, (whose, bucket), size)
  return BucketedProfile(
    tables,
    count,
    p,
    uses,
    assumed="no data counted: every table a power law of exponent "
    f"{exponent:g}",
    of_table=of_table,
  )


def _power_law_buckets(
  table: Table, s: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A table's buckets: (rows, probability of a touch, lookups a sample)."""
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
  p = buffer_sizes.bag_probability(r, table.sizes or table.hotness)
  return b - a, p, table.lookups * r


def _integral(a, b, s):
  """The sum of r^-s over ranks r in (a, b], a >= 1 or so; midpoint rule."""
  a, b = np.asarray(a, np.float64) + 0.5, np.asarray(b, np.float64) + 0.5
  if abs(s - 1) < 1e-9:
    return np.log(b / a)
  return (a ** (1 - s) - b ** (1 - s)) / (s - 1)


def _merge(count, p, uses):
  """Merges neighbours whose p is within EPS; also returns where each starts."""
  key = np.floor(np.log(np.maximum(p, 1e-300)) / math.log1p(EPS))
  starts = np.flatnonzero(np.concatenate([[True], np.diff(key) != 0]))
  rows = np.add.reduceat(count, starts)
  mean = lambda x: np.add.reduceat(x * count, starts) / rows
  return rows, mean(p), mean(uses), starts


# ---- Batches that are not independent


@dataclasses.dataclass(frozen=True, eq=False)
class DistinctRatios:
  """Distinct rows of real batches over those expected of independent ones."""

  samples: np.ndarray  # [M] ascending batch sizes
  ranks: np.ndarray  # [E + 1] ascending, 0 ... R
  ratios: np.ndarray  # [M, E]

  def ratio(self, profile: BucketedProfile, samples: int) -> np.ndarray:
    """The ratio of each bucket for a batch of `samples`: [K] float64.

    Linear in the logarithm of the batch size, constant outside.
    """
    x = math.log(samples)
    by_rank = np.array(
      [np.interp(x, np.log(self.samples), r) for r in self.ratios.T]
    )
    middle = (profile.ends[:-1] + profile.ends[1:]) // 2
    k = np.searchsorted(self.ranks, middle, side="right") - 1
    return by_rank[np.clip(k, 0, len(by_rank) - 1)]


def measure(
  profile: BucketedProfile,
  batches: Mapping[int, Sequence[np.ndarray]],
  parts: int = 12,
) -> DistinctRatios:
  """Counts the distinct rows of real batches.

  Args:
    profile: of the same row space, not corrected itself.
    batches: batch size -> arrays of ranks [that many, S] int32, -1 = none.
    parts: of the rows, geometric in rank, each with a ratio of its own.
  """
  edges = np.round(profile.rows ** (np.arange(1, parts + 1) / parts))
  ranks = np.unique(np.append(0, edges)).astype(np.int64)
  sizes = sorted(batches)
  ratios = np.ones((len(sizes), len(ranks) - 1))
  for i, size in enumerate(sizes):
    found = np.zeros(len(ranks) - 1)
    for ids in batches[size]:
      distinct = np.unique(ids[ids >= 0])
      found += np.histogram(distinct, ranks)[0]
    below = profile.cumulative(buffer_sizes.touch_probability(profile.p, size))
    expected = below.between(ranks[:-1], ranks[1:]) * len(batches[size])
    enough = expected > 0
    ratios[i, enough] = found[enough] / expected[enough]
  return DistinctRatios(np.asarray(sizes), ranks, ratios)
