"""A log that nobody has described yet: a sample of it, and what it holds."""

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.config import Config, Data, Text
from recjax.data import (
  column_facts,
  csv_rows,
  guess_schema,
  log_files,
  log_format,
  movielens,
  staging,
)
from recjax.data.column_facts import Column
from recjax.data.guess_schema import Proposal
from recjax.data.log import Format, Log
from recjax.data.text import DamagedLines
from recjax.errors import UserError
from recjax.log_schema import Id, Ids, Number, Schema
from recjax.schema import columns_of

ROWS = 100_000  # looked at
_CELLS = 20_000_000  # at most, of logs of very many columns
_BYTES = 1 << 28  # of the sample, in memory
_FILES = 8  # over which the sample is spread
_DAMAGED = 1_000  # rows; more of them, and the log is something else


class Sample(NamedTuple):
  """Rows from the beginning of some of a log's files."""

  tables: tuple[pa.Table, ...]  # of a file each
  types: dict[str, str]  # of columns, in words
  rows: int
  bytes_read: int
  damaged: DamagedLines


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What a log holds, and what is proposed for it."""

  data: Data  # format and text as they were found
  paths: tuple[str, ...]
  bytes: int  # of all files
  rows: int  # looked at
  total: int  # of all files, by their bytes
  damaged: DamagedLines  # among the rows looked at
  columns: tuple[Column, ...]
  proposal: Proposal


def inspect(config: Config, format_given: bool) -> Inspection:
  """Looks at the log that data.train names.

  Args:
    config: whose `data` it is.
    format_given: whether data.format is to be believed; else it is found.

  Raises:
    UserError: there is no such log, or it is nothing that can be read.
  """
  data = config.data
  fixed = format_given and data.format == "movielens"
  if fixed or (not format_given and log_format.is_movielens(data.train)):
    return _movielens(dataclasses.replace(data, format="movielens"))
  paths = log_files.find(data.train, "data.train")
  if not format_given:
    found = log_format.find(paths[0], data.text)
    data = dataclasses.replace(data, format=found.format, text=found.text)
  elif data.format == "csv":
    text = log_format.text_of(paths[0], data.text)
    data = dataclasses.replace(data, text=text)
  config = dataclasses.replace(config, data=data)
  sample = _sample(_format_of(config), paths, _text(data), config)
  _check(sample, paths[0], data)
  columns = tuple(
    column_facts.column(name, of, [t.column(name) for t in sample.tables])
    for name, of in sample.types.items()
  )
  size = sum(map(os.path.getsize, paths))
  total = sample.rows
  if sample.bytes_read < size:
    total = int(sample.rows * size / max(sample.bytes_read, 1))
  if data.format in ("criteo", "synthetic"):
    proposal = _criteo(columns)
  else:
    proposal = guess_schema.propose(columns)
  return Inspection(
    *(data, paths, size, sample.rows, total, sample.damaged),
    columns,
    proposal,
  )


def _check(sample: Sample, path: str, data: Data) -> None:
  """Raises UserError where hardly any row can be read."""
  bad = len(sample.damaged.lines)
  if sample.rows > 2 * bad:
    return
  if not bad:
    raise UserError(f"data.train: {path} holds no row")
  of, line, field, reason = sample.damaged.lines[0]
  raise UserError(
    f"data.train: {bad:,} of {bad + sample.rows:,} rows cannot be read as"
    f" {data.format}, the first {of}, line {line}"
    f"{', ' + field if field else ''}: {reason}; set data.format to what it is,"
    " or name a log"
  )


def _text(data: Data) -> Text:
  if data.format in ("criteo", "synthetic"):
    return log_format.criteo_text()
  return data.text


def _format_of(config: Config) -> Format:
  """Returns what reads rows of the log."""
  reader = staging.reader_of(config)
  if isinstance(reader, Log):
    return reader.format
  return Format(csv_rows.read, csv_rows.names)  # a Criteo log


def _sample(
  format: Format, paths: Sequence[str], text: Text, config: Config
) -> Sample:
  """Reads the first rows of files that are spread over the log."""
  some = sorted({int(i) for i in np.linspace(0, len(paths) - 1, _FILES)})
  if format.names is None:
    raise UserError(
      f"data.format={config.data.format!r} does not tell its columns: give"
      " register_format a Format with `names`"
    )
  types = format.names(paths[0], text)
  most = max(1, min(ROWS, _CELLS // max(len(types), 1)) // len(some))
  damaged = DamagedLines(_DAMAGED)
  tables, read = [], 0.0
  for i in some:
    table, of_it = _first(
      format,
      paths[i],
      dict.fromkeys(types, "text"),
      text,
      most=most,
      memory=_BYTES // len(some),
      damaged=damaged,
    )
    tables.append(table)
    read += of_it
  rows = sum(len(t) for t in tables)
  return Sample(tuple(tables), types, rows, int(read), damaged)


def _first(
  format: Format,
  path: str,
  wanted: dict[str, str],
  text: Text,
  *,
  most: int,
  memory: int,
  damaged: DamagedLines,
) -> tuple[pa.Table, float]:
  """Reads the first rows of a file.

  Args:
    format: what reads it.
    path: of the file.
    wanted: the kinds of columns.
    text: how it is written.
    most: rows.
    memory: bytes that they may take.
    damaged: takes damaged rows.

  Returns:
    (the rows, the bytes of the file that they take).
  """
  parts, rows, size = [], 0, os.path.getsize(path)
  read = size
  for part in format.read(path, wanted, text, damaged):
    table, before = part.table, rows
    left = min(most - rows, len(table))
    if table.nbytes > memory:
      left = max(1, min(left, len(table) * memory // table.nbytes))
    if left < len(table):
      table = table.take(pa.array(np.arange(left)))  # frees the others
    parts.append(table)
    rows, memory = rows + left, memory - table.nbytes
    if rows >= most or memory <= 0 or left < len(part.table):
      read = min(part.read, size) * rows / (before + len(part.table))
      break
  if not parts:
    nothing = pa.table({name: pa.nulls(0, pa.string()) for name in wanted})
    return nothing, read
  return pa.concat_tables(parts, promote_options="permissive"), read


# ---- Formats whose columns are known


def _criteo(columns: Sequence[Column]) -> Proposal:
  """Returns what a Criteo log's columns are; bags are told by commas."""
  seen = {c.name: c for c in columns}
  features = []
  for c in columns[14:]:
    commas = pc.max(pc.count_substring(c.values, ",")).as_py() or 0
    if commas:
      seen[c.name] = column_facts.as_bag(c, ",")
    features.append(
      Ids(c.name, commas + 1, separator=",") if commas else Id(c.name)
    )
  numbers = tuple(Number(c.name, "log1p") for c in columns[1:14])
  schema = Schema((columns[0].name,), numbers, tuple(features))
  return Proposal(schema, seen, {}, ("time", "the last rows"))


def _movielens(data: Data) -> Inspection:
  """Looks at MovieLens' ratings, users and movies."""
  paths = movielens.sources(data)["data.train"]
  data = dataclasses.replace(data, split="random")
  damaged, inputs = DamagedLines(_DAMAGED), movielens.schema(data)
  chunk = next(movielens.chunks(data, inputs, paths, damaged))
  rows = len(chunk.label)
  label = column_facts.column(
    "label", "rating > 3", [pa.array(chunk.label.astype(np.int8))]
  )
  columns, features = [label], []
  for name, at in columns_of(inputs.features).items():
    codes = chunk.codes[:, at]
    there = codes >= 0
    ids = pa.DictionaryArray.from_arrays(
      pa.array(codes[there].astype(np.int32)), chunk.values
    )
    if at.stop - at.start > 1:
      ends = np.append(0, np.cumsum(there.sum(1))).astype(np.int32)
      ids = pa.ListArray.from_arrays(pa.array(ends), ids)
      features.append(Ids(name, at.stop - at.start, pooling="mean"))
    else:
      features.append(Id(name))
    columns.append(column_facts.column(name, "text", [ids]))
  schema = Schema(("label",), features=tuple(features))
  why = "the same users and movies on both sides"
  seen = {c.name: c for c in columns}
  return Inspection(
    data=data,
    paths=paths,
    bytes=sum(map(os.path.getsize, paths)),
    rows=rows,
    total=round(rows / chunk.read),
    damaged=damaged,
    columns=tuple(columns),
    proposal=Proposal(schema, seen, {}, ("random", why)),
  )
