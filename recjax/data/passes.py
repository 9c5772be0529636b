"""What each pass over the staged chunks of a log wants of them.

The log may be a whole one (prepare.py) or one of its files (shards.py).
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from recjax import log_schema
from recjax.config import Data
from recjax.data import blocks, fit_numbers, numbers, staging
from recjax.data.fit_numbers import Sums
from recjax.data.log import Log
from recjax.data.numbers import Fitted
from recjax.data.split import Split, time_cut
from recjax.data.staging import Reader
from recjax.errors import UserError
from recjax.progress import Progress


def split_of(
  data: Data,
  reader: Reader,
  train_rows: int | None,
  rows: int,
  times: Callable[[], Iterator[np.ndarray]],
) -> Split:
  """Returns which samples of the logs train.

  Args:
    data: says how they are split.
    reader: of the logs.
    train_rows: samples of data.train, where data.test is given.
    rows: samples of all logs.
    times: gives those of each chunk, where the log has times.

  Raises:
    UserError: training or testing would have no sample.
  """
  split = Split(data, train_rows, rows)
  timed = isinstance(reader, Log) and reader.columns.time
  if timed and not data.test and data.split == "time":
    cut = time_cut(times, split.train) if split.train else None
    split = dataclasses.replace(split, cut=cut)
  if not 0 < split.train < split.total:
    raise UserError(
      f"the logs hold {split.total:,} samples, of which {split.train:,} would"
      " train and the rest test: both need at least one"
    )
  return split


class Chunks:
  """Staged chunks, as each of the later passes reads them."""

  def __init__(
    self,
    folder: str,
    sizes: list[tuple[int, int]],
    split: Split,
    data: Data,
    reader: Reader,
    *,
    row: int = 0,
    report: Callable[[str], None],
  ):
    """Reads nothing yet.

    Args:
      folder: of the chunks.
      sizes: samples and distinct values of each.
      split: of all logs.
      data: the config.
      reader: of the logs.
      row: of the logs, the chunks' first.
      report: takes lines of progress.
    """
    self.folder, self.sizes, self.split = folder, sizes, split
    self.row, self.report = row, report
    self.schema = schema = reader.schema(data)
    log = reader.columns if isinstance(reader, Log) else log_schema.Schema()
    self.min_counts = dict.fromkeys(schema.tables, data.min_count)
    self.min_counts |= log_schema.min_counts(log, data.min_count)
    self.log_numbers = log.numbers
    self.numbers: tuple[Fitted, ...] = ()  # the user sets them, once fitted
    tables = schema.tables
    self.table_of = np.array(
      [tables.index(f.table) for f in schema.features], np.int16
    )

  def sums(self) -> Iterator[Sums]:
    """Sums the log's numbers over the training split, chunk by chunk."""
    for row, arrays, _ in self._read("fit"):
      train = self._trains(row, arrays)
      yield fit_numbers.sums(
        self.log_numbers, arrays["dense"], row, train, self.split.train
      )

  def counts(self) -> Iterator[tuple[np.ndarray, pa.Array, np.ndarray]]:
    """Yields (table, value, count in the training split) of each chunk."""
    for row, arrays, values in self._read("count"):
      codes = arrays["codes"]
      train = codes[self._trains(row, arrays)]
      n = np.bincount(train[train >= 0], minlength=len(values))
      yield self.table_of[arrays["feature"]], values, n

  def values(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Yields (table, value) of each chunk."""
    for i in range(len(self.sizes)):
      feature = staging.features(self.folder, i)
      values = staging.values(self.folder, i)
      feature, values = numbers.with_buckets(self.numbers, feature, values)
      yield self.table_of[feature], values

  def samples(
    self, ranks: Iterator[np.ndarray]
  ) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (split, arrays of samples), given the ranks of `values`."""
    wanted = blocks.features(self.schema)
    for row, arrays, _ in self._read("pack"):
      rank = np.append(next(ranks), np.int32(-1))  # which the code -1 finds
      arrays["ids"] = rank[arrays.pop("codes")]
      if self.numbers:
        arrays["dense"] = numbers.normalised(self.numbers, arrays["dense"])
      train = self._trains(row, arrays)
      for name, mask in (("train", train), ("test", ~train)):
        if mask.any():
          yield name, {a: arrays[a][mask] for a in wanted}

  def _trains(self, row: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Says of each sample of a chunk if it trains."""
    return self.split.mask(row, len(arrays["label"]), arrays.get("time"))

  def _read(
    self, name: str
  ) -> Iterator[tuple[int, dict[str, np.ndarray], pa.Array]]:
    rows = sum(rows for rows, _ in self.sizes)
    progress = Progress(f"prepare: {name}", self.report, rows)
    for row, arrays, values in staging.read(self.folder, self.sizes, progress):
      yield self.row + row, *numbers.bucketed(self.numbers, arrays, values)
