"""Placements of tables and parts of tables: their owners pool, none coalesces.

What TorchRec's and HugeCTR's planners choose from, costed by the same model as
our plans.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recjax.planner import communication, host_path, step_cost
from recjax.planner import traffic as traffic_lib
from recjax.planner.frequency_buckets import Table
from recjax.planner.host_path import Paths
from recjax.planner.problem import Problem
from recjax.planner.traffic import Part, Traffic

TableId = tuple[int, int]  # (group, table of the group)


@dataclasses.dataclass(frozen=True)
class Shard:
  """A device's part of a table; its owner pools the bags' lookups in it."""

  table: int
  device: int
  rows: int
  splits: int = 1  # shards that the table's rows are split into
  columns: float = 1.0  # part of the dim
  host: bool = False  # rows in host memory
  group: int = 0


class ShardsCost(NamedTuple):
  """What table shards cost: the busiest device decides."""

  seconds: float  # of a step
  sent: float  # bytes of a device and step
  device_bytes: float  # of the fullest device
  host_bytes: float  # of all hosts
  busiest: float  # lookups of the busiest device over the mean


def greedy(
  problems: Sequence[Problem],
  splits: dict[TableId, int],
  device_bytes: float,
  memory_weight: float = 0.0,
) -> list[Shard] | None:
  """Places the costliest part first, onto the least loaded device with room.

  No device gets two parts of a table. A part costs its share of a sample's
  lookups and memory_weight x its share of the memory.

  Args:
    problems: of the groups.
    splits: in how many parts each table is.
    device_bytes: budget of a device.
    memory_weight: of the memory in a part's cost.

  Returns:
    The parts; None where they do not fit.
  """
  n = problems[0].shape.devices
  parts = []
  for (g, i), k in splits.items():
    table, stored = problems[g].profile.tables[i], _stored(problems, g)
    part = (g, i, k, table.lookups / k, -(-table.rows // k), stored)
    parts += [part] * k
  whole = sum(rows * stored for *_, rows, stored in parts) or 1
  of = [
    lookups + memory_weight * n * rows * stored / whole
    for *_, lookups, rows, stored in parts
  ]
  load, held = np.zeros(n), np.zeros(n)
  used: list[set[TableId]] = [set() for _ in range(n)]
  shards = []
  for i in sorted(range(len(parts)), key=lambda i: (-of[i], -parts[i][4])):
    g, table, k, _, rows, stored = parts[i]
    free = held + rows * stored <= device_bytes
    free &= np.array([(g, table) not in u for u in used])
    if not free.any():
      return None
    to = int(np.argmin(np.where(free, load, np.inf)))
    shards.append(Shard(table, to, rows, k, group=g))
    load[to] += of[i]
    held[to] += rows * stored
    used[to].add((g, table))
  return shards


def _stored(problems: Sequence[Problem], group: int) -> int:
  return problems[group].shape.stored_bytes


class _Busy:
  """What each device does in a step for its shards of a group, [n] each."""

  def __init__(self, problem: Problem, shards: Sequence[Shard]):
    shape, tables = problem.shape, problem.profile.tables
    n, b, train = shape.devices, shape.local, float(shape.train)
    self.lookups, self.rows_read, self.sent_back = np.zeros((3, n))
    self.held, self.on_host = np.zeros((2, n))  # rows; rows read
    self.host_bytes, self.ids, self.vectors = 0.0, 0.0, 0.0
    self.tables = len({s.table for s in shards})
    share = b * (n - 1) / n
    for s in shards:
      hotness = tables[s.table].lookups / s.splits  # of a bag, here
      some = min(hotness, 1.0)
      read = hotness * shape.batch_size * s.columns
      self.lookups[s.device] += hotness * shape.batch_size
      self.rows_read[s.device] += read
      back = some * shape.batch_size * s.columns * shape.wire_bytes
      self.sent_back[s.device] += back
      self.ids += share * hotness * communication.ID_BYTES
      vectors = share * some * s.columns * shape.wire_bytes
      self.vectors += vectors * (1 + train)
      if s.host:
        self.on_host[s.device] += read
        self.host_bytes += s.rows * s.columns * shape.stored_bytes
      else:
        self.held[s.device] += s.rows * s.columns


def cost(
  problems: Sequence[Problem],
  shards: Sequence[Shard],
  replicated: Sequence[TableId] = (),
) -> ShardsCost:
  """Costs shards that their owners pool.

  A bag costs an owner its lookups there and, if it has one, a vector. Nothing
  is coalesced, as TorchRec and HugeCTR do it.

  Args:
    problems: of the groups.
    shards: of all tables that are not replicated.
    replicated: tables on every device, whose gradients are all-reduced.
  """
  shape, t = problems[0].shape, problems[0].topology
  busy = [
    _Busy(p, [s for s in shards if s.group == g])
    for g, p in enumerate(problems)
  ]
  small = [
    [p.profile.tables[i] for k, i in replicated if k == g]
    for g, p in enumerate(problems)
  ]
  replicas = [sum(table.rows for table in tables) for tables in small]
  parts = [
    Part(p.shape, Traffic(hot=float(rows)))
    for p, rows in zip(problems, replicas, strict=True)
  ]
  base = step_cost.device_seconds(parts, t)
  own = step_cost.device_seconds(
    [_looked_up(*x) for x in zip(parts, small, strict=True)], t
  )
  paths = Paths(
    sum(float(base[k]) for k in ("all-reduce", "dense", "launch"))
    + sum(float(own[k]) for k in ("gather", "optimizer"))
  )
  for p, x in zip(problems, busy, strict=True):
    paths = paths.beside(_paths(p, x))
  seconds = float(paths.longer)
  sent = sum(x.ids + x.vectors for x in busy)
  sent += traffic_lib.sent_bytes(parts)["hot gradients"]
  held = sum(
    (x.held + rows) * p.shape.stored_bytes
    for p, x, rows in zip(problems, busy, replicas, strict=True)
  )
  lookups = np.sum([x.lookups for x in busy], axis=0)
  return ShardsCost(
    seconds,
    float(sent) * shape.devices / shape.batch_size,
    float(np.max(held)),
    sum(x.host_bytes for x in busy),
    float(lookups.max() / max(lookups.mean(), 1)),
  )


def _looked_up(part: Part, tables: Sequence[Table]) -> Part:
  """The part as if a sample looked up its replicated tables alone."""
  lookups = sum(table.lookups for table in tables)
  return part._replace(shape=dataclasses.replace(part.shape, lookups=lookups))


def _paths(problem: Problem, busy: _Busy) -> Paths:
  """Seconds of a group's lookups and updates, on its busiest device.

  Rows in host memory visit the device, once for each lookup, as ours do.
  """
  shape, t = problem.shape, problem.topology
  n, b, train = shape.devices, shape.local, float(shape.train)
  lookups, read = float(busy.lookups.max()), float(busy.rows_read.max())
  wide, back = 4 * shape.dim, float(busy.sent_back.max())
  sizes = (lookups * communication.ID_BYTES, back, train * back)
  on_host = Part(shape, Traffic(visitors=float(busy.on_host.max())))
  tiers = bool(busy.held.any()) + bool(busy.on_host.any())
  terms = (
    read * shape.row_bytes / t.gather,
    (1 + train) * b * busy.tables * wide / t.stream,
    *(float(communication.all_to_all_seconds(x, n, t)) for x in sizes),
    # Sort by row, sum, read and write.
    train * lookups / t.sort,
    train * read * (wide + 2 * shape.stored_bytes) / t.gather,
    tiers * (1 + train) * t.tier_latency,
  )
  host = host_path.seconds([on_host], t)
  return Paths(sum(terms), float(sum(host.values())))
