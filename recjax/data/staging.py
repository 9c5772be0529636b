"""The first pass of data/prepare.py: logs -> chunks on disk, and how they split.

A staged chunk is two files: numbers (.npz) and distinct values (.arrow).
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pyarrow as pa

from recjax.config import Data
from recjax.data import criteo, movielens, synthetic, text
from recjax.schema import Schema


def format_of(data: Data) -> ModuleType:
  """The module with this format's schema, sources and chunks."""
  return movielens if data.format == "movielens" else criteo


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
      uniform = (
        _splitmix64(row + np.uint64((self.data.seed << 40) % 2**64)) / 2.0**64
      )
      return uniform >= self.data.test_fraction
    return row < self.train


def _splitmix64(x: np.ndarray) -> np.ndarray:
  """A hash of 64-bit integers (Steele, Lea and Flood, 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def write(
  data: Data, schema: Schema, directory: str, report: Callable[[str], None]
) -> dict:
  """Stages the logs in `directory`/stage; their damaged lines in skipped.tsv.

  Returns:
    rows; train_rows, those of data.train where data.test is given; sizes, the
    rows and the values of each chunk.
  """
  stage = os.path.join(directory, "stage")
  if data.format == "synthetic":
    synthetic.write(data, os.path.join(directory, "logs"), report)
    data = dataclasses.replace(
      data,
      format="criteo",
      hotness=data.synthetic.hotness,
      train=os.path.join(directory, "logs", "*.tsv"),
    )
  bad = text.BadRows(data.max_bad_rows)
  sizes: list[tuple[int, int]] = []
  rows = train_rows = 0
  for field, paths in format_of(data).sources(data).items():
    progress = Progress("stage", report)
    for chunk in format_of(data).chunks(data, schema, paths, bad):
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


def _fields(chunk: criteo.Chunk):
  return [
    f
    for f in dataclasses.fields(chunk)
    if isinstance(getattr(chunk, f.name), np.ndarray)
  ]


def read(
  stage: str, staged: dict, progress: Progress
) -> Iterator[tuple[int, dict[str, np.ndarray], pa.Array]]:
  """(first row, arrays, values) of each staged chunk."""
  row = 0
  for i, (rows, _) in enumerate(staged["sizes"]):
    with np.load(os.path.join(stage, f"{i:06}.npz")) as file:
      arrays = dict(file)
    yield row, arrays, values(stage, i)
    row += rows
    progress.add(rows)


def features(stage: str, i: int) -> np.ndarray:
  """[V] int16: whose value each of the values of chunk i is."""
  with np.load(os.path.join(stage, f"{i:06}.npz")) as file:
    return file["feature"]


def values(stage: str, i: int) -> pa.Array:
  """[V] strings: the distinct values of chunk i."""
  with pa.memory_map(os.path.join(stage, f"{i:06}.arrow")) as f:
    return pa.ipc.open_file(f).get_batch(0)["value"]
