"""A log of any columns, which the config's schema names: files -> chunks.

A format's reader gives rows by the names of their columns (rows.py), cells.py
makes numbers and ids of them.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recjax import log_schema
from recjax.config import Data, Text
from recjax.data import cells, log_files
from recjax.data.cells import Fault
from recjax.data.chunks import Chunk, encode
from recjax.data.rows import Rows
from recjax.data.text import DamagedLines
from recjax.schema import Schema


class Format(NamedTuple):
  """How a format of logs is read: two functions of a file.

  Attributes:
    read: (path, {column: 'id', 'number' or 'text'}, config.Text, damaged lines)
      -> rows of these columns.
    names: (path, config.Text) -> {column: its type in words}; None = only
      `read` knows.
  """

  read: Callable[[str, Mapping[str, str], Text, DamagedLines], Iterator[Rows]]
  names: Callable[[str, Text], dict[str, str]] | None = None


@dataclasses.dataclass(frozen=True)
class Log:
  """Reads a log's files; has what a module of a log format has."""

  columns: log_schema.Schema
  format: Format

  def schema(self, data: Data) -> Schema:
    """Returns the inputs of a sample; UserError where the columns are none."""
    return log_schema.inputs_of(self.columns)

  def sources(self, data: Data) -> dict[str, tuple[str, ...]]:
    """Finds the files, in time order, that each config field names.

    Raises:
      UserError: see log_files.find.
    """
    return log_files.sources(data)

  def chunks(
    self,
    data: Data,
    inputs: Schema,
    paths: tuple[str, ...],
    damaged: DamagedLines,
    *,
    keep: tuple[str, ...] | None = None,
  ) -> Iterator[Chunk]:
    """Reads the samples of files, in order; numbers as they are.

    Args:
      data: the config.
      inputs: see `schema`.
      paths: of the files.
      damaged: takes damaged rows.
      keep: None = samples to train on. Else to score: labels may be missing,
        and are nan then, there is no need of weights and times, and chunks
        bring these columns.

    Raises:
      UserError: a file that cannot be read; more damaged rows than allowed.
    """
    sizes = [os.path.getsize(path) for path in paths]
    for i, path in enumerate(paths):
      wanted = self._wanted(path, data.text, keep)
      for rows in self.format.read(path, wanted, data.text, damaged):
        chunk = self._chunk(inputs, path, rows, damaged, keep=keep)
        if chunk is not None:
          read = (sum(sizes[:i]) + min(rows.read, sizes[i])) / sum(sizes)
          yield dataclasses.replace(chunk, read=read)

  def _wanted(
    self, path: str, options: Text, keep: tuple[str, ...] | None
  ) -> dict[str, str]:
    """Returns what the reader is to give of a file."""
    wanted = _wanted(self.columns, keep)
    if keep is None or self.format.names is None:
      return wanted
    there = self.format.names(path, options)
    labels = {log_schema.label_of(x)[0] for x in self.columns.labels}
    return {n: k for n, k in wanted.items() if n in there or n not in labels}

  def _chunk(
    self,
    inputs: Schema,
    path: str,
    rows: Rows,
    damaged: DamagedLines,
    *,
    keep: tuple[str, ...] | None,
  ) -> Chunk | None:
    """Makes samples of rows; the damaged ones are left out."""
    table, at = rows.table, rows.at
    found, faults = _converted(self.columns, inputs, table, keep)
    while faults:  # that of a row may hide another's
      good = ~_report(path, at, faults, damaged)
      table, at = table.filter(pa.array(good)), at[good]
      found, faults = _converted(self.columns, inputs, table, keep)
    return found if len(at) else None


def _report(
  path: str, at: np.ndarray, faults: list[Fault], damaged: DamagedLines
) -> np.ndarray:
  """Tells of each damaged row what is wrong first: [k] bool, which they are."""
  bad = np.zeros(len(at), bool)
  told = sorted(
    (int(row), i, fault.column, reason)
    for i, fault in enumerate(faults)
    for row, reason in zip(fault.rows, fault.reasons, strict=True)
  )
  for row, _, column, reason in told:
    if not bad[row]:
      damaged.add(path, int(at[row]), column, reason)
      bad[row] = True
  return bad


def _wanted(
  columns: log_schema.Schema, keep: tuple[str, ...] | None
) -> dict[str, str]:
  """Returns what a reader is to give: {column: 'number', 'id' or 'text'}.

  keep: see `Log.chunks`.
  """
  found: dict[str, str] = {}

  def want(name: str, kind: str) -> None:
    found[name] = kind if found.get(name, kind) == kind else "text"

  for label in columns.labels:
    want(log_schema.label_of(label)[0], "number")
  for x in columns.numbers:
    want(x.name, "number")
  for f in columns.features:
    if isinstance(f, log_schema.Cross):
      for name in f.names:
        want(name, "id")
    elif isinstance(f, log_schema.Ids):
      want(f.name, "text")
      if f.weights:
        want(f.weights, "text")
    else:
      want(f.name, "id")
  for name in (columns.weight, columns.time) if keep is None else ():
    if name:
      want(name, "number")
  for name in keep or ():
    want(name, "text")
  return found


# ---- Conversion


def _converted(
  schema: log_schema.Schema,
  inputs: Schema,
  table: pa.Table,
  keep: tuple[str, ...] | None,
) -> tuple[Chunk | None, list[Fault]]:
  """Returns the samples of rows, or the cells that none can have.

  keep: see `Log.chunks`.
  """
  columns = {name: cells.flat(table[name]) for name in table.column_names}
  training, faults = keep is None, []
  of_labels = []
  for label in schema.labels:
    name, threshold = log_schema.label_of(label)
    column = columns.get(name)
    if column is None and not training:
      column = pa.nulls(len(table))
    found, wrong = cells.labels(
      name, column, threshold, may_be_missing=not training
    )
    of_labels.append(found)
    faults += wrong
  of_numbers = []
  for x in schema.numbers:
    found, wrong = cells.numbers(x.name, columns[x.name])
    of_numbers.append(found)
    faults += wrong
  weight = None
  if schema.weight and training:
    weight, wrong = cells.sample_weights(schema.weight, columns[schema.weight])
    faults += wrong
  time = None
  if schema.time and training:
    time, wrong = cells.times(schema.time, columns[schema.time])
    faults += wrong
  ids, weights, wrong = _ids(schema, columns)
  faults += wrong
  if faults:
    return None, faults
  k = len(table)
  last = [f.name for f in schema.features if getattr(f, "keep", "") == "last"]
  labels = np.stack(of_labels, axis=1) if len(of_labels) > 1 else None
  return (
    Chunk(
      label=of_labels[0],
      dense=np.stack(of_numbers, axis=1) if of_numbers else np.empty((k, 0)),
      read=0.0,
      labels=labels,
      sample_weight=weight,
      time=time,
      keep=None if training else table.select(keep),
      **encode(inputs, ids, weights, last),
    ),
    [],
  )


def _ids(
  schema: log_schema.Schema, columns: Mapping[str, pa.Array]
) -> tuple[dict[str, pa.Array], dict[str, pa.Array], list[Fault]]:
  """Returns the cells of each feature, the weights of bags, and what is wrong.

  Numbers with buckets have none yet: those are fitted first.
  """
  found, weights, faults = {}, {}, []
  for f in schema.features:
    match f:
      case log_schema.Ids():
        of = (f.weights, columns[f.weights]) if f.weights else None
        bags = cells.bags(
          f.name, columns[f.name], f.separator, of, f.weight_separator
        )
        found[f.name] = bags.ids
        if bags.weights is not None:
          weights[f.name] = bags.weights
        faults += bags.faults
      case log_schema.Hashed():
        coded = cells.ids(f.name, columns[f.name])
        found[f.name] = cells.hashed(coded, f.rows)
      case log_schema.Cross():
        parts = [cells.ids(name, columns[name]) for name in f.names]
        found[f.name] = cells.hashed(cells.crossed(parts), f.rows)
      case log_schema.Id():
        found[f.name] = cells.ids(f.name, columns[f.name])
  k = len(next(iter(columns.values())))
  nothing = pa.nulls(k, pa.string())
  for x in schema.numbers:
    if x.buckets:
      found[x.name] = nothing
  return found, weights, faults
