"""A log that a data set was not prepared from, as samples of its vocabulary.

Streamed: nothing is staged on disk, and of the log some hundred thousand rows
are in memory at a time. Ids that training has not seen, or too seldom, are out
of vocabulary.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from recjax.config import Config, Data
from recjax.data import log_files, numbers, staging, vocabulary
from recjax.data.ahead import ahead
from recjax.data.chunks import Chunk
from recjax.data.log import Log
from recjax.data.prepared import Prepared
from recjax.data.staging import Reader
from recjax.data.text import DamagedLines
from recjax.errors import UserError

_ROWS = 1 << 18  # whose values are looked up together, about


class Part(NamedTuple):
  """Consecutive samples."""

  arrays: dict[str, np.ndarray]  # of a batch, [k, ...]; see data/batches.py
  keep: pa.Table | None  # [k] columns that predictions repeat
  lookups: np.ndarray  # [F] int64
  unseen: np.ndarray  # [F] int64, those out of vocabulary
  read: float  # share of the log's bytes so far


class OtherLog(NamedTuple):
  """A log to score."""

  reader: ModuleType | Log
  paths: tuple[str, ...]
  keep: tuple[str, ...]  # columns that predictions repeat

  def stamps(self) -> list[list[Any]]:
    """Returns name, size and time of change of its files."""
    stats = ((path, os.stat(path)) for path in self.paths)
    return [[path, s.st_size, s.st_mtime_ns] for path, s in stats]


def open_log(config: Config, field: str) -> OtherLog:
  """Finds the log that data.predict or data.evaluate names.

  Raises:
    UserError: there is none, or the format has no such logs.
  """
  data = config.data
  if data.format == "movielens":
    raise UserError(
      f"data.{field}: data.format=movielens has one log; a log of the other "
      "formats can be scored with what was trained on another"
    )
  paths = log_files.find(getattr(data, field), f"data.{field}")
  keep = config.schema.keep if field == "predict" else ()
  return OtherLog(staging.reader_of(config), paths, keep)


def read(
  prepared: Prepared,
  log: OtherLog,
  data: Data,
  report: Callable[[str], None],
) -> Iterator[Part]:
  """Reads the samples of a log, in order.

  Args:
    prepared: whose vocabulary and normalisers say what a model gets.
    log: of the same columns; its labels may be missing.
    data: the config; `max_bad_rows` may be skipped.
    report: takes a line about damaged ones.

  Raises:
    UserError: the log has other columns than the data set, or is damaged.
  """
  _check_inputs(prepared, log.reader, data)
  schema, damaged = prepared.schema, DamagedLines(data.max_bad_rows)
  with tempfile.TemporaryDirectory(prefix="recjax_") as spill:
    path = os.path.join(prepared.directory, vocabulary.FILE)
    with vocabulary.open_engine(data.memory_mb, spill) as engine:
      known = vocabulary.Known(engine, schema.tables, path)
      waiting: list[Chunk] = []
      chunks = log.reader.chunks(
        data, schema, log.paths, damaged, keep=log.keep
      )
      for chunk in ahead(chunks):
        waiting.append(chunk)
        if sum(len(c.label) for c in waiting) >= _ROWS:
          yield _part(prepared, known, waiting)
          waiting = []
      if waiting:
        yield _part(prepared, known, waiting)
  if damaged.lines:
    path, line, field, why = damaged.lines[0]
    report(
      f"skipped {len(damaged.lines):,} damaged lines; the first is {path}, "
      f"line {line}, {field}: {why}"
    )


def _check_inputs(prepared: Prepared, reader: Reader, data: Data) -> None:
  """Raises UserError where a log's samples are not those of a data set."""
  schema = reader.schema(data)
  for what, was, now in (
    ("schema.numbers", prepared.schema.dense, schema.dense),
    ("schema.features", prepared.schema.features, schema.features),
    ("schema.labels", prepared.schema.labels, schema.labels),
  ):
    if was != now:
      raise UserError(
        f"{what}: the data set in {prepared.directory} has {was}, this config "
        f"{now}: use the config that it was prepared with"
      )


def _part(
  prepared: Prepared, known: vocabulary.Known, chunks: list[Chunk]
) -> Part:
  """Looks the values of some chunks up; makes their samples."""
  schema = prepared.schema
  tables = np.array([schema.tables.index(f.table) for f in schema.features])
  staged = [
    numbers.bucketed(prepared.numbers, dict(vars(c)), c.values) for c in chunks
  ]
  feature = np.concatenate([arrays["feature"] for arrays, _ in staged])
  rank, in_vocabulary = known.ranks(
    tables[feature], pa.concat_arrays([values for _, values in staged])
  )
  samples, times, start = [], [], 0
  for arrays, values in staged:
    stop = start + len(values)
    codes = arrays["codes"]
    times.append(np.bincount(codes[codes >= 0], minlength=len(values)))
    ids = np.append(rank[start:stop], np.int32(-1))[codes]
    samples.append(_sample_arrays(prepared, arrays | {"ids": ids}))
    start = stop
  n, size = np.concatenate(times), len(schema.features)
  return Part(
    {a: np.concatenate([x[a] for x in samples]) for a in samples[0]},
    None if chunks[0].keep is None else _joined([c.keep for c in chunks]),
    np.bincount(feature, n, size).astype(np.int64),
    np.bincount(feature, n * ~in_vocabulary, size).astype(np.int64),
    chunks[-1].read,
  )


def _joined(tables: list[pa.Table]) -> pa.Table:
  """Joins kept columns, whose types may be found in each part anew."""
  return pa.concat_tables(tables, promote_options="permissive")


def _sample_arrays(
  prepared: Prepared, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns the arrays that the forward pass takes, [k, ...], and the label."""
  dense = arrays["dense"]
  if prepared.numbers:
    dense = numbers.normalised(prepared.numbers, dense)
  found = {"label": arrays["label"], "dense": dense, "ids": arrays["ids"]}
  if prepared.schema.weighted:
    found["weights"] = arrays["weights"]
  return found
