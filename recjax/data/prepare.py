"""Logs -> vocabulary, frequency profile and packed blocks of ranks.

Four passes, each streaming with bounded memory:

1. stage: parse the logs into chunks whose categorical cells are codes into the
   chunk's own list of distinct values (staging.py).
2. count: sum the counts of those lists over the training split; keep ids with
   `min_count`; sort by count. The result is the vocabulary (vocabulary.py).
3. remap: join the lists with the vocabulary: code -> rank, chunk by chunk.
4. pack: ranks in blocks of thousands of samples, in time order (blocks.py).
"""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from recjax import config_check, files, log_schema
from recjax.config import Config, Data
from recjax.data import (
  blocks,
  fit_numbers,
  log_files,
  made_from,
  numbers,
  old_vocabulary,
  prepared,
  staging,
  synthetic,
  vocabulary,
)
from recjax.data.ahead import ahead
from recjax.data.columns import Columns
from recjax.data.log import Log
from recjax.data.made_from import MadeFrom
from recjax.data.numbers import Fitted
from recjax.data.old_vocabulary import Before
from recjax.data.prepared import Prepared
from recjax.data.split import Split, time_cut
from recjax.data.staging import Reader, Staged
from recjax.errors import UserError
from recjax.progress import Progress

Report = Callable[[str], None]


def prepare(
  config: Config,
  directory: str,
  report: Report = print,
  columns: Columns | None = None,
  before: Before | None = None,
) -> Prepared:
  """Prepares the logs of `config.data`, or loads them where that is done.

  The data set appears by one rename when it is complete; until then all is in
  `<directory>.unfinished`. What a killed run left there is used again, pass by
  pass, when it is of the same logs and settings.

  Args:
    config: of which `data` matters.
    directory: for this data set only.
    report: takes lines of progress.
    columns: samples in memory, instead of logs.
    before: data of another run, whose counts go into these.

  Raises:
    UserError: damaged or missing logs, settings that do not fit, a full disk,
      or a data set made from other logs or settings.
  """
  config_check.check(config)
  directory = directory.rstrip("/")
  reader = columns or staging.reader_of(config)
  reader.schema(config.data)  # or an error, before all work
  if prepared.exists(directory):
    found = prepared.load(directory)
    _check_same(found, config.data, reader, before, report)
    _remove(os.path.join(directory, staging.FOLDER))
    return found
  of = made_from.settings_of(config.data, reader, {}, report)
  of = made_from.with_counts(of, config.data, before, {})
  if os.path.exists(directory) and os.listdir(directory):
    raise UserError(
      f"{directory} holds other files but no prepared data set: delete it or"
      " use another --workdir"
    )
  try:
    _run(config.data, of, f"{directory}.unfinished", report, reader)
    files.move_folder(f"{directory}.unfinished", directory)
  except (OSError, duckdb.Error, RuntimeError) as e:
    if not _disk_full(e):
      if isinstance(e, duckdb.OutOfMemoryException):
        raise UserError(
          f"data.memory_mb={config.data.memory_mb} is too little to prepare"
          f" these logs ({e}): raise it"
        ) from e
      raise
    free = shutil.disk_usage(os.path.dirname(directory) or ".").free >> 20
    raise UserError(
      f"no space left on the disk of {directory} while preparing ({free:,}"
      f" MiB free; {e}): free some and run again, or use another --workdir"
    ) from e
  _remove(os.path.join(directory, staging.FOLDER))
  return prepared.load(directory)


def _check_same(
  found: Prepared,
  data: Data,
  reader: Reader,
  before: Before | None,
  report: Report,
) -> None:
  """Raises UserError where a data set is of other logs or settings.

  Logs that are not there any more are taken for those that it is of.
  """
  try:
    now = made_from.settings_of(data, reader, found.logs, report)
  except log_files.MissingError as e:
    made_from.check_but_logs(found.settings, data, reader, found.directory)
    report(f"{e}: what was prepared from it before is used")
  else:
    now = made_from.with_counts(now, data, before, found.settings)
    made_from.check_same(found.settings, now.settings, found.directory)


def _disk_full(e: BaseException) -> bool:
  """Whether the error means that nothing more can be written."""
  if isinstance(e, OSError) and e.errno:
    return e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  message = str(e).lower()
  return any(
    s in message
    for s in ("no space left", "file too large", "quota", "max_temp_directory")
  )


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)


# ---- The passes


def _run(
  data: Data,
  of: MadeFrom,
  directory: str,
  report: Report,
  reader: Reader,
) -> None:
  """Runs the passes in `directory`; those that are done there are not repeated.

  Raises:
    UserError: damaged logs, or too few samples.
  """
  staged = _stage(data, reader, of.settings, directory, report)
  chunks = _Chunks(directory, staged, data, reader, report)
  spill = os.path.join(chunks.folder, "spill")
  with vocabulary.open_engine(data.memory_mb, spill) as engine:
    fingerprint, counted = _count(engine, chunks, of)
    samples = _pack(engine, chunks, data.block_samples)
  _remove(spill)
  prepared.save(
    directory,
    chunks.schema,
    samples,
    numbers=chunks.numbers,
    fingerprint=fingerprint,
    counted=counted,
    settings=of.settings,
    logs=of.logs,
    teacher=_read_json(os.path.join(directory, "logs", "teacher.json")),
  )


def _stage(
  data: Data,
  reader: Reader,
  settings: dict[str, Any],
  directory: str,
  report: Report,
) -> Staged:
  """Stages the logs, where that is not done yet with these settings.

  Synthetic logs are written first.
  """
  folder = os.path.join(directory, staging.FOLDER)
  done = os.path.join(folder, "staged.json")
  key = settings | {"data.max_bad_rows": data.max_bad_rows}
  found = _read_json(done)
  if found and found.get("settings") == key and "staged" in found:
    return Staged(**found["staged"])
  _remove(directory)
  os.makedirs(folder)
  if data.format == "synthetic" and not isinstance(reader, Columns):
    logs = os.path.join(directory, "logs")
    synthetic.write(data, logs, report)
    written = os.path.join(log_files.escape(logs), "*.tsv")
    data = dataclasses.replace(data, train=written)
  staged = staging.write(data, reader, directory, report)
  content = {"settings": key, "staged": dataclasses.asdict(staged)}
  files.write(done, json.dumps(content))
  return staged


class _Chunks:
  """The staged chunks, as each of the later passes reads them."""

  def __init__(
    self,
    directory: str,
    staged: Staged,
    data: Data,
    reader: Reader,
    report: Report,
  ):
    """Raises UserError where training or testing would have no sample."""
    self.directory, self.staged, self.report = directory, staged, report
    self.schema = schema = reader.schema(data)
    log = reader.columns if isinstance(reader, Log) else log_schema.Schema()
    self.min_counts = dict.fromkeys(schema.tables, data.min_count)
    self.min_counts |= log_schema.min_counts(log, data.min_count)
    self.log_numbers = log.numbers
    self.numbers: tuple[Fitted, ...] = ()  # `fit` sets them
    self.folder = os.path.join(directory, staging.FOLDER)
    self.vocabulary = os.path.join(directory, vocabulary.FILE)
    tables = schema.tables
    self.table_of = np.array(
      [tables.index(f.table) for f in schema.features], np.int16
    )
    self.split = Split(data, staged.train_rows, staged.rows)
    if log.time and not data.test and data.split == "time":
      parts = range(len(staged.sizes))
      times = lambda: (staging.times(self.folder, i) for i in parts)
      cut = time_cut(times, self.split.train) if self.split.train else None
      self.split = dataclasses.replace(self.split, cut=cut)
    if not 0 < self.split.train < self.split.total:
      raise UserError(
        f"the logs hold {self.split.total:,} samples, of which"
        f" {self.split.train:,} would train and the rest test: both need at"
        " least one"
      )

  def fit(self) -> None:
    """Fits the normalisers of the log's numbers to the training split.

    Unless they are those of another run, which this one goes on from.
    """
    if self.numbers or not self.log_numbers:
      return
    self.numbers = fit_numbers.fit(
      self.log_numbers,
      (
        fit_numbers.sums(
          self.log_numbers,
          arrays["dense"],
          row,
          self._trains(row, arrays),
          self.split.train,
        )
        for row, arrays, _ in self._read("fit")
      ),
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
    for i in range(len(self.staged.sizes)):
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
    progress = Progress(f"prepare: {name}", self.report, self.staged.rows)
    for row, arrays, values in staging.read(self.folder, self.staged, progress):
      yield row, *numbers.bucketed(self.numbers, arrays, values)


def _count(
  engine: duckdb.DuckDBPyConnection, chunks: _Chunks, of: MadeFrom
) -> tuple[str, int]:
  """Fits the normalisers and writes the vocabulary, where that is not done.

  Returns:
    The vocabulary's fingerprint, and the samples that its counts are of.
  """
  done = os.path.join(chunks.folder, "counted.json")
  found = _read_json(done)
  if found is None or "numbers" not in found:
    chunks.numbers = old_vocabulary.numbers_of(of.before, of.settings)
    chunks.fit()
    tables = chunks.schema.tables
    fingerprint, share = old_vocabulary.count(
      engine,
      chunks.counts(),
      tables,
      [chunks.min_counts[t] for t in tables],
      chunks.vocabulary,
      before=of.before,
      settings=of.settings,
    )
    found = {
      "vocabulary": fingerprint,
      "samples": round(chunks.split.train * share),
      "numbers": [x._asdict() for x in chunks.numbers],
    }
    files.write(done, json.dumps(found))
  chunks.numbers = tuple(Fitted.from_json(x) for x in found["numbers"])
  return found["vocabulary"], found["samples"]


def _pack(
  engine: duckdb.DuckDBPyConnection, chunks: _Chunks, block_samples: int
) -> dict[str, int]:
  """Writes the blocks; returns the samples of each split."""
  target = os.path.join(chunks.directory, prepared.BLOCKS)
  _remove(target)
  ranks = vocabulary.ranks(
    engine, chunks.values, chunks.schema.tables, chunks.vocabulary
  )
  samples = chunks.samples(ranks)
  return blocks.write(ahead(samples), chunks.schema, block_samples, target)


def _read_json(path: str) -> dict[str, Any] | None:
  """Reads what a pass left; None where there is nothing, or it is damaged."""
  try:
    found = files.read_json(path)
  except (FileNotFoundError, ValueError):
    return None
  return found if isinstance(found, dict) else None
