"""Raw click logs -> chunks: columns of numbers and codes, in time order.

A chunk is some tens of thousands of consecutive samples. Every categorical
cell is a code: an index into the chunk's list of that feature's distinct
values. So a value's text is handled once a chunk, and everything after this
file works on numbers and on lists of distinct values.

data/text.py parses; here is what a Criteo log's fields mean, and how columns
become codes.
"""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.config import Data
from recjax.data.text import BadRows, Columns, find, parse, shown
from recjax.errors import UserError
from recjax.schema import Feature, Schema

DENSE = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Consecutive samples. Feature by feature, `values` holds distinct values.

  Each feature's last value is null and stands for a missing one.
  """

  label: np.ndarray  # [k] float32, 0 or 1
  dense: np.ndarray  # [k, D] float32
  codes: np.ndarray  # [k, S] int32, into values; -1 = empty position of a bag
  weights: np.ndarray | None  # [k, S] float32
  values: pa.Array  # [V] strings
  feature: np.ndarray  # [V] int16, whose value it is
  read: float  # share of the logs' bytes that was read so far


# Schemas


def schema(data: Data) -> Schema:
  """The inputs of a Criteo-format sample.

  Raises:
    UserError: the hotnesses do not fit the features.
  """
  synthetic = data.format == "synthetic"
  field = "data.synthetic.hotness" if synthetic else "data.hotness"
  hotness = data.synthetic.hotness if synthetic else data.hotness
  hotness = hotness or (1,) * len(CATEGORIES)
  if len(hotness) != len(CATEGORIES) or min(hotness) < 1:
    raise UserError(
      f"{field} is {hotness}: give {len(CATEGORIES)} numbers of at least 1,"
      " the longest bag of each feature, or () for one lookup each"
    )
  return Schema(
    DENSE,
    tuple(
      Feature(n, n, h, data.pooling if h > 1 else "sum", data.weighted)
      for n, h in zip(CATEGORIES, hotness, strict=True)
    ),
  )


# Criteo


def sources(data: Data) -> dict[str, tuple[str, ...]]:
  """Config field -> the files it names, in time order.

  Raises:
    UserError: see `find`.
  """
  fields = {"data.train": data.train}
  if data.test:
    fields["data.test"] = data.test
  return {field: find(pattern, field) for field, pattern in fields.items()}


def chunks(
  data: Data, inputs: Schema, paths: tuple[str, ...], bad: BadRows
) -> Iterator[Chunk]:
  """The samples of Criteo-format TSV files, in the order of the lines.

  A line: label (0 or 1), 13 integers, 26 categories. An empty field is a
  missing value. A dense input is log(max(x, -1) + 2), a missing one as x = 0.
  A cell of a feature with hotness > 1 holds ids separated by ','; those past
  the hotness are dropped. With `data.weighted` an id may end in ':weight'.

  Raises:
    UserError: a file that cannot be read; more damaged lines than allowed.
  """
  kinds = {"label": "int"} | dict.fromkeys(DENSE, "int")
  for f in inputs.features:
    kinds[f.name] = "text" if f.hotness > 1 or f.weighted else "id"

  def convert(table: pa.Table) -> Chunk:
    label = table["label"]
    if (
      label.null_count or not pc.all(pc.is_in(label, pa.array([0, 1]))).as_py()
    ):
      raise pa.ArrowInvalid("label")
    ints = [pc.fill_null(table[n], 0).to_numpy() for n in inputs.dense]
    dense = np.stack(ints, axis=1, dtype=np.float32, casting="unsafe")
    dense = np.log(np.maximum(dense, -1) + 2)
    return {
      "label": label.to_numpy().astype(np.float32),
      "dense": dense,
    } | encode(inputs, table)

  def explain(fields):
    if fields[0] not in ("0", "1"):
      return "label", f"{shown(fields[0])} is not 0 or 1"
    return None

  columns = Columns(kinds, convert, explain)
  sizes = [os.path.getsize(path) for path in paths]
  for i, path in enumerate(paths):
    for found, read in parse(path, columns, bad):
      yield Chunk(**found, read=(sum(sizes[:i]) + read) / sum(sizes))


def encode(inputs: Schema, table: pa.Table) -> dict:
  """The categorical columns of a Chunk, from 'id', 'text' or list columns."""
  shape = table.num_rows, inputs.columns
  codes = np.full(shape, -1, np.int32)
  weights = np.zeros(shape, np.float32) if inputs.weighted else None
  values, column, start = [], 0, 0
  for f in inputs.features:
    cells = table[f.name].combine_chunks()
    if f.hotness > 1 or f.weighted:
      row, position, ids = _bags(cells, f.hotness)
      if weights is not None:
        ids, weight = _weigh(ids)
        weights[row, column + position] = weight
      code, value = _codes(ids)
      codes[row, column + position] = code + start
    else:
      code, value = _codes(cells)
      codes[:, column] = code + start
    values.append(value)
    column += f.hotness
    start += len(value)
  return {
    "codes": codes,
    "weights": weights,
    "values": pa.concat_arrays(values),
    "feature": np.repeat(
      np.arange(len(values), dtype=np.int16), [len(v) for v in values]
    ),
  }


def _bags(cells: pa.Array, hotness: int):
  """(row, position in the bag, id): the first `hotness` ids of each cell."""
  if not pa.types.is_list(cells.type):
    cells = pc.split_pattern(pc.fill_null(cells, ""), ",")
  lengths = cells.value_lengths().to_numpy()
  row = np.repeat(np.arange(len(lengths)), lengths)
  position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
  keep = position < hotness
  ids = cells.flatten().filter(pa.array(keep))
  return row[keep], position[keep], pc.if_else(pc.equal(ids, ""), None, ids)


def _weigh(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
  """'id:weight' -> (id, weight); 1 where there is none."""
  parts = pc.split_pattern(pc.fill_null(ids, ""), ":", max_splits=1)
  given = pc.greater(parts.value_lengths(), 1)
  text = pc.list_element(pc.if_else(given, parts, pa.scalar(["", "1"])), 1)
  weight = text.cast(pa.float32()).to_numpy()
  if not np.isfinite(weight).all():
    raise pa.ArrowInvalid("a weight is not finite")
  ids = pc.list_element(parts, 0)
  return pc.if_else(pc.equal(ids, ""), None, ids), weight


def _codes(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
  """([k] int32, values): nulls get the last code, whose value is null."""
  if not pa.types.is_dictionary(column.type):
    column = column.dictionary_encode()
  values = pa.concat_arrays([column.dictionary, pa.nulls(1, pa.string())])
  codes = pc.fill_null(column.indices, len(values) - 1)
  return codes.to_numpy(zero_copy_only=False), values
