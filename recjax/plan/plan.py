"""What a plan says: where rows live, how they travel, at what cost."""

import dataclasses
import json

from recjax.plan import layout


@dataclasses.dataclass(frozen=True)
class TierReport:
  """What a tier holds and what a step asks of it."""

  rows: int
  bytes: int  # tables and slots, of a device (hot, warm) or all hosts (cold)
  share: float  # of the training split's accesses
  distinct: float  # expected rows that a device touches in a step
  buffer_bytes: int  # of a device: requests and rows, both directions


Terms = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Two cut points, capacities and transports; static in the compiled step.

  Ranks below `hot` are replicated, ranks below `warm_end` sharded in device
  memory, the others sharded in host memory. Owners are cyclic in rank.
  Capacities are rows a peer and round (C), 0 for a tier without rows. Where
  tables are pooled at owners, `rows`, `warm_end` and the tiers count positions
  (plan/positions.py), `spare` ones without a row included.
  """

  devices: int  # n
  batch_size: int  # B
  rows: int  # R
  dim: int  # d
  dtype: str
  hot: int
  warm_end: int
  capacity_warm: int
  capacity_cold: int
  reports: tuple[TierReport, ...] = ()  # hot, warm, cold
  hot_sync: str = "dense"  # how hot gradients meet: all-reduced, or "sparse"
  capacity_hot: int = 0  # hot rows that a device sends a round, where "sparse"
  node_devices: int = 0  # g; 0 = one node
  exchange: str = "flat"  # or in stages that meet in the node: "two_stage"
  warm_copies: str = "one"  # warm rows over all devices, or those of a "node"
  capacity_far_warm: int = 0  # C_far, rows a node and round, where staged
  capacity_far_cold: int = 0
  topology: str = ""
  seconds: Terms = ()  # of a step, predicted, by term
  sent: Terms = ()  # bytes that a device sends in a step, by kind
  memory: Terms = ()  # bytes of a device, by kind
  network: Terms = ()  # of those in `sent`, the bytes to other nodes, by kind
  pooled: tuple[tuple[str, int], ...] = ()  # tables and their owners
  spare: int = 0  # warm positions without a row; see plan/positions.py

  @property
  def warm(self) -> int:
    return self.warm_end - self.hot

  @property
  def cold(self) -> int:
    return self.rows - self.warm_end

  @property
  def nodes(self) -> int:
    """N"""
    return self.devices // (self.node_devices or self.devices)

  @property
  def warm_owners(self) -> int:
    """Devices that share the warm rows: all, or those of each node."""
    return self.devices // (self.nodes if self.warm_copies == "node" else 1)

  @property
  def warm_slots(self) -> int:
    """Rows of a device's warm shard."""
    return layout.shard_rows(self.warm, self.warm_owners)

  @property
  def cold_slots(self) -> int:
    """Rows of a device's cold shard, in its host's memory."""
    return layout.shard_rows(self.cold, self.devices)

  @property
  def step_seconds(self) -> float:
    return sum(x for _, x in self.seconds)

  @property
  def bytes_per_sample(self) -> float:
    return sum(x for _, x in self.sent) * self.devices / self.batch_size

  @property
  def network_per_sample(self) -> float:
    """Bytes between nodes."""
    return sum(x for _, x in self.network) * self.devices / self.batch_size

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Plan":
    """The inverse of to_json."""
    fields = json.loads(text)
    fields["reports"] = tuple(TierReport(**r) for r in fields["reports"])
    for name in ("seconds", "sent", "memory", "network"):
      fields[name] = tuple((k, v) for k, v in fields.get(name, ()))
    fields["pooled"] = tuple(map(tuple, fields.get("pooled", ())))
    return cls(**fields)


def transports(plan: Plan) -> str:
  """How sharded rows travel between several nodes."""
  where = "sharded over all" if plan.warm_copies == "one" else "in each"
  return (
    f"{plan.nodes} nodes of {plan.node_devices}: {plan.exchange} exchange, "
    f"warm rows {where}, {plan.network_per_sample:,.0f} bytes a sample "
    "between nodes"
  )


def describe(plan: Plan) -> str:
  """The plan as a table to print."""
  lines = [
    f"plan: {plan.rows - plan.spare:,} rows x {plan.dim} {plan.dtype} on "
    f"{plan.devices} device(s), global batch {plan.batch_size:,}",
    f"{'tier':5} {'rows':>13} {'memory':>18} {'accesses':>9} "
    f"{'distinct/step':>14} {'buffer rows':>12} {'buffers':>10}",
  ]
  capacities = (0, plan.capacity_warm, plan.capacity_cold)
  wheres = ("a device", "a device", "of hosts")
  for name, r, c, where in zip(
    ("hot", "warm", "cold"), plan.reports, capacities, wheres, strict=True
  ):
    size = f"{r.bytes / 2**20:,.1f} MB {where}"
    owners = plan.warm_owners if name == "warm" else plan.devices
    buffers = f"{owners} x {c:,}" if c else "-"
    lines.append(
      f"{name:5} {r.rows:>13,} {size:>18} {r.share:>9.2%} "
      f"{r.distinct:>14,.0f} {buffers:>12} {r.buffer_bytes / 2**20:>7,.1f} MB"
    )
  if plan.nodes > 1:
    lines.append(transports(plan))
  if plan.pooled:
    of = [f"{name} on {owner}" for name, owner in plan.pooled]
    lines.append(f"pooled at their owners: {', '.join(of)}")
  if plan.seconds:
    total = plan.step_seconds
    lines.append(
      f"predicted on {plan.topology}: {total * 1e3:,.3f} ms a step, "
      f"{plan.batch_size / total:,.0f} samples/s, "
      f"{plan.bytes_per_sample:,.0f} bytes a sample"
    )
    for title, terms, scale, unit in (
      ("time", plan.seconds, 1e3, "ms"),
      ("memory of a device", plan.memory, 2**-20, "MB"),
    ):
      parts = [f"{k} {v * scale:,.3g}" for k, v in terms if v * scale >= 5e-4]
      lines.append(f"  {title} ({unit}): {', '.join(parts)}")
  return "\n".join(lines)
