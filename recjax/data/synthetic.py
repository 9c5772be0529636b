"""Criteo-format logs drawn from a planted teacher.

The teacher is a function of what the log shows, so its own probabilities give
the best reachable AUC and log loss. Its logit is

  bias + signal (sum_j w_j f(x_j) + sum_t e_t[id_t] + sum_(s,t) u_s . v_t)

over the dense inputs x, a scalar effect for each id, and low-rank interactions
of pairs of tables. Effects shrink with the rank of the id, so that most of the
signal is in what a model can see often enough to learn.
"""

import bisect
import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from recjax import files
from recjax.config import Data
from recjax.data import power_law
from recjax.data.criteo import DENSE, KAGGLE_ROWS
from recjax.errors import UserError
from recjax.progress import Progress

_DENSE = len(DENSE)
_PAIRS = ((0, 6), (5, 8), (1, 16), (7, 22))  # tables that interact
_RANK = 2  # of an interaction
_SHARD = 1 << 18  # samples a file
_STEP = 1 << 16  # samples generated at a time


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The planted model; effects are indexed by the id's rank in its table."""

  rows: tuple[int, ...]  # of each table
  dense: np.ndarray  # [D] weights of the standardised inputs
  missing: np.ndarray  # [D + F] share of missing cells
  scale: np.ndarray  # [D] of log(1 + integer)
  effects: tuple[np.ndarray, ...]  # F of [rows + 1] float32; last = missing
  factors: dict[int, np.ndarray]  # table -> [rows + 1, _RANK] float32


def table_rows(total: int) -> tuple[int, ...]:
  """Raises the Kaggle log's table sizes to a power that makes them `total`.

  Raises:
    UserError: fewer than two rows a table.
  """
  kaggle = np.array(KAGGLE_ROWS, np.float64)
  if total < 2 * len(kaggle):
    raise UserError(
      f"data.synthetic.rows is {total}: give at least {2 * len(kaggle)}, two"
      " for each table"
    )

  def sizes(power: float) -> np.ndarray:
    return np.maximum(np.floor(kaggle**power), 2).astype(np.int64)

  # The largest power from 0 to 2 whose sizes do not exceed the total.
  unit = 2.0**-59
  steps = bisect.bisect_right(
    range(1 << 60), total, key=lambda i: int(sizes(i * unit).sum())
  )
  rows = sizes((steps - 1) * unit)
  rows[np.argmax(rows)] += total - rows.sum()
  return tuple(rows.tolist())


def plant(data: Data) -> Teacher:
  """Draws the teacher that `data.seed` and `data.synthetic` define."""
  rng = np.random.default_rng([data.seed, 0])
  rows = table_rows(data.synthetic.rows)

  def shrunk(n: int, scale: float, *shape: int) -> np.ndarray:
    """Normal numbers [n + 1, *shape] that shrink with the rank."""
    draw = rng.standard_normal((n + 1, *shape), np.float32)
    rank = np.arange(n + 1, dtype=np.float32).reshape(-1, *[1] * len(shape))
    return draw * scale / (1 + rank / 10)

  effects = tuple(shrunk(n, 0.25) for n in rows)
  factors = {t: shrunk(rows[t], 0.4, _RANK) for p in _PAIRS for t in p}
  return Teacher(
    rows,
    rng.standard_normal(_DENSE) * 0.42,
    np.where(rng.random(_DENSE + len(rows)) < 0.4, 0.15, 0.0),
    rng.uniform(0.7, 1.6, _DENSE),
    effects,
    factors,
  )


def sample(
  teacher: Teacher, data: Data, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
  """Draws n samples.

  Returns:
    (logit [n], integers [n, D], ranks: F of [n, h]). A missing integer is -1, a
    missing id is one past the table's last rank.
  """
  latent = rng.standard_normal((n, _DENSE), np.float32)
  integers = np.floor(np.exp(1.5 + latent * teacher.scale)).astype(np.int64)
  integers[rng.random((n, _DENSE)) < teacher.missing[:_DENSE]] = -1
  # A missing integer acts as 0, as criteo.py reads it: nothing is hidden.
  x = (np.log(np.maximum(integers, 0) + 2.0) - 1.9) / teacher.scale
  logit = x @ teacher.dense

  hotness = data.synthetic.hotness or (1,) * len(teacher.rows)
  ranks = []
  pooled = {t: 0.0 for t in teacher.factors}
  for t, (rows, h) in enumerate(zip(teacher.rows, hotness, strict=True)):
    rank = power_law.ranks(rng, (n, h), rows, data.synthetic.exponent)
    if missing := teacher.missing[_DENSE + t]:
      rank[rng.random(n) < missing] = rows
    ranks.append(rank)
    logit += teacher.effects[t][rank].mean(axis=1)
    if t in pooled:
      pooled[t] = teacher.factors[t][rank].mean(axis=1)
  for s, t in _PAIRS:
    logit += np.einsum("nr,nr->n", pooled[s], pooled[t])
  return logit * data.synthetic.signal - 1.8, integers, ranks


def tokens(table: int, ranks: np.ndarray) -> pa.Array:
  """Writes ids as eight hex digits, distinct and in no visible order."""
  x = ranks.astype(np.uint32) ^ np.uint32((table + 1) * 0x9E3779B1 & 0xFFFFFFFF)
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)  # murmur3's finalizer:
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)  # a bijection
  x = x ^ (x >> np.uint32(16))
  nibbles = (x[:, None] >> np.arange(28, -1, -4, dtype=np.uint32)) & 15
  text = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles]
  offsets = np.arange(0, 8 * len(x) + 1, 8, dtype=np.int32)
  return pa.StringArray.from_buffers(
    len(x), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text))
  )


def write(data: Data, directory: str, report: Callable[[str], None]) -> None:
  """Writes the logs and teacher.json into `directory`, all of it or nothing.

  teacher.json holds the teacher's AUC and log loss on the test part: the last
  `data.test_fraction` of the samples.
  """
  teacher = plant(data)
  rng = np.random.default_rng([data.seed, 1])
  total = data.synthetic.samples
  progress = Progress("synthetic: wrote", report, total, "samples")
  label = np.empty(total, bool)
  probability = np.empty(total, np.float32)
  with files.replacing_folder(directory) as part:
    for start in range(0, total, _SHARD):
      stop = min(start + _SHARD, total)
      path = os.path.join(part, f"part_{start // _SHARD:04}.tsv")
      with open(path, "wb") as f:
        for at in range(start, stop, _STEP):
          n = min(_STEP, stop - at)
          logit, integers, ranks = sample(teacher, data, rng, n)
          p = 1 / (1 + np.exp(-logit))
          y = rng.random(n) < p
          pyarrow.csv.write_csv(
            _table(teacher, y, integers, ranks),
            f,
            pyarrow.csv.WriteOptions(
              include_header=False, delimiter="\t", quoting_style="none"
            ),
          )
          label[at : at + n], probability[at : at + n] = y, p
          progress.add(n)
    test = total - round(total * data.test_fraction)
    y, p = label[test:], probability[test:]
    content = {
      "auc": auc(y, p),
      "log_loss": float(-np.log(np.where(y, p, 1 - p)).mean()),
      "test_samples": len(y),
      "rows": teacher.rows,
    }
    files.write(os.path.join(part, "teacher.json"), json.dumps(content))


def _table(
  teacher: Teacher,
  label: np.ndarray,
  integers: np.ndarray,
  ranks: list[np.ndarray],
) -> pa.Table:
  """Lays samples out as the fields of Criteo-format lines."""
  columns = [pa.array(label.astype(np.int8))]
  for x in integers.T:
    columns.append(pa.array(x, mask=x < 0))
  for t, rank in enumerate(ranks):
    ids = tokens(t, rank.ravel())
    n, h = rank.shape
    if h > 1:
      offsets = pa.array(np.arange(0, n * h + 1, h, dtype=np.int32))
      ids = pc.binary_join(pa.ListArray.from_arrays(offsets, ids), ",")
    missing = pa.array(rank[:, 0] == teacher.rows[t])
    columns.append(pc.if_else(missing, None, ids))
  return pa.table(columns, [str(i) for i in range(len(columns))])


def auc(label: np.ndarray, score: np.ndarray) -> float:
  """Area under the ROC curve: P(a positive scores higher), ties counted half.

  Args:
    label: [k], true or 1 for positives.
    score: [k].

  Returns:
    From 0 to 1; nan where only one class is there.
  """
  _, group, size = np.unique(score, return_inverse=True, return_counts=True)
  rank = (np.cumsum(size) - (size - 1) / 2)[group]  # mean rank of equal scores
  positives = int(label.sum())
  negatives = len(label) - positives
  if not positives or not negatives:
    return float("nan")
  above = rank[label.astype(bool)].sum() - positives * (positives + 1) / 2
  return float(above / (positives * negatives))
