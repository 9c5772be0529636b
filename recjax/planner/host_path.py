"""The way of stored rows to the devices and back, beside a step.

While the devices are at a step, the hosts write the stored rows of the step
before and gather those of the next (training/look_ahead.py): a step takes the
longer of the two paths.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recjax.planner import traffic
from recjax.planner.topology import PAGE_BYTES, Topology
from recjax.planner.traffic import Part, StepShape

Seconds = dict[str, Any]  # by term; numbers or arrays

# What a second of the hosts counts where plans are chosen, hidden or not; it is
# not in what is predicted. Nothing is hidden wholly: with a store as slow as
# the step, 62 ms, a step took 70 (scripts/bench_overlap.py, docs/results.md).
# And without it devices' memory stays empty to save the latency of a tier.
HIDDEN = 0.1


class Paths(NamedTuple):
  """What is done side by side in a step: seconds of each, or bytes."""

  device: Any = 0.0  # the step that is compiled
  host: Any = 0.0  # the way of stored rows to the device and back

  @property
  def longer(self) -> Any:
    """What the step takes."""
    return np.maximum(self.device, self.host)

  @property
  def cost(self) -> Any:
    """What is minimised: what the step takes, and a little of the hosts'."""
    return self.longer + HIDDEN * self.host

  def beside(self, others: "Paths") -> "Paths":
    """Both ways with what other groups do on them."""
    return Paths(self.device + others.device, self.host + others.host)


NO_PATHS = Paths()


def seconds(parts: Sequence[Part], t: Topology) -> Seconds:
  """Seconds of a host for a device's visitors, beside the step, by term.

  One after the other: pages of frozen rows are read, rows and slot variables
  gathered and sent to the device; in training all that goes back as well. The
  devices of a host share its memory and its SSDs; the groups wait for a page
  once, and each for its own transfers.

  Returns:
    {"SSD", "host memory", "host link"}.
  """
  terms = traffic.total(seconds_of_group(part, t) for part in parts)
  frozen = sum((part.traffic.pages > 0) * 1.0 for part in parts) > 0
  terms["SSD"] = terms["SSD"] + frozen * page_latency(parts[0].shape, t)
  return terms


def page_latency(shape: StepShape, t: Topology) -> float:
  """Seconds that a step with frozen rows waits for a page, and to write it."""
  return (1.0 + shape.train) * t.ssd_latency


def seconds_of_group(part: Part, t: Topology) -> Seconds:
  """Seconds by term for a group, without the wait that groups share."""
  shape, asked = part
  ways, sharing = 1.0 + shape.train, min(shape.devices, t.host_devices)
  pages = ways * asked.pages * PAGE_BYTES
  rows = ways * asked.visitors * shape.stored_bytes
  return {
    "SSD": pages * sharing / t.ssd_read,
    "host memory": rows * sharing / t.host_gather,
    "host link": traffic.sent_bytes([part])["host"] / t.host_link
    + (asked.visitors > 0) * ways * t.host_latency,
  }
