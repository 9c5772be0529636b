"""After which steps a run is saved, the same ones on all its processes."""

import time
from typing import Any

from recjax import distributed, signals
from recjax.config import Checkpoint

_GO_ON, _SAVE = 0, 1  # else the signal that ends the run


class Saves:
  """By steps, by time, and before a signal ends the run.

  Process 0's clock and signals count.
  """

  def __init__(self, config: Checkpoint, steps: int, saver: Any):
    """Starts the clock.

    Args:
      config: see `every_steps` and `every_minutes`.
      steps: the last step, which is saved.
      saver: the checkpoint manager.
    """
    self._config, self._steps, self._saver = config, steps, saver
    self._since = time.monotonic()
    self.ended_by = 0  # a signal

  def due(self, step: int) -> bool:
    """Whether the run is saved after this step; asked once a step."""
    seconds = 60 * self._config.every_minutes
    late = seconds > 0 and time.monotonic() - self._since >= seconds
    wanted = distributed.decided(signals.asked() or (_SAVE if late else _GO_ON))
    self.ended_by = wanted if wanted > _SAVE else 0
    every = self._config.every_steps
    return (
      bool(wanted) or step == self._steps or bool(every and not step % every)
    )

  def done(self) -> None:
    """Starts the clock anew: the run was saved."""
    self._since = time.monotonic()

  def said(self) -> str:
    """Returns what is saved, and how to go on."""
    return (
      f"checkpoint {self._saver.latest_step()} in {self._saver.directory} is "
      "saved; the same command goes on from there"
    )

  def end(self) -> None:
    """Raises signals.Ended where a signal has ended the run."""
    if self.ended_by:
      raise signals.Ended(self.ended_by, self.said())
