"""The passes of preparation as tasks (tasks.py), for many machines.

No worker needs more than a file of the log, a range of the vocabulary
(ranges.py) or a file of blocks, a piece at a time. What the passes do is what
those of prepare.py do, so that every bit of the result is the same.
"""

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recjax.data import blocks, fit_numbers, passes, ranges, staging, vocabulary
from recjax.data.fit_numbers import Sums
from recjax.data.numbers import Fitted
from recjax.data.passes import Chunks
from recjax.data.tasks import Job, Pass, once, read_json, write_json
from recjax.data.text import DamagedLines
from recjax.errors import UserError

SPLITS = ("train", "test")


# ---- stage: a file of the log -> its chunks


def _stage(job: Job, i: int, folder: str) -> None:
  reader, inputs = job.reader, job.schema
  damaged = DamagedLines(job.data.max_bad_rows)
  sizes, error = [], ""
  cut = np.zeros(len(inputs.features), np.int64)
  try:
    for chunk in reader.chunks(job.data, inputs, job.sources[i][1], damaged):
      staging.write_chunk(folder, len(sizes), chunk)
      sizes.append((len(chunk.label), len(chunk.values)))
      cut += chunk.cut
  except UserError as e:  # of this file; what others find may come before it
    error = str(e)
  found = {"sizes": sizes, "cut": cut.tolist(), "error": error}
  write_json(folder, found | {"damaged": damaged.lines})


def _join_staged(job: Job) -> None:
  """Numbers the samples of all files; errors are those of the first."""
  damaged = DamagedLines(job.data.max_bad_rows)
  first, train_rows = [0], 0
  cut = np.zeros(len(job.schema.features), np.int64)
  for i, (field, _) in enumerate(job.sources):
    found = read_json(job.at("stage", i))
    for line in found["damaged"]:
      damaged.add(*line)
    if found["error"]:
      raise UserError(found["error"])
    cut += np.array(found["cut"], np.int64)
    first.append(first[-1] + sum(rows for rows, _ in found["sizes"]))
    if field == "data.train":
      train_rows = first[-1]
  train = train_rows if job.data.test else None
  times = lambda: _times(job)
  split = passes.split_of(job.data, job.reader, train, first[-1], times)
  content = {
    "first": first,
    "train_rows": train,
    "train": split.train,
    "time_cut": split.cut,
  }
  content |= {"damaged": damaged.lines, "cut": cut.tolist()}
  once(job.at("stage"), lambda folder: write_json(folder, content))


def _times(job: Job) -> Iterator[np.ndarray]:
  """Yields the times of each chunk of all files."""
  for folder in job.every("stage"):
    for i in range(len(read_json(folder)["sizes"])):
      yield staging.times(folder, i)


def _chunks(job: Job, i: int) -> Chunks:
  """Returns the staged chunks of file i."""
  found = read_json(job.at("stage"))
  cut = tuple(found["time_cut"]) if found["time_cut"] else None
  rows = found["first"][-1]
  split = passes.Split(job.data, found["train_rows"], rows, cut)
  vars(split)["train"] = found["train"]  # or each would count all samples
  chunks = Chunks(
    job.at("stage", i),
    [tuple(x) for x in read_json(job.at("stage", i))["sizes"]],
    split,
    job.data,
    job.reader,
    row=found["first"][i],
    report=lambda _: None,
  )
  if os.path.exists(job.at("fit")):
    of = read_json(job.at("fit"))
    chunks.numbers = tuple(Fitted.from_json(x) for x in of)
  return chunks


# ---- fit: a file's chunks -> their sums


def _tasks_of_fit(job: Job) -> int:
  _join_staged(job)
  fits = _chunks(job, 0).log_numbers and not job.numbers
  return len(job.sources) if fits else 0


def _fit(job: Job, i: int, folder: str) -> None:
  chunks = _chunks(job, i)
  found = list(chunks.sums())
  n = len(chunks.log_numbers)
  arrays = {
    name: np.reshape([getattr(x, name) for x in found], (-1, n))
    for name in Sums._fields[:-1]
  }
  for k in range(n):
    drawn = [np.empty(0), *(x.sample[k] for x in found)]
    arrays[f"sample{k}"] = np.concatenate(drawn)
  np.savez(os.path.join(folder, "sums.npz"), **arrays)


def _sums(job: Job) -> Iterator[Sums]:
  """Reads the sums of all chunks, in order."""
  for folder in job.every("fit"):
    with np.load(os.path.join(folder, "sums.npz")) as file:
      arrays = dict(file)
    columns = [arrays[name] for name in Sums._fields[:-1]]
    drawn = [arrays[f"sample{k}"] for k in range(columns[0].shape[1])]
    for chunk in zip(*columns, strict=True):
      yield Sums(*chunk, tuple(drawn))
      drawn = [np.empty(0)] * len(drawn)  # of the whole file: they are sorted


# ---- count: a file's chunks -> its run


def _tasks_of_count(job: Job) -> int:
  log_numbers = _chunks(job, 0).log_numbers
  fitted = job.numbers
  if log_numbers and not fitted:
    fitted = fit_numbers.fit(log_numbers, _sums(job))
  content = [x._asdict() for x in fitted]
  once(job.at("fit"), lambda folder: write_json(folder, content))
  return len(job.sources)


def _engine(job: Job, folder: str):
  """Opens DuckDB; as a worker has neighbours, it takes one thread."""
  spill = os.path.join(folder, "spill")
  engine = vocabulary.open_engine(job.data.memory_mb, spill)
  engine.execute("SET threads = 1")
  return engine


def _count(job: Job, i: int, folder: str) -> None:
  chunks = _chunks(job, i)
  missing = np.zeros(len(chunks.schema.tables), np.int64)
  with _engine(job, folder) as engine:
    # All values: one that only tests here may train in another file.
    vocabulary.add_up(engine, chunks.counts())
    for tbl, n in engine.execute(
      "SELECT tbl, n FROM counts WHERE value IS NULL"
    ).fetchall():
      missing[tbl] = n
    run = engine.sql("FROM counts WHERE value IS NOT NULL ORDER BY tbl, value")
    ranges.write_run(folder, run.to_arrow_reader(1 << 16))
  write_json(folder, missing.tolist())


# ---- merge: a range of all runs -> its rows


def _tasks_of_merge(job: Job) -> int:
  found = ranges.cut(job.every("count"), job.range_bytes)

  def write(folder: str) -> None:
    np.savez(
      os.path.join(folder, "batches.npz"), start=found.start, stop=found.stop
    )
    write_json(folder, found.bounds)

  once(job.at("count"), write)
  return len(found.bounds) + 1


def _ranges(job: Job) -> ranges.Ranges:
  bounds = [tuple(x) for x in read_json(job.at("count"))]
  with np.load(os.path.join(job.at("count"), "batches.npz")) as file:
    return ranges.Ranges(bounds, file["start"], file["stop"])


def _merge(job: Job, p: int, folder: str) -> None:
  least = _chunks(job, 0).min_counts
  counted = [least[t] for t in job.schema.tables]
  found = ranges.add_up(job.every("count"), _ranges(job), p, counted)
  ranges.save(folder, found)


# ---- rank: a range's rows -> ranks of each run's values; the vocabulary


def of_ranges(job: Job, name: str) -> list[str]:
  """Returns the folders that a pass over the ranges leaves."""
  return [job.at(name, p) for p in range(len(_ranges(job).bounds) + 1)]


def _tasks_of_rank(job: Job) -> int:
  missing = sum(np.array(read_json(f), np.int64) for f in job.every("count"))
  folders = of_ranges(job, "merge")
  found = ranges.bases(folders, missing)

  def write(folder: str) -> None:
    np.savez(
      os.path.join(folder, "bases.npz"), *found.groups,
      special=found.special, counts=found.counts,
    )  # fmt: skip

  once(job.at("merge"), write)
  return len(folders) + 1


def _rank(job: Job, p: int, folder: str) -> None:
  """Ranks the rows of range p; after the last one, writes the vocabulary."""
  folders = of_ranges(job, "merge")
  with np.load(os.path.join(job.at("merge"), "bases.npz")) as file:
    if p < len(folders):
      rank, starts = ranges.ranks(folders[p], file[f"arr_{p}"])
      np.save(os.path.join(folder, "rank.npy"), rank)
      np.save(os.path.join(folder, "starts.npy"), starts)
      return
    counts = file["counts"]
  with _engine(job, folder) as engine:
    path = os.path.join(folder, vocabulary.FILE)
    rows = ranges.rows(folders, counts)
    found = vocabulary.write(engine, rows, job.schema.tables, path)
  write_json(folder, found)


# ---- pack: a file's chunks -> samples of ranks


def _tasks_of_pack(job: Job) -> int:
  return len(job.sources)


def _pack(job: Job, i: int, folder: str) -> None:
  chunks = _chunks(job, i)
  known = os.path.join(folder, vocabulary.FILE)
  _write_known(job, i, known)
  sizes: dict[str, list[int]] = {name: [] for name in SPLITS}
  with _engine(job, folder) as engine:
    tables = chunks.schema.tables
    ranks = vocabulary.ranks(engine, chunks.values, tables, known)
    for name, arrays in chunks.samples(ranks):
      np.savez(_packed(folder, name, len(sizes[name])), **arrays)
      sizes[name].append(len(arrays["label"]))
  os.remove(known)
  write_json(folder, sizes)


def _packed(folder: str, split: str, n: int) -> str:
  return os.path.join(folder, f"{split}-{n:06}.npz")


def _write_known(job: Job, i: int, path: str) -> None:
  """Writes the part of the vocabulary that file i of the log has."""
  ranks = []
  for folder in of_ranges(job, "rank"):
    start, stop = np.load(os.path.join(folder, "starts.npy"))[i : i + 2]
    every = np.load(os.path.join(folder, "rank.npy"), mmap_mode="r")
    ranks.append(every[start:stop])
  rank = np.concatenate(ranks)
  with np.load(os.path.join(job.at("merge"), "bases.npz")) as file:
    special = file["special"].astype(np.int32)
  names = pa.array(job.schema.tables)
  columns = [vocabulary.SCHEMA.field(c) for c in vocabulary.LOOKED_UP]
  with pq.ParquetWriter(path, pa.schema(columns)) as writer:
    for kind, of in zip(vocabulary.KINDS, special, strict=False):
      kinds, nothing = (
        pa.array([kind] * len(of)),
        pa.nulls(len(of), pa.string()),
      )
      batch = [names, kinds, nothing, of]
      writer.write_batch(pa.record_batch(batch, schema=pa.schema(columns)))
    start = 0
    for run in ranges.read_run(job.at("count", i)):
      of = rank[start : start + len(run)]
      start += len(run)
      kinds = pa.array(["value"] * len(run))
      batch = [names.take(run["tbl"]), kinds, run["value"], of]
      batch = pa.record_batch(batch, schema=pa.schema(columns))
      writer.write_batch(batch.filter(pa.array(of >= 0)))


# ---- block: samples -> a file of blocks


def _tasks_of_block(job: Job) -> int:
  """Lists the pieces of samples, and which of them each file of blocks has."""
  pieces: dict[str, list[tuple[int, int, int]]] = {name: [] for name in SPLITS}
  for i, folder in enumerate(job.every("pack")):
    for name, sizes in read_json(folder).items():
      pieces[name] += [(i, n, size) for n, size in enumerate(sizes)]
  samples = {k: sum(size for *_, size in x) for k, x in pieces.items()}
  per_file = blocks.file_samples(job.schema, job.data.block_samples)
  of = [
    (name, k) for name in SPLITS for k in range(-(-samples[name] // per_file))
  ]
  content = {"pieces": pieces, "samples": samples, "files": of}
  once(job.at("pack"), lambda folder: write_json(folder, content))
  return len(of)


def _block(job: Job, j: int, folder: str) -> None:
  found = read_json(job.at("pack"))
  name, k = found["files"][j]
  size = blocks.file_samples(job.schema, job.data.block_samples)
  start, stop = k * size, (k + 1) * size

  def parts() -> Iterator[dict[str, np.ndarray]]:
    at = 0
    for i, n, samples in found["pieces"][name]:
      a, b = max(start - at, 0), min(stop - at, samples)
      at += samples
      if a < b:
        with np.load(_packed(job.at("pack", i), name, n)) as file:
          yield {x: file[x][a:b] for x in file.files}

  written = blocks.write_file(
    parts(), job.schema, job.data.block_samples, folder, (name, k)
  )
  write_json(folder, written)


PASSES = (
  Pass("stage", lambda job: len(job.sources), _stage),
  Pass("fit", _tasks_of_fit, _fit),
  Pass("count", _tasks_of_count, _count),
  Pass("merge", _tasks_of_merge, _merge),
  Pass("rank", _tasks_of_rank, _rank),
  Pass("pack", _tasks_of_pack, _pack),
  Pass("block", _tasks_of_block, _block),
)
