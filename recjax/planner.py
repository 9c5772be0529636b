"""plan(profile, budgets) -> Plan: where rows live, how large buffers are.

Numpy only. First form: hot rows are those whose gradients are worth an
all-reduce, warm rows fill the devices' budget, hottest first, the rest is
cold, and buffers are sized from the distribution of distinct rows.
"""

import bisect
import dataclasses
import json

import numpy as np

from recjax import cost
from recjax.errors import UserError
from recjax.frequency import Profile

# A row is worth a replica from this chance of being touched by a device's
# part of a step: the all-reduce of its gradient (2w) then moves at most twice
# the bytes of the coalesced exchange (0.5 (2w + c) and more), and its lookup
# leaves the forward pass's critical path. See "What a row costs", design.
_HOT_TOUCH = 0.5
_ID_BYTES = 4


@dataclasses.dataclass(frozen=True)
class TierReport:
  """What a tier holds and what a step asks of it."""

  rows: int
  bytes: int  # tables and slots, of a device (hot, warm) or all hosts (cold)
  share: float  # of the training split's accesses
  distinct: float  # expected rows that a device touches in a step
  buffer_bytes: int  # of a device: requests and rows, both directions


@dataclasses.dataclass(frozen=True)
class Plan:
  """Two cut points and two capacities; static in the compiled step.

  Ranks below `hot` are replicated, ranks below `warm_end` sharded in device
  memory, the others sharded in host memory. Owners are cyclic in rank.
  Capacities are rows a peer and round (C), 0 for a tier without rows.
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

  @property
  def warm(self) -> int:
    return self.warm_end - self.hot

  @property
  def cold(self) -> int:
    return self.rows - self.warm_end

  @property
  def warm_slots(self) -> int:
    """Rows of a device's warm shard."""
    return _slots(self.warm, self.devices)

  @property
  def cold_slots(self) -> int:
    """Rows of a device's cold shard, in its host's memory."""
    return _slots(self.cold, self.devices)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Plan":
    """The inverse of to_json."""
    fields = json.loads(text)
    fields["reports"] = tuple(TierReport(**r) for r in fields["reports"])
    return cls(**fields)


def plan(
  profile: Profile,
  *,
  devices: int,
  hosts: int,
  batch_size: int,
  lookups: int,
  dim: int,
  dtype: str,
  slot_bytes: int,
  device_bytes: int,
  host_bytes: int,
  hot_rows: int = -1,
  warm_rows: int = -1,
  capacity: int = 0,
  overflow_probability: float = 1e-6,
) -> Plan:
  """Chooses the cut points and the capacities.

  Args:
    profile: the row space, hottest first.
    devices: n; hosts: machines that they sit in.
    batch_size: B, global.
    lookups: S, lookups of a sample at most.
    dim, dtype, slot_bytes: of a row.
    device_bytes: budget of a device for tables and slots.
    host_bytes: budget of a host for the same.
    hot_rows, warm_rows: the cuts, where >= 0.
    capacity: of every buffer, where > 0.
    overflow_probability: of any buffer of any device in a step.

  Raises:
    UserError: the batch does not divide, or the rows do not fit.
  """
  n, rows = devices, profile.rows
  if batch_size % n:
    raise UserError(
      f"train.batch_size: {batch_size} samples cannot be divided over "
      f"{n} devices; the nearest multiple is "
      f"{max(1, round(batch_size / n)) * n}"
    )
  local = batch_size // n
  row_bytes = dim * (4 if dtype == "float32" else 2) + slot_bytes
  fit = device_bytes // row_bytes  # rows a device

  if hot_rows < 0:
    replicas = _replicas(profile, n, local)
    asked = _slots(min(max(warm_rows, 0), rows), n)
    hot = min(replicas, max(fit - asked, 0))
  else:
    replicas = hot = min(hot_rows, rows)
  if hot > fit:
    raise UserError(
      f"plan.hot_rows: {hot} replicated rows of {row_bytes} bytes take "
      f"{_mb(hot * row_bytes)} MB of a device, the budget "
      f"(plan.device_memory_mb) is {_mb(device_bytes)} MB; at most {fit} fit"
    )
  most = _most_warm(rows, hot, fit, n)
  warm = most if warm_rows < 0 else min(warm_rows, rows - hot)
  if warm > most:
    raise UserError(
      f"plan.warm_rows: {warm} rows of {row_bytes} bytes over {n} devices take "
      f"{_mb((hot + _slots(warm, n)) * row_bytes)} MB of each with the {hot} "
      f"hot rows, the budget (plan.device_memory_mb) is {_mb(device_bytes)} "
      f"MB; at most {most} fit"
    )
  cold = rows - hot - warm
  cold_bytes = _slots(cold, n) * n * row_bytes
  if cold_bytes > hosts * host_bytes:

    def fits(device_mb):  # with warm_rows = -1
      fit = (device_mb << 20) // row_bytes
      hot = min(replicas, fit)
      cold = rows - hot - _most_warm(rows, hot, fit, n)
      return _slots(cold, n) * n * row_bytes <= hosts * host_bytes

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

  cuts = ((0, hot), (hot, hot + warm), (hot + warm, rows))
  means, reports, capacities = [], [], []
  buffers = 2 * n * n  # (tier, device, peer)
  for name, (start, stop) in zip(("hot", "warm", "cold"), cuts, strict=True):
    distinct, top = _distinct(profile, start, stop, local)
    means.append(distinct)
    c = 0
    if name != "hot" and stop > start:
      # Cyclic in rank: no owner has more than its n-th part and one row.
      c = capacity or cost.capacity(
        distinct / n + top, overflow_probability / buffers
      )
      c = min(c, -(-(stop - start) // n), local * lookups)
      capacities.append(c)
    elif name != "hot":
      capacities.append(0)
    held = {"hot": hot, "warm": _slots(warm, n), "cold": _slots(cold, n) * n}
    held = held[name]
    reports.append(
      TierReport(
        rows=stop - start,
        bytes=held * row_bytes,
        share=float(profile.counts[start:stop].sum())
        / max(profile.accesses, 1),
        distinct=distinct,
        buffer_bytes=n * c * 2 * (_ID_BYTES + 4 * dim),
      )
    )
  return Plan(
    devices=n,
    batch_size=batch_size,
    rows=rows,
    dim=dim,
    dtype=dtype,
    hot=hot,
    warm_end=hot + warm,
    capacity_warm=capacities[0],
    capacity_cold=capacities[1],
    reports=tuple(reports),
  )


def _slots(rows: int, devices: int) -> int:
  """A device's part of a tier, padded by less than 1/128.

  The padded size has a large power of two as a factor, so that a checkpoint
  can store a shard in equal chunks.
  """
  slots = -(-rows // devices)
  unit = 1 << max(0, slots.bit_length() - 8)
  return -(-slots // unit) * unit


def _slots_within(room: int) -> int:
  """The largest padded size that is at most `room`."""
  unit = 1 << max(0, room.bit_length() - 8)
  return room // unit * unit


def _most_warm(rows: int, hot: int, fit: int, devices: int) -> int:
  """Rows that may be warm where `fit` rows fit a device and `hot` are hot."""
  return min(rows - hot, _slots_within(fit - hot) * devices)


def _mb(size: int) -> int:
  return -(-int(size) >> 20)


_SLICE = 1 << 24  # rows at a time, so that temporaries stay small


def _replicas(profile: Profile, n: int, local: int) -> int:
  """Rows that a device's part of a step touches more often than not."""
  if n == 1:
    return 0
  # pi(b) >= touch <=> count >= samples (1 - (1 - touch)^(1/b)); descending.
  least = profile.samples * -np.expm1(np.log1p(-_HOT_TOUCH) / local)
  return bisect.bisect_right(profile.counts, -least, key=lambda c: -c)


def _distinct(profile: Profile, start: int, stop: int, local: int):
  """(expected distinct rows of [start, stop) in b samples, the top row's)."""
  total, top = 0.0, 0.0
  for at in range(start, stop, _SLICE):
    p = profile.frequencies(at, min(at + _SLICE, stop))
    touched = cost.touch_probability(p, local)
    total += float(touched.sum())
    top = max(top, float(touched[0]))
  return total, top


def describe(plan: Plan) -> str:
  """The plan as a table to print."""
  lines = [
    f"plan: {plan.rows:,} rows x {plan.dim} {plan.dtype} on {plan.devices} "
    f"device(s), global batch {plan.batch_size:,}",
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
  return "\n".join(lines)
