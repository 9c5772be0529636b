"""A log format of one's own, which Beam's workers import from here.

Lines are `column=value` fields with tabs between them.
"""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
from helpers_data import config

from recjax.config import Config, Text
from recjax.data import staging
from recjax.data.log import Format
from recjax.data.rows import Rows
from recjax.data.text import DamagedLines
from recjax.log_schema import Id, Ids, Number, Schema

LINES = 100  # of a chunk


def read(
  path: str, wanted: Mapping[str, str], options: Text, damaged: DamagedLines
) -> Iterator[Rows]:
  """Reads a file; where a file of its name and `.kill` is, dies first, once."""
  if os.path.exists(f"{path}.kill"):
    os.remove(f"{path}.kill")
    os.kill(os.getpid(), signal.SIGKILL)
  with open(path, encoding="utf-8") as f:
    lines = f.read().splitlines()
  rows = [dict(x.split("=") for x in line.split("\t") if x) for line in lines]
  for start in range(0, len(rows), LINES):
    part = rows[start : start + LINES]
    columns = {
      name: pa.array(
        [float(r[name]) if kind == "number" and name in r else r.get(name)
         for r in part],
        pa.float64() if kind == "number" else pa.string(),
      )
      for name, kind in wanted.items()
    }  # fmt: skip
    at = np.arange(start + 1, start + 1 + len(part))
    yield Rows(pa.table(columns), at, os.path.getsize(path))


SCHEMA = Schema(
  labels=("click",),
  numbers=(
    Number("price", transform="log1p", missing="mean"),
    Number("age", transform="standard"),
    Number("score", buckets=5),
  ),
  features=(Id("user"), Ids("tags", most=2, min_count=3)),
)

# Of no missing times, which would be damaged rows.
TIMED = dataclasses.replace(SCHEMA, time="second")


@contextlib.contextmanager
def registered() -> Iterator[Callable[..., Config]]:
  """Registers the format; gives the config of a log of it."""
  staging.register_format("fields", Format(read))

  def of(train: os.PathLike | str, **data) -> Config:
    c = config(train, format="fields", **data)
    return dataclasses.replace(c, schema=SCHEMA)

  yield of
  staging.FORMATS.remove("fields")
  del staging._READERS["fields"]


def write(path: os.PathLike, rows: int, seed: int) -> None:
  """Writes a log of labels, three numbers, ids and bags; some are missing."""
  rng = np.random.default_rng(seed)
  with open(path, "w", encoding="utf-8") as f:
    for _ in range(rows):
      cells = {
        "click": int(rng.integers(2)),
        "second": int(rng.integers(1_000)),
        "price": rng.lognormal(),
        "age": rng.normal(40, 10),
        "score": rng.normal(),
        "user": f"u{int(rng.pareto(0.7)) % 300}",
        "tags": "|".join(f"t{int(t)}" for t in rng.integers(0, 30, 3)),
      }
      there = {
        k: v
        for k, v in cells.items()
        if k in ("click", "second") or rng.random() < 0.9
      }
      f.write("\t".join(f"{k}={v}" for k, v in there.items()) + "\n")
