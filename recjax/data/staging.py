"""The first pass of prepare.py: logs -> chunks on disk.

A staged chunk is two files: numbers (.npz) and distinct values (.arrow).
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pyarrow as pa

from recjax import files
from recjax.config import FORMATS, Config, Data
from recjax.data import (
  criteo,
  csv_rows,
  json_rows,
  libsvm_rows,
  movielens,
  parquet_rows,
  text,
)
from recjax.data.ahead import ahead
from recjax.data.chunks import Chunk
from recjax.data.columns import Columns
from recjax.data.log import Format, Log
from recjax.progress import Progress
from recjax.schema import Schema

FOLDER = "stage"  # of the data set that is being prepared

# What reads logs: it has `schema`, `sources` and `chunks`.
Reader = ModuleType | Columns | Log
# config.Data.format -> what reads it: a module, or the format of a log whose
# columns the config's schema names.
_READERS: dict[str, ModuleType | Format] = {
  "criteo": criteo,
  "movielens": movielens,
  "synthetic": criteo,
} | {
  name: Format(of.read, of.names)
  for name, of in {
    "csv": csv_rows,
    "jsonl": json_rows,
    "libsvm": libsvm_rows,
    "parquet": parquet_rows,
  }.items()
}


def reader_of(config: Config) -> ModuleType | Log:
  """Returns what reads a config's logs, by its schema where it needs one."""
  found = _READERS[config.data.format]
  return Log(config.schema, found) if isinstance(found, Format) else found


def register_format(name: str, format: Format) -> None:
  """Adds a format of logs of one's own, for `data.format`.

  Such a call stands in a config file; the tutorial has one. A format that is
  there already is replaced.
  """
  if name not in FORMATS:
    FORMATS.append(name)
  _READERS[name] = format


@dataclasses.dataclass(frozen=True)
class Staged:
  """What the pass found."""

  rows: int  # samples of all logs
  train_rows: int | None  # those of data.train, where data.test is given
  sizes: list[tuple[int, int]]  # samples and distinct values of each chunk


def write(
  data: Data, reader: Reader, directory: str, report: Callable[[str], None]
) -> Staged:
  """Stages the logs in `directory`/stage; their damaged lines in skipped.tsv.

  Args:
    data: the config; synthetic logs are those that data.train names.
    reader: of the logs.
    directory: of the data set; its folder `stage` is there.
    report: takes lines of progress.

  Raises:
    UserError: a file that cannot be read; more damaged lines than allowed.
  """
  schema = reader.schema(data)
  damaged = text.DamagedLines(data.max_bad_rows)
  sizes: list[tuple[int, int]] = []
  rows = train_rows = 0
  cut = np.zeros(len(schema.features), np.int64)
  for field, paths in reader.sources(data).items():
    progress = Progress("prepare: stage", report)
    for chunk in ahead(reader.chunks(data, schema, paths, damaged)):
      write_chunk(os.path.join(directory, FOLDER), len(sizes), chunk)
      sizes.append((len(chunk.label), len(chunk.values)))
      rows += len(chunk.label)
      cut += chunk.cut
      progress.add(len(chunk.label), chunk.read)
    if field == "data.train":
      train_rows = rows
  tell(schema, directory, rows, cut, damaged, report=report)
  return Staged(rows, train_rows if data.test else None, sizes)


def tell(
  schema: Schema,
  directory: str,
  rows: int,
  cut: np.ndarray,
  damaged: text.DamagedLines,
  *,
  report: Callable[[str], None],
) -> None:
  """Says what of the logs was left out.

  Args:
    schema: of the samples.
    directory: of the data set, for skipped.tsv.
    rows: samples of all logs.
    cut: [F], bags that had more ids than their hotness.
    damaged: lines, which are listed in a file.
    report: takes lines.
  """
  for f, bags in zip(schema.features, cut.tolist(), strict=True):
    if bags:
      report(
        f"prepare: {f.name}: {bags:,} of {rows:,} bags had more than "
        f"{f.hotness} ids and were cut"
      )
  if damaged.lines:
    files.write(os.path.join(directory, "skipped.tsv"), damaged.report())
    report(
      f"prepare: skipped {len(damaged.lines):,} damaged lines, see skipped.tsv"
    )


def write_chunk(stage: str, i: int, chunk: Chunk) -> None:
  """Writes chunk i."""
  fields = {f.name: getattr(chunk, f.name) for f in dataclasses.fields(chunk)}
  arrays = {k: x for k, x in fields.items() if isinstance(x, np.ndarray)}
  with files.replacing(_path(stage, i, "npz")) as part, open(part, "wb") as f:
    np.savez(f, **arrays)
  batch = pa.record_batch([chunk.values], names=["value"])
  with (
    files.replacing(_path(stage, i, "arrow")) as part,
    pa.OSFile(part, "wb") as f,
    pa.ipc.new_file(f, batch.schema) as writer,
  ):
    writer.write_batch(batch)


def _path(stage: str, i: int, kind: str) -> str:
  return os.path.join(stage, f"{i:06}.{kind}")


def read(
  stage: str, sizes: list[tuple[int, int]], progress: Progress
) -> Iterator[tuple[int, dict[str, np.ndarray], pa.Array]]:
  """Reads the staged chunks.

  Args:
    stage: their folder.
    sizes: samples and distinct values of each.
    progress: counts the samples.

  Yields:
    (number of the first sample, arrays of a Chunk, its values).
  """
  row = 0
  for i, (rows, _) in enumerate(sizes):
    with np.load(_path(stage, i, "npz")) as file:
      arrays = dict(file)
    yield row, arrays, values(stage, i)
    row += rows
    progress.add(rows)


def features(stage: str, i: int) -> np.ndarray:
  """Reads whose value each of the values of chunk i is: [V] int16."""
  with np.load(_path(stage, i, "npz")) as file:
    return file["feature"]


def times(stage: str, i: int) -> np.ndarray | None:
  """Reads the times of chunk i, [k] float64, where it has any."""
  with np.load(_path(stage, i, "npz")) as file:
    return file.get("time", None)


def values(stage: str, i: int) -> pa.Array:
  """Reads the distinct values of chunk i: [V] strings."""
  with pa.memory_map(_path(stage, i, "arrow")) as f:
    return pa.ipc.open_file(f).get_batch(0)["value"]
