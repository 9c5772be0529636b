"""The Plan that chosen cuts make: tiers, capacities and what is predicted."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recjax.plan import layout
from recjax.plan.plan import (
  COLD,
  FROZEN,
  HOT,
  VISITORS,
  WARM,
  Group,
  Plan,
  Prediction,
  Terms,
  Tier,
  TierReport,
)
from recjax.planner import communication, host_path, memory_budgets, step_cost
from recjax.planner import traffic as traffic_lib
from recjax.planner.problem import Cuts, Problem
from recjax.planner.table_wise import Choice
from recjax.planner.traffic import Part, Traffic
from recjax.schema import AXES, DEVICE, TableGroup


class Placed(NamedTuple):
  """A group's problem, its chosen cuts, and its table-wise tables if any."""

  problem: Problem
  cuts: Cuts
  choice: Choice | None = None

  @property
  def padding_rows(self) -> int:
    """Warm positions without a row."""
    return self.choice.padding_rows if self.choice else 0

  @property
  def warm(self) -> int:
    """Warm positions: rows and padding rows."""
    return self.cuts.warm + self.padding_rows

  @property
  def warm_owners(self) -> int:
    """Devices that share the warm rows out."""
    return self.cuts.transport.warm_owners(self.problem.shape)

  @property
  def warm_shard(self) -> int:
    """Warm rows of a device, padded."""
    return layout.shard_rows(self.warm, self.warm_owners)

  @property
  def device_bytes(self) -> int:
    """Bytes of a device."""
    rows = self.cuts.hot + self.warm_shard
    return rows * self.problem.shape.stored_bytes

  @property
  def host_bytes(self) -> int:
    """Bytes of all hosts' memories."""
    return int(memory_budgets.cold_bytes(self.problem, self.cuts))

  @property
  def ssd_bytes(self) -> int:
    """Bytes of all hosts' SSDs."""
    return int(memory_budgets.frozen_bytes(self.problem, self.cuts))

  @property
  def frozen(self) -> int:
    """Rows on SSDs."""
    return int(self.cuts.frozen(self.problem.profile.rows))

  def traffic(self, capacity: int = 0) -> Traffic:
    """What the placement asks of a step; `capacity` of buffers, where > 0."""
    traffic = self.problem.traffic(self.cuts, capacity)
    if self.choice is None:
      return traffic
    warm = float(self.choice.traffic.warm)
    if capacity:
      shape = self.problem.shape
      most = min(-(-self.warm // shape.devices), shape.local_lookups)
      warm = float(shape.devices * min(capacity, most))
    pooled = self.choice.traffic.table_wise
    return dataclasses.replace(traffic, warm=warm, table_wise=pooled)


def plan(
  placed: Sequence[Placed], groups: Sequence[TableGroup], capacity: int = 0
) -> Plan:
  """The plan of all groups.

  Args:
    placed: of each group.
    groups: their tables.
    capacity: of every buffer, where > 0; 0 = as the traffic needs.
  """
  shape, topology = placed[0].problem.shape, placed[0].problem.topology
  parts = [Part(x.problem.shape, x.traffic(capacity)) for x in placed]
  tiers = [
    _tiers(x, part.traffic) for x, part in zip(placed, parts, strict=True)
  ]
  made = [
    _group(x, group, found, _visitors(found, part))
    for x, group, found, part in zip(placed, groups, tiers, parts, strict=True)
  ]
  accesses = sum(
    _uses(x, tier)
    for x, found in zip(placed, tiers, strict=True)
    for tier in found
  )
  memory = traffic_lib.total(
    _memory(x, part.traffic) for x, part in zip(placed, parts, strict=True)
  )
  return Plan(
    devices=shape.devices,
    batch_size=shape.batch_size,
    groups=tuple(made),
    node_devices=shape.node_devices,
    prediction=Prediction(
      topology=topology.name,
      tiers=tuple(
        dataclasses.replace(
          _report(x, tier, part.traffic),
          group=group.name,
          share=_uses(x, tier) / max(accesses, 1e-30),
        )
        for x, part, group, found in zip(
          placed, parts, groups, tiers, strict=True
        )
        for tier in found
      ),
      seconds=_terms(step_cost.step_seconds(parts, topology)),
      host_seconds=_terms(host_path.seconds(parts, topology)),
      sent=_terms(traffic_lib.sent_bytes(parts)),
      network=_terms(traffic_lib.network_bytes(parts)),
      memory=_terms(memory),
    ),
  )


def _group(
  placed: Placed,
  group: TableGroup,
  tiers: tuple[Tier, ...],
  visitors: Tier | None,
) -> Group:
  owner = placed.choice.owner if placed.choice else {}
  tables = placed.problem.profile.tables
  return Group(
    name=group.name,
    tables=group.tables,
    dim=group.dim,
    dtype=group.dtype,
    optimizer=group.optimizer,
    tiers=tiers,
    hot_sync=placed.cuts.hot_sync,
    table_wise=tuple((tables[t].name, o) for t, o in owner.items()),
    padding_rows=placed.padding_rows,
    visitors=visitors,
  )


def _visitors(tiers: tuple[Tier, ...], part: Part) -> Tier | None:
  """The stored rows of a batch as a tier; None where none are stored."""
  stored = [t for t in tiers if t.memory != "device"]
  if not stored:
    return None
  n, nodes = part.shape.devices, part.shape.nodes
  rows = max(math.ceil(part.traffic.visitors), 1)
  return Tier(
    VISITORS,
    stored[0].first,
    rows * n,
    n,
    AXES,
    rows,
    capacity=_rows(part.traffic.cold) // n,
    node_capacity=_rows(part.traffic.inter_node_cold) // nodes,
  )


def _tiers(placed: Placed, traffic: Traffic) -> tuple[Tier, ...]:
  """The tiers with rows, in rank order."""
  n, nodes = placed.problem.shape.devices, placed.problem.shape.nodes
  cuts, owners = placed.cuts, placed.warm_owners
  start = cuts.hot + placed.warm  # of the cold tier, as a position
  frozen = placed.frozen
  cold = placed.problem.profile.rows - cuts.warm_end - frozen
  gathered = 0 if traffic.gathered is None else math.ceil(traffic.gathered)
  tiers = (
    Tier(HOT, 0, cuts.hot, 1, (), cuts.hot, capacity=gathered),
    Tier(
      WARM,
      cuts.hot,
      placed.warm,
      owners,
      (DEVICE,) if cuts.transport.copies else AXES,
      placed.warm_shard,
      capacity=_rows(traffic.warm) // owners,
      node_capacity=_rows(traffic.inter_node_warm) // nodes,
    ),
    Tier(
      COLD,
      start,
      cold,
      n,
      AXES,
      layout.shard_rows(cold, n),
      memory="host",
    ),
    Tier(
      FROZEN,
      start + cold,
      frozen,
      n,
      AXES,
      layout.shard_rows(frozen, n),
      memory="ssd",
    ),
  )
  return tuple(t for t in tiers if t.rows)


def _rows(buffer: float | np.ndarray | None) -> int:
  return round(float(buffer or 0.0))


def _ranks(placed: Placed, tier: Tier) -> tuple[int, int]:
  """The ranks of a tier's rows: [first, stop)."""
  cuts, rows = placed.cuts, placed.problem.profile.rows
  cold_end = rows - placed.frozen
  return {
    HOT: (0, cuts.hot),
    WARM: (cuts.hot, cuts.warm_end),
    COLD: (cuts.warm_end, cold_end),
    FROZEN: (cold_end, rows),
  }[tier.name]


def _uses(placed: Placed, tier: Tier) -> float:
  """Lookups of a sample in the tier."""
  profile = placed.problem.profile
  uses = profile.cumulative(profile.uses)
  return float(uses.between(*_ranks(placed, tier)))


def _report(placed: Placed, tier: Tier, traffic: Traffic) -> TierReport:
  """What a tier holds and is asked, without its group and share."""
  problem = placed.problem
  start, stop = _ranks(placed, tier)
  distinct = float(problem.distinct(start, stop))
  if placed.choice and tier.name == WARM:
    distinct = placed.choice.distinct
  visitors = _rows(traffic.cold) + _rows(traffic.inter_node_cold)
  buffers = {
    HOT: 0,
    WARM: _rows(traffic.warm) + _rows(traffic.inter_node_warm),
    COLD: visitors,
    # One exchange for both, reported with the first.
    FROZEN: visitors if start == placed.cuts.warm_end else 0,
  }[tier.name]
  shards = 1 if tier.memory == "device" else tier.owners
  return TierReport(
    group="",
    tier=tier.name,
    rows=stop - start,
    bytes=tier.shard_rows * shards * problem.shape.stored_bytes,
    share=0.0,
    distinct=distinct,
    buffer_bytes=buffers * 2 * (communication.ID_BYTES + 4 * problem.shape.dim),
  )


def _memory(placed: Placed, traffic: Traffic) -> dict[str, float]:
  buffers = (
    traffic.warm,
    traffic.cold,
    traffic.inter_node_warm,
    traffic.inter_node_cold,
  )
  problem = placed.problem
  return step_cost.device_bytes(
    problem.shape,
    hot=placed.cuts.hot,
    warm_shard=placed.warm_shard,
    buffers=sum(_rows(x) for x in buffers),
    visitors=float(traffic.visitors),
    gathered=traffic.gathered,
    table_wise=traffic.table_wise,
    tiled=problem.tiled,
    longest_bag=problem.longest_bag,
  )


def _terms(of: Mapping[str, float]) -> Terms:
  return tuple((k, float(v)) for k, v in of.items())
