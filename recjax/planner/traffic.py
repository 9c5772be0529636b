"""What a step moves: the shape of a step, its rows, and the bytes sent.

The model of the step in embedding/lookup.py and embedding/exchange.py, as it
runs. Every group of tables has a part in the step; the requests of all groups
that travel at the same level go in one all-to-all.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from recjax.models.cost import DenseCost
from recjax.planner import communication

Bytes = dict[str, Any]  # by kind; numbers or arrays


@dataclasses.dataclass(frozen=True)
class StepShape:
  """What all placements of a group share: the batch, the sizes of its rows."""

  devices: int  # n
  batch_size: int  # B, global
  lookups: int  # of a sample in the group's tables, at most
  dim: int  # d
  row_bytes: int  # of a row's weights, in memory
  slot_bytes: int  # of its slot variables
  wire_bytes: int  # of a row's weights or gradient, on the wire
  # Of the model; in one group of a step.
  dense: DenseCost = dataclasses.field(default_factory=DenseCost)
  compute: str = "float32"
  train: bool = True  # False: the forward pass only
  node_devices: int = 0  # g; 0 = one node

  @property
  def local(self) -> int:
    """b, the samples of a device."""
    return self.batch_size // self.devices

  @property
  def nodes(self) -> int:
    """N, the nodes of the mesh."""
    return self.devices // (self.node_devices or self.devices)

  @property
  def local_lookups(self) -> int:
    """L, the lookups of a device and step."""
    return self.local * self.lookups

  @property
  def stored_bytes(self) -> int:
    """Bytes of a row where it lives: weights and slot variables."""
    return self.row_bytes + self.slot_bytes

  @property
  def files(self) -> tuple[int, ...]:
    """Bytes of a row's weights, and of each of its slot variables.

    Those have a float32 number a column, or one a row.
    """
    wide = 4 * self.dim
    columns, row = divmod(self.slot_bytes, wide)
    return (self.row_bytes, *[wide] * columns, *[4] * (row // 4))


class TableWise(NamedTuple):
  """What tables that their owners pool ask of a step."""

  ids: float  # that a device sends to the owners, itself included
  vectors: float  # that it gets back
  owner_ids: float  # that the busiest owner gets of all devices
  owner_vectors: float  # that the owner of the most sends to all
  distinct: float  # rows that the busiest owner updates
  calls: tuple[int, int]  # collectives one after the other: of ids, of vectors


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a placement asks of a step: rows of a device, numbers or arrays."""

  hot: Any = 0.0  # replicated
  warm: Any = 0.0  # of the exchange buffer: n C, or g C of a node's copy
  cold: Any = 0.0  # stored: of the exchange buffer of the visitors, n C
  # None where the hot rows' gradients are all-reduced, else the touched hot
  # rows that a device shares with all.
  gathered: Any = None
  # Rows N C_node that a device exchanges with other nodes for its own node, of
  # which it is one owner's proxy; None where all devices ask the owners.
  inter_node_warm: Any = None
  inter_node_cold: Any = None
  copies: bool = False  # every node has its own copy of the warm rows
  table_wise: TableWise | None = None
  visitors: Any = 0.0  # V, stored rows of a batch that an owner has room for
  pages: Any = 0.0  # of frozen rows that an owner's host reads


class Part(NamedTuple):
  """The part of a group in a step."""

  shape: StepShape
  traffic: Traffic


class Owned(NamedTuple):
  """Rows that an owner handles in a step."""

  read_warm: Any
  updated_warm: Any
  cold: Any  # read and updated, among the visitors


def owned(part: Part) -> Owned:
  """The rows of a group that an owner reads and updates."""
  shape, traffic = part
  warm, cold = traffic.warm, traffic.cold
  if traffic.inter_node_warm is not None:
    warm = traffic.inter_node_warm
  if traffic.inter_node_cold is not None:
    cold = traffic.inter_node_cold
  return Owned(warm / (shape.nodes if traffic.copies else 1), warm, cold)


class Message(NamedTuple):
  """A collective of warm and cold rows.

  kind: "ids", "rows" or "gradients". level: "all" devices, "within" a node,
  or between nodes, "across" by all-to-all or "copies" by all-gather. size: of
  a device's buffer, its own part included, in bytes.
  """

  kind: str
  level: str
  size: Any


def messages(parts: Sequence[Part]) -> list[Message]:
  """What the collectives of a step carry for warm and cold rows.

  The ids of all parts are one message a level; rows and gradients are one a
  tier, and so are the ids that go with the gradients of copies.
  """
  ids: dict[str, Any] = {}
  found: list[Message] = []
  for part in parts:
    for kind, level, rows, width in _rows_sent(part):
      if kind == "ids" and level != "copies":
        ids[level] = ids.get(level, 0.0) + rows * width
      else:
        found.append(Message(kind, level, rows * width))
  return [Message("ids", level, size) for level, size in ids.items()] + found


def _rows_sent(part: Part) -> Iterable[tuple[str, str, Any, float]]:
  """Yields (kind, level, rows, bytes of each) of every tier's messages."""
  shape, traffic = part
  train, wire = float(shape.train), shape.wire_bytes
  width = {
    "ids": communication.ID_BYTES,
    "rows": wire,
    "gradients": train * wire,
  }
  for rows, inter_node, copies in (
    (traffic.warm, traffic.inter_node_warm, traffic.copies),
    (traffic.cold, traffic.inter_node_cold, False),
  ):
    level = "all" if inter_node is None else "within"
    yield from ((kind, level, rows, size) for kind, size in width.items())
    if copies:  # only gradients leave the node, each with its local row
      yield "ids", "copies", inter_node, train * communication.ID_BYTES
      yield "gradients", "copies", inter_node, width["gradients"]
    elif inter_node is not None:
      for kind, size in width.items():
        yield kind, "across", inter_node, size


# ---- Bytes


def network_bytes(parts: Sequence[Part]) -> Bytes:
  """Bytes that a device sends to other nodes in a step, by kind.

  The part of `sent_bytes` that leaves the node. Replicas' gradients meet
  within the node first.

  Returns:
    {"ids", "rows", "gradients", "hot gradients"} and, where tables are
    table-wise, their kinds as in `sent_bytes`.
  """

  def one(part: Part) -> Bytes:
    shape, traffic = part
    n, nodes = shape.devices, shape.nodes
    g = n // nodes
    share = {"all": (n - g) / n, "within": 0.0}
    if traffic.gathered is None:
      shared = communication.all_reduced_bytes(summed_bytes(part), nodes)[1] / g
    else:
      rows = traffic.gathered
      shared = communication.gathered_bytes(rows, shape.wire_bytes, nodes)[1]
    sent = _sent(part, share) | _table_wise_sent(part, share["all"])
    return sent | {"hot gradients": shape.train * shared}

  return total(map(one, parts))


def sent_bytes(parts: Sequence[Part]) -> Bytes:
  """Bytes that a device sends in a step for its rows, over links and to hosts.

  To and from its host, in "host": stored rows with their slot variables once
  each way, and two numbers of each, which row of the owner it is and where it
  was in the batch before.

  Returns:
    {"ids", "rows", "gradients", "hot gradients", "host"} and, where tables are
    table-wise, {"table-wise ids", "table-wise vectors", "table-wise
    gradients"}.
  """

  def one(part: Part) -> Bytes:
    shape, traffic = part
    n, train = shape.devices, float(shape.train)
    g = n // shape.nodes
    share = {"all": (n - 1) / n, "within": (g - 1) / g}
    if traffic.gathered is None:
      shared = communication.all_reduced_bytes(summed_bytes(part), n)[1]
    else:
      rows = traffic.gathered
      shared = communication.gathered_bytes(rows, shape.wire_bytes, n)[1]
    sent = _sent(part, share) | {"hot gradients": train * shared}
    row = (1 + train) * shape.stored_bytes + 2 * communication.ID_BYTES
    sent["host"] = traffic.visitors * row
    return sent | _table_wise_sent(part, share["all"])

  return total(map(one, parts))


def summed_bytes(part: Part) -> Any:
  """Bytes of the float32 summands of a device: all hot rows, with a count."""
  return part.traffic.hot * 4.0 * (part.shape.dim + 1)


def _sent(part: Part, share: Mapping[str, float]) -> Bytes:
  """Bytes by kind, where this share of a level's message leaves the device."""
  between = (part.shape.nodes - 1) / part.shape.nodes
  sent: Bytes = dict.fromkeys(("ids", "rows", "gradients"), 0.0)
  for kind, level, size in messages([part]):
    sent[kind] = sent[kind] + size * share.get(level, between)
  return sent


def _table_wise_sent(part: Part, share: float) -> Bytes:
  """Bytes by kind, where this share of the bags and vectors leaves."""
  shape, asked = part.shape, part.traffic.table_wise
  if asked is None:
    return {}
  vectors = asked.vectors * shape.wire_bytes * share
  return {
    "table-wise ids": asked.ids * communication.ID_BYTES * share,
    "table-wise vectors": vectors,
    "table-wise gradients": shape.train * vectors,
  }


def total(terms: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """The sum of terms, key by key, in the order of first appearance."""
  found: dict[str, Any] = {}
  for of in terms:
    for key, value in of.items():
      found[key] = found[key] + value if key in found else value
  return found
