"""Criteo-format logs: what a line's fields mean, and the tables' sizes.

  label <tab> 13 integers <tab> 26 categories

An empty field is a missing value. A missing number counts as 0. A category may
be a bag: ids separated by ',', each with ':weight' where `data.weighted` is
set.

A log format is a module with `schema`, `sources` and `chunks`, as this one;
staging.FORMATS lists them.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.config import Data
from recjax.data import log_files, text_blocks
from recjax.data.chunks import Chunk, encode
from recjax.data.text import Columns, DamagedLines, parse, shown
from recjax.errors import UserError
from recjax.schema import Feature, Schema

DENSE = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
# Distinct values of C1..C26 in the Criteo Kaggle log (facebookresearch/dlrm).
KAGGLE_ROWS = (
  1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593,
  3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105,
  142572,
)  # fmt: skip


def schema(data: Data) -> Schema:
  """The inputs of a Criteo-format sample.

  Raises:
    UserError: the number of hotnesses is not that of the features.
  """
  synthetic = data.format == "synthetic"
  field = "data.synthetic.hotness" if synthetic else "data.hotness"
  hotness = data.synthetic.hotness if synthetic else data.hotness
  hotness = hotness or (1,) * len(CATEGORIES)
  if len(hotness) != len(CATEGORIES):
    raise UserError(
      f"{field} is {hotness}: give {len(CATEGORIES)} numbers, the longest bag"
      " of each feature, or () for one lookup each"
    )
  return Schema(
    DENSE,
    tuple(
      Feature(n, n, h, data.pooling if h > 1 else "sum", data.weighted)
      for n, h in zip(CATEGORIES, hotness, strict=True)
    ),
  )


def sources(data: Data) -> dict[str, tuple[str, ...]]:
  """Finds the files of logs; see `log_files.sources`."""
  return log_files.sources(data)


def chunks(
  data: Data,
  inputs: Schema,
  paths: tuple[str, ...],
  damaged: DamagedLines,
  *,
  keep: tuple[str, ...] | None = None,
) -> Iterator[Chunk]:
  """Reads the samples of Criteo-format files, in the order of the lines.

  A dense input is log(max(x, -1) + 2), a missing one as x = 0. Ids of a bag
  past the feature's hotness are dropped.

  Args:
    data: the config; all of it that matters here is in `inputs` already.
    inputs: see `schema`.
    paths: of the files, plain or .gz.
    damaged: takes damaged lines.
    keep: None = samples to train on. Else to score: a file may have no
      labels, and 39 fields; they are nan then. There are no columns to keep.

  Raises:
    UserError: a file that cannot be read; more damaged lines than allowed.
  """
  kinds = dict.fromkeys(DENSE, "int")
  for f in inputs.features:
    kinds[f.name] = "text" if f.hotness > 1 or f.weighted else "id"
  convert = functools.partial(_convert, inputs)
  unlabelled = Columns(kinds, convert, lambda fields: None)
  labelled = Columns({"label": "int"} | kinds, convert, _explain)
  sizes = [os.path.getsize(path) for path in paths]
  for i, path in enumerate(paths):
    none = keep is not None and _fields(path) == len(kinds)
    columns = unlabelled if none else labelled
    for found, read in parse(path, columns, damaged):
      yield Chunk(**found, read=(sum(sizes[:i]) + read) / sum(sizes))


def _fields(path: str) -> int:
  """Returns how many fields a file's first line has."""
  line = text_blocks.head(path).partition(b"\n")[0]
  return line.count(b"\t") + 1


def _convert(inputs: Schema, table: pa.Table) -> dict[str, Any]:
  """Turns parsed columns into a Chunk's fields; ArrowInvalid if damaged."""
  label = np.full(len(table), np.nan, np.float32)
  if "label" in table.column_names:
    given = table["label"]
    good = pc.is_in(given, pa.array([0, 1]))
    if given.null_count or not pc.all(good).as_py():
      raise pa.ArrowInvalid("label")
    label = given.to_numpy().astype(np.float32)
  integers = [pc.fill_null(table[n], 0).to_numpy() for n in inputs.dense]
  dense = np.stack(integers, axis=1, dtype=np.float32, casting="unsafe")
  cells, weights = {}, {}
  cut = np.zeros(len(inputs.features), np.int64)
  for i, f in enumerate(inputs.features):
    cells[f.name] = table[f.name].combine_chunks()
    if f.hotness > 1 or f.weighted:
      cells[f.name], cut[i] = _bags(cells[f.name], f.hotness)
    if f.weighted:
      cells[f.name], weights[f.name] = _weigh(cells[f.name])
  return encode(inputs, cells, weights) | {
    "label": label,
    "dense": np.log(np.maximum(dense, -1) + 2),
    "cut": cut,
  }


def _explain(fields: list[str]) -> tuple[str, str] | None:
  """Names the label of a damaged line, and why, where that is at fault."""
  if fields[0] not in ("0", "1"):
    return "label", f"{shown(fields[0])} is not 0 or 1"
  return None


def _bags(cells: pa.Array, hotness: int) -> tuple[pa.ListArray, int]:
  """'a,b,c' -> ['a', 'b', 'c'], `hotness` at most; and how many had more."""
  bags = pc.split_pattern(pc.fill_null(cells, ""), ",", max_splits=hotness)
  longer = np.count_nonzero(bags.value_lengths().to_numpy() > hotness)
  return pc.list_slice(bags, 0, hotness), longer


def _weigh(bags: pa.ListArray) -> tuple[pa.ListArray, pa.ListArray]:
  """['ip:10.0:0.5', 'b'] -> ['ip:10.0', 'b'], [0.5, 1]; else ArrowInvalid."""
  parts = pc.split_pattern(bags.flatten(), ":", max_splits=1, reverse=True)
  given = pc.greater(parts.value_lengths(), 1)
  text = pc.list_element(pc.if_else(given, parts, pa.scalar(["", "1"])), 1)
  weight = text.cast(pa.float32())
  if not np.isfinite(weight.to_numpy()).all():
    raise pa.ArrowInvalid("a weight is not finite")
  ids = pc.list_element(parts, 0)
  return (
    pa.ListArray.from_arrays(bags.offsets, ids),
    pa.ListArray.from_arrays(bags.offsets, weight),
  )
