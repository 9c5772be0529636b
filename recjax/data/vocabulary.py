"""The vocabulary: which rows each table has, and how they rank.

It sums, sorts and joins the distinct values of billions of cells. DuckDB does
that: it is a maintained columnar engine that keeps to a memory limit and
spills to disk, which PyArrow does not do and Polars does for some operations
only. It does not parse the logs, though it could: its reader gives strings, so
that every cell would be hashed, and its joins keep no order. chunks.py gives it
lists of distinct values instead, about a tenth of the cells.

Each row of a table is an id, or one of two special rows which every table
has: 'oov' for ids seen fewer than `min_count` times and ids never seen in
training, 'missing' for empty cells. They rank by their counts like any other.
Equal counts rank by table, then special rows first, then by value (bytes).

The file is Parquet in rank order, with the columns table, kind ('value', 'oov'
or 'missing'), value (null in special rows), count and rank, and the tables'
order in its metadata. It is the frequency profile as well.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recjax import files
from recjax.data.vocabulary_content import Content, of_one_size
from recjax.errors import UserError
from recjax.frequency import Profile

FILE = "vocabulary.parquet"
KINDS = ("oov", "missing", "value")  # in this order at equal counts
COUNTS = pa.schema(
  [("tbl", pa.int16()), ("value", pa.string()), ("n", pa.int64())]
)
ROWS = COUNTS.insert(1, pa.field("kind", pa.int8()))
SCHEMA = pa.schema(
  [
    ("table", pa.string()),
    ("kind", pa.string()),
    ("value", pa.string()),
    ("count", pa.int64()),
    ("rank", pa.int32()),
  ]
)
LOOKED_UP = ("table", "kind", "value", "rank")  # columns, see `ranks`
_BATCH = 1 << 18  # rows
_TABLES = b"tables"  # key of the file's metadata


def open_engine(memory_mb: int, spill: str) -> duckdb.DuckDBPyConnection:
  """Opens a database in memory that spills into the directory `spill`.

  It reads what it is given alone: no file, no URL, no extension.
  """
  engine = duckdb.connect(
    ":memory:",
    config={
      "memory_limit": f"{memory_mb}MB",
      "temp_directory": spill,
      "preserve_insertion_order": False,
      "autoload_known_extensions": False,
      "autoinstall_known_extensions": False,
    },
  )
  engine.execute("SET enable_progress_bar = false")  # as progress.py reports
  engine.execute("SET enable_external_access = false")
  return engine


def too_little(memory_mb: int, e: Exception) -> UserError:
  """Returns the error that says that the engine has not enough memory."""
  return UserError(
    f"data.memory_mb={memory_mb} is too little to prepare these logs ({e}):"
    " raise it"
  )


def count(
  engine: duckdb.DuckDBPyConnection,
  parts: Iterator[tuple[np.ndarray, pa.Array, np.ndarray]],
  tables: tuple[str, ...],
  min_counts: Sequence[int],
  path: str,
  *,
  oov: np.ndarray | None = None,
) -> str:
  """Writes the vocabulary of these counts to `path`, atomically.

  Args:
    engine: see `open_engine`.
    parts: (table [V] int16, value [V] strings with null = missing, count [V]);
      a value may come in many parts.
    tables: their names.
    min_counts: [T]; rarer values share their table's 'oov' row.
    path: of the file.
    oov: [tables] int64, counts of 'oov' that no value is known of.

  Returns:
    The fingerprint: sha256 of the content, whatever the file's encoding.

  Raises:
    UserError: more rows than int32 can count.
  """
  seen = ((n > 0, table, value, n) for table, value, n in parts)
  add_up(engine, ((t[x], v.filter(pa.array(x)), n[x]) for x, t, v, n in seen))
  least = list(min_counts)
  more = [0] * len(tables) if oov is None else oov.tolist()
  engine.execute(
    "CREATE TABLE special AS SELECT t.tbl, kind, coalesce(sum(n) FILTER"
    " (value IS NULL AND kind = 1 OR value IS NOT NULL AND kind = 0"
    " AND n < $m[t.tbl + 1]), 0)::BIGINT AS n FROM range($t) AS t(tbl)"
    " CROSS JOIN range(2) AS k(kind)"
    " LEFT JOIN counts AS c ON c.tbl = t.tbl GROUP BY ALL",
    {"m": least, "t": len(tables)},
  )
  engine.execute(
    "UPDATE special SET n = n + list_extract($o::BIGINT[], tbl + 1)"
    " WHERE kind = 0",
    {"o": more},
  )
  rows = engine.sql(
    "SELECT tbl, 2 AS kind, value, n FROM counts"
    " WHERE value IS NOT NULL AND n >= $m[tbl + 1]"
    " UNION ALL SELECT tbl, kind, NULL, n FROM special"
    " ORDER BY n DESC, tbl, kind, value",
    params={"m": least},
  )
  fingerprint = _write(rows.to_arrow_reader(_BATCH), tables, path)
  engine.execute("DROP TABLE counts")
  return fingerprint


def add_up(
  engine: duckdb.DuckDBPyConnection,
  parts: Iterable[tuple[np.ndarray, pa.Array, np.ndarray]],
) -> None:
  """Makes the table `counts` of (tbl, value, n) of such parts; see `count`."""
  batches = (pa.record_batch(list(part), schema=COUNTS) for part in parts)
  engine.register("parts", pa.RecordBatchReader.from_batches(COUNTS, batches))
  engine.execute(
    "CREATE TABLE counts AS SELECT tbl, value, sum(n)::BIGINT AS n"
    " FROM parts GROUP BY ALL"
  )


def write(
  engine: duckdb.DuckDBPyConnection,
  rows: Iterable[pa.RecordBatch],
  tables: tuple[str, ...],
  path: str,
) -> str:
  """Writes the vocabulary of the rows of all tables, atomically.

  Args:
    engine: see `open_engine`.
    rows: (tbl, kind: an index of KINDS, value, n), in any order.
    tables: their names.
    path: of the file.

  Returns:
    The fingerprint; see `count`.

  Raises:
    UserError: more rows than int32 can count.
  """
  engine.register("rows", pa.RecordBatchReader.from_batches(ROWS, rows))
  ordered = engine.sql("FROM rows ORDER BY n DESC, tbl, kind, value")
  return _write(ordered.to_arrow_reader(_BATCH), tables, path)


def _write(
  batches: Iterable[pa.RecordBatch], tables: tuple[str, ...], path: str
) -> str:
  """Writes rows (tbl, kind, value, n) in rank order.

  Returns:
    Their fingerprint.

  Raises:
    UserError: more rows than int32 can count.
  """
  schema = SCHEMA.with_metadata({_TABLES: json.dumps(tables)})
  names, kinds = pa.array(tables), pa.array(KINDS)
  content = Content()
  with (
    files.replacing(path) as part,
    pq.ParquetWriter(part, schema, compression="zstd") as writer,
  ):
    for batch in of_one_size(batches, _BATCH):
      tbl, kind, value, n = (batch[c] for c in ("tbl", "kind", "value", "n"))
      rank = content.rows
      if rank + len(batch) > np.iinfo(np.int32).max:
        raise UserError(
          "the tables have more than 2^31 rows together: raise data.min_count"
        )
      content.add(tbl.to_numpy(), kind.to_numpy(), value, n.to_numpy())
      ranks = np.arange(rank, content.rows, dtype=np.int32)
      writer.write_batch(
        pa.record_batch(
          [names.take(tbl), kinds.take(kind), value, n, ranks], schema=schema
        )
      )
  return content.fingerprint(tables)


def tables_of(path: str) -> tuple[str, ...] | None:
  """Returns the tables of a vocabulary in their order; None: it is not there.

  Files of recjax before `export_rows` do not say it.
  """
  found = (pq.ParquetFile(path).schema_arrow.metadata or {}).get(_TABLES)
  return None if found is None else tuple(map(str, files.parse_json(found)))


def fingerprint_of(path: str, tables: tuple[str, ...]) -> str:
  """Returns the fingerprint of what a vocabulary file holds.

  Raises:
    ValueError: it is not a vocabulary of these tables.
  """
  content, names, kinds = Content(), pa.array(tables), pa.array(KINDS)
  for batch in pq.ParquetFile(path).iter_batches(
    _BATCH, columns=["table", "kind", "value", "count"]
  ):
    tbl = pc.index_in(batch["table"], names)
    kind = pc.index_in(batch["kind"], kinds)
    if tbl.null_count or kind.null_count or batch["count"].null_count:
      raise ValueError(f"{path} is no vocabulary of {', '.join(tables)}")
    tbl, kind, n = (x.to_numpy() for x in (tbl, kind, batch["count"]))
    content.add(tbl, kind, batch["value"], n)
  return content.fingerprint(tables)


def ranks(
  engine: duckdb.DuckDBPyConnection,
  parts: Callable[[], Iterator[tuple[np.ndarray, pa.Array]]],
  tables: tuple[str, ...],
  path: str,
) -> Iterator[np.ndarray]:
  """Looks up the rank of each value, part by part.

  Args:
    engine: see `open_engine`.
    parts: gives, each time the same, (table [V] int16, value [V] strings).
    tables: their names.
    path: of the vocabulary; LOOKED_UP of any rows of it will do, too.

  Yields:
    [V] int32, for each part.
  """
  cells = pa.schema(
    [("position", pa.int64()), ("tbl", pa.int16()), ("value", pa.string())]
  )

  def batches() -> Iterator[pa.RecordBatch]:
    position = 0
    for table, values in parts():
      at = np.arange(position, position + len(values))
      position += len(values)
      yield pa.record_batch([at, table, values], schema=cells)

  engine.register("cells", pa.RecordBatchReader.from_batches(cells, batches()))
  special = _load(engine, tables, path)
  stream = _Stream(
    engine.sql(
      "SELECT coalesce(v.rank, -1)::INTEGER FROM cells AS b LEFT JOIN"
      " (FROM vocabulary WHERE kind = 'value') AS v"
      " ON b.tbl = v.tbl AND b.value = v.value ORDER BY position"
    ).to_arrow_reader(_BATCH)
  )
  for table, values in parts():
    missing = values.is_null().to_numpy(zero_copy_only=False)
    rank = stream.take(len(values))
    yield np.where(rank < 0, special[missing.astype(int), table], rank)


def _load(
  engine: duckdb.DuckDBPyConnection, tables: tuple[str, ...], path: str
) -> np.ndarray:
  """Reads a vocabulary into the engine's table `vocabulary`.

  Returns:
    [2, T] int32, ranks of the tables' 'oov' and 'missing' rows.
  """
  stored = pq.ParquetFile(path)
  columns = list(LOOKED_UP)
  rows = pa.RecordBatchReader.from_batches(
    pa.schema([stored.schema_arrow.field(c) for c in columns]),
    stored.iter_batches(columns=columns),
  )
  engine.register("stored", rows)
  engine.execute(
    'CREATE TABLE vocabulary AS SELECT (list_position($names, "table") - 1)'
    "::SMALLINT AS tbl, kind, value, rank FROM stored",
    {"names": list(tables)},
  )
  special = np.empty((2, len(tables)), np.int32)
  for tbl, kind, rank in engine.execute(
    "SELECT tbl, kind, rank FROM vocabulary WHERE kind <> 'value'"
  ).fetchall():
    special[KINDS.index(kind), tbl] = rank
  return special


class Known:
  """A vocabulary that values are looked up in, again and again."""

  def __init__(
    self,
    engine: duckdb.DuckDBPyConnection,
    tables: tuple[str, ...],
    path: str,
  ):
    """Reads the vocabulary; see `ranks` for the arguments."""
    self._engine, self._special = engine, _load(engine, tables, path)

  def ranks(
    self, table: np.ndarray, values: pa.Array
  ) -> tuple[np.ndarray, np.ndarray]:
    """Looks values up.

    Args:
      table: [V] int, of each value.
      values: [V] strings; null = missing.

    Returns:
      (ranks [V] int32, [V] bool: False for those out of vocabulary).
    """
    at = np.arange(len(values))
    columns = [pa.array(at), pa.array(table.astype(np.int16)), values]
    cells = pa.table(columns, names=["position", "tbl", "value"])
    self._engine.register("cells", cells)
    found = self._engine.sql(
      "SELECT position, v.rank FROM cells AS c JOIN vocabulary AS v"
      " ON c.tbl = v.tbl AND c.value = v.value WHERE v.kind = 'value'"
    ).to_arrow_table()
    missing = values.is_null().to_numpy(zero_copy_only=False)
    rank = self._special[missing.astype(int), table]
    known = missing.copy()
    hit = found["position"].to_numpy()
    rank[hit], known[hit] = found["rank"].to_numpy(), True
    return rank, known


class _Stream:
  """A stream of one int32 column, taken in pieces of any length."""

  def __init__(self, batches: Iterable[pa.RecordBatch]):
    self.batches, self.rest = iter(batches), np.empty(0, np.int32)

  def take(self, n: int) -> np.ndarray:
    """The next n numbers."""
    parts = [self.rest]
    while sum(map(len, parts)) < n:
      parts.append(next(self.batches).column(0).to_numpy())
    joined = np.concatenate(parts)
    self.rest = joined[n:]
    return joined[:n]


def read_profile(path: str, tables: tuple[str, ...], samples: int) -> Profile:
  """Reads the profile that a vocabulary file holds.

  Args:
    path: of the file.
    tables: the names that the profile's tables are numbered by.
    samples: of the training split.
  """
  file = pq.ParquetFile(path)
  rows = file.metadata.num_rows
  counts, table = np.empty(rows, np.int64), np.empty(rows, np.int16)
  names = pa.array(tables)
  start = 0
  for batch in file.iter_batches(columns=["table", "count"]):
    stop = start + len(batch)
    counts[start:stop] = batch["count"]
    table[start:stop] = pc.index_in(batch["table"], names)
    start = stop
  return Profile(samples, tables, counts, table)
