"""Chunks: some tens of thousands of consecutive samples, their ids as codes.

A code is an index into the chunk's list of a feature's distinct values. So a
value's text is handled once a chunk, and everything after this file works on
numbers and on lists of distinct values.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.schema import Schema, columns_of


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Consecutive samples. Feature by feature, `values` holds distinct values.

  Each feature's last value is null and stands for a missing one.
  """

  label: np.ndarray  # [k] float32, from 0 to 1
  dense: np.ndarray  # [k, D] float32, or numbers to be normalised (numbers.py)
  codes: np.ndarray  # [k, S] int32, into values; -1 = empty position of a bag
  weights: np.ndarray | None  # [k, S] float32
  values: pa.Array  # [V] strings
  feature: np.ndarray  # [V] int16, whose value it is
  cut: np.ndarray  # [F] int64, bags that had more ids than their hotness
  read: float  # share of the logs' bytes that was read so far
  labels: np.ndarray | None = None  # [k, K] float32, where K > 1
  sample_weight: np.ndarray | None = None  # [k] float32
  time: np.ndarray | None = None  # [k] float64
  keep: pa.Table | None = None  # [k] columns that predictions repeat


def encode(
  schema: Schema,
  cells: Mapping[str, pa.Array],
  weights: Mapping[str, pa.Array] | None = None,
  keep_last: Collection[str] = (),
) -> dict[str, Any]:
  """Turns the features' ids into codes.

  Args:
    schema: whose features these are.
    cells: [k] strings or dictionary codes of each feature; lists of strings of
      a feature with bags, of which those past its hotness are dropped. A null,
      and in a list '', is a missing id.
    weights: [k] lists of float32, as long as the lists of ids; those of
      features without them are 1.
    keep_last: features of whose bags the last ids are kept, not the first.

  Returns:
    codes, weights, values, feature and cut of a Chunk.
  """
  k = len(next(iter(cells.values())))
  codes = np.full((k, schema.columns), -1, np.int32)
  weights = weights or {}
  weight = np.zeros(codes.shape, np.float32) if schema.weighted else None
  values, start, cut = [], 0, np.zeros(len(schema.features), np.int64)
  for i, (name, columns) in enumerate(columns_of(schema.features).items()):
    ids = cells[name]
    if pa.types.is_list(ids.type):
      hotness = columns.stop - columns.start
      row, position, keep = _positions(ids, hotness, name in keep_last)
      cut[i] = np.count_nonzero(ids.value_lengths().to_numpy() > hotness)
      at = row, columns.start + position
      if weight is not None:
        of = weights.get(name)
        weight[at] = 1 if of is None else of.flatten().to_numpy()[keep]
      ids = ids.flatten().filter(pa.array(keep))
      if not pa.types.is_dictionary(ids.type):
        ids = pc.if_else(pc.equal(ids, ""), None, ids)
      code, value = _codes(ids)
      codes[at] = code + start
    else:
      code, value = _codes(ids)
      codes[:, columns.start] = code + start
      if weight is not None:
        weight[:, columns.start] = 1
    values.append(value)
    start += len(value)
  return {
    "codes": codes,
    "weights": weight,
    "values": pa.concat_arrays(values),
    "feature": np.repeat(
      np.arange(len(values), dtype=np.int16), [len(v) for v in values]
    ),
    "cut": cut,
  }


def _positions(
  bags: pa.ListArray, hotness: int, last: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds the first `hotness` ids of each bag, or the last.

  Returns:
    row and position in the bag of the ids that are kept, and [all ids] bool:
    which are kept.
  """
  lengths = bags.value_lengths().to_numpy()
  row = np.repeat(np.arange(len(lengths)), lengths)
  position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
  if last:
    position -= np.maximum(lengths - hotness, 0)[row]
  keep = (position >= 0) & (position < hotness)
  return row[keep], position[keep], keep


def _codes(ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
  """Numbers the distinct ids.

  Returns:
    (codes [k] int32, values): nulls get the last code, whose value is null.
  """
  if not pa.types.is_dictionary(ids.type):
    ids = ids.dictionary_encode()
  values = pa.concat_arrays([ids.dictionary, pa.nulls(1, pa.string())])
  codes = pc.fill_null(ids.indices, len(values) - 1)
  return codes.to_numpy(zero_copy_only=False), values
