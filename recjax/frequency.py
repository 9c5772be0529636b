"""How often each row is used: counts, ranks, coverage and skew.

The rows of all tables share one row space, sorted by their count in the
training split, most frequent first. A row's place in it is its rank. The rows
of some of the tables, in the same order, are a row space of their own: that of
a group of tables.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np

_EXACT = 100_000  # ranks of a Zipf sum that are added one by one
_SLICE = 1 << 24  # rows at a time, so that temporaries stay small


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
  """A row space of several tables, and how often the training split uses it.

  `counts` are lookups: a bag that holds an id twice counts it twice.
  """

  samples: int  # of the training split
  tables: tuple[str, ...]
  counts: np.ndarray  # [R] int64, descending: index = rank
  table: np.ndarray  # [R] int16, index into tables

  @property
  def rows(self) -> int:
    """R, the rows of all tables."""
    return len(self.counts)

  @functools.cached_property
  def accesses(self) -> int:
    """Lookups of the training split, all rows together."""
    return int(self.counts.sum())

  def frequencies(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Probabilities [stop - start] that a sample uses a row, at most 1."""
    return np.minimum(self.counts[start:stop] / max(self.samples, 1), 1.0)

  def table_rows(self) -> dict[str, int]:
    """Rows of each table."""
    rows = np.zeros(len(self.tables), np.int64)
    for start, stop in _slices(self.rows):
      rows += np.bincount(self.table[start:stop], minlength=len(rows))
    return dict(zip(self.tables, rows.tolist(), strict=True))

  def of_tables(self, tables: Iterable[str]) -> "Profile":
    """Selects the rows of these tables, in rank order, as their own space.

    Args:
      tables: their names, in the order in which the new profile counts them.

    Returns:
      The profile of a group of these tables.
    """
    tables = tuple(tables)
    if tables == self.tables:
      return self
    rows = self.table_rows()
    counts = np.empty(sum(rows[t] for t in tables), np.int64)
    table = np.empty(len(counts), np.int16)
    renumbered = np.full(len(self.tables), -1, np.int16)
    for i, name in enumerate(tables):
      renumbered[self.tables.index(name)] = i
    at = 0
    for start, stop in _slices(self.rows):
      found = renumbered[self.table[start:stop]]
      theirs = found >= 0
      end = at + int(np.count_nonzero(theirs))
      table[at:end] = found[theirs]
      counts[at:end] = self.counts[start:stop][theirs]
      at = end
    return Profile(self.samples, tables, counts, table)


def group_ranks(
  profile: Profile, groups: Iterable[Iterable[str]]
) -> np.ndarray:
  """Ranks in their group, [R] int32, of the rows of the whole profile.

  Row r of the profile is row `group_ranks(...)[r]` of
  `profile.of_tables(tables)`, where `tables` is the group that holds its table.

  Args:
    profile: of all tables.
    groups: the names of each group's tables.

  Raises:
    ValueError: a table is in no group, or in two.
  """
  groups = [tuple(tables) for tables in groups]
  if sorted(t for g in groups for t in g) != sorted(profile.tables):
    raise ValueError(
      f"each of {profile.tables} must be in one group, found {groups}"
    )
  if len(groups) == 1:
    return np.arange(profile.rows, dtype=np.int32)
  group_of = {name: i for i, tables in enumerate(groups) for name in tables}
  of_table = np.array([group_of[t] for t in profile.tables], np.int16)
  ranks = np.empty(profile.rows, np.int32)
  used = [0] * len(groups)
  for start, stop in _slices(profile.rows):
    group = of_table[profile.table[start:stop]]
    for i in range(len(groups)):
      rows = np.flatnonzero(group == i)
      ranks[start + rows] = np.arange(
        used[i], used[i] + len(rows), dtype=np.int32
      )
      used[i] += len(rows)
  return ranks


def _slices(rows: int) -> Iterator[tuple[int, int]]:
  """Starts and ends of pieces of so many rows."""
  for start in range(0, rows, _SLICE):
    yield start, min(start + _SLICE, rows)


@dataclasses.dataclass(frozen=True)
class Summary:
  """One line of `describe`: a table, or all of them."""

  name: str
  rows: int
  accesses: int
  coverage: tuple[float, ...]  # share of accesses of the FRACTIONS
  exponent: float  # of the fitted Zipf law; nan where it is not defined


FRACTIONS = (0.001, 0.01, 0.1)


def coverage(profile: Profile, fraction: float) -> float:
  """Share of the accesses that go to the top `fraction` of all rows."""
  return _coverage(profile.counts, fraction)


def _coverage(counts: np.ndarray, fraction: float) -> float:
  """Share of `counts` [R], descending, in its first `fraction` of rows.

  At least one row is taken.
  """
  total = int(counts.sum())
  top = max(1, round(fraction * len(counts)))
  return int(counts[:top].sum()) / total if total else 0.0


def fit_exponent(counts: np.ndarray) -> float:
  """Fits s of the power law P(rank r) ~ r^-s, r = 1..R, by maximum likelihood.

  With N accesses, the log likelihood is -s sum_r c_r log r - N log H(R, s), so
  s solves E_s[log r] = sum_r c_r log r / N (Clauset, Shalizi and Newman, Power-
  law distributions in empirical data, 2009, section 3.5, for ranks). The left
  side falls with s. Sums over more than 100,000 ranks end in an integral, so
  that a billion rows take as long as the pass over the counts.

  Args:
    counts: [R], descending.

  Returns:
    s in [0, 10]; nan for fewer than two rows or no access.
  """
  from scipy import optimize  # here, as it takes a while to import

  rows = len(counts)
  total = float(counts.sum())
  if rows < 2 or not total:
    return float("nan")
  mean = 0.0
  for start, stop in _slices(rows):
    ranks = np.arange(start + 1, stop + 1, dtype=np.float64)
    mean += float(np.log(ranks) @ counts[start:stop])
  mean /= total

  low, high = 0.0, 10.0
  if _mean_log_rank(rows, low) <= mean:
    return low
  if _mean_log_rank(rows, high) >= mean:
    return high
  return float(
    optimize.brentq(lambda s: _mean_log_rank(rows, s) - mean, low, high)
  )


def _mean_log_rank(rows: int, s: float) -> float:
  """E[log r] under P(r) ~ r^-s, r = 1..rows."""
  logs = _head_logs(min(rows, _EXACT))
  weights = np.exp(-s * logs)
  norm, total = float(weights.sum()), float(weights @ logs)
  if rows > _EXACT:  # midpoint rule: sum over r in (a, b] = integral a+.5..b+.5
    a, b = np.log(_EXACT + 0.5), np.log(rows + 0.5)
    t = np.linspace(a, b, 2_001)  # x = e^t: integral of e^(t (1 - s)) dt
    f = np.exp(t * (1 - s))
    norm += float(np.trapezoid(f, t))
    total += float(np.trapezoid(f * t, t))
  return total / norm


@functools.lru_cache(maxsize=2)
def _head_logs(rows: int) -> np.ndarray:
  """log 1 ... log rows."""
  return np.log(np.arange(1, rows + 1, dtype=np.float64))


def summaries(profile: Profile) -> tuple[Summary, ...]:
  """Summarises each table, then all of them together."""

  def one(name: str, counts: np.ndarray) -> Summary:
    return Summary(
      name,
      len(counts),
      int(counts.sum()),
      tuple(_coverage(counts, f) for f in FRACTIONS),
      fit_exponent(counts),
    )

  tables = [
    one(name, profile.counts[profile.table == i])  # stays descending
    for i, name in enumerate(profile.tables)
  ]
  return (*tables, one("all", profile.counts))


def describe(profile: Profile) -> str:
  """Formats the frequency profile as a table to print."""
  lines = [
    f"frequency profile of {profile.samples:,} training samples",
    f"{'table':12} {'rows':>13} {'accesses':>15} "
    f"{'top 0.1%':>9} {'1%':>7} {'10%':>7} {'exponent':>9}",
  ]
  for s in summaries(profile):
    top = " ".join(f"{c:>7.1%}" for c in s.coverage)
    lines.append(
      f"{s.name:12} {s.rows:>13,} {s.accesses:>15,} {top:>25} "
      f"{s.exponent:>9.2f}"
    )
  return "\n".join(lines)
