"""Columns in memory (NumPy, lists, Arrow, pandas) -> chunks: a log from Python.

It has what a module of a log format has: `schema`, `sources` and `chunks`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.config import Data
from recjax.data.chunks import Chunk, encode
from recjax.data.text import DamagedLines
from recjax.errors import UserError
from recjax.schema import Feature, Schema

_ROWS = 1 << 17  # of a chunk


@dataclasses.dataclass(frozen=True)
class Columns:
  """Samples in time order, column by column."""

  table: pa.Table  # ids as strings, or lists of strings
  label: str
  inputs: Schema

  def schema(self, data: Data) -> Schema:
    """Returns the inputs of a sample."""
    return self.inputs

  def sources(self, data: Data) -> dict[str, tuple[str, ...]]:
    """Returns no files: the columns are the training log.

    Raises:
      UserError: the config names logs as well.
    """
    if data.train or data.test:
      raise UserError(
        f"data.train, data.test: {data.train or data.test!r} found, but the "
        "samples come from Python: leave both empty, and say with data.split "
        "and data.test_fraction which part is the test part"
      )
    return {"data.train": ()}

  def fingerprint(self) -> str:
    """Returns a hash of all that the columns hold."""
    digest = hashlib.sha256(repr((self.label, self.inputs)).encode())
    with pa.ipc.new_stream(_Hash(digest), self.table.schema) as writer:
      writer.write_table(self.table.combine_chunks())
    return f"columns {self.table.num_rows} {digest.hexdigest()[:32]}"

  def chunks(
    self,
    data: Data,
    inputs: Schema,
    paths: tuple[str, ...],
    damaged: DamagedLines,
  ) -> Iterator[Chunk]:
    """Yields the samples, some tens of thousands at a time."""
    total = self.table.num_rows
    for start in range(0, total, _ROWS):
      part = self.table.slice(start, _ROWS)
      cells = {f.name: part[f.name].combine_chunks() for f in inputs.features}
      dense = [part[name].to_numpy() for name in inputs.dense]
      yield Chunk(
        label=part[self.label].to_numpy().astype(np.float32),
        dense=np.stack(dense, axis=1).astype(np.float32)
        if dense
        else np.empty((len(part), 0), np.float32),
        read=(start + len(part)) / total,
        **encode(inputs, cells),
      )


class _Hash:
  """A file that only hashes what is written into it."""

  closed = False

  def __init__(self, digest):
    self._digest = digest

  def write(self, data) -> int:
    self._digest.update(data)
    return len(data)

  def flush(self) -> None:
    pass


def from_columns(
  columns: Mapping[str, Any] | pa.Table,
  label: str,
  dense: tuple[str, ...],
  features: tuple[Feature, ...],
) -> Columns:
  """Checks columns in memory and makes them a log.

  Args:
    columns: name -> values of all samples, in time order: a NumPy array, a list
      or whatever Arrow reads (a pandas Series), or an Arrow table. Ids are
      integers or strings, None = missing; those of a bag are lists.
    label: name of the 0/1 labels.
    dense: names of numeric inputs, taken as they are: scale them before.
    features: one a column of ids, by its name.

  Raises:
    UserError: a column is missing, or holds what it cannot.
  """
  table = columns if isinstance(columns, pa.Table) else _table(columns)
  wanted = [label, *dense, *(f.name for f in features)]
  missing = [name for name in wanted if name not in table.column_names]
  if missing:
    raise UserError(
      f"columns: there is no column {missing[0]!r}; there are "
      f"{', '.join(table.column_names)}"
    )
  if not table.num_rows:
    raise UserError("columns: they are empty")
  found = {label: _labels(label, table[label])}
  found |= {name: _numbers(name, table[name]) for name in dense}
  found |= {f.name: _ids(f, table[f.name]) for f in features}
  return Columns(pa.table(found), label, Schema(tuple(dense), features))


def _table(columns: Mapping[str, Any]) -> pa.Table:
  arrays = {}
  for name, values in columns.items():
    try:
      arrays[name] = pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as e:
      raise UserError(f"columns: {name}: {e}") from e
  lengths = {name: len(a) for name, a in arrays.items()}
  if len(set(lengths.values())) > 1:
    raise UserError(f"columns: they are not equally long: {lengths}")
  return pa.table(arrays)


def _labels(name: str, column) -> pa.Array:
  found = _numbers(name, column)
  if not pc.all(pc.is_in(found, pa.array([0.0, 1.0], pa.float32()))).as_py():
    bad = found.filter(
      pc.invert(pc.is_in(found, pa.array([0.0, 1.0], pa.float32())))
    )
    raise UserError(f"columns: {name}: labels are 0 or 1, found {bad[0]}")
  return found


def _numbers(name: str, column) -> pa.Array:
  """Returns a column as float32; raises UserError for what is no number."""
  try:
    found = pa.chunked_array(column).combine_chunks().cast(pa.float32())
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
    raise UserError(f"columns: {name}: no numbers: {e}") from e
  if found.null_count or not pc.all(pc.is_finite(found)).as_py():
    raise UserError(
      f"columns: {name}: a number is missing or not finite; replace it before"
    )
  return found


def _ids(f: Feature, column) -> pa.Array:
  """Returns ids as strings, or as lists of strings where they are bags."""
  found = pa.chunked_array(column).combine_chunks()
  many = pa.types.is_list(found.type) or pa.types.is_large_list(found.type)
  if many != (f.hotness > 1):
    what = "lists of ids" if many else "one id a sample"
    raise UserError(
      f"columns: {f.name}: {what} found, but the feature's hotness is "
      f"{f.hotness}: bags need lists and a hotness above 1"
    )
  if f.weighted:
    raise UserError(
      f"columns: {f.name}: weights cannot come from columns yet; leave "
      "weighted=False"
    )
  kind = found.type.value_type if many else found.type
  if pa.types.is_floating(kind):
    raise UserError(
      f"columns: {f.name}: ids are integers or strings, found {kind}; make "
      "them integers, missing ones None (pandas: astype('Int64'))"
    )
  to = pa.list_(pa.string()) if many else pa.string()
  try:
    return found.cast(to)
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
    raise UserError(f"columns: {f.name}: no ids: {e}") from e
