"""How sharded rows travel on a mesh of nodes: as the exchange has it."""

import itertools
from typing import NamedTuple

from recjax.plan.plan import Group
from recjax.planner.traffic import StepShape
from recjax.schema import AXES, DEVICE


class Transport(NamedTuple):
  """How the sharded rows of a group travel.

  exchange: "flat", all devices ask the owners; or "two_stage", a node's
  devices first unite what they ask of an owner, so that a row crosses the
  network once a node. warm_copies: "one", sharded over all devices; or
  "node", over the devices of each node, whose gradients meet in an all-gather.
  """

  exchange: str = "flat"
  warm_copies: str = "one"

  @property
  def two_stage(self) -> bool:
    """Whether all requests are united in the node first."""
    return self.exchange == "two_stage"

  @property
  def copies(self) -> bool:
    """Whether each node has a copy of the warm rows."""
    return self.warm_copies == "node"

  def warm_owners(self, shape: StepShape) -> int:
    """The number of devices that share the warm rows out."""
    return shape.devices // (shape.nodes if self.copies else 1)


FLAT = Transport()
TRANSPORTS = tuple(
  Transport(*x)
  for x in itertools.product(("flat", "two_stage"), ("one", "node"))
)


def available(shape: StepShape) -> tuple[Transport, ...]:
  """The transports that differ on this mesh.

  On one node, and on nodes of one device, all are flat.
  """
  return TRANSPORTS if 1 < shape.nodes < shape.devices else (FLAT,)


def of_group(group: Group) -> Transport:
  """The transport that a planned group's tiers show."""
  two_stage = any(t.axes == AXES and t.node_capacity for t in group.sharded)
  copies = any(t.axes == (DEVICE,) for t in group.sharded)
  return Transport(
    "two_stage" if two_stage else "flat", "node" if copies else "one"
  )
