"""Whether the rows fit the budgets, and which budget is too small."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from recjax.errors import UserError
from recjax.plan import layout
from recjax.planner import stored_rows
from recjax.planner.common_order import CommonOrder
from recjax.planner.problem import Cuts, Problem
from recjax.planner.stored_rows import Room
from recjax.planner.transport import Transport


@dataclasses.dataclass(frozen=True)
class Budgets:
  """Bytes for tables and slot variables, of all groups together."""

  device_bytes: int  # of a device
  host_bytes: int  # of a host
  hosts: int
  ssd_bytes: int = 0  # of a host's SSDs

  @property
  def all_hosts(self) -> int:
    """Bytes of all hosts."""
    return self.hosts * self.host_bytes

  @property
  def all_ssds(self) -> int:
    """Bytes of all hosts' SSDs."""
    return self.hosts * self.ssd_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
  """Cut points that the user gives, in the common order of all groups' rows."""

  order: CommonOrder
  hot_rows: int = -1  # -1: to be planned
  warm_rows: int = -1
  cold_rows: int = -1

  @property
  def fixed(self) -> bool:
    """Whether hot or warm rows are given."""
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

  def cold(self, stored: Sequence[int]) -> tuple[int, ...] | None:
    """Cold rows of groups that have so many stored ones; None: not given.

    The most used of all stored rows.
    """
    if self.cold_rows < 0:
      return None
    rows = self.order.split(self.order.rows)

    def below(rank: int) -> list[int]:
      of = zip(self.order.split(rank), rows, stored, strict=True)
      return [max(end - (r - s), 0) for end, r, s in of]

    ranks = range(self.order.rows)
    end = bisect.bisect_left(ranks, self.cold_rows, key=lambda r: sum(below(r)))
    return tuple(below(end))


def shard_bytes(problem: Problem, cuts: Cuts):
  """Bytes of a device that cuts take; numbers or arrays."""
  owners = cuts.transport.warm_owners(problem.shape)
  rows = cuts.hot + layout.shard_rows(cuts.warm, owners)
  return rows * problem.shape.stored_bytes


def cold_bytes(problem: Problem, cuts: Cuts):
  """Bytes of all hosts' memories that cuts take; numbers or arrays."""
  rows = problem.profile.rows
  stored = rows - cuts.warm_end
  return _sharded_bytes(problem, stored - cuts.frozen(rows))


def frozen_bytes(problem: Problem, cuts: Cuts):
  """Bytes of all hosts' SSDs that cuts take; numbers or arrays."""
  return _sharded_bytes(problem, cuts.frozen(problem.profile.rows))


def _sharded_bytes(problem: Problem, rows):
  n = problem.shape.devices
  return layout.shard_rows(rows, n) * n * problem.shape.stored_bytes


def stored(
  problems: Sequence[Problem],
  found: Sequence[Cuts],
  budgets: Budgets,
  given: Given,
) -> tuple[Cuts, ...]:
  """The cuts with each group's part of the hosts' memory, as is best.

  Rows are frozen only where there are SSDs and the hosts' memory is full, or
  the cold rows are given.
  """
  n = problems[0].shape.devices
  rows = [
    p.profile.rows - int(c.warm_end)
    for p, c in zip(problems, found, strict=True)
  ]
  cold = given.cold(rows)
  if cold is not None:
    pairs = zip(cold, rows, strict=True)
    cold = [int(Room(0, cold=c).cold_rows(r, n)) for c, r in pairs]
  elif budgets.ssd_bytes:
    groups = [
      stored_rows.of_group(
        p.profile, p.pages_of_row, int(c.warm_end), p.shape.stored_bytes
      )
      for p, c in zip(problems, found, strict=True)
    ]
    cold = stored_rows.share_out(groups, budgets.all_hosts, n)
  else:
    cold = rows
  return tuple(
    dataclasses.replace(c, cold_end=int(c.warm_end) + rows)
    for c, rows in zip(found, cold, strict=True)
  )


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
  found = stored(problems, found, budgets, given)
  if not fit(problems, found, budgets):
    raise _hosts_too_small(problems, budgets, given, found)
  return found


def fit(
  problems: Sequence[Problem], found: Sequence[Cuts], budgets: Budgets
) -> bool:
  """Whether the hosts have room for the stored rows."""
  return (
    all_bytes(problems, found, cold_bytes) <= budgets.all_hosts
    and all_bytes(problems, found, frozen_bytes) <= budgets.all_ssds
  )


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
    return all_bytes(problems, found, shard_bytes) > budgets.device_bytes

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
    return all_bytes(problems, found, shard_bytes)

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
  if given.cold_rows >= 0:
    return _cold_rows_do_not_fit(problems, budgets, given, found)
  planned = dataclasses.replace(given, warm_rows=-1)
  hot_rows = max(given.hot_rows, 0)
  stored_bytes = all_bytes(problems, _all_cold(found), cold_bytes)

  def fits(changed: Budgets) -> bool:
    return fit(problems, stored(problems, found, changed, given), changed)

  def fits_devices(device_mb: int) -> bool:  # with warm_rows = -1
    tried = _packed(
      problems, device_mb << 20, planned, hot_rows, found[0].transport
    )
    return fit(problems, stored(problems, tried, budgets, planned), budgets)

  each = _mb(2 * stored_bytes) + 1  # more than a host can need
  of_host = lambda mb: fits(dataclasses.replace(budgets, host_bytes=mb << 20))
  of_ssd = lambda mb: fits(dataclasses.replace(budgets, ssd_bytes=mb << 20))
  hosts = _enough(of_host, budgets.host_bytes, each)
  ssds = _enough(of_ssd, budgets.ssd_bytes, each)
  devices = _enough(
    fits_devices,
    budgets.device_bytes,
    _mb(2 * sum(p.profile.rows * p.shape.stored_bytes for p in problems)),
  )
  rows = sum(
    p.profile.rows - c.warm_end for p, c in zip(problems, found, strict=True)
  )
  room = f"the {_mb(budgets.all_hosts)} MB of {budgets.hosts} host(s)"
  if budgets.ssd_bytes:
    room += f" and the {_mb(budgets.all_ssds)} MB of their SSDs"
  lacking = stored_bytes - budgets.all_hosts - budgets.all_ssds
  return UserError(
    f"plan.host_memory_mb: {rows} stored rows of {_widths(problems)} bytes "
    f"take {_mb(stored_bytes)} MB, {_mb(max(lacking, 1))} MB more than {room}. "
    f"It fits with plan.host_memory_mb={hosts}, or with "
    f"plan.ssd_memory_mb={ssds} and an SSD's plan.host_store_dir, or with "
    f"plan.device_memory_mb={devices} and plan.warm_rows=-1, or on more devices"
  )


def _cold_rows_do_not_fit(
  problems: Sequence[Problem],
  budgets: Budgets,
  given: Given,
  found: Sequence[Cuts],
) -> UserError:
  """The error for cold rows that are given."""

  def held(rows: int, of: Callable) -> int:
    tried = dataclasses.replace(given, cold_rows=rows)
    return all_bytes(problems, stored(problems, found, budgets, tried), of)

  rows, taken = given.cold_rows, held(given.cold_rows, cold_bytes)
  if taken > budgets.all_hosts:
    too_many = lambda rows: held(rows, cold_bytes) > budgets.all_hosts
    most = bisect.bisect_left(range(rows + 1), True, key=too_many) - 1
    return UserError(
      f"plan.cold_rows: {rows} rows of {_widths(problems)} bytes take "
      f"{_mb(taken)} MB, the budget (plan.host_memory_mb) of {budgets.hosts} "
      f"host(s) is {_mb(budgets.all_hosts)} MB; at most {most} fit"
    )
  frozen = sum(
    c.frozen(p.profile.rows) for p, c in zip(problems, found, strict=True)
  )
  size = all_bytes(problems, found, frozen_bytes)
  enough = _mb(-(-size // budgets.hosts))
  return UserError(
    f"plan.cold_rows: {rows} cold rows leave {frozen} frozen ones, which take "
    f"{_mb(size)} MB of the {_mb(budgets.all_ssds)} MB of SSDs. It fits with "
    f"plan.ssd_memory_mb={enough} and an SSD's plan.host_store_dir; or leave "
    "plan.cold_rows to be planned"
  )


def _all_cold(found: Sequence[Cuts]) -> tuple[Cuts, ...]:
  return tuple(dataclasses.replace(c, cold_end=None) for c in found)


def _enough(fits: Callable[[int], bool], now: int, most_mb: int) -> int:
  """The fewest MB that fit, from those of `now` bytes on."""
  larger = range(_mb(now), max(_mb(now), most_mb) + 1)
  return larger[bisect.bisect_left(larger, True, key=fits)]


def all_bytes(
  problems: Sequence[Problem],
  found: Sequence[Cuts],
  of: Callable[[Problem, Cuts], int],
) -> int:
  """Bytes of all groups: `of` is shard_bytes, cold_bytes or frozen_bytes."""
  return sum(int(of(p, c)) for p, c in zip(problems, found, strict=True))


def _widths(problems: Sequence[Problem]) -> str:
  """The bytes of a row, or their range: '36' or '36 to 516'."""
  sizes = sorted({p.shape.stored_bytes for p in problems})
  return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _mb(size: int) -> int:
  return -(-int(size) >> 20)
