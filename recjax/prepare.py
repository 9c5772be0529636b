"""Logs -> vocabulary, frequency profile and packed blocks of ranks.

Four passes, each streaming with bounded memory:

1. stage: parse the logs into chunks whose categorical cells are codes into the
   chunk's own list of distinct values (formats.py).
2. count: sum the counts of those lists over the training split; keep ids with
   `min_count`; sort by count. The result is the vocabulary.
3. remap: join the lists with the vocabulary: code -> rank, a chunk.
4. pack: ranks in blocks of thousands of samples, in time order.

Passes 2 and 3 sum, sort and join the distinct values of billions of cells.
DuckDB does that: it is a maintained columnar engine that keeps to a memory
limit and spills to disk, which PyArrow does not do and Polars does only for
some operations. It does not parse: its joins keep no order and its CSV reader
gives strings, so that every cell would be hashed 26 times a row; codes from
PyArrow's reader keep the order for free and leave the engine a tenth of the
work.

Each row of a table is an id, or one of two special rows which every table
has: 'oov' for ids seen fewer than `min_count` times and ids never seen in
training, 'missing' for empty cells. They rank by their counts like any other.
Equal counts rank by table, then special rows first, then by value (bytes).
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from recjax import formats, synthetic
from recjax.config import Config, Data
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.specs import Feature, Schema

VERSION = 1  # of the prepared data; other versions are not read
VOCABULARY = "vocabulary.parquet"
BLOCKS = "blocks"
_KINDS = ("oov", "missing", "value")  # in this order at equal counts
_SHARD_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared data set: where it is, and what it holds."""

  directory: str
  schema: Schema
  profile: Profile
  samples: dict[str, int]  # of 'train' and 'test'
  vocabulary: str  # fingerprint: sha256 of the vocabulary's content
  settings: dict  # what it was made with
  teacher: dict | None = None  # synthetic: auc, log_loss of the test split


# Loading


def load(directory: str) -> Prepared:
  """The prepared data set in `directory`.

  Raises:
    UserError: there is none, it is unfinished or damaged.
  """
  path = os.path.join(directory, "prepared.json")
  try:
    with open(path, encoding="utf-8") as f:
      found = json.load(f)
    if found["version"] != VERSION:
      raise UserError(
        f"{path} has version {found['version']}, this recjax reads version"
        f" {VERSION}: delete {directory} and prepare again"
      )
    schema = Schema(
      tuple(found["schema"]["dense"]),
      tuple(Feature(**f) for f in found["schema"]["features"]),
    )
    samples = found["samples"]
    vocabulary = os.path.join(directory, VOCABULARY)
    return Prepared(
      directory,
      schema,
      read_profile(vocabulary, schema.tables, samples["train"]),
      samples,
      found["vocabulary"],
      found["settings"],
      found["teacher"],
    )
  except FileNotFoundError as e:
    raise UserError(
      f"{directory} holds no prepared data set ({e.filename} is missing):"
      " run with --mode=prepare"
    ) from e
  except (KeyError, TypeError, ValueError, pa.ArrowInvalid) as e:
    raise UserError(
      f"{directory} is damaged ({type(e).__name__}: {e}): delete it and"
      " prepare again"
    ) from e


def read_profile(
  vocabulary: str, tables: tuple[str, ...], samples: int
) -> Profile:
  """The profile that a vocabulary file holds."""
  file = pq.ParquetFile(vocabulary)
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


def copy_vocabulary(prepared: Prepared, directory: str) -> str:
  """Copies the vocabulary file into `directory`; returns its path there."""
  os.makedirs(directory, exist_ok=True)
  target = os.path.join(directory, VOCABULARY)
  part = target + ".part"
  shutil.copyfile(os.path.join(prepared.directory, VOCABULARY), part)
  os.replace(part, target)
  return target


# Preparing


def prepare(
  config: Config,
  directory: str,
  report: Callable[[str], None] = print,
) -> Prepared:
  """Prepares the logs of `config.data`, or loads them where that is done.

  The data set appears by one rename when it is complete; until then all is in
  `<directory>.unfinished`. What a killed run left there is used again, pass by
  pass, when it is of the same logs and settings.

  Args:
    config: see `config.data`.
    directory: for this data set only.
    report: takes lines of progress.

  Raises:
    UserError: damaged or missing logs, settings that do not fit, a full disk,
      or a data set made from other logs or settings.
  """
  directory = directory.rstrip("/")
  schema = formats.schema(config.data)
  settings = _settings(config)
  if os.path.exists(os.path.join(directory, "prepared.json")):
    prepared = load(directory)
    _check_same(prepared.settings, settings, directory)
    _remove(os.path.join(directory, "stage"))
    return prepared
  if os.path.exists(directory) and os.listdir(directory):
    raise UserError(
      f"{directory} holds other files but no prepared data set: delete it or"
      " use another --workdir"
    )
  try:
    _prepare(config, schema, settings, f"{directory}.unfinished", report)
    os.replace(f"{directory}.unfinished", directory)
  except (OSError, duckdb.Error, RuntimeError) as e:
    if not _disk_full(e):
      raise
    free = shutil.disk_usage(os.path.dirname(directory) or ".").free >> 20
    raise UserError(
      f"no space left on the disk of {directory} while preparing ({free:,}"
      f" MiB free; {e}): free some and run again, or use another --workdir"
    ) from e
  _remove(os.path.join(directory, "stage"))
  return load(directory)


def _disk_full(e: BaseException) -> bool:
  if isinstance(e, OSError) and e.errno:
    return e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  text = str(e).lower()
  return any(
    s in text
    for s in ("no space left", "file too large", "quota exceeded", "disk space")
  )


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)


def _write_json(path: str, content: dict) -> None:
  """Atomically: all of it or none, also after a power cut."""
  with open(path + ".part", "w", encoding="utf-8") as f:
    json.dump(content, f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + ".part", path)


def _read_json(path: str) -> dict | None:
  """None where there is no such file."""
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except FileNotFoundError:
    return None


# Settings


def _settings(config: Config) -> dict:
  """All that the prepared data depends on, by value; logs by a fingerprint.

  Raises:
    UserError: a value out of its range; no such logs.
  """
  data = config.data
  if not 0 < data.test_fraction < 1:
    raise UserError(
      f"data.test_fraction is {data.test_fraction}: give a share between 0 and"
      " 1"
    )
  for name, least in (
    ("block_samples", 1),
    ("min_count", 0),
    ("max_bad_rows", 0),
    ("memory_mb", 128),
  ):
    if getattr(data, name) < least:
      raise UserError(
        f"data.{name} is {getattr(data, name)}: give at least {least}"
      )
  names = ["format", "pooling", "min_count", "block_samples", "hotness"]
  if not data.test:
    names += ["test_fraction", "split"]
    if data.split == "random":
      names += ["seed"]
  settings = {f"data.{name}": getattr(data, name) for name in names}
  if data.format == "synthetic":
    settings["data.seed"] = data.seed
    for name, value in dataclasses.asdict(data.synthetic).items():
      settings[f"data.synthetic.{name}"] = value
  else:
    for field, paths in formats.sources(data).items():
      settings[field] = [_fingerprint(path) for path in paths]
  return json.loads(json.dumps(settings))  # as it reads back


def _fingerprint(path: str) -> str:
  """Name, size and a hash of the first and last MiB: cheap for any size."""
  size = os.path.getsize(path)
  with open(path, "rb") as f:
    digest = hashlib.sha256(f.read(1 << 20))
    f.seek(max(0, size - (1 << 20)))
    digest.update(f.read())
  return f"{os.path.basename(path)} {size} {digest.hexdigest()[:32]}"


def _check_same(old: dict, new: dict, directory: str) -> None:
  differ = [
    f"{k} was {formats.shown(old.get(k))}, is now {formats.shown(new.get(k))}"
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k)
  ]
  if differ:
    raise UserError(
      f"{directory} was prepared from other logs or settings:"
      f" {'; '.join(differ)}. Set them back, use another --workdir, or delete"
      f" {directory}"
    )


# The passes


def _prepare(config, schema, settings, directory, report) -> None:
  """All passes, in `directory`; those that are done there are not repeated."""
  data = config.data
  stage = os.path.join(directory, "stage")
  key = settings | {"data.max_bad_rows": data.max_bad_rows}
  staged = _read_json(os.path.join(stage, "staged.json"))
  if staged is None or staged["settings"] != key:
    _remove(directory)
    os.makedirs(stage)
    staged = _stage(data, schema, directory, report) | {"settings": key}
    _write_json(os.path.join(stage, "staged.json"), staged)
  split = Split(data, staged["train_rows"], staged["rows"])
  if not 0 < split.train < split.total:
    raise UserError(
      f"the logs hold {split.total:,} samples, of which {split.train:,} would"
      " train and the rest test: both need at least one"
    )

  tables = schema.tables
  of_feature = np.array([tables.index(f.table) for f in schema.features])
  with _engine(data.memory_mb, os.path.join(stage, "spill")) as engine:
    counted = _read_json(os.path.join(stage, "counted.json"))
    path = os.path.join(directory, VOCABULARY)
    if counted is None:
      progress = Progress("count", report, split.total)
      chunks = _staged(stage, staged, progress)
      fingerprint = _count(
        engine, chunks, split, of_feature, tables, data.min_count, path
      )
      counted = {"vocabulary": fingerprint}
      _write_json(os.path.join(stage, "counted.json"), counted)
    blocks = os.path.join(directory, BLOCKS)
    _remove(blocks)
    progress = Progress("pack", report, split.total)
    samples = _pack(
      _remap(engine, stage, staged, of_feature, tables, path, progress),
      split,
      schema,
      data.block_samples,
      blocks,
    )
  _remove(os.path.join(stage, "spill"))
  _write_json(
    os.path.join(directory, "prepared.json"),
    {
      "version": VERSION,
      "schema": dataclasses.asdict(schema),
      "samples": samples,
      "vocabulary": counted["vocabulary"],
      "settings": settings,
      "teacher": _read_json(os.path.join(directory, "logs", "teacher.json")),
    },
  )


class Progress:
  """Reports rows/s and the time left, every few seconds and at the end."""

  def __init__(self, name: str, report: Callable[[str], None], total: int = 0):
    self.name, self.report, self.total = name, report, total
    self.rows, self.start = 0, time.monotonic()
    self.reported = self.start

  def add(self, rows: int, share: float = 0.0) -> None:
    """`share` of the pass is done; from the total where that is known."""
    self.rows += rows
    now = time.monotonic()
    share = self.rows / self.total if self.total else share
    if now - self.reported < 5 and share < 1:
      return
    self.reported, spent = now, max(now - self.start, 1e-9)
    left = f", {spent / share - spent:,.0f} s left" if share < 1 else ""
    self.report(
      f"prepare: {self.name:5} {self.rows:>13,} rows,"
      f" {self.rows / spent:>11,.0f} rows/s{left}"
    )


@dataclasses.dataclass(frozen=True)
class Split:
  """Which rows of the logs are the test part."""

  data: Data
  train_rows: int | None  # those of data.train where data.test is given
  total: int

  @functools.cached_property
  def train(self) -> int:
    """Training samples."""
    if self.train_rows is not None:
      return self.train_rows
    if self.data.split == "time":
      return self.total - round(self.total * self.data.test_fraction)
    return sum(
      int(self.mask(start, min(1 << 20, self.total - start)).sum())
      for start in range(0, self.total, 1 << 20)
    )

  def mask(self, start: int, rows: int) -> np.ndarray:
    """[rows] bool: which of the rows from `start` on are training samples."""
    row = np.arange(start, start + rows, dtype=np.uint64)
    if self.train_rows is None and self.data.split == "random":
      uniform = _splitmix64(row + np.uint64(self.data.seed << 40)) / 2.0**64
      return uniform >= self.data.test_fraction
    return row < self.train


def _splitmix64(x: np.ndarray) -> np.ndarray:
  """A hash of 64-bit integers (Steele, Lea and Flood, 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _stage(data, schema, directory, report) -> dict:
  """Pass 1. Returns rows, train_rows, and the rows and values a chunk."""
  stage = os.path.join(directory, "stage")
  if data.format == "synthetic":
    synthetic.write(data, os.path.join(directory, "logs"), report)
    data = dataclasses.replace(
      data,
      format="criteo",
      hotness=data.synthetic.hotness,
      train=os.path.join(directory, "logs", "*.tsv"),
    )
  bad = formats.BadRows(data.max_bad_rows)
  sizes: list[tuple[int, int]] = []
  rows = train_rows = 0
  for field, paths in formats.sources(data).items():
    progress = Progress("stage", report)
    for chunk in formats.chunks(data, schema, paths, bad):
      arrays = {f.name: getattr(chunk, f.name) for f in _fields(chunk)}
      np.savez(os.path.join(stage, f"{len(sizes):06}.npz"), **arrays)
      with pa.OSFile(os.path.join(stage, f"{len(sizes):06}.arrow"), "wb") as f:
        batch = pa.record_batch([chunk.values], names=["value"])
        with pa.ipc.new_file(f, batch.schema) as writer:
          writer.write_batch(batch)
      sizes.append((len(chunk.label), len(chunk.values)))
      rows += len(chunk.label)
      progress.add(len(chunk.label), chunk.read)
    if field == "data.train":
      train_rows = rows
  if bad.rows:
    path = os.path.join(directory, "skipped.tsv")
    with open(path, "w", encoding="utf-8") as f:
      f.write(bad.report())
    report(f"prepare: skipped {len(bad.rows):,} damaged lines, see skipped.tsv")
  return {
    "rows": rows,
    "train_rows": train_rows if data.test else None,
    "sizes": sizes,
  }


def _fields(chunk: formats.Chunk):
  return [
    f
    for f in dataclasses.fields(chunk)
    if isinstance(getattr(chunk, f.name), np.ndarray)
  ]


def _staged(stage, staged, progress) -> Iterator[tuple[int, dict, pa.Array]]:
  """(first row, arrays, values) of each staged chunk."""
  row = 0
  for i, (rows, _) in enumerate(staged["sizes"]):
    with np.load(os.path.join(stage, f"{i:06}.npz")) as file:
      arrays = dict(file)
    yield row, arrays, _values(stage, i)
    row += rows
    progress.add(rows)


def _values(stage: str, i: int) -> pa.Array:
  with pa.memory_map(os.path.join(stage, f"{i:06}.arrow")) as f:
    return pa.ipc.open_file(f).get_batch(0)["value"]


def _engine(memory_mb: int, spill: str) -> duckdb.DuckDBPyConnection:
  engine = duckdb.connect(
    ":memory:",
    config={
      "memory_limit": f"{memory_mb}MB",
      "temp_directory": spill,
      "preserve_insertion_order": False,
    },
  )
  engine.execute("SET enable_progress_bar = false")  # Progress reports
  return engine


def _count(engine, chunks, split, of_feature, tables, min_count, path) -> str:
  """Pass 2. Writes the vocabulary; returns its fingerprint."""
  columns = pa.schema(
    [("tbl", pa.int16()), ("value", pa.string()), ("n", pa.int64())]
  )

  def batches():
    for row, arrays, values in chunks:
      codes = arrays["codes"]
      train = codes[split.mask(row, len(codes))]
      n = np.bincount(train[train >= 0], minlength=len(values))
      table = of_feature[arrays["feature"]].astype(np.int16)
      used = pa.array(n > 0)
      yield pa.record_batch([table, values, n], schema=columns).filter(used)

  batches = pa.RecordBatchReader.from_batches(columns, batches())
  engine.execute(
    "CREATE TABLE counts AS SELECT tbl, value, sum(n)::BIGINT AS n"
    " FROM batches GROUP BY ALL"
  )
  engine.execute(
    "CREATE TABLE special AS SELECT t.tbl, kind, coalesce(sum(n) FILTER"
    " (value IS NULL AND kind = 1 OR value IS NOT NULL AND kind = 0 AND n < $m)"
    ", 0)::BIGINT AS n FROM range($t) AS t(tbl) CROSS JOIN range(2) AS k(kind)"
    " LEFT JOIN counts AS c ON c.tbl = t.tbl GROUP BY ALL",
    {"m": min_count, "t": len(tables)},
  )
  rows = engine.sql(
    "SELECT tbl, 2 AS kind, value, n FROM counts"
    " WHERE value IS NOT NULL AND n >= $m"
    " UNION ALL SELECT tbl, kind, NULL, n FROM special"
    " ORDER BY n DESC, tbl, kind, value",
    params={"m": min_count},
  )
  fingerprint = _write_vocabulary(rows.to_arrow_reader(1 << 18), tables, path)
  engine.execute("DROP TABLE counts")
  return fingerprint


def _write_vocabulary(batches, tables, path) -> str:
  """Writes ranked rows (tbl, kind, value, n) as Parquet; see Prepared."""
  schema = pa.schema(
    [
      ("table", pa.string()),
      ("kind", pa.string()),
      ("value", pa.string()),
      ("count", pa.int64()),
      ("rank", pa.int32()),
    ]
  )
  names, kinds = pa.array(tables), pa.array(_KINDS)
  digests = [hashlib.sha256() for _ in range(5)]
  rank = 0
  with pq.ParquetWriter(path + ".part", schema, compression="zstd") as writer:
    for batch in batches:
      tbl, kind, value, n = (batch[c] for c in ("tbl", "kind", "value", "n"))
      if rank + len(batch) > np.iinfo(np.int32).max:
        raise UserError(
          "the tables have more than 2^31 rows together: raise data.min_count"
        )
      ranks = np.arange(rank, rank + len(batch), dtype=np.int32)
      rank += len(batch)
      text = pc.fill_null(value, "")
      for digest, column in zip(
        digests,
        (
          tbl.to_numpy().astype(np.int16),
          kind.to_numpy().astype(np.int8),
          pc.binary_length(text).to_numpy().astype(np.int32),
          pc.binary_join(pa.array([text.to_pylist()]), "")[0].as_buffer(),
          n.to_numpy().astype(np.int64),
        ),
        strict=True,
      ):
        digest.update(column)
      writer.write_batch(
        pa.record_batch(
          [names.take(tbl), kinds.take(kind), value, n, ranks], schema=schema
        )
      )
  os.replace(path + ".part", path)
  head = json.dumps([list(tables), rank]).encode()
  return hashlib.sha256(
    head + b"".join(d.digest() for d in digests)
  ).hexdigest()


def _remap(
  engine, stage, staged, of_feature, tables, path, progress
) -> Iterator[tuple[int, dict]]:
  """Pass 3: (first row, arrays with ids [k, S] int32 ranks) of each chunk."""
  columns = pa.schema(
    [("position", pa.int64()), ("tbl", pa.int16()), ("value", pa.string())]
  )

  def batches():
    position = 0
    for i, (_, size) in enumerate(staged["sizes"]):
      with np.load(os.path.join(stage, f"{i:06}.npz")) as file:
        table = of_feature[file["feature"]].astype(np.int16)
      at = np.arange(position, position + size)
      position += size
      yield pa.record_batch([at, table, _values(stage, i)], schema=columns)

  batches = pa.RecordBatchReader.from_batches(columns, batches())
  engine.execute(
    'CREATE TABLE vocabulary AS SELECT (list_position($names, "table") - 1)'
    "::SMALLINT AS tbl, kind, value, rank FROM read_parquet($path)",
    {"names": list(tables), "path": path},
  )
  special = np.empty((2, len(tables)), np.int32)  # [oov or missing, table]
  for tbl, kind, rank in engine.execute(
    "SELECT tbl, kind, rank FROM vocabulary WHERE kind <> 'value'"
  ).fetchall():
    special[_KINDS.index(kind), tbl] = rank
  ranks = _Ranks(
    engine.sql(
      "SELECT coalesce(v.rank, -1)::INTEGER FROM batches AS b LEFT JOIN"
      " (FROM vocabulary WHERE kind = 'value') AS v"
      " ON b.tbl = v.tbl AND b.value = v.value ORDER BY position"
    ).to_arrow_reader(1 << 18)
  )
  for row, arrays, values in _staged(stage, staged, progress):
    table = of_feature[arrays["feature"]]
    missing = values.is_null().to_numpy(zero_copy_only=False)
    rank = ranks.take(len(values))
    rank = np.where(rank < 0, special[missing.astype(int), table], rank)
    rank = np.append(rank, np.int32(-1))  # which the code -1 finds
    arrays["ids"] = rank[arrays.pop("codes")]
    yield row, arrays


class _Ranks:
  """A stream of one int32 column, taken in pieces of any length."""

  def __init__(self, batches):
    self.batches, self.rest = iter(batches), np.empty(0, np.int32)

  def take(self, n: int) -> np.ndarray:
    parts = [self.rest]
    while sum(map(len, parts)) < n:
      parts.append(next(self.batches).column(0).to_numpy())
    joined = np.concatenate(parts)
    self.rest = joined[n:]
    return joined[:n]


def features(schema: Schema) -> dict[str, tuple[tuple, type]]:
  """Shape and type of each array of a block of k samples (None = k)."""
  arrays = {
    "label": ((None,), np.float32),
    "dense": ((None, len(schema.dense)), np.float32),
    "ids": ((None, schema.columns), np.int32),
  }
  if schema.weighted:
    arrays["weights"] = ((None, schema.columns), np.float32)
  return arrays


def _pack(chunks, split, schema, block_samples, directory) -> dict[str, int]:
  """Pass 4: the tensorflow-datasets builder. Returns samples a split."""
  os.makedirs(directory)
  arrays = features(schema)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="recjax_blocks",
    version=tfds.core.Version("1.0.0"),
    data_dir=directory,
    module_name="recjax.prepare",
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description="Blocks of samples, in time order; ids are ranks, -1 = none.",
    features=tfds.features.FeaturesDict(
      {
        name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
        for name, (shape, dtype) in arrays.items()
      }
    ),
    disable_shuffling=True,
  )
  width = 4 * sum(np.prod(s[1:], dtype=int) for s, _ in arrays.values())
  writer = tfds.core.SequentialWriter(
    info,
    max_examples_per_shard=max(1, _SHARD_BYTES // (width * block_samples)),
    file_format="array_record",
  )
  names = ("train", "test")
  writer.initialize_splits(list(names))
  rest: dict[str, list[dict]] = {name: [] for name in names}
  samples = dict.fromkeys(names, 0)

  def flush(name, last=False):
    waiting = sum(len(part["label"]) for part in rest[name])
    if waiting < block_samples and not (last and waiting):
      return
    joined = {a: np.concatenate([p[a] for p in rest[name]]) for a in arrays}
    full = waiting if last else waiting - waiting % block_samples
    blocks = [
      {a: x[i : min(i + block_samples, full)] for a, x in joined.items()}
      for i in range(0, full, block_samples)
    ]
    writer.add_examples({name: blocks})
    rest[name] = [{a: x[full:] for a, x in joined.items()}]
    samples[name] += full

  for row, chunk in chunks:
    train = split.mask(row, len(chunk["label"]))
    for name, mask in (("train", train), ("test", ~train)):
      if mask.any():
        rest[name].append({a: chunk[a][mask] for a in arrays})
        flush(name)
  for name in names:
    flush(name, last=True)
  writer.close_all()
  return samples
