"""The ranks of a vocabulary that no worker sees as a whole.

Each file of a log is counted into a run: its values in the order of (table,
value), with their counts. The values of all runs are cut into ranges of about
as many bytes, and each range is summed by itself:

  rank of a value = rows that have a larger count, or the same count and come
                    before its range + its position among those of its range

Rows of one count rank by table, then the special rows, then by value
(vocabulary.py). Ranges are in that order, too, so that their histograms of
counts give the first number without a sort of all rows.
"""

import bisect
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.data import vocabulary

_BATCH = 4_096  # values that are read together, of a run
_RUN, _INDEX, _ROWS = "run.arrow", "index.arrow", "rows.arrow"
_KEYS = pa.schema([("tbl", pa.int16()), ("value", pa.string())])

Key = tuple[int, str]  # table and value


def write_run(folder: str, batches: Iterable[pa.RecordBatch]) -> None:
  """Writes the run of a file of the log.

  Args:
    folder: where to.
    batches: (tbl, value, n) in the order of (tbl, value).
  """
  firsts: list[tuple[int, str, int]] = []
  schema = vocabulary.COUNTS
  with pa.ipc.new_file(os.path.join(folder, _RUN), schema) as writer:
    for whole in batches:
      for start in range(0, len(whole), _BATCH):
        batch = whole.slice(start, _BATCH)
        writer.write_batch(batch)
        tbl, value = batch["tbl"][0].as_py(), batch["value"][0].as_py()
        firsts.append((tbl, value, batch.nbytes))
  columns = list(zip(*firsts, strict=True)) or [(), (), ()]
  index = pa.record_batch(columns, schema=_KEYS.append(_BYTES))
  with pa.ipc.new_file(os.path.join(folder, _INDEX), index.schema) as writer:
    writer.write_batch(index)


_BYTES = pa.field("bytes", pa.int64())


def read_run(folder: str) -> Iterator[pa.RecordBatch]:
  """Reads what `write_run` was given."""
  with pa.memory_map(os.path.join(folder, _RUN)) as f:
    run = pa.ipc.open_file(f)
    for i in range(run.num_record_batches):
      yield run.get_batch(i)


# ---- Ranges


class Ranges(NamedTuple):
  """P ranges of the values of F runs."""

  bounds: list[Key]  # [P - 1], the first key of each range but the first
  # [F, P] int32, batches of a run that hold values of a range, and others.
  start: np.ndarray
  stop: np.ndarray


def cut(folders: Sequence[str], range_bytes: int) -> Ranges:
  """Cuts the values of runs into ranges.

  Args:
    folders: of the runs.
    range_bytes: of the runs' values and counts; a range has about as many, and
      up to a batch of each run more.
  """
  indices = []
  for folder in folders:
    with pa.memory_map(os.path.join(folder, _INDEX)) as f:
      indices.append(pa.ipc.open_file(f).read_all())
  every = pa.concat_tables(indices)
  every = every.sort_by([("tbl", "ascending"), ("value", "ascending")])
  filled = np.cumsum(every["bytes"].to_numpy()) // range_bytes
  at = np.flatnonzero(np.diff(filled, prepend=0))
  found = every.take(pa.array(at))
  keys = zip(found["tbl"].to_pylist(), found["value"].to_pylist(), strict=True)
  bounds = sorted(set(keys), key=_order)
  start = np.zeros((len(folders), len(bounds) + 1), np.int32)
  stop = np.zeros_like(start)
  for i, index in enumerate(indices):
    columns = index["tbl"].to_pylist(), index["value"].to_pylist()
    firsts = [_order(key) for key in zip(*columns, strict=True)]
    stop[i, -1] = len(firsts)
    for p, bound in enumerate(map(_order, bounds)):
      start[i, p + 1] = max(0, bisect.bisect_right(firsts, bound) - 1)
      stop[i, p] = bisect.bisect_left(firsts, bound)
  return Ranges(bounds, start, stop)


def _order(key: Key) -> tuple[int, bytes]:
  """Returns what orders keys as DuckDB does."""
  return key[0], key[1].encode()


def _part(folder: str, ranges: Ranges, i: int, p: int) -> pa.Table:
  """Reads the values of run i, in `folder`, that are in range p."""
  start, stop = int(ranges.start[i, p]), int(ranges.stop[i, p])
  with pa.memory_map(os.path.join(folder, _RUN)) as f:
    run = pa.ipc.open_file(f)
    batches = [run.get_batch(k) for k in range(start, stop)]
  found = pa.Table.from_batches(batches, vocabulary.COUNTS)
  if p:
    found = found.filter(_from(found, ranges.bounds[p - 1]))
  if p < len(ranges.bounds):
    found = found.filter(pc.invert(_from(found, ranges.bounds[p])))
  return found


def _from(rows: pa.Table, key: Key) -> pa.ChunkedArray:
  """Says of each row whether its key is this one or comes after it."""
  same = pc.equal(rows["tbl"], key[0])
  after = pc.greater_equal(rows["value"], key[1])
  return pc.or_(pc.greater(rows["tbl"], key[0]), pc.and_(same, after))


# ---- The rows of a range


class Summed(NamedTuple):
  """A range of the vocabulary."""

  # [R] (tbl, value, n), those that have a row of their own, in rank order.
  rows: pa.Table
  oov: np.ndarray  # [T] int64, counts of the others
  row: np.ndarray  # the row of each value of each run's part, -1 = it has none
  lengths: np.ndarray  # [F] int64, of the parts


def add_up(
  folders: Sequence[str], ranges: Ranges, p: int, min_counts: Sequence[int]
) -> Summed:
  """Sums range p over the runs.

  Args:
    folders: of the runs.
    ranges: of their values.
    p: which of them.
    min_counts: [T]; rarer values have no row of their own.
  """
  parts = [_part(folder, ranges, i, p) for i, folder in enumerate(folders)]
  lengths = np.array([len(part) for part in parts], np.int64)
  every = pa.concat_tables(parts).combine_chunks()
  del parts
  least = np.array(min_counts, np.int64)
  coded = pa.array(every["value"].combine_chunks()).dictionary_encode()
  different = max(len(coded.dictionary), 1)
  key = every["tbl"].to_numpy().astype(np.int64) * different
  key += coded.indices.to_numpy()
  keys, of = np.unique(key, return_inverse=True)
  n = np.zeros(len(keys), np.int64)
  np.add.at(n, of, every["n"].to_numpy())
  tbl, code = np.divmod(keys, different)
  kept = n >= least[tbl]
  oov = np.zeros(len(least), np.int64)
  np.add.at(oov, tbl[~kept], n[~kept])
  value = coded.dictionary.take(pa.array(code[kept]))
  rows = pa.table(
    [tbl[kept].astype(np.int16), value, n[kept]], schema=vocabulary.COUNTS
  )
  order = pc.sort_indices(
    rows,
    [("n", "descending"), ("tbl", "ascending"), ("value", "ascending")],
  ).to_numpy()
  row = np.full(len(keys), -1, np.int32)
  row[np.flatnonzero(kept)[order]] = np.arange(len(order), dtype=np.int32)
  return Summed(rows.take(pa.array(order)), oov, row[of], lengths)


def save(folder: str, summed: Summed) -> None:
  """Writes a range."""
  with pa.ipc.new_file(os.path.join(folder, _ROWS), summed.rows.schema) as f:
    f.write_table(summed.rows, max_chunksize=1 << 16)
  n, tbl, rows = _groups(summed.rows)
  np.savez(
    os.path.join(folder, "groups.npz"), n=n, tbl=tbl, rows=rows, oov=summed.oov
  )
  np.save(os.path.join(folder, "row.npy"), summed.row)
  np.save(os.path.join(folder, "lengths.npy"), summed.lengths)


def _groups(rows: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Counts the rows of each (n, table), which are neighbours.

  Returns:
    (n, tbl, rows), [G] each.
  """
  n, tbl = rows["n"].to_numpy(), rows["tbl"].to_numpy()
  new = np.ones(len(n), bool)
  new[1:] = (n[1:] != n[:-1]) | (tbl[1:] != tbl[:-1])
  at = np.flatnonzero(new)
  return n[at], tbl[at], np.diff(at, append=len(n))


# ---- Ranks


class Bases(NamedTuple):
  """Ranks of the special rows, and of the first row of each group."""

  special: np.ndarray  # [2, T] int64, of 'oov' and 'missing'
  counts: np.ndarray  # [2, T] int64, theirs
  groups: list[np.ndarray]  # [P][G] int64, see `_groups`


def bases(folders: Sequence[str], missing: np.ndarray) -> Bases:
  """Ranks the groups of all ranges, and the special rows.

  Args:
    folders: of the ranges.
    missing: [T] int64, the missing values of each table.
  """
  found = [dict(np.load(os.path.join(f, "groups.npz"))) for f in folders]
  counts = np.stack([sum(x["oov"] for x in found), missing])
  tables = np.arange(len(missing))
  # A group's place among those of its count and table: oov, missing, ranges.
  n = [*counts, *(x["n"] for x in found)]
  tbl = [tables, tables, *(x["tbl"] for x in found)]
  rows = [np.ones_like(missing)] * 2 + [x["rows"] for x in found]
  sizes = [len(x) for x in n]
  place = np.repeat(np.arange(len(n)), sizes)
  order = np.lexsort((place, np.concatenate(tbl), -np.concatenate(n)))
  every = np.concatenate(rows)
  first = np.empty(len(every), np.int64)
  first[order] = np.cumsum(every[order]) - every[order]
  oov, missed, *groups = np.split(first, np.cumsum(sizes)[:-1])
  return Bases(np.stack([oov, missed]), counts, groups)


def ranks(folder: str, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks the values of the runs' parts of a range.

  Args:
    folder: of the range.
    base: of its groups.

  Returns:
    (ranks int32, -1 = the value has no row; first of each part, and the number
    of all [F + 1]).
  """
  with np.load(os.path.join(folder, "groups.npz")) as groups:
    rows = groups["rows"]
  begin = np.repeat(base - (np.cumsum(rows) - rows), rows)
  rank = (begin + np.arange(len(begin))).astype(np.int32)
  row = np.load(os.path.join(folder, "row.npy"))
  starts = np.append(0, np.cumsum(np.load(os.path.join(folder, "lengths.npy"))))
  return np.append(rank, np.int32(-1))[row], starts


def rows(folders: Sequence[str], counts: np.ndarray) -> Iterator:
  """Yields the rows of all ranges and the special rows, as vocabulary.write.

  Args:
    folders: of the ranges.
    counts: [2, T], of the special rows.
  """
  for kind, n in enumerate(counts):
    of = np.arange(len(n), dtype=np.int16), np.full(len(n), kind, np.int8)
    nothing = pa.nulls(len(n), pa.string())
    yield pa.record_batch([*of, nothing, n], schema=vocabulary.ROWS)
  value = np.int8(vocabulary.KINDS.index("value"))
  for folder in folders:
    with pa.memory_map(os.path.join(folder, _ROWS)) as f:
      found = pa.ipc.open_file(f)
      for i in range(found.num_record_batches):
        batch = found.get_batch(i)
        yield batch.add_column(1, "kind", np.full(len(batch), value)).select(
          vocabulary.ROWS.names
        )
