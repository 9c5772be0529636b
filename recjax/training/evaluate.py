"""The test split through the forward pass, into streaming metrics."""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from recjax.errors import UserError
from recjax.mesh import batch_sharding
from recjax.training import metrics
from recjax.training.step import TrainState


def to_devices(
  batch: dict[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """A process's part of a batch, as global arrays split over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, x)
    for name, x in batch.items()
  }


def run(
  state: TrainState,
  forward: Callable,
  batches: Iterator[dict[str, np.ndarray]],
  mesh: Mesh,
  report: Callable[[str], None],
  samples: int,
) -> dict[str, float]:
  """Metrics of every sample of the split: loss, auc, log_loss, ...

  Args:
    forward: of `train_step.make_forward`; padded samples (mask 0) of its
      batches do not count.
    samples: of the split, for the progress line.

  Raises:
    UserError: a logit is not finite.
  """
  total = metrics.Metrics()
  start = last = time.monotonic()
  seen = 0
  for batch in batches:
    inputs = {k: batch[k] for k in ("dense", "ids", "weights") if k in batch}
    scored = to_devices(
      {"label": batch["label"], "mask": batch["mask"], **inputs}, mesh
    )
    logits, labels, mask = jax.device_get(forward(state, scored))
    try:
      total.add(logits, labels, mask)
    except ValueError as e:
      raise UserError(
        f"evaluation at step {int(state.step)}: {e}; the parameters have "
        "diverged. Lower train.learning_rate or embedding.learning_rate, or "
        "evaluate an earlier --config.checkpoint.step"
      ) from e
    seen += int(mask.sum())
    if time.monotonic() - last > 10:
      last = time.monotonic()
      rate = seen / (last - start)
      report(
        f"evaluate: {seen:,} of {samples:,} samples, {rate:,.0f} samples/s, "
        f"{(samples - seen) / rate:.0f} s left"
      )
  return total.result()
