"""Which samples train and which test."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np

from recjax.config import Data

_SIGN = np.uint64(1 << 63)


@dataclasses.dataclass(frozen=True)
class Split:
  """The test part of the logs: their end, a random share, or data.test."""

  data: Data
  train_rows: int | None  # samples of data.train, where data.test is given
  total: int  # samples of all logs
  # (a time, samples before it), where samples have times of their own: those
  # before it train.
  cut: tuple[float, int] | None = None

  @functools.cached_property
  def train(self) -> int:
    """Training samples."""
    if self.train_rows is not None:
      return self.train_rows
    if self.data.split == "time":
      if self.cut is not None:
        return self.cut[1]
      return self.total - round(self.total * self.data.test_fraction)
    return sum(
      int(self.mask(start, min(1 << 20, self.total - start)).sum())
      for start in range(0, self.total, 1 << 20)
    )

  def mask(
    self, start: int, rows: int, time: np.ndarray | None = None
  ) -> np.ndarray:
    """Says of each of the samples from `start` on if it trains: [rows] bool.

    Args:
      start: the first one's number.
      rows: how many.
      time: [rows] float64 of samples that have times.
    """
    row = np.arange(start, start + rows, dtype=np.uint64)
    if self.train_rows is None and self.data.split == "random":
      seed = np.uint64((self.data.seed << 40) % 2**64)
      return splitmix64(row + seed) / 2.0**64 >= self.data.test_fraction
    if self.train_rows is None and self.cut is not None:
      assert time is not None
      return time < self.cut[0]
    return row < self.train


def time_cut(
  times: Callable[[], Iterable[np.ndarray]], train: int
) -> tuple[float, int]:
  """Finds the time from which on samples test.

  By radix, so that memory is bounded however many samples there are.

  Args:
    times: gives, each time the same, parts of all times, float64.
    train: samples that are to train, fewer than there are.

  Returns:
    (a time, the samples before it): as many as are to train, but for those of
    the very time.
  """
  prefix, before = np.uint64(0), 0
  for shift in (48, 32, 16, 0):
    counts = np.zeros(1 << 16, np.int64)
    for part in times():
      key = _ordered(part)
      digit = (key >> np.uint64(shift)) & np.uint64(0xFFFF)
      if shift < 48:
        digit = digit[key >> np.uint64(shift + 16) == prefix]
      counts += np.bincount(digit.astype(np.int64), minlength=1 << 16)
    ends = before + np.cumsum(counts)
    found = int(np.searchsorted(ends, train, side="right"))
    before = int(ends[found] - counts[found])
    prefix = prefix << np.uint64(16) | np.uint64(found)
  negative = not prefix >> np.uint64(63)
  bits = ~prefix if negative else prefix ^ _SIGN
  return float(np.array([bits]).view(np.float64)[0]), before


def _ordered(x: np.ndarray) -> np.ndarray:
  """Returns uint64 in the order of float64."""
  bits = (x + 0.0).view(np.uint64)  # -0 is 0
  return np.where(bits >> np.uint64(63), ~bits, bits ^ _SIGN)


def splitmix64(x: np.ndarray) -> np.ndarray:
  """Hashes 64-bit integers (Steele, Lea and Flood, 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
