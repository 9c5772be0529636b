"""How often each row is used: counts, ranks, coverage and skew.

All tables of a group (the same dim, dtype and optimizer) share one row space,
sorted by count in the training split, most frequent first. A row's position in
it is its rank.
"""

import dataclasses
import functools

import numpy as np

_EXACT = 100_000  # ranks of a Zipf sum that are added one by one
_SLICE = 1 << 24  # rows at a time, so that temporaries stay small


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
  """The row space of a group and how often the training split uses it.

  `counts` are lookups: a bag that holds an id twice counts it twice.
  """

  samples: int  # of the training split
  tables: tuple[str, ...]
  counts: np.ndarray  # [R] int64, descending: index = rank
  table: np.ndarray  # [R] int16, index into tables

  @property
  def rows(self) -> int:
    return len(self.counts)

  @functools.cached_property
  def accesses(self) -> int:
    """Lookups of the training split, all rows together."""
    return int(self.counts.sum())

  def frequencies(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """[stop - start] float64: P(a sample uses the row), at most 1."""
    return np.minimum(self.counts[start:stop] / max(self.samples, 1), 1.0)


@dataclasses.dataclass(frozen=True)
class Summary:
  """One line of `describe`: a table, or the whole group."""

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
  """Of `counts` [R], descending; at least one row is taken."""
  total = int(counts.sum())
  top = max(1, round(fraction * len(counts)))
  return int(counts[:top].sum()) / total if total else 0.0


def fit_exponent(counts: np.ndarray) -> float:
  """The maximum-likelihood s of P(rank r) ~ r^-s, r = 1..R.

  With N accesses, the log likelihood is -s sum_r c_r log r - N log H(R, s), so
  s solves E_s[log r] = sum_r c_r log r / N (Clauset, Shalizi and Newman, Power-
  law distributions in empirical data, 2009, section 3.5, for ranks). The left
  side falls with s: bisection. Sums over more than 100,000 ranks end in an
  integral, so that a billion rows take as long as the pass over the counts.

  Args:
    counts: [R], descending.

  Returns:
    s in [0, 10]; nan for fewer than two rows or no access.
  """
  rows = len(counts)
  total = float(counts.sum())
  if rows < 2 or not total:
    return float("nan")
  mean = 0.0
  for start in range(0, rows, _SLICE):
    part = counts[start : start + _SLICE]
    ranks = np.arange(start + 1, start + len(part) + 1, dtype=np.float64)
    mean += float(np.log(ranks) @ part)
  mean /= total

  low, high = 0.0, 10.0
  for _ in range(60):
    middle = (low + high) / 2
    if _mean_log_rank(rows, middle) > mean:
      low = middle
    else:
      high = middle
  return (low + high) / 2


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
  return np.log(np.arange(1, rows + 1, dtype=np.float64))


def summaries(profile: Profile) -> tuple[Summary, ...]:
  """One for each table, then one for the whole group."""

  def one(name, counts):
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
  """The frequency profile as a table to print."""
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
