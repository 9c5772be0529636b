"""The test split through the forward pass, into streaming metrics."""

from collections.abc import Callable, Iterable

import jax

from recjax.errors import UserError
from recjax.progress import Progress
from recjax.training.metrics import Metrics
from recjax.training.state import Run

_REPORT_SECONDS = 10


def evaluate(
  run: Run,
  batches: Iterable[dict[str, jax.Array]],
  samples: int,
  report: Callable[[str], None] = print,
) -> dict[str, float]:
  """Scores every sample of the test split, on the run's mesh.

  Args:
    run: whose present state is scored.
    batches: of `inputs.scored_batches`.
    samples: of the split, to tell the time left.
    report: takes lines of progress.

  Returns:
    loss, auc, log_loss, ...: see `Metrics.result`. Padded samples of the last
    batch do not count.

  Raises:
    UserError: a logit is not finite.
  """
  total = Metrics()
  progress = Progress(
    "evaluate:", report, samples, "samples", every_seconds=_REPORT_SECONDS
  )
  for batch in batches:
    logits, labels, mask = jax.device_get(run.forward(run.state, batch))
    try:
      total.add(logits, labels, mask)
    except ValueError as e:
      raise UserError(
        f"evaluation at step {int(run.state.step)}: {e}; the parameters have "
        "diverged. Lower train.learning_rate or embedding.learning_rate, or "
        "evaluate an earlier --config.checkpoint.step"
      ) from e
    progress.add(int(mask.sum()))
  return total.result()
