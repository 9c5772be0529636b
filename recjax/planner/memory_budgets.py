"""Whether the rows fit the budgets, and which budget is too small."""

import bisect
import dataclasses
from collections.abc import Sequence

from recjax.errors import UserError
from recjax.plan import layout
from recjax.planner.common_order import CommonOrder
from recjax.planner.problem import Cuts, Problem
from recjax.planner.transport import Transport


@dataclasses.dataclass(frozen=True)
class Budgets:
  """Bytes for tables and slot variables, of all groups together."""

  device_bytes: int  # of a device
  host_bytes: int  # of a host
  hosts: int

  @property
  def all_hosts(self) -> int:
    """Bytes of all hosts."""
    return self.hosts * self.host_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
  """Cut points that the user gives, in the common order of all groups' rows."""

  order: CommonOrder
  hot_rows: int = -1  # -1: to be planned
  warm_rows: int = -1

  @property
  def fixed(self) -> bool:
    """Whether either is given."""
    return self.hot_rows >= 0 or self.warm_rows >= 0

  def hot(self) -> tuple[int, ...]:
    """Hot rows of each group; -1 where they are to be planned."""
    if self.hot_rows < 0:
      return (-1,) * self.order.groups
    return self.order.split(self.hot_rows)

  def warm(self, hot_rows: int) -> tuple[int, ...]:
    """Warm rows of each group after so many hot ones of all groups."""
    ends = self.order.split(hot_rows + self.warm_rows)
    return tuple(
      end - hot
      for end, hot in zip(ends, self.order.split(hot_rows), strict=True)
    )


def shard_bytes(problem: Problem, cuts: Cuts):
  """Bytes of a device that cuts take; numbers or arrays."""
  owners = cuts.transport.warm_owners(problem.shape)
  rows = cuts.hot + layout.shard_rows(cuts.warm, owners)
  return rows * problem.shape.stored_bytes


def cold_bytes(problem: Problem, cuts: Cuts):
  """Bytes of all hosts that cuts take; numbers or arrays."""
  n, rows = problem.shape.devices, problem.profile.rows
  cold = layout.shard_rows(rows - cuts.warm_end, n) * n
  return cold * problem.shape.stored_bytes


def check(
  problems: Sequence[Problem],
  budgets: Budgets,
  given: Given,
  transport: Transport,
) -> tuple[Cuts, ...]:
  """Cuts that fit the budgets, as many rows on the devices as do.

  Args:
    problems: of the groups.
    budgets: what must not be exceeded.
    given: cuts to keep.
    transport: of the most owners of warm rows.

  Raises:
    UserError: the rows do not fit; it says which budget lacks how much, and
      what would do.
  """
  _check_hot(problems, budgets, given)
  hot_rows = _hot_rows(problems, budgets, given, transport)
  if given.warm_rows >= 0:
    _check_warm(problems, budgets, given, hot_rows, transport)
  found = _packed(problems, budgets.device_bytes, given, hot_rows, transport)
  if _cold_bytes(problems, found) > budgets.all_hosts:
    raise _hosts_too_small(problems, budgets, given, found)
  return found


def _packed(
  problems: Sequence[Problem],
  device_bytes: int,
  given: Given,
  hot_rows: int,
  transport: Transport,
) -> tuple[Cuts, ...]:
  """Fills the devices' memory with warm rows, the widest rows first."""
  hot = given.order.split(hot_rows)
  if given.warm_rows >= 0:
    return tuple(
      Cuts(h, h + w, transport=transport)
      for h, w in zip(hot, given.warm(hot_rows), strict=True)
    )
  sizes = [p.shape.stored_bytes for p in problems]
  left = device_bytes - sum(h * w for h, w in zip(hot, sizes, strict=True))
  found = [Cuts(h, h, transport=transport) for h in hot]
  for i in sorted(range(len(problems)), key=lambda i: -sizes[i]):
    p = problems[i]
    warm = layout.most_sharded(
      p.profile.rows,
      hot[i],
      hot[i] + left // sizes[i],
      transport.warm_owners(p.shape),
    )
    found[i] = Cuts(hot[i], hot[i] + int(warm), transport=transport)
    left -= int(shard_bytes(p, found[i])) - hot[i] * sizes[i]
  return tuple(found)


def _hot_rows(
  problems: Sequence[Problem],
  budgets: Budgets,
  given: Given,
  transport: Transport,
) -> int:
  """Hot rows of all groups: as given, or as many as the warm ones leave."""
  if given.hot_rows >= 0:
    return min(given.hot_rows, given.order.rows)
  if given.warm_rows < 0:
    return 0

  def too_many(hot_rows: int) -> bool:
    found = _packed(problems, budgets.device_bytes, given, hot_rows, transport)
    return _device_bytes(problems, found) > budgets.device_bytes

  # Past the last warm row fewer are left to be warm: those fit as well, or not.
  most = max(given.order.rows - given.warm_rows, 0)
  return max(bisect.bisect_left(range(most + 1), True, key=too_many) - 1, 0)


def _check_hot(
  problems: Sequence[Problem], budgets: Budgets, given: Given
) -> None:
  def taken(hot_rows: int) -> int:
    hot = given.order.split(hot_rows)
    return sum(
      h * p.shape.stored_bytes for h, p in zip(hot, problems, strict=True)
    )

  rows = min(max(given.hot_rows, 0), given.order.rows)
  if taken(rows) <= budgets.device_bytes:
    return
  too_many = lambda rows: taken(rows) > budgets.device_bytes
  most = bisect.bisect_left(range(rows + 1), True, key=too_many) - 1
  raise UserError(
    f"plan.hot_rows: {rows} replicated rows of {_widths(problems)} bytes take "
    f"{_mb(taken(rows))} MB of a device, the budget (plan.device_memory_mb) is "
    f"{_mb(budgets.device_bytes)} MB; at most {most} fit"
  )


def _check_warm(
  problems: Sequence[Problem],
  budgets: Budgets,
  given: Given,
  hot_rows: int,
  transport: Transport,
) -> None:
  def taken(warm_rows: int) -> int:
    tried = dataclasses.replace(given, warm_rows=warm_rows)
    found = _packed(problems, budgets.device_bytes, tried, hot_rows, transport)
    return _device_bytes(problems, found)

  warm = min(given.warm_rows, given.order.rows - hot_rows)
  if taken(warm) <= budgets.device_bytes:
    return
  too_many = lambda rows: taken(rows) > budgets.device_bytes
  most = bisect.bisect_left(range(warm + 1), True, key=too_many) - 1
  owners = transport.warm_owners(problems[0].shape)
  raise UserError(
    f"plan.warm_rows: {warm} rows of {_widths(problems)} bytes over {owners} "
    f"devices take {_mb(taken(warm))} MB of each with the {hot_rows} hot rows, "
    f"the budget (plan.device_memory_mb) is {_mb(budgets.device_bytes)} MB; at "
    f"most {most} fit"
  )


def _hosts_too_small(
  problems: Sequence[Problem],
  budgets: Budgets,
  given: Given,
  found: Sequence[Cuts],
) -> UserError:
  """The error that says what lacks, and what would do."""
  planned = dataclasses.replace(given, warm_rows=-1)
  hot_rows = max(given.hot_rows, 0)

  def fits(device_mb: int) -> bool:  # with warm_rows = -1
    tried = _packed(
      problems, device_mb << 20, planned, hot_rows, found[0].transport
    )
    return _cold_bytes(problems, tried) <= budgets.all_hosts

  now = _mb(budgets.device_bytes)
  stored = sum(p.profile.rows * p.shape.stored_bytes for p in problems)
  larger = range(now, max(now, _mb(2 * stored)) + 1)
  enough = larger[bisect.bisect_left(larger, True, key=fits)]
  cold = sum(
    p.profile.rows - c.warm_end for p, c in zip(problems, found, strict=True)
  )
  lacking = _cold_bytes(problems, found)
  return UserError(
    f"plan.host_memory_mb: {cold} cold rows of {_widths(problems)} bytes take "
    f"{_mb(lacking)} MB, {_mb(lacking - budgets.all_hosts)} MB more "
    f"than the {_mb(budgets.all_hosts)} MB of {budgets.hosts} host(s). It fits "
    f"with plan.host_memory_mb={_mb(-(-lacking // budgets.hosts))}, or with "
    f"plan.device_memory_mb={enough} and plan.warm_rows=-1, or on more "
    "devices"
  )


def _device_bytes(problems: Sequence[Problem], found: Sequence[Cuts]) -> int:
  pairs = zip(problems, found, strict=True)
  return sum(int(shard_bytes(p, cuts)) for p, cuts in pairs)


def _cold_bytes(problems: Sequence[Problem], found: Sequence[Cuts]) -> int:
  pairs = zip(problems, found, strict=True)
  return sum(int(cold_bytes(p, cuts)) for p, cuts in pairs)


def _widths(problems: Sequence[Problem]) -> str:
  """The bytes of a row, or their range: '36' or '36 to 516'."""
  sizes = sorted({p.shape.stored_bytes for p in problems})
  return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _mb(size: int) -> int:
  return -(-int(size) >> 20)
