"""Chunks: some tens of thousands of consecutive samples, their ids as codes.

A code is an index into the chunk's list of a feature's distinct values. So a
value's text is handled once a chunk, and everything after this file works on
numbers and on lists of distinct values.
"""

import dataclasses
from collections.abc import Mapping
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

  label: np.ndarray  # [k] float32, 0 or 1
  dense: np.ndarray  # [k, D] float32
  codes: np.ndarray  # [k, S] int32, into values; -1 = empty position of a bag
  weights: np.ndarray | None  # [k, S] float32
  values: pa.Array  # [V] strings
  feature: np.ndarray  # [V] int16, whose value it is
  read: float  # share of the logs' bytes that was read so far


def encode(
  schema: Schema,
  cells: Mapping[str, pa.Array],
  weights: Mapping[str, pa.Array] | None = None,
) -> dict[str, Any]:
  """Turns the features' ids into codes.

  Args:
    schema: whose features these are.
    cells: [k] strings or dictionary codes of each feature; lists of strings of
      a feature with bags, of which those past its hotness are dropped. A null,
      and in a list '', is a missing id.
    weights: [k] lists of float32, as long as the lists of ids, of each feature
      of a weighted schema.

  Returns:
    codes, weights, values and feature of a Chunk.
  """
  k = len(next(iter(cells.values())))
  codes = np.full((k, schema.columns), -1, np.int32)
  weights = weights or {}
  weight = np.zeros(codes.shape, np.float32) if weights else None
  values, start = [], 0
  for name, columns in columns_of(schema.features).items():
    ids = cells[name]
    if pa.types.is_list(ids.type):
      row, position, keep = _positions(ids, columns.stop - columns.start)
      at = row, columns.start + position
      if weight is not None:
        weight[at] = weights[name].flatten().to_numpy()[keep]
      ids = ids.flatten().filter(pa.array(keep))
      code, value = _codes(pc.if_else(pc.equal(ids, ""), None, ids))
      codes[at] = code + start
    else:
      code, value = _codes(ids)
      codes[:, columns.start] = code + start
    values.append(value)
    start += len(value)
  return {
    "codes": codes,
    "weights": weight,
    "values": pa.concat_arrays(values),
    "feature": np.repeat(
      np.arange(len(values), dtype=np.int16), [len(v) for v in values]
    ),
  }


def _positions(
  bags: pa.ListArray, hotness: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds the first `hotness` ids of each bag.

  Returns:
    row and position in the bag of the ids that are kept, and [all ids] bool:
    which are kept.
  """
  lengths = bags.value_lengths().to_numpy()
  row = np.repeat(np.arange(len(lengths)), lengths)
  position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
  keep = position < hotness
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
