"""Which samples train and which test."""

import dataclasses
import functools

import numpy as np

from recjax.config import Data


@dataclasses.dataclass(frozen=True)
class Split:
  """The test part of the logs: their end, a random share, or data.test."""

  data: Data
  train_rows: int | None  # samples of data.train, where data.test is given
  total: int  # samples of all logs

  @functools.cached_property
  def train(self) -> int:
    """Training samples."""
    if self.train_rows is not None:
      return self.train_rows
    if self.data.split == "time":
      return self.total - round(self.total * self.data.test_fraction)
    return sum(
      int(self.mask(start, min(1 << 20, self.total - start)).sum())
      for start in range(0, self.total, 1 << 20)
    )

  def mask(self, start: int, rows: int) -> np.ndarray:
    """Says of each of the samples from `start` on if it trains: [rows] bool."""
    row = np.arange(start, start + rows, dtype=np.uint64)
    if self.train_rows is None and self.data.split == "random":
      seed = np.uint64((self.data.seed << 40) % 2**64)
      return splitmix64(row + seed) / 2.0**64 >= self.data.test_fraction
    return row < self.train


def splitmix64(x: np.ndarray) -> np.ndarray:
  """Hashes 64-bit integers (Steele, Lea and Flood, 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
