"""The usual placements of embedding tables, costed by the same model.

Each returns a `Baseline` for the problems that a plan was made for. Time terms
are those of planner/step_cost.py; what does not fit says so instead of a time.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from recjax.plan.plan import COLD, FROZEN, HOT, WARM, Plan
from recjax.planner import common_order, step_cost, table_shards
from recjax.planner import traffic as traffic_lib
from recjax.planner.problem import HOT_SYNCS, Problem
from recjax.planner.table_shards import Shard, TableId
from recjax.planner.traffic import Part, Traffic


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A placement's prediction."""

  name: str
  seconds: float  # of a step; nan where it does not fit
  bytes_per_sample: float
  device_bytes: float  # tables and slot variables of the fullest device
  host_bytes: float  # of all hosts, on their SSDs too
  note: str = ""


def compare(
  problems: Sequence[Problem], plan: Plan, device_bytes: int, host_bytes: int
) -> tuple[Baseline, ...]:
  """The plan and the usual placements; host_bytes of all hosts together."""
  budgets = (device_bytes, host_bytes)
  return (
    of_plan(plan),
    row_wise(problems, *budgets),
    fae(problems, *budgets),
    table_wise(problems, device_bytes),
    hugectr(problems, device_bytes),
  )


def of_plan(plan: Plan) -> Baseline:
  """The plan itself, as a line beside the others."""
  tiers = plan.prediction.tiers
  rows = {
    name: sum(t.rows for t in tiers if t.tier == name)
    for name in (HOT, WARM, COLD, FROZEN)
  }
  stored = {(g.name, t.name) for g in plan.groups for t in g.stored}
  of_hosts = [t.bytes for t in tiers if (t.group, t.tier) in stored]
  frozen = f", {rows[FROZEN]:,} frozen" if rows[FROZEN] else ""
  return Baseline(
    "recjax",
    plan.prediction.step_seconds,
    plan.bytes_per_sample,
    sum(t.bytes for t in tiers) - sum(of_hosts),
    sum(of_hosts),
    f"{rows[HOT]:,} hot, {rows[WARM]:,} warm, {rows[COLD]:,} cold{frozen} rows",
  )


# ---- By rows


def row_wise(
  problems: Sequence[Problem], device_bytes: int, host_bytes: int
) -> Baseline:
  """Every row sharded, every lookup sent: TorchRec's row-wise, no coalescing.

  Where the devices are too small, the coldest rows are on the host, too.
  """
  n = problems[0].shape.devices
  sizes = [p.shape.stored_bytes for p in problems]
  warm = _hottest(problems, n * device_bytes, sizes)
  traffics, cold = [], 0
  for p, rows in zip(problems, warm, strict=True):
    uses = p.profile.cumulative(p.profile.uses * p.shape.local)
    on_hosts = float(uses.between(rows, p.profile.rows))
    # An owner's visitors: each of the lookups that devices send it.
    traffics.append(
      Traffic(0.0, float(uses(rows)), on_hosts, visitors=on_hosts)
    )
    cold += p.profile.rows - rows
  return _baseline(
    "row-wise, not coalesced",
    problems,
    traffics,
    held=(_bytes(problems, warm) / n, _bytes(problems, _rest(problems, warm))),
    budgets=(device_bytes, host_bytes),
    note=f"{cold:,} rows on the host" if cold else "",
  )


def fae(
  problems: Sequence[Problem], device_bytes: int, host_bytes: int
) -> Baseline:
  """The hottest rows replicated to the budget, the rest on the host.

  FAE (Adnan et al., VLDB 2021, Accelerating recommendation system training by
  leveraging popular choices), without its sorting of batches. Replicas'
  gradients meet in the cheaper way: all-reduced, or those of touched rows.
  """
  sizes = [p.shape.stored_bytes + 4 * (p.shape.dim + 1) for p in problems]
  hot = _hottest(problems, device_bytes, sizes)

  def traffics(hot_sync: str) -> list[Traffic]:
    return [
      Traffic(
        float(rows),
        0.0,
        float(p.buffers(rows, p.profile.rows)),
        p.gathered(rows, hot_sync),
        visitors=float(p.visitors(rows, p.profile.rows)),
      )
      for p, rows in zip(problems, hot, strict=True)
    ]

  return _baseline(
    "FAE: replicas and host",
    problems,
    min(map(traffics, HOT_SYNCS), key=lambda x: _seconds(problems, x)),
    held=(_bytes(problems, hot), _bytes(problems, _rest(problems, hot))),
    budgets=(device_bytes, host_bytes),
    note=f"{sum(hot):,} replicas on each of {problems[0].shape.devices} "
    "devices",
  )


def _hottest(
  problems: Sequence[Problem], room: int, sizes: Sequence[int]
) -> list[int]:
  """Rows of each group, the most used of all first, that fill `room` bytes."""
  order = common_order.of_buckets([p.profile for p in problems])

  def taken(rank: int) -> int:
    pairs = zip(order.split(rank), sizes, strict=True)
    return sum(rows * size for rows, size in pairs)

  rank = bisect.bisect_right(range(order.rows + 1), room, key=taken) - 1
  return list(order.split(rank))


def _rest(problems: Sequence[Problem], rows: Sequence[int]) -> list[int]:
  return [p.profile.rows - r for p, r in zip(problems, rows, strict=True)]


def _bytes(problems: Sequence[Problem], rows: Sequence[int]) -> int:
  pairs = zip(problems, rows, strict=True)
  return sum(r * p.shape.stored_bytes for p, r in pairs)


# ---- By tables


def table_wise(problems: Sequence[Problem], device_bytes: int) -> Baseline:
  """Whole tables, greedily: the costliest next, onto the least loaded device.

  Owners pool; a device does the lookups of all samples in its tables.
  """
  name = "table-wise, greedy"
  sizes = {
    (g, i): t.rows * p.shape.stored_bytes
    for g, p in enumerate(problems)
    for i, t in enumerate(p.profile.tables)
  }
  shards = table_shards.greedy(problems, dict.fromkeys(sizes, 1), device_bytes)
  if shards is None:
    largest = max(sizes.values())
    why = f"does not fit: the largest table takes {size(largest)}"
    return Baseline(name, np.nan, np.nan, largest, 0.0, why)
  return of_shards(name, problems, shards)


def hugectr(
  problems: Sequence[Problem],
  device_bytes: int,
  *,
  replicate_mb: float = 1.0,
  memory_weight: float = 1.0,
  rounds: int = 20,
) -> Baseline:
  """HugeCTR's rule: small tables replicated, hot or large ones split.

  A shard costs hotness / splits + memory_weight x its part of the memory;
  greedy onto the least loaded device. Then the hottest or, where memory is
  short, the largest table is split by two, at most 20 times; the best is kept.
  (NVIDIA HugeCTR and MLPerf training's dlrm_dcnv2 sharding plan, "auto".)
  """
  tables = {
    (g, i): (t, t.rows * p.shape.stored_bytes)
    for g, p in enumerate(problems)
    for i, t in enumerate(p.profile.tables)
  }
  small = [k for k, (_, held) in tables.items() if held <= replicate_mb * 2**20]
  splits = dict.fromkeys((k for k in tables if k not in small), 1)
  room = device_bytes - sum(tables[k][1] for k in small)
  best = None
  for _ in range(rounds):
    shards = table_shards.greedy(problems, splits, room, memory_weight)
    dearest: Callable[[TableId], float]
    if shards is None:
      dearest = lambda k: tables[k][1] / splits[k]
    else:
      dearest = lambda k: tables[k][0].lookups / splits[k]
      placed = of_shards("HugeCTR's rule", problems, shards, small)
      if best is None or placed.seconds < best.seconds:
        best = placed
    able = [k for k in splits if 2 * splits[k] <= problems[0].shape.devices]
    if not able:
      break
    splits[max(able, key=dearest)] *= 2
  if best is not None:
    return best
  total = sum(held for _, held in tables.values())
  return Baseline(
    "HugeCTR's rule",
    np.nan,
    np.nan,
    total / problems[0].shape.devices,
    0.0,
    f"does not fit: {size(total)} of tables",
  )


def of_shards(
  name: str,
  problems: Sequence[Problem],
  shards: Sequence[Shard],
  replicated: Sequence[TableId] = (),
) -> Baseline:
  """Shards pooled at their owners; see `table_shards.cost`."""
  found = table_shards.cost(problems, shards, replicated)
  return Baseline(
    name,
    found.seconds,
    found.sent,
    found.device_bytes,
    found.host_bytes,
    f"busiest device {found.busiest:.2f} of the mean" if found.busiest else "",
  )


# ---- To print


def _parts(
  problems: Sequence[Problem], traffics: Sequence[Traffic]
) -> list[Part]:
  return [Part(p.shape, x) for p, x in zip(problems, traffics, strict=True)]


def _seconds(problems: Sequence[Problem], traffics: Sequence[Traffic]) -> float:
  parts = _parts(problems, traffics)
  return float(
    sum(step_cost.step_seconds(parts, problems[0].topology).values())
  )


def _baseline(
  name: str,
  problems: Sequence[Problem],
  traffics: Sequence[Traffic],
  *,
  held: tuple[float, float],
  budgets: tuple[int, int],
  note: str,
) -> Baseline:
  for where, have, budget in zip(
    ("devices", "hosts"), held, budgets, strict=True
  ):
    if have > budget:
      note = f"does not fit: the {where} lack {size(have - budget)}"
      return Baseline(name, np.nan, np.nan, *held, note)
  shape = problems[0].shape
  sent = sum(traffic_lib.sent_bytes(_parts(problems, traffics)).values())
  per_sample = float(sent) * shape.devices / shape.batch_size
  seconds = _seconds(problems, traffics)
  return Baseline(name, seconds, per_sample, *held, note)


def size(number: float) -> str:
  """Bytes with a unit."""
  for limit, unit in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
    if number >= limit:
      return f"{number / limit:,.3g} {unit}"
  return f"{number:.0f} B"


def describe(placed: Sequence[Baseline]) -> str:
  """The placements as a table to print."""
  lines = [
    f"{'placement':24} {'ms a step':>10} {'bytes a sample':>15} "
    f"{'a device':>9} {'all hosts':>9}"
  ]
  for p in placed:
    ms = "-" if np.isnan(p.seconds) else f"{p.seconds * 1e3:,.3f}"
    sent = "-" if np.isnan(p.seconds) else f"{p.bytes_per_sample:,.0f}"
    lines.append(
      f"{p.name:24} {ms:>10} {sent:>15} {size(p.device_bytes):>9} "
      f"{size(p.host_bytes):>9}  {p.note}"
    )
  return "\n".join(lines)
