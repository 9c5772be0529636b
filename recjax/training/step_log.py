"""Reports a run as it goes: loss, samples/s, rounds, rows, time left."""

import contextlib
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from recjax import errors
from recjax.config import Train
from recjax.errors import UserError
from recjax.training import metrics


@contextlib.contextmanager
def writer(workdir, first, report):
  """Yields the `write` of a metrics.MetricsWriter, which closes at the end.

  Process 0 writes; what the others yield does nothing. What cannot be written
  is reported, once, and stops no run.

  Args:
    workdir: an existing folder.
    first: the step after which training goes on.
    report: takes lines for the terminal.
  """
  files: list[metrics.MetricsWriter] = []

  def tried(make: Callable[[], object]) -> None:
    try:
      make()
    except OSError as e:
      for writer in files:
        with contextlib.suppress(OSError):
          writer.close()
      files.clear()
      report(f"no more metrics in {workdir}: {errors.refusal(e)}")

  if jax.process_index() == 0:
    tried(lambda: files.append(metrics.MetricsWriter(workdir, first, report)))
  try:
    yield lambda *line: files and tried(lambda: files[0].write(*line))
  finally:
    if files:
      tried(files[0].close)


class StepLog:
  """Logs the metrics of each step, one step late.

  A step's metrics are fetched only after the next step was dispatched, so that
  the devices never wait for the host.
  """

  def __init__(
    self,
    config: Train,
    steps: int,
    first: int,
    expected: float,
    *,
    write: Callable,
    report: Callable[[str], None],
    saver,
    directory: pathlib.Path,
  ):
    """Starts the log of a run.

    Args:
      config: the config's `train`.
      steps: the last step.
      first: the step after which training goes on; 0 = from the start.
      expected: how many distinct warm and cold rows a device is expected to
        ask for in a step, by the plan.
      write: takes (step, split, values); see `writer`.
      report: takes a line for the terminal.
      saver: the checkpoint manager, which is asked for the last good step.
      directory: of the checkpoints, for the error message.
    """
    self._expected = expected
    self._every = config.log_every_steps
    self._batch_size, self._steps = config.batch_size, steps
    self._put, self._report = write, report
    self._saver, self._directory = saver, directory
    self._pending: tuple | None = None
    self._window: list[dict] = []
    self._since, self._at = time.monotonic(), first

  def add(self, step: int, out: dict) -> None:
    """Takes a step's metrics, which may still be being computed.

    Raises:
      UserError: the loss of the step before is not finite.
    """
    self.flush()
    self._pending = step, out

  def flush(self) -> None:
    """Waits for the metrics of the last step and logs them.

    Raises:
      UserError: the loss of that step is not finite.
    """
    if self._pending is None:
      return
    (step, out), self._pending = self._pending, None
    out = {k: float(v) for k, v in jax.device_get(out).items()}
    if not np.isfinite(out["loss"]):
      self._saver.wait_until_finished()
      last = self._saver.latest_step()
      kept = f"checkpoint {last} in {self._directory}" if last else "nothing"
      raise UserError(
        f"the loss is {out['loss']} at step {step}; {kept} is kept as it was. "
        "Look at the data of that step, or go on in another --workdir with a "
        "lower train.learning_rate or embedding.learning_rate and this one as "
        "train.start_from"
      )
    self._window.append(out)
    if step % self._every == 0 or step == self._steps:
      self._write(step)

  def _write(self, step: int) -> None:
    now = time.monotonic()
    seconds = max(now - self._since, 1e-9)
    rate = (step - self._at) / seconds
    mean = {
      k: float(np.mean([w[k] for w in self._window])) for k in self._window[0]
    }
    mean["rounds"] = max(w["rounds"] for w in self._window)
    mean["samples_per_second"] = rate * self._batch_size
    mean["steps"] = len(self._window)  # fewer after a restart
    self._put(step, "train", mean)
    exchanged = ""
    if self._expected or mean["distinct_rows"]:  # a device alone asks nobody
      exchanged = (
        f"rounds {mean['rounds']:.0f}, "
        f"distinct rows {mean['distinct_rows']:,.0f} "
        f"(planned {self._expected:,.0f}), "
      )
    self._report(
      f"step {step:,} of {self._steps:,}: loss {mean['loss']:.5f}, "
      f"{mean['samples_per_second']:,.0f} samples/s, {exchanged}"
      f"{(self._steps - step) / rate:.0f} s left"
    )
    self._window, self._since, self._at = [], now, step
