"""Any log through the forward pass: metrics of it, or predictions in a file.

Every process reads the log and scores its part of each batch; the first one
writes, in the log's order.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa

from recjax.data import batches as batches_lib
from recjax.data.other_log import Part
from recjax.data.prepared import Prepared
from recjax.errors import UserError
from recjax.plan import positions
from recjax.progress import Progress
from recjax.training.inputs import one_ahead
from recjax.training.metrics import Metrics
from recjax.training.state import Run

Report = Callable[[str], None]


class Scored(NamedTuple):
  """Consecutive samples with their logits."""

  logits: np.ndarray  # [k] float32
  labels: np.ndarray  # [k] float32, nan where the log has none
  keep: pa.Table | None  # [k]


def score(
  run: Run,
  prepared: Prepared,
  parts: Iterable[Part],
  report: Report,
  *,
  done: int = 0,
) -> Iterator[Scored]:
  """Scores the samples of a log, in order; tells the share of unseen ids.

  Args:
    run: whose present state scores.
    prepared: the data set that it was trained on.
    parts: of `other_log.read`.
    report: takes lines of progress.
    done: samples at the log's beginning, which are left out.
  """
  progress = Progress("score:", report, unit="samples")
  lookups = unseen = np.zeros(len(prepared.schema.features), np.int64)

  def counted() -> Iterator[Part]:
    nonlocal lookups, unseen
    for part in parts:
      lookups, unseen = lookups + part.lookups, unseen + part.unseen
      yield part
      progress.add(len(part.arrays["label"]), part.read)

  size = run.spec.embedding.plan.batch_size
  place = _placing(run, prepared, size)
  placed = (
    (place(arrays), len(arrays["label"]), keep)
    for arrays, keep in _batches(counted(), size, done)
  )
  for batch, samples, keep in one_ahead(placed):
    logits, labels, _ = jax.device_get(run.forward(run.state, batch))
    yield Scored(logits[:samples], labels[:samples], keep)
  _tell_unseen(prepared, lookups, unseen, report)


def _placing(run: Run, prepared: Prepared, size: int) -> Callable:
  """Makes what puts this process's part of a global batch onto the mesh."""
  plan, schema = run.spec.embedding.plan, prepared.schema
  where = positions.of_batches(plan, prepared.profile, schema.features)
  local = size // jax.process_count()
  mine = slice(local * jax.process_index(), local * (jax.process_index() + 1))

  def place(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    batch = {name: x[mine] for name, x in arrays.items()}
    if where:
      batch["ids"] = where.of_batch(batch["ids"])
    batch["mask"] = np.ones(len(batch["label"]), np.float32)
    return run.place(run.prepare(batches_lib.padded(batch, local), False))

  return place


def _batches(
  parts: Iterable[Part], size: int, done: int
) -> Iterator[tuple[dict[str, np.ndarray], pa.Table | None]]:
  """Cuts samples into batches of `size`; the last one may be smaller."""
  rest, kept = None, None
  for part in parts:
    arrays, keep = part.arrays, part.keep
    if done:
      skip = min(done, len(arrays["label"]))
      done -= skip
      arrays = {a: x[skip:] for a, x in arrays.items()}
      keep = keep and keep.slice(skip)
    if rest is not None:
      arrays = {a: np.concatenate([rest[a], x]) for a, x in arrays.items()}
      keep = keep and pa.concat_tables([kept, keep])
    rows = len(arrays["label"])
    whole = rows - rows % size
    for i in range(0, whole, size):
      piece = {a: x[i : i + size] for a, x in arrays.items()}
      yield piece, keep and keep.slice(i, size)
    rest = {a: x[whole:] for a, x in arrays.items()}
    kept = keep and keep.slice(whole)
  if rest is not None and len(rest["label"]):
    yield rest, kept


def _tell_unseen(
  prepared: Prepared, lookups: np.ndarray, unseen: np.ndarray, report: Report
) -> None:
  """Tells of each feature how many lookups are out of vocabulary."""
  shares = [
    f"{f.name} {new / n:.1%}"
    for f, n, new in zip(prepared.schema.features, lookups, unseen, strict=True)
    if new
  ]
  if shares:
    report(f"lookups of ids out of vocabulary: {', '.join(shares)}")


# ---- Metrics


def evaluate(scored: Iterable[Scored], where: str) -> dict[str, float]:
  """Returns the metrics of scored samples; see `Metrics.result`.

  Raises:
    UserError: a label is missing, or a logit is not finite.
  """
  total = Metrics()
  for part in scored:
    if np.isnan(part.labels).any():
      raise UserError(
        f"{where}: a sample has no label, or the log no column of labels: "
        "evaluate one that has them, or use --mode=predict"
      )
    total.add(part.logits, part.labels)
  return total.result()
