"""Criteo logs and prepared data sets that several tests of data/ want."""

import glob
import hashlib
import os
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds

from recjax.config import Config, Data
from recjax.data import criteo, prepared
from recjax.data.prepared import Prepared
from recjax.data.text import DamagedLines
from recjax.schema import columns_of

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
CRITEO = os.path.join(REAL, "criteo_kaggle_80k.tsv.gz")
needs_real_data = pytest.mark.skipif(
  not os.path.exists(CRITEO), reason=f"no {CRITEO}"
)


def quiet(_: str) -> None:
  """Takes a line of progress and shows it to nobody."""


def log(
  path: os.PathLike, rows: int = 500, seed: int = 0, hotness: int = 1
) -> list[list[str]]:
  """Writes a Criteo log of few, skewed values; returns its cells [rows][26].

  The first category is a bag of up to `hotness` ids.
  """
  rng = random.Random(seed)
  table = []
  with open(path, "w") as f:
    for i in range(rows):
      cells = [
        ",".join(
          f"v{int(rng.paretovariate(0.7)) % 200}"
          for _ in range(rng.randint(1, hotness) if c == 0 else 1)
        )
        for c in range(26)
      ]
      cells = [c if rng.random() < 0.9 else "" for c in cells]
      ints = [str(i + j) for j in range(13)]
      f.write("\t".join([str(i % 2), *ints, *cells]) + "\n")
      table.append(cells)
  return table


def config(train: os.PathLike | str, **data) -> Config:
  """A config of small blocks and little memory."""
  return Config(
    data=Data(train=str(train), block_samples=64, memory_mb=256, **data)
  )


def arrays(found: Prepared, split: str) -> dict[str, np.ndarray]:
  """Reads all samples of a split, through tensorflow-datasets itself."""
  at = os.path.join(found.directory, prepared.BLOCKS)
  source = tfds.builder_from_directory(at).as_data_source(split)
  blocks = [source[i] for i in range(len(source))]
  return {a: np.concatenate([b[a] for b in blocks]) for a in blocks[0]}


def content(directory: os.PathLike | str) -> dict[str, str]:
  """Hashes every file below a folder, by its path in there."""
  found = {}
  for path in glob.glob(os.path.join(directory, "**"), recursive=True):
    if os.path.isfile(path):
      with open(path, "rb") as f:
        name = os.path.relpath(path, directory)
        found[name] = hashlib.sha256(f.read()).hexdigest()
  return found


# A line of a Criteo-format log.
GOOD = b"1\t" + b"\t".join(b"%d" % i for i in range(13))
GOOD += b"\t" + b"\t".join(b"c%d" % i for i in range(26)) + b"\n"


def field(line: bytes, index: int, text: bytes) -> bytes:
  """Replaces a field of a line."""
  fields = line[:-1].split(b"\t")
  fields[index] = text
  return b"\t".join(fields) + b"\n"


def read(
  path: os.PathLike, data: Data | None = None, limit: int = 0
) -> tuple[list[float], list[list[float]], list, DamagedLines]:
  """Reads a Criteo-format log in plain lists.

  Returns:
    label, dense, bags of (id, weight), and the damaged lines.
  """
  data = data or Data()
  schema = criteo.schema(data)
  damaged = DamagedLines(limit)
  label, dense, bags = [], [], []
  for c in criteo.chunks(data, schema, (str(path),), damaged):
    label += c.label.tolist()
    dense += c.dense.tolist()
    values = c.values.to_pylist()
    for i, codes in enumerate(c.codes):
      weight = c.weights[i] if c.weights is not None else [1] * len(codes)
      cells = list(zip(codes, weight, strict=True))
      bags.append(
        [
          [(values[k], w) for k, w in cells[columns] if k >= 0]
          for columns in columns_of(schema.features).values()
        ]
      )
  return label, dense, bags, damaged
