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
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from recjax import config_check, files
from recjax.config import Config, Data
from recjax.data import (
  blocks,
  log_files,
  prepared,
  staging,
  synthetic,
  text,
  vocabulary,
)
from recjax.data.columns import Columns
from recjax.data.prepared import Prepared
from recjax.data.split import Split
from recjax.data.staging import Reader, Staged
from recjax.errors import UserError
from recjax.progress import Progress
from recjax.schema import Schema

Report = Callable[[str], None]


def prepare(
  config: Config,
  directory: str,
  report: Report = print,
  columns: Columns | None = None,
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

  Raises:
    UserError: damaged or missing logs, settings that do not fit, a full disk,
      or a data set made from other logs or settings.
  """
  config_check.check(config)
  directory = directory.rstrip("/")
  reader = columns or staging.FORMATS[config.data.format]
  found = prepared.load(directory) if prepared.exists(directory) else None
  known = found.logs if found else {}
  settings, logs = _settings(config.data, reader, known, report)
  if found:
    _check_same(found.settings, settings, directory)
    _remove(os.path.join(directory, staging.FOLDER))
    return found
  if os.path.exists(directory) and os.listdir(directory):
    raise UserError(
      f"{directory} holds other files but no prepared data set: delete it or"
      " use another --workdir"
    )
  try:
    made_from = MadeFrom(settings, logs)
    _run(config.data, made_from, f"{directory}.unfinished", report, reader)
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


# ---- Settings


class MadeFrom(NamedTuple):
  """What a data set is prepared from."""

  settings: dict[str, Any]  # all that it depends on; logs by fingerprints
  logs: dict[str, str]  # see `log_files.fingerprints`


def _settings(
  data: Data, reader: Reader, known: dict[str, str], report: Report
) -> MadeFrom:
  """Returns all that the prepared data depends on, by value.

  Args:
    data: the config.
    reader: of the logs.
    known: fingerprints that were taken before.
    report: takes lines of progress.

  Raises:
    UserError: there are no such logs, or one is named twice.
  """
  logs: dict[str, str] = {}
  names = ["format", "pooling", "min_count", "block_samples"]
  names += ["hotness", "weighted"]
  if not data.test:
    names += ["test_fraction", "split"]
    if data.split == "random":
      names += ["seed"]
  settings = {f"data.{name}": getattr(data, name) for name in names}
  if isinstance(reader, Columns):
    reader.sources(data)
    settings["columns"] = reader.fingerprint()
  elif data.format == "synthetic":
    settings["data.seed"] = data.seed
    for name, value in dataclasses.asdict(data.synthetic).items():
      settings[f"data.synthetic.{name}"] = value
  else:
    sources = reader.sources(data)
    log_files.check_apart(sources)
    of_logs, logs = log_files.fingerprints(sources, known, report)
    settings |= of_logs
  # As it reads back.
  return MadeFrom(json.loads(json.dumps(settings)), logs)


def _check_same(
  old: dict[str, Any], new: dict[str, Any], directory: str
) -> None:
  """Raises UserError where the settings of a data set differ."""
  differ = [
    f"{k} was {text.shown(old.get(k))}, is now {text.shown(new.get(k))}"
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k)
  ]
  if differ:
    raise UserError(
      f"{directory} was prepared from other logs or settings:"
      f" {'; '.join(differ)}. Set them back, use another --workdir, or delete"
      f" {directory}"
    )


# ---- The passes


def _run(
  data: Data,
  made_from: MadeFrom,
  directory: str,
  report: Report,
  reader: Reader,
) -> None:
  """Runs the passes in `directory`; those that are done there are not repeated.

  Raises:
    UserError: damaged logs, or too few samples.
  """
  schema = reader.schema(data)
  staged = _stage(data, reader, made_from.settings, directory, report)
  chunks = _Chunks(directory, schema, staged, data, report)
  spill = os.path.join(chunks.folder, "spill")
  with vocabulary.open_engine(data.memory_mb, spill) as engine:
    fingerprint = _count(engine, chunks, data.min_count)
    samples = _pack(engine, chunks, data.block_samples)
  _remove(spill)
  prepared.save(
    directory,
    schema,
    samples,
    fingerprint=fingerprint,
    settings=made_from.settings,
    logs=made_from.logs,
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
    schema: Schema,
    staged: Staged,
    data: Data,
    report: Report,
  ):
    """Raises UserError where training or testing would have no sample."""
    self.directory, self.schema, self.staged = directory, schema, staged
    self.report = report
    self.folder = os.path.join(directory, staging.FOLDER)
    self.vocabulary = os.path.join(directory, vocabulary.FILE)
    tables = schema.tables
    self.table_of = np.array(
      [tables.index(f.table) for f in schema.features], np.int16
    )
    self.split = Split(data, staged.train_rows, staged.rows)
    if not 0 < self.split.train < self.split.total:
      raise UserError(
        f"the logs hold {self.split.total:,} samples, of which"
        f" {self.split.train:,} would train and the rest test: both need at"
        " least one"
      )

  def counts(self) -> Iterator[tuple[np.ndarray, pa.Array, np.ndarray]]:
    """Yields (table, value, count in the training split) of each chunk."""
    for row, arrays, values in self._read("count"):
      codes = arrays["codes"]
      train = codes[self.split.mask(row, len(codes))]
      n = np.bincount(train[train >= 0], minlength=len(values))
      yield self.table_of[arrays["feature"]], values, n

  def values(self) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Yields (table, value) of each chunk."""
    for i in range(len(self.staged.sizes)):
      feature = staging.features(self.folder, i)
      yield self.table_of[feature], staging.values(self.folder, i)

  def samples(
    self, ranks: Iterator[np.ndarray]
  ) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (split, arrays of samples), given the ranks of `values`."""
    for row, arrays, _ in self._read("pack"):
      rank = np.append(next(ranks), np.int32(-1))  # which the code -1 finds
      arrays["ids"] = rank[arrays.pop("codes")]
      del arrays["feature"]
      train = self.split.mask(row, len(arrays["label"]))
      for name, mask in (("train", train), ("test", ~train)):
        if mask.any():
          yield name, {a: x[mask] for a, x in arrays.items()}

  def _read(
    self, name: str
  ) -> Iterator[tuple[int, dict[str, np.ndarray], pa.Array]]:
    progress = Progress(f"prepare: {name}", self.report, self.staged.rows)
    return staging.read(self.folder, self.staged, progress)


def _count(
  engine: duckdb.DuckDBPyConnection, chunks: _Chunks, min_count: int
) -> str:
  """Writes the vocabulary, where that is not done; returns its fingerprint."""
  done = os.path.join(chunks.folder, "counted.json")
  found = _read_json(done)
  if found is None or "vocabulary" not in found:
    found = {
      "vocabulary": vocabulary.count(
        engine,
        chunks.counts(),
        chunks.schema.tables,
        min_count,
        chunks.vocabulary,
      )
    }
    files.write(done, json.dumps(found))
  return found["vocabulary"]


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
  return blocks.write(samples, chunks.schema, block_samples, target)


def _read_json(path: str) -> dict[str, Any] | None:
  """Reads what a pass left; None where there is nothing, or it is damaged."""
  try:
    found = files.read_json(path)
  except (FileNotFoundError, ValueError):
    return None
  return found if isinstance(found, dict) else None
