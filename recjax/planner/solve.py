"""plan(profile, budgets, topology) -> Plan: where rows live, at what cost."""

import bisect
import dataclasses
import inspect
import math

from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.plan import layout
from recjax.plan.plan import Plan, Terms, TierReport
from recjax.planner import (
  cut_points,
  formulas,
  frequency_buckets,
  presets,
  step_cost,
  table_wise,
)
from recjax.planner.cut_points import Problem, Transport
from recjax.planner.frequency_buckets import Spectrum
from recjax.planner.step_cost import Dense, Work
from recjax.planner.topology import Topology


def make_problem(
  profile: Profile | Spectrum,
  *,
  devices: int,
  batch_size: int,
  lookups: int,
  dim: int,
  dtype: str,
  slot_bytes: int,
  overflow_probability: float | None = 1e-2,
  topology: Topology | None = None,
  exchange_dtype: str = "float32",
  dense: Dense | None = None,
  compute_dtype: str = "float32",
  objective: str = "time",
  train: bool = True,
) -> Problem:
  """What is to be planned.

  Args:
    profile: the row space, hottest first.
    devices: n.
    batch_size: B, global.
    lookups: S, lookups of a sample at most.
    dim, dtype, slot_bytes: of a row.
    overflow_probability: that any buffer of any device overflows in a step and
      a second round is due; by Bernstein's bound, which is above the truth.
      None = the expected rows, without padding.
    topology: how fast the machines are; None = simulated CPU devices.
    exchange_dtype: of rows and gradients on the wire.
    dense, compute_dtype: the dense part of the model.
    objective: "time" or "bytes", what is minimised.
    train: False plans the forward pass only.

  Raises:
    UserError: the batch does not divide.
  """
  if batch_size % devices:
    raise UserError(
      f"train.batch_size: {batch_size} samples cannot be divided over "
      f"{devices} devices; the nearest multiple is "
      f"{max(1, round(batch_size / devices)) * devices}"
    )
  topology = topology or presets.cpu(devices)
  g = topology.node_devices
  if isinstance(profile, Profile):
    profile = frequency_buckets.of_profile(profile)
  work = Work(
    devices=devices,
    batch_size=batch_size,
    lookups=lookups,
    dim=dim,
    row_bytes=dim * _itemsize(dtype),
    slot_bytes=slot_bytes if train else 0,
    wire_bytes=dim * _itemsize(exchange_dtype),
    dense=dense or Dense(),
    compute=compute_dtype,
    train=train,
    node_devices=g if devices % g == 0 else 0,  # nodes alike, or no stages
  )
  return Problem(profile, work, topology, overflow_probability, objective)


def plan(profile: Profile | Spectrum, **arguments) -> Plan:
  """`solve` of `make_problem`, with the arguments of both."""
  names = inspect.signature(solve).parameters
  given = {k: arguments.pop(k) for k in list(arguments) if k in names}
  return solve(make_problem(profile, **arguments), **given)


def solve(
  problem: Problem,
  *,
  hosts: int,
  device_bytes: int,
  host_bytes: int,
  hot_rows: int = -1,
  warm_rows: int = -1,
  capacity: int = 0,
  syncs: tuple[str, ...] = cut_points.HOT_SYNCS,
  ways: tuple[Transport, ...] = (),
  pooled: tuple[str, ...] | None = None,
) -> Plan:
  """Chooses the cut points and the capacities.

  Args:
    problem: what is to be planned.
    hosts: machines that the devices sit in.
    device_bytes: budget of a device for tables and slots.
    host_bytes: budget of a host for the same.
    hot_rows, warm_rows: the cuts, where >= 0.
    capacity: of every buffer, where > 0.
    syncs: how hot gradients may meet, to choose from.
    ways: how sharded rows may travel; none = all that the mesh has.
    pooled: tables that owners pool, of several devices; None = as it is best.

  Raises:
    UserError: the rows do not fit.
  """
  n, rows = problem.work.devices, problem.spectrum.rows
  ways = ways or cut_points.transports(problem.work)
  owners = max(way.warm_owners(problem.work) for way in ways)
  row_bytes = problem.work.stored
  fit = device_bytes // row_bytes  # rows a device

  # ---- Fits at all?
  if hot_rows >= 0:
    hot = min(hot_rows, rows)
  elif warm_rows >= 0:  # more hot rows, fewer cold
    hot = min(
      max(fit - layout.shard_rows(min(warm_rows, rows), owners), 0), rows
    )
  else:
    hot = 0
  if hot > fit:
    raise UserError(
      f"plan.hot_rows: {hot} replicated rows of {row_bytes} bytes take "
      f"{_mb(hot * row_bytes)} MB of a device, the budget "
      f"(plan.device_memory_mb) is {_mb(device_bytes)} MB; at most {fit} fit"
    )
  most = int(layout.most_sharded(rows, hot, fit, owners))
  warm = most if warm_rows < 0 else min(warm_rows, rows - hot)
  if warm > most:
    raise UserError(
      f"plan.warm_rows: {warm} rows of {row_bytes} bytes over {owners} devices "
      f"take {_mb((hot + layout.shard_rows(warm, owners)) * row_bytes)} MB of "
      f"each with the {hot} hot rows, the budget (plan.device_memory_mb) is "
      f"{_mb(device_bytes)} MB; at most {most} fit"
    )
  cold = rows - hot - warm
  cold_bytes = layout.shard_rows(cold, n) * n * row_bytes
  if cold_bytes > hosts * host_bytes:
    _too_small(rows, n, owners, hosts, row_bytes, device_bytes, host_bytes,
               cold, max(hot_rows, 0))  # fmt: skip

  # ---- Cuts
  host_rows = hosts * host_bytes // row_bytes
  chosen = cut_points.best_cuts(
    problem, fit, host_rows, hot_rows, warm_rows, syncs, ways
  )
  assert chosen is not None  # hot and warm from above fit
  best = *chosen, None
  if cut_points.FLAT in ways and pooled != ():  # the owners of all devices pool
    flat = chosen
    if chosen[-1] != cut_points.FLAT:
      flat = cut_points.best_cuts(
        problem, fit, host_rows, hot_rows, warm_rows, syncs, (cut_points.FLAT,)
      )
    fixed = hot_rows >= 0 or warm_rows >= 0
    best = _pooled(problem, best, flat, fit, host_rows, fixed, pooled)
  return _finish(problem, *best, capacity)


def _pooled(problem, best, flat, fit, host_rows, fixed, pooled):
  """The cheaper of `best` and of the flat exchange with tables pooled.

  Of cut points, sync, transport and table_wise.Choice; as asked for, where the
  tables are given.
  """
  if flat is None:
    return best
  names = [t.name for t in problem.spectrum.tables]
  tables = None if pooled is None else tuple(map(names.index, pooled))
  hot, end, sync, choice = table_wise.best(
    problem, flat[:3], fit, host_rows, fixed=fixed, tables=tables
  )
  if choice is None:
    return best
  if pooled is None:
    of_best = float(problem.cost_of_cuts(*best[:4]))
    if float(problem.evaluate(choice.load)) >= of_best:
      return best
  return hot, end, sync, cut_points.FLAT, choice


def _finish(problem, hot, warm_end, sync, way, choice, capacity) -> Plan:
  """The plan of chosen cuts: capacities and reports."""
  s, work = problem.spectrum, problem.work
  n, rows = work.devices, s.rows
  uses, spare = s.below(s.uses), choice.spare if choice else 0
  ranges = ((0, hot), (hot, warm_end), (warm_end, rows))
  slots = {
    "hot": hot,
    "warm": layout.shard_rows(warm_end - hot + spare, way.warm_owners(work)),
    "cold": layout.shard_rows(rows - warm_end, n) * n,
  }
  load = problem.load_of_cuts(hot, warm_end, sync, way, capacity)
  if choice:
    warm = float(choice.load.warm)
    if capacity:
      most = min(-(-(warm_end - hot + spare) // n), work.ids)
      warm = float(n * min(capacity, most))
    load = dataclasses.replace(load, warm=warm, pooled=choice.load.pooled)
  near = round(float(load.warm)), round(float(load.cold))
  far = round(float(load.far_warm or 0)), round(float(load.far_cold or 0))
  buffers = 0, near[0] + far[0], near[1] + far[1]
  reports = []
  for name, (start, stop), held in zip(slots, ranges, buffers, strict=True):
    distinct = float(problem.distinct(start, stop))
    if choice and name == "warm":
      distinct = choice.distinct
    reports.append(
      TierReport(
        rows=stop - start,
        bytes=slots[name] * work.stored,
        share=float(uses.between(start, stop)) / max(float(uses(rows)), 1e-30),
        distinct=distinct,
        buffer_bytes=held * 2 * (formulas.ID_BYTES + 4 * work.dim),
      )
    )
  return Plan(
    devices=n,
    batch_size=work.batch_size,
    rows=rows + spare,
    dim=work.dim,
    dtype="float32" if work.row_bytes == 4 * work.dim else "bfloat16",
    hot=hot,
    warm_end=warm_end + spare,
    capacity_warm=near[0] // way.warm_owners(work),
    capacity_cold=near[1] // n,
    reports=tuple(reports),
    hot_sync=sync,
    capacity_hot=0 if load.gathered is None else math.ceil(load.gathered),
    node_devices=work.node_devices,
    exchange=way.exchange,
    warm_copies=way.warm_copies,
    capacity_far_warm=far[0] // work.nodes,
    capacity_far_cold=far[1] // work.nodes,
    pooled=tuple((s.tables[t].name, o) for t, o in choice.owner.items())
    if choice
    else (),
    spare=spare,
    topology=problem.topology.name,
    seconds=_terms(step_cost.step_seconds(work, problem.topology, load)),
    sent=_terms(step_cost.sent_bytes(work, load)),
    memory=_terms(
      step_cost.device_bytes(
        work, hot, slots["warm"], sum(buffers), load.pooled
      )
    ),
    network=_terms(step_cost.network_bytes(work, load)),
  )


def _terms(of: dict) -> Terms:
  return tuple((k, float(v)) for k, v in of.items())


def _too_small(
  rows, n, owners, hosts, row_bytes, device_bytes, host_bytes, cold, replicas
):
  """Raises: which budget is too small, by how much, and what would do."""
  cold_bytes = layout.shard_rows(cold, n) * n * row_bytes

  def fits(device_mb):  # with warm_rows = -1
    fit = (device_mb << 20) // row_bytes
    hot = min(replicas, fit)
    cold = rows - hot - int(layout.most_sharded(rows, hot, fit, owners))
    return layout.shard_rows(cold, n) * n * row_bytes <= hosts * host_bytes

  now = _mb(device_bytes)
  larger = range(now, max(now, _mb(2 * rows * row_bytes)) + 1)
  enough = larger[bisect.bisect_left(larger, True, key=fits)]
  raise UserError(
    f"plan.host_memory_mb: {cold} cold rows of {row_bytes} bytes take "
    f"{_mb(cold_bytes)} MB, {_mb(cold_bytes - hosts * host_bytes)} MB more "
    f"than the {_mb(hosts * host_bytes)} MB of {hosts} host(s). It fits with "
    f"plan.host_memory_mb={_mb(-(-cold_bytes // hosts))}, or with "
    f"plan.device_memory_mb={enough} and plan.warm_rows=-1, or on more "
    "devices"
  )


def _itemsize(dtype: str) -> int:
  return 4 if dtype == "float32" else 2


def _mb(size: int) -> int:
  return -(-int(size) >> 20)
