"""The rows of a vocabulary: the same whatever batches an engine gives."""

import hashlib
import json
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def of_one_size(
  batches: Iterable[pa.RecordBatch], rows: int
) -> Iterator[pa.RecordBatch]:
  """Cuts batches anew, into so many rows each but for the last one."""
  waiting: list[pa.RecordBatch] = []
  for batch in batches:
    waiting.append(batch)
    while sum(map(len, waiting)) >= rows:
      joined = pa.Table.from_batches(waiting).combine_chunks()
      yield joined[:rows].to_batches()[0]
      waiting = joined[rows:].to_batches()
  if sum(map(len, waiting)):
    yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]


class Content:
  """Hashes what a vocabulary says, row by row, whatever the batches."""

  def __init__(self):
    self.rows = 0
    self._digests = [hashlib.sha256() for _ in range(5)]

  def add(
    self, tbl: np.ndarray, kind: np.ndarray, value: pa.Array, n: np.ndarray
  ) -> None:
    """Adds rows: numbers of table and kind, value, count."""
    text = pc.fill_null(value, "")
    for digest, column in zip(
      self._digests,
      (
        tbl.astype(np.int16),
        kind.astype(np.int8),
        pc.binary_length(text).to_numpy().astype(np.int32),
        pc.binary_join(pa.array([text.to_pylist()]), "")[0].as_buffer(),
        n.astype(np.int64),
      ),
      strict=True,
    ):
      digest.update(column)
    self.rows += len(tbl)

  def fingerprint(self, tables: tuple[str, ...]) -> str:
    """Returns the hash of all rows."""
    head = json.dumps([list(tables), self.rows]).encode()
    return hashlib.sha256(
      head + b"".join(d.digest() for d in self._digests)
    ).hexdigest()
