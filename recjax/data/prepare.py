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
from collections.abc import Callable
from typing import Any

import duckdb

from recjax import config_check, files
from recjax.config import Config, Data
from recjax.data import (
  beam_prepare,
  blocks,
  fit_numbers,
  log_files,
  made_from,
  old_vocabulary,
  passes,
  prepared,
  staging,
  synthetic,
  vocabulary,
)
from recjax.data.ahead import ahead
from recjax.data.beam_prepare import Found
from recjax.data.columns import Columns
from recjax.data.made_from import MadeFrom
from recjax.data.numbers import Fitted
from recjax.data.old_vocabulary import Before
from recjax.data.passes import Chunks
from recjax.data.prepared import Prepared
from recjax.data.staging import Reader, Staged
from recjax.errors import UserError

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
        raise vocabulary.too_little(config.data.memory_mb, e) from e
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
  made = _passes if data.engine == "duckdb" else _on_beam
  found = made(data, reader, of, directory, report)
  prepared.save(
    directory,
    reader.schema(data),
    found.samples,
    numbers=found.numbers,
    fingerprint=found.fingerprint,
    counted=found.counted,
    settings=of.settings,
    logs=of.logs,
    teacher=_read_json(os.path.join(directory, "logs", "teacher.json")),
  )


def _passes(
  data: Data,
  reader: Reader,
  of: MadeFrom,
  directory: str,
  report: Report,
) -> Found:
  """Runs the passes in this process."""
  staged = _stage(data, reader, of.settings, directory, report)
  folder = os.path.join(directory, staging.FOLDER)
  sizes = staged.sizes
  times = lambda: (staging.times(folder, i) for i in range(len(sizes)))
  split = passes.split_of(data, reader, staged.train_rows, staged.rows, times)
  chunks = Chunks(folder, sizes, split, data, reader, report=report)
  spill = os.path.join(folder, "spill")
  with vocabulary.open_engine(data.memory_mb, spill) as engine:
    fingerprint, counted = _count(engine, chunks, of, directory)
    samples = _pack(engine, chunks, directory, data.block_samples)
  _remove(spill)
  return Found(samples, chunks.numbers, fingerprint, counted)


def _on_beam(
  data: Data,
  reader: Reader,
  of: MadeFrom,
  directory: str,
  report: Report,
) -> Found:
  """Runs the passes on Apache Beam, in folders that all workers share."""
  folder = os.path.join(directory, staging.FOLDER)
  if of.before is not None and old_vocabulary.BEFORE in of.settings:
    raise UserError(
      "data.engine=beam does not add counts of another run: set it to duckdb,"
      " or data.count_decay to 0"
    )
  key = of.settings | {"data.max_bad_rows": data.max_bad_rows}
  done = os.path.join(folder, "beam.json")
  if _read_json(done) != key:
    _remove(directory)
    os.makedirs(folder)
    files.write(done, json.dumps(key))
  data = _with_logs(data, reader, directory, report)
  known = old_vocabulary.numbers_of(of.before, of.settings)
  return beam_prepare.run(data, reader, directory, report, known)


def _with_logs(
  data: Data, reader: Reader, directory: str, report: Report
) -> Data:
  """Writes synthetic logs; returns the config that names them."""
  if data.format != "synthetic" or isinstance(reader, Columns):
    return data
  logs = os.path.join(directory, "logs")
  if not os.path.exists(os.path.join(logs, "teacher.json")):
    synthetic.write(data, logs, report)
  written = os.path.join(log_files.escape(logs), "*.tsv")
  return dataclasses.replace(data, train=written)


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
  data = _with_logs(data, reader, directory, report)
  staged = staging.write(data, reader, directory, report)
  content = {"settings": key, "staged": dataclasses.asdict(staged)}
  files.write(done, json.dumps(content))
  return staged


def _count(
  engine: duckdb.DuckDBPyConnection,
  chunks: Chunks,
  of: MadeFrom,
  directory: str,
) -> tuple[str, int]:
  """Fits the normalisers and writes the vocabulary, where that is not done.

  Returns:
    The vocabulary's fingerprint, and the samples that its counts are of.
  """
  done = os.path.join(chunks.folder, "counted.json")
  found = _read_json(done)
  if found is None or "numbers" not in found:
    chunks.numbers = old_vocabulary.numbers_of(of.before, of.settings)
    if chunks.log_numbers and not chunks.numbers:
      chunks.numbers = fit_numbers.fit(chunks.log_numbers, chunks.sums())
    tables = chunks.schema.tables
    fingerprint, share = old_vocabulary.count(
      engine,
      chunks.counts(),
      tables,
      [chunks.min_counts[t] for t in tables],
      os.path.join(directory, vocabulary.FILE),
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
  engine: duckdb.DuckDBPyConnection,
  chunks: Chunks,
  directory: str,
  block_samples: int,
) -> dict[str, int]:
  """Writes the blocks; returns the samples of each split."""
  target = os.path.join(directory, prepared.BLOCKS)
  _remove(target)
  path = os.path.join(directory, vocabulary.FILE)
  ranks = vocabulary.ranks(engine, chunks.values, chunks.schema.tables, path)
  samples = chunks.samples(ranks)
  return blocks.write(ahead(samples), chunks.schema, block_samples, target)


def _read_json(path: str) -> dict[str, Any] | None:
  """Reads what a pass left; None where there is nothing, or it is damaged."""
  try:
    found = files.read_json(path)
  except (FileNotFoundError, ValueError):
    return None
  return found if isinstance(found, dict) else None
