"""plan(profile, budgets, topology) -> Plan: where rows live, at what cost."""

import bisect
import dataclasses
import inspect
import json
import math

from recjax import cost, cuts, owners, presets, spectrum, step_cost
from recjax.cuts import Problem
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.spectrum import Spectrum
from recjax.step_cost import Dense, Load, Work
from recjax.topology import Topology


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
  """Two cut points and two capacities; static in the compiled step.

  Ranks below `hot` are replicated, ranks below `warm_end` sharded in device
  memory, the others sharded in host memory. Owners are cyclic in rank.
  Capacities are rows a peer and round (C), 0 for a tier without rows. Where
  tables are pooled at owners, `rows`, `warm_end` and the tiers count positions
  (positions.py), `spare` ones without a row included.
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
  topology: str = ""
  seconds: Terms = ()  # of a step, predicted, by term
  sent: Terms = ()  # bytes that a device sends in a step, by kind
  memory: Terms = ()  # bytes of a device, by kind
  pooled: tuple[tuple[str, int], ...] = ()  # tables and their owners
  spare: int = 0  # warm positions without a row; see positions.py

  @property
  def warm(self) -> int:
    return self.warm_end - self.hot

  @property
  def cold(self) -> int:
    return self.rows - self.warm_end

  @property
  def warm_slots(self) -> int:
    """Rows of a device's warm shard."""
    return cuts.slots_of(self.warm, self.devices)

  @property
  def cold_slots(self) -> int:
    """Rows of a device's cold shard, in its host's memory."""
    return cuts.slots_of(self.cold, self.devices)

  @property
  def step_seconds(self) -> float:
    return sum(x for _, x in self.seconds)

  @property
  def bytes_per_sample(self) -> float:
    return sum(x for _, x in self.sent) * self.devices / self.batch_size

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Plan":
    """The inverse of to_json."""
    fields = json.loads(text)
    fields["reports"] = tuple(TierReport(**r) for r in fields["reports"])
    for name in ("seconds", "sent", "memory"):
      fields[name] = tuple((k, v) for k, v in fields.get(name, ()))
    fields["pooled"] = tuple(map(tuple, fields.get("pooled", ())))
    return cls(**fields)


def make_problem(
  profile: Profile | Spectrum,
  *,
  devices: int,
  batch_size: int,
  lookups: int,
  dim: int,
  dtype: str,
  slot_bytes: int,
  overflow_probability: float | None = 1e-6,
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
    overflow_probability: of any buffer of any device in a step; None = the
      expected rows, without padding.
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
  if isinstance(profile, Profile):
    profile = spectrum.of_profile(profile)
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
  )
  topology = topology or presets.cpu(devices)
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
  syncs: tuple[str, ...] = cuts.HOT_SYNCS,
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
    syncs: ways for hot gradients to meet, to choose from.
    pooled: tables that owners pool, of several devices; None = as it is best.

  Raises:
    UserError: the rows do not fit.
  """
  n, rows = problem.work.devices, problem.spectrum.rows
  row_bytes = problem.work.stored
  fit = device_bytes // row_bytes  # rows a device

  # ---- Fits at all?
  if hot_rows >= 0:
    hot = min(hot_rows, rows)
  elif warm_rows >= 0:  # more hot rows, fewer cold
    hot = min(max(fit - cuts.slots_of(min(warm_rows, rows), n), 0), rows)
  else:
    hot = 0
  if hot > fit:
    raise UserError(
      f"plan.hot_rows: {hot} replicated rows of {row_bytes} bytes take "
      f"{_mb(hot * row_bytes)} MB of a device, the budget "
      f"(plan.device_memory_mb) is {_mb(device_bytes)} MB; at most {fit} fit"
    )
  most = int(cuts.most_warm(rows, hot, fit, n))
  warm = most if warm_rows < 0 else min(warm_rows, rows - hot)
  if warm > most:
    raise UserError(
      f"plan.warm_rows: {warm} rows of {row_bytes} bytes over {n} devices take "
      f"{_mb((hot + cuts.slots_of(warm, n)) * row_bytes)} MB of each with the "
      f"{hot} hot rows, the budget (plan.device_memory_mb) is "
      f"{_mb(device_bytes)} MB; at most {most} fit"
    )
  cold = rows - hot - warm
  cold_bytes = cuts.slots_of(cold, n) * n * row_bytes
  if cold_bytes > hosts * host_bytes:
    _too_small(rows, n, hosts, row_bytes, device_bytes, host_bytes, cold,
               max(hot_rows, 0))  # fmt: skip

  # ---- Cuts
  host_rows = hosts * host_bytes // row_bytes
  chosen = cuts.best_cuts(problem, fit, host_rows, hot_rows, warm_rows, syncs)
  assert chosen is not None  # hot and warm from above fit
  names = [t.name for t in problem.spectrum.tables]
  best = owners.best(
    problem,
    chosen,
    fit,
    host_rows,
    fixed=hot_rows >= 0 or warm_rows >= 0,
    tables=None if pooled is None else tuple(map(names.index, pooled)),
  )
  return _finish(problem, *best, capacity)


def _finish(problem, hot, warm_end, sync, choice, capacity) -> Plan:
  """The plan of chosen cuts: capacities and reports."""
  s, work = problem.spectrum, problem.work
  n, rows = work.devices, s.rows
  uses, spare = s.below(s.uses), choice.spare if choice else 0
  ranges = ((0, hot), (hot, warm_end), (warm_end, rows))
  slots = {
    "hot": hot,
    "warm": cuts.slots_of(warm_end - hot + spare, n),
    "cold": cuts.slots_of(rows - warm_end, n) * n,
  }
  reports, capacities = [], []
  for name, (start, stop) in zip(slots, ranges, strict=True):
    c = 0
    if name != "hot":
      size = stop - start + (spare if name == "warm" else 0)
      c = int(problem.buffers(start, stop)) // n
      if choice and name == "warm":
        c = int(choice.load.warm) // n
      if capacity and size:
        c = min(capacity, -(-size // n), work.ids)
      capacities.append(c)
    reports.append(
      TierReport(
        rows=stop - start,
        bytes=slots[name] * work.stored,
        share=float(uses.between(start, stop)) / max(float(uses(rows)), 1e-30),
        distinct=choice.distinct
        if choice and name == "warm"
        else float(problem.distinct(start, stop)),
        buffer_bytes=n * c * 2 * (cost.ID_BYTES + 4 * work.dim),
      )
    )
  warm, cold = (n * c for c in capacities)
  gathered = problem.gathered(hot, sync)
  pooling = choice.load.pooled if choice else None
  load = Load(hot, warm, cold, gathered, pooling)
  return Plan(
    devices=n,
    batch_size=work.batch_size,
    rows=rows + spare,
    dim=work.dim,
    dtype="float32" if work.row_bytes == 4 * work.dim else "bfloat16",
    hot=hot,
    warm_end=warm_end + spare,
    capacity_warm=capacities[0],
    capacity_cold=capacities[1],
    reports=tuple(reports),
    hot_sync=sync,
    capacity_hot=0 if gathered is None else math.ceil(gathered),
    topology=problem.topology.name,
    seconds=_terms(step_cost.step_seconds(work, problem.topology, load)),
    sent=_terms(step_cost.sent_bytes(work, load)),
    memory=_terms(
      step_cost.device_bytes(work, hot, slots["warm"], warm + cold, pooling)
    ),
    pooled=tuple((s.tables[t].name, o) for t, o in choice.owner.items())
    if choice
    else (),
    spare=spare,
  )


def _terms(of: dict) -> Terms:
  return tuple((k, float(v)) for k, v in of.items())


def _too_small(
  rows, n, hosts, row_bytes, device_bytes, host_bytes, cold, replicas
):
  """Raises: which budget is too small, by how much, and what would do."""
  cold_bytes = cuts.slots_of(cold, n) * n * row_bytes

  def fits(device_mb):  # with warm_rows = -1
    fit = (device_mb << 20) // row_bytes
    hot = min(replicas, fit)
    cold = rows - hot - int(cuts.most_warm(rows, hot, fit, n))
    return cuts.slots_of(cold, n) * n * row_bytes <= hosts * host_bytes

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
    buffers = f"{plan.devices} x {c:,}" if c else "-"
    lines.append(
      f"{name:5} {r.rows:>13,} {size:>18} {r.share:>9.2%} "
      f"{r.distinct:>14,.0f} {buffers:>12} {r.buffer_bytes / 2**20:>7,.1f} MB"
    )
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
