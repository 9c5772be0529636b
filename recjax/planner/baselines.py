"""The usual placements of embedding tables, costed by the same model.

Each returns a `Placed` for the problem that a plan was made for. Time terms
are those of planner/step_cost.py; what does not fit says so instead of a time.
"""

import dataclasses

import numpy as np

from recjax.plan.plan import Plan
from recjax.planner import formulas, step_cost
from recjax.planner.cut_points import Problem
from recjax.planner.step_cost import Load


@dataclasses.dataclass(frozen=True)
class Placed:
  """A placement's prediction."""

  name: str
  seconds: float  # of a step; nan where it does not fit
  bytes_per_sample: float
  device_bytes: float  # tables and slots of the fullest device
  host_bytes: float  # of all hosts
  note: str = ""


def of_plan(problem: Problem, plan: Plan) -> Placed:
  return Placed(
    "recjax",
    plan.step_seconds,
    plan.bytes_per_sample,
    (plan.hot + plan.warm_slots) * problem.work.stored,
    plan.cold_slots * plan.devices * problem.work.stored,
    f"{plan.hot:,} hot, {plan.warm:,} warm, {plan.cold:,} cold rows",
  )


def compare(
  problem: Problem, plan: Plan, device_bytes: int, host_bytes: int
) -> tuple[Placed, ...]:
  """The plan and the usual placements; host_bytes of all hosts together."""
  budgets = (device_bytes, host_bytes)
  return (
    of_plan(problem, plan),
    row_wise(problem, *budgets),
    fae(problem, *budgets),
    table_wise(problem, *budgets),
    hugectr(problem, *budgets),
  )


# ---- By rows


def row_wise(problem: Problem, device_bytes: int, host_bytes: int) -> Placed:
  """Every row sharded, every lookup sent: TorchRec's row-wise, no coalescing.

  Where the devices are too small, the coldest rows are on the host, too.
  """
  s, work = problem.spectrum, problem.work
  n, rows = work.devices, s.rows
  warm = min(rows, device_bytes // work.stored * n)
  uses = s.below(s.uses * work.local)
  near, far = float(uses(warm)), float(uses.between(warm, rows))
  return _placed(
    "row-wise, not coalesced",
    problem,
    Load(0.0, near, far),
    (warm / n * work.stored, (rows - warm) * work.stored),
    (device_bytes, host_bytes),
    f"{rows - warm:,} rows on the host" if warm < rows else "",
  )


def fae(problem: Problem, device_bytes: int, host_bytes: int) -> Placed:
  """The hottest rows replicated to the budget, the rest on the host.

  FAE (Adnan et al., VLDB 2021, Accelerating recommendation system training by
  leveraging popular choices), without its sorting of batches. Replicas'
  gradients meet in the cheaper way: all-reduced, or those of touched rows.
  """
  s, work, t = problem.spectrum, problem.work, problem.topology
  rows, n = s.rows, work.devices
  hot = min(rows, device_bytes // (work.stored + 4 * (work.dim + 1)))
  cold = problem.buffers(hot, rows)
  ways = [
    Load(float(hot), 0.0, float(cold), gathered)
    for gathered in (None, problem.gathered(hot, "sparse"))
  ]
  load = min(
    ways, key=lambda x: sum(step_cost.step_seconds(work, t, x).values())
  )
  return _placed(
    "FAE: replicas and host",
    problem,
    load,
    (hot * work.stored, (rows - hot) * work.stored),
    (device_bytes, host_bytes),
    f"{hot:,} replicas on each of {n} devices",
  )


# ---- By tables


@dataclasses.dataclass(frozen=True)
class Shard:
  """A device's part of a table; its owner pools the bags' lookups in it."""

  table: int
  device: int
  rows: int
  splits: int = 1  # shards that the table's rows are split into
  columns: float = 1.0  # part of the dim
  host: bool = False  # rows in host memory


def table_wise(problem: Problem, device_bytes: int, host_bytes: int) -> Placed:
  """Whole tables, greedily: the costliest next, onto the least loaded device.

  Owners pool; a device does the lookups of all samples in its tables.
  """
  tables, work = problem.spectrum.tables, problem.work
  name = "table-wise, greedy"
  shards = _greedy(problem, dict.fromkeys(range(len(tables)), 1), device_bytes)
  if shards is None:
    largest = max(t.rows for t in tables) * work.stored
    why = f"does not fit: the largest table takes {size(largest)}"
    return Placed(name, np.nan, np.nan, largest, 0.0, why)
  return of_shards(name, problem, shards)


def hugectr(
  problem: Problem,
  device_bytes: int,
  host_bytes: int,
  replicate_mb: float = 1.0,
  memory_weight: float = 1.0,
  rounds: int = 20,
) -> Placed:
  """HugeCTR's rule: small tables replicated, hot or large ones split.

  A shard costs hotness / splits + memory_weight x its part of the memory;
  greedy onto the least loaded device. Then the hottest or, where memory is
  short, the largest table is split by two, at most 20 times; the best is kept.
  (NVIDIA HugeCTR and MLPerf training's dlrm_dcnv2 sharding plan, "auto".)
  """
  tables, work = problem.spectrum.tables, problem.work
  small = replicate_mb * 2**20
  replicas = sum(t.rows for t in tables if t.rows * work.stored <= small)
  splits = {i: 1 for i, t in enumerate(tables) if t.rows * work.stored > small}
  room = device_bytes - replicas * work.stored
  best = None
  for _ in range(rounds):
    shards = _greedy(problem, splits, room, memory_weight)
    if shards is not None:
      placed = of_shards("HugeCTR's rule", problem, shards, replicas)
      if best is None or placed.seconds < best.seconds:
        best = placed
    by = (
      (lambda i: tables[i].lookups / splits[i])
      if shards is not None
      else (lambda i: tables[i].rows / splits[i])
    )
    able = [i for i in splits if 2 * splits[i] <= work.devices]
    if not able:
      break
    splits[max(able, key=by)] *= 2
  if best is not None:
    return best
  total = sum(t.rows for t in tables) * work.stored
  return Placed(
    "HugeCTR's rule",
    np.nan,
    np.nan,
    total / work.devices,
    0.0,
    f"does not fit: {size(total)} of tables",
  )


def _greedy(
  problem, splits: dict[int, int], device_bytes, memory_weight=0.0
) -> list[Shard] | None:
  """Tables in so many parts each, the costliest part first, onto the least
  loaded device with room that has none of the same table."""
  n, stored = problem.work.devices, problem.work.stored
  tables = problem.spectrum.tables
  parts = [
    (i, k, tables[i].lookups / k, -(-tables[i].rows // k))
    for i, k in splits.items()
    for _ in range(k)
  ]
  whole = sum(rows for *_, rows in parts) or 1
  of = [h + memory_weight * n * rows / whole for _, _, h, rows in parts]
  load, held = np.zeros(n), np.zeros(n)
  used: list[set[int]] = [set() for _ in range(n)]
  shards = []
  order = sorted(range(len(parts)), key=lambda i: (-of[i], -parts[i][3]))
  for i in order:
    table, k, _, rows = parts[i]
    free = held + rows * stored <= device_bytes
    free &= np.array([table not in u for u in used])
    if not free.any():
      return None
    to = int(np.argmin(np.where(free, load, np.inf)))
    shards.append(Shard(table, to, rows, k))
    load[to] += of[i]
    held[to] += rows * stored
    used[to].add(table)
  return shards


def of_shards(
  name: str, problem: Problem, shards: list[Shard], replicas: int = 0
) -> Placed:
  """Shards pooled at their owners: the busiest device decides.

  A bag costs an owner its lookups there and, if it has one, a vector. Nothing
  is coalesced, as TorchRec and HugeCTR do it.

  Args:
    shards: of all tables that are not replicated.
    replicas: rows on every device, whose gradients are all-reduced.
  """
  work, t, tables = problem.work, problem.topology, problem.spectrum.tables
  n, b, train = work.devices, work.local, float(work.train)
  lookups, bytes_of, sent_back, held, host = np.zeros((5, n))
  host_bytes = 0.0
  sent = {"ids": 0.0, "vectors": 0.0}
  far = b * (n - 1) / n
  for s in shards:
    hotness = tables[s.table].lookups / s.splits  # of a bag, here
    some = min(hotness, 1.0)
    at = s.device
    lookups[at] += hotness * work.batch_size
    bytes_of[at] += hotness * work.batch_size * s.columns
    sent_back[at] += some * work.batch_size * s.columns * work.wire_bytes
    sent["ids"] += far * hotness * formulas.ID_BYTES
    sent["vectors"] += far * some * s.columns * work.wire_bytes * (1 + train)
    if s.host:
      host[at] += hotness * work.batch_size * s.columns
      host_bytes += s.rows * s.columns * work.stored
    else:
      held[at] += s.rows * s.columns
  ids = float(lookups.max()) * formulas.ID_BYTES
  there = float(sent_back.max())
  trips = (ids, there, train * there)
  busy, wide = float(bytes_of.max()), 4 * work.dim
  base = step_cost.step_seconds(work, t, Load(float(replicas)))
  of_host = step_cost.step_seconds(work, t, Load(cold=float(host.max())))
  terms = {
    "gather": busy * work.row_bytes / t.gather
    + (1 + train) * b * len({s.table for s in shards}) * wide / t.stream,
    "all-to-all": sum(formulas.all_to_all_seconds(x, n, t) for x in trips),
    # Sort by row, sum, read and write.
    "optimizer": train
    * (
      float(lookups.max()) / t.sort + busy * (wide + 2 * work.stored) / t.gather
    ),
    "host link": of_host["host link"],
    "host rows": of_host["host rows"],
  }
  seconds = {k: float(terms.get(k, 0.0)) for k in base}
  for k in ("all-reduce", "dense", "launch"):
    seconds[k] = float(base[k])
  sharded = bool(held.any()) + bool(host.any())
  seconds["launch"] += sharded * (1 + train) * t.tier_latency
  if replicas:
    own = step_cost.sent_bytes(work, Load(float(replicas)))
    sent["replicas"] = own["hot gradients"]
  return Placed(
    name,
    sum(seconds.values()),
    sum(sent.values()) * n / work.batch_size,
    float(held.max() + replicas) * work.stored,
    host_bytes,
    f"busiest device {lookups.max() / max(lookups.mean(), 1):.2f} of the mean",
  )


def _placed(name, problem, load, held, budgets, note) -> Placed:
  work = problem.work
  for where, have, budget in zip(
    ("devices", "hosts"), held, budgets, strict=True
  ):
    if have > budget:
      note = f"does not fit: the {where} lack {size(have - budget)}"
      return Placed(name, np.nan, np.nan, *held, note)
  seconds = step_cost.step_seconds(work, problem.topology, load)
  sent = step_cost.sent_bytes(work, load)
  per_sample = sum(sent.values()) * work.devices / work.batch_size
  return Placed(name, float(sum(seconds.values())), float(per_sample), *held,
                note)  # fmt: skip


def size(number: float) -> str:
  """Bytes with a unit."""
  for limit, unit in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
    if number >= limit:
      return f"{number / limit:,.3g} {unit}"
  return f"{number:.0f} B"


def describe(placed: tuple[Placed, ...]) -> str:
  """A table to print."""
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
