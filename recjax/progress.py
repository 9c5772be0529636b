"""Lines that say how much is done, at which rate, and how much time is left."""

import time
from collections.abc import Callable


class Progress:
  """Counts what is done and reports it every few seconds, and at the end.

  evaluate: 2,000 of 8,000 samples, 950 samples/s, 6 s left
  """

  def __init__(
    self,
    name: str,
    report: Callable[[str], None],
    total: int = 0,
    unit: str = "rows",
    *,
    every_seconds: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      name: of what is done; the lines begin with it.
      report: takes the lines.
      total: how much there is to do; 0 = not known.
      unit: what is counted.
      every_seconds: between two lines.
      clock: gives seconds.
    """
    self.name, self.report, self.total, self.unit = name, report, total, unit
    self.every_seconds, self.clock = every_seconds, clock
    self.done = 0
    self.start = self.reported = clock()

  def add(self, count: int, share: float | None = None) -> None:
    """Counts `count` more, and reports where it is time to.

    Args:
      count: in units.
      share: of all that is done now, from 0 to 1, where the total is not known.
    """
    self.done += count
    if share is None:
      share = self.done / self.total if self.total else 0.0
    now = self.clock()
    if now - self.reported < self.every_seconds and share < 1:
      return
    self.reported = now
    self.report(self.line(now - self.start, share))

  def line(self, seconds: float, share: float) -> str:
    """Formats what is done after that many seconds, a share of it all."""
    seconds = max(seconds, 1e-9)
    of = f" of {self.total:,}" if self.total and share < 1 else ""
    left = f", {seconds / share - seconds:,.0f} s left" if 0 < share < 1 else ""
    return (
      f"{self.name} {self.done:,}{of} {self.unit},"
      f" {self.done / seconds:,.0f} {self.unit}/s{left}"
    )
