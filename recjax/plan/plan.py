"""What a plan says: groups of tables, their tiers, and what was predicted.

The contract between the planner and the runtime. Everything in it is static in
the compiled step: a plan is hashable, and it is stored as JSON.

A group is the tables of one dim, dtype and sparse optimizer. Their rows share
one row space, most used first: a row's place in it is its rank. Cut points
divide the ranks into tiers:

  rank  0 ......... hot rows: a replica on every device
        hot ....... warm rows: sharded over the mesh, in device memory
        warm_end .. cold rows: sharded over the mesh, in host memory
        cold_end .. frozen rows: sharded over the mesh, on the hosts' SSDs

Cold and frozen rows are stored: a step sees those that its batch uses as
visitors, a small sharded tier in device memory (embedding/visits.py).
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

# Names, in rank order.
HOT, WARM, COLD, FROZEN = TIERS = ("hot", "warm", "cold", "frozen")
MOST_ADDRESSES = 2**31 - 1  # ids, ranks and addresses are int32
VISITORS = "visitors"  # name of the stored rows' tier, as a step sees it


@dataclasses.dataclass(frozen=True)
class Tier:
  """Rows of a group that live alike: where, with whom, and how they travel.

  Rank r of the group is local row (r - first) // owners of the owner
  (r - first) % owners: the load is balanced by construction.
  """

  name: str  # of TIERS, for people and checkpoints; the runtime never asks
  first: int  # rank of its first row
  rows: int
  owners: int  # devices that share the rows out; 1 where all have a replica
  axes: tuple[str, ...]  # of the mesh, along which they lie; () = replicated
  shard_rows: int  # rows of an owner, padding included
  memory: str = "device"  # or "host", or "ssd"
  # C: rows that a device asks an owner for in a round; of replicated rows,
  # those whose gradients it shares in a round (0: all are all-reduced).
  capacity: int = 0
  # Rows that a node asks an owner for, or shares, in a round, where its devices
  # unite what they ask first; 0 = every device asks the owners.
  node_capacity: int = 0

  @property
  def stop(self) -> int:
    """One past the rank of its last row."""
    return self.first + self.rows


@dataclasses.dataclass(frozen=True)
class Group:
  """Tables of one dim, dtype and sparse optimizer, and where their rows live.

  Where tables are table-wise, the tiers count positions instead of ranks
  (plan/positions.py), of which `padding_rows` warm ones hold no row.
  """

  name: str
  tables: tuple[str, ...]
  dim: int  # d
  dtype: str
  optimizer: str
  tiers: tuple[Tier, ...]  # those with rows, in rank order
  hot_sync: str = "all_reduce"  # of replicas' gradients, or "all_gather"
  table_wise: tuple[tuple[str, int], ...] = ()  # tables and their owners
  padding_rows: int = 0
  # The stored rows of a batch as a tier: `shard_rows` are V, those that an
  # owner's device has room for. None where no rows are stored.
  visitors: Tier | None = None

  @property
  def rows(self) -> int:
    """Positions of the group: its rows, and the padding rows."""
    return sum(t.rows for t in self.tiers)

  @property
  def addresses(self) -> int:
    """Addresses of the group, with the padding of shards: int32 at the step."""
    return max(
      (t.first + t.shard_rows * t.owners for t in self.tiers), default=0
    )

  @property
  def stored(self) -> tuple[Tier, ...]:
    """The tiers outside device memory; neighbours, with the same owners."""
    return tuple(t for t in self.tiers if t.memory != "device")

  @property
  def resident(self) -> tuple[Tier, ...]:
    """The tiers in device memory."""
    return tuple(t for t in self.tiers if t.memory == "device")

  @property
  def on_device(self) -> tuple[Tier, ...]:
    """The tiers as a step sees them: visitors in place of the stored ones."""
    visitors = () if self.visitors is None else (self.visitors,)
    return self.resident + visitors

  @property
  def hot(self) -> Tier | None:
    """The replicated tier; None where there is none."""
    return next((t for t in self.tiers if not t.axes), None)

  @property
  def sharded(self) -> tuple[Tier, ...]:
    """The tiers whose rows have owners, as a step sees them."""
    return tuple(t for t in self.on_device if t.axes)

  @property
  def table_wise_tier(self) -> Tier | None:
    """The tier whose rows lie with their tables' owners, or None."""
    return self.tier(WARM) if self.table_wise else None

  def first_rank(self, tier: Tier) -> int:
    """Rank of the tier's first row: its position, less padding rows before."""
    padded = self.tier(WARM)
    past = padded is not None and tier.first >= padded.stop
    return tier.first - (self.padding_rows if past else 0)

  def tier(self, name: str) -> Tier | None:
    """The tier of that name; None where it has no rows."""
    return next((t for t in self.tiers if t.name == name), None)

  def rows_of(self, name: str) -> int:
    """Rows of the tier of that name; 0 where there is none."""
    tier = self.tier(name)
    return tier.rows if tier else 0


@dataclasses.dataclass(frozen=True)
class TierReport:
  """What a tier holds, and what a step is expected to ask of it."""

  group: str
  tier: str
  rows: int  # without padding rows
  # Rows and slot variables: of a device; of all hosts, in their memory or on
  # their SSDs.
  bytes: int
  share: float  # of the training split's accesses
  distinct: float  # expected rows that a device touches in a step
  buffer_bytes: int  # of a device: requests and rows, both directions


Terms = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the planner expects of a step."""

  topology: str = ""
  tiers: tuple[TierReport, ...] = ()  # group by group, in rank order
  seconds: Terms = ()  # of a step, by term, what is hidden left out
  sent: Terms = ()  # bytes that a device sends in a step, by kind
  network: Terms = ()  # of those, the bytes to other nodes, by kind
  memory: Terms = ()  # bytes of a device, by kind
  # Of the stored rows' way to a device and back, beside the step: "host rows"
  # of `seconds` is what of it is not hidden.
  host_seconds: Terms = ()

  @property
  def step_seconds(self) -> float:
    """Seconds of a step."""
    return sum(x for _, x in self.seconds)

  @property
  def distinct_rows(self) -> float:
    """Rows that a device asks owners for in a step: all but the hot ones."""
    return sum(t.distinct for t in self.tiers if t.tier != HOT)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where every row lives and how it travels, on a mesh, for a batch size."""

  devices: int  # n
  batch_size: int  # B, global
  groups: tuple[Group, ...]
  node_devices: int = 0  # g; 0 = one node
  prediction: Prediction = Prediction()

  @property
  def nodes(self) -> int:
    """N, the nodes of the mesh."""
    return self.devices // (self.node_devices or self.devices)

  @property
  def rows(self) -> int:
    """Rows of all groups, without padding rows."""
    return sum(g.rows - g.padding_rows for g in self.groups)

  @property
  def bytes_per_sample(self) -> float:
    """Bytes that all devices send in a step, over its samples."""
    return self._per_sample(self.prediction.sent)

  @property
  def network_bytes_per_sample(self) -> float:
    """The bytes of those between nodes."""
    return self._per_sample(self.prediction.network)

  def _per_sample(self, terms: Terms) -> float:
    return sum(x for _, x in terms) * self.devices / self.batch_size

  def group(self, name: str) -> Group:
    """The group of that name."""
    return next(g for g in self.groups if g.name == name)

  def with_visitors(self, rows: Mapping[str, int]) -> "Plan":
    """The plan with room for so many visitors an owner, by group's name."""
    groups = []
    for g in self.groups:
      if g.visitors and g.name in rows:
        v, n = rows[g.name], g.visitors.owners
        tier = dataclasses.replace(g.visitors, rows=v * n, shard_rows=v)
        g = dataclasses.replace(g, visitors=tier)
      groups.append(g)
    return dataclasses.replace(self, groups=tuple(groups))

  def report(self, group: str, tier: str) -> TierReport | None:
    """What was predicted of a tier; None where it has no rows."""
    for report in self.prediction.tiers:
      if (report.group, report.tier) == (group, tier):
        return report
    return None

  def to_json(self) -> str:
    """The plan as JSON, which `from_json` reads back equal."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Plan":
    """The inverse of to_json; raises KeyError or TypeError for other JSON."""
    found = json.loads(text)
    found["groups"] = tuple(_group(g) for g in found["groups"])
    found["prediction"] = _prediction(found["prediction"])
    return cls(**found)


def _tier(found: dict[str, Any]) -> Tier:
  return Tier(**found | {"axes": tuple(found["axes"])})


def _group(found: dict[str, Any]) -> Group:
  visitors = found["visitors"]
  found |= {
    "tiers": tuple(map(_tier, found["tiers"])),
    "visitors": visitors and _tier(visitors),
    "tables": tuple(found["tables"]),
    "table_wise": tuple((name, owner) for name, owner in found["table_wise"]),
  }
  return Group(**found)


def _prediction(found: dict[str, Any]) -> Prediction:
  found["tiers"] = tuple(TierReport(**t) for t in found["tiers"])
  for name in ("seconds", "sent", "network", "memory", "host_seconds"):
    found[name] = tuple((k, v) for k, v in found[name])
  return Prediction(**found)
