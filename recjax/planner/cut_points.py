"""Where to cut a group's rows into tiers: least predicted cost.

A step takes the longer of two paths (planner/step_cost.py): D, of the devices,
and H, of the hosts that bring stored (cold and frozen) rows and take them back.
What is minimised is that, and a little of H, which hardly costs a step while it
is hidden but is better left out.

Why cut points are optimal. Let a placement put hot, warm, cold and frozen rows
anywhere. D depends on it only through how many rows each tier has, through the
distinct rows that a device touches, M = sum pi(b), of the warm and of the
stored rows, and through those that the batch does, V = sum pi(B) / n, of the
stored rows. It grows with all three, with M of the stored rows as fast as with
M of the warm ones: a visitor is exchanged and updated as a warm row is, and
merged with its value of the batch before on top. H grows with V, and with the
pages that frozen rows have read, whose chance of being read grows with pi. So
let row i be in a tier, j in a later one, and pi_j > pi_i (at all batch sizes:
both grow with p): swapping them keeps all memory, and lengthens neither D nor
H. Hence some placement in frequency order, with three cuts, is as short on
both paths, and so is no dearer. (Where hot rows' touched
gradients are gathered, hot_sync "all_gather", a hot row's cost grows with pi as
well, for n > 2 faster than a warm row's; and where each of several nodes has a
copy of the warm rows, their gradients may cost more than a stored row: there
the order is that of the tables, not the best of all.)

Which cuts. A stored row is dearer than a warm one on D, and only stored rows
are on H: with `hot` given, more warm rows lengthen neither path but for the
first one (latencies), so the devices' memory is full or there is no warm tier.
A frozen row is a cold one with pages to be read: so the hosts' memory is full
or no row is frozen. What remains is a function of `hot`, along each of those
two curves. Between the ends of the profile's buckets, of equal rows, and the
points where the curve puts another cut on such an end, D and H are concave
(linear, without padding): the cost is least at one of those few thousand
points, or where the paths cross, the host's path being hidden on one side. All
of these are tried; crossings are bisected.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from recjax.plan import layout
from recjax.planner import transport as transport_lib
from recjax.planner.host_path import HIDDEN, Paths
from recjax.planner.problem import HOT_SYNCS, Cuts, Problem
from recjax.planner.stored_rows import Room, most_cold
from recjax.planner.traffic import Traffic
from recjax.planner.transport import Transport

Curve = Callable[[np.ndarray], np.ndarray]  # hot rows [C] -> warm rows [C]


def best_cuts(
  problem: Problem,
  fit: int,
  host_rows: int,
  *,
  ssd_rows: int = 0,
  hot_rows: int = -1,
  warm_rows: int = -1,
  cold_rows: int = -1,
  hot_syncs: tuple[str, ...] = HOT_SYNCS,
  transports: tuple[Transport, ...] = (),
) -> Cuts | None:
  """The cuts of least cost; None where nothing fits.

  Args:
    problem: what is minimised.
    fit: rows that a device can hold.
    host_rows: rows that all hosts can hold.
    ssd_rows: rows that the SSDs of all hosts can hold.
    hot_rows, warm_rows, cold_rows: given, where >= 0.
    hot_syncs, transports: to choose from; no transports = all that the mesh
      has.
  """
  room = Room(host_rows, ssd_rows, cold_rows)
  found: list[tuple[float, Cuts]] = []
  for transport in transports or transport_lib.available(problem.shape):
    search = _Search(problem, fit, room, transport, (hot_rows, warm_rows))
    for hot_sync in hot_syncs:
      hot, warm, costs = search.costs(hot_sync)
      if len(hot):
        # Of equal costs, the one with fewest rows on the host.
        i = np.lexsort((-(hot + warm), costs))[0]
        cuts = search.cuts(int(hot[i]), int(warm[i]))
        chosen = dataclasses.replace(
          cuts, hot_sync=hot_sync, cold_end=int(cuts.cold_end)
        )
        found.append((float(costs[i]), chosen))
  return min(found, key=lambda x: x[0])[1] if found else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
  """Cuts with one transport; `given`: (hot, warm) rows, -1 to be chosen."""

  problem: Problem
  fit: int
  room: Room
  transport: Transport
  given: tuple[int, int]

  @property
  def owners(self) -> int:
    """Devices that share the warm rows out."""
    return self.transport.warm_owners(self.problem.shape)

  @property
  def rows(self) -> int:
    """Rows of the group."""
    return self.problem.profile.rows

  def cuts(self, hot, warm) -> Cuts:
    """The cuts, the hosts' memory filled with cold rows."""
    n = self.problem.shape.devices
    cold_end = self.room.cold_end(self.rows, hot + warm, n)
    return Cuts(hot, hot + warm, transport=self.transport, cold_end=cold_end)

  def fits(self, hot: np.ndarray, warm: np.ndarray) -> np.ndarray:  # [C] bool
    """Whether the rows find room."""
    on_device = hot + layout.shard_rows(warm, self.owners) <= self.fit
    stored = self.rows - hot - warm
    return on_device & self.room.fits(stored, self.problem.shape.devices)

  def traffic(self, hot: np.ndarray, warm: np.ndarray) -> Traffic:
    """What the cuts ask of a step, but for how hot gradients meet."""
    return self.problem.traffic(self.cuts(hot, warm))

  def paths(self, hot: np.ndarray, traffic: Traffic, hot_sync: str) -> Paths:
    """Both paths of a step, the other groups included."""
    gathered = self.problem.gathered(hot, hot_sync)
    own = self.problem.paths(dataclasses.replace(traffic, gathered=gathered))
    return own.beside(self.problem.rest)

  def costs(self, hot_sync: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts that fit, the best among them: hot, warm, cost: [C] each."""
    found = []

    def ahead(curve: Curve) -> Curve:  # D - H
      def at(hot: np.ndarray) -> np.ndarray:
        paths = self.paths(hot, self.traffic(hot, curve(hot)), hot_sync)
        return paths.device - paths.host + 0.0 * hot

      return at

    def offer(hot: np.ndarray, warm: np.ndarray, traffic: Traffic) -> Paths:
      paths = self.paths(hot, traffic, hot_sync)
      fits = self.fits(hot, warm)
      cost = paths.cost + 0.0 * hot
      found.append((hot[fits], warm[fits], cost[fits]))
      return paths

    for curve, (hot, warm, traffic) in zip(
      self._curves, self._on_curves, strict=True
    ):
      paths = offer(hot, warm, traffic)
      more = _crossings(ahead(curve), hot, paths.device - paths.host)
      if len(more):
        offer(more, curve(more), self.traffic(more, curve(more)))
    if self.transport.copies and self.given[1] < 0:
      least = min((float(cost.min()) for *_, cost in found if len(cost)),
                  default=np.inf)  # fmt: skip
      hot, low, high = self._balanced_copies(hot_sync, least)
      for warm in (low, high):
        offer(hot, warm, self.traffic(hot, warm))
    hot, warm, cost = (np.concatenate(x) for x in zip(*found, strict=True))
    return hot, warm, cost

  # ---- Hot rows that are tried

  @functools.cached_property
  def _hots(self) -> np.ndarray:
    """Hot rows that put a cut on the end of a bucket, ascending."""
    ends, (hot_rows, warm_rows) = self.problem.profile.ends, self.given
    if hot_rows >= 0:
      return np.array([min(hot_rows, self.rows)])
    if self.room.ssd:  # warm_end where cold_end is the end of a bucket
      cold = self.room.cold_rows(self.rows, self.problem.shape.devices)
      ends = np.concatenate([ends, ends - int(cold)])
    if self.transport.copies and warm_rows < 0:  # see _fewer_copies
      ends = np.append(ends, self._need)
    if warm_rows >= 0:
      shard = layout.shard_rows(min(warm_rows, self.rows), self.owners)
      hot = np.concatenate([ends, ends - warm_rows, [self.fit - shard]])
    else:
      hot = np.append(ends, self.fit)
      if self.owners > 1:  # hot + (end - hot) / owners = fit
        tight = (self.owners * self.fit - ends) // (self.owners - 1)
        hot = np.concatenate([hot, tight, tight - 1])
    return np.unique(np.clip(hot, 0, min(self.fit, self.rows)))

  @functools.cached_property
  def _on_curves(self) -> list[tuple[np.ndarray, np.ndarray, Traffic]]:
    """(hot rows, warm rows, traffic) that are tried on each of the curves."""
    found = []
    for curve in self._curves:
      inside = lambda hot, curve=curve: self.fits(hot, curve(hot)) - 0.5
      last = _crossings(inside, self._hots, inside(self._hots))
      hot = np.unique(np.concatenate([self._hots, last]))
      warm = curve(hot)
      found.append((hot, warm, self.traffic(hot, warm)))
    return found

  # ---- Warm rows for them

  @functools.cached_property
  def _curves(self) -> list[Curve]:
    """Warm rows by hot rows: as given; or none, or as many as fit."""
    given = self.given[1]
    if given >= 0:
      return [lambda hot: np.minimum(given, self.rows - hot)]
    curves: list[Curve] = [self._most, lambda hot: 0 * hot]
    if self.transport.copies:
      for end in self._fewer_copies:
        curves.append(
          lambda hot, end=end: np.clip(end - hot, 0, self._most(hot))
        )
    return curves

  def _most(self, hot: np.ndarray) -> np.ndarray:  # [C] -> [C]
    most = layout.most_sharded(self.rows, hot, self.fit, self.owners)
    return np.maximum(most, 0)

  @property
  def _need(self) -> int:
    """Rows that the devices must hold."""
    n, room = self.problem.shape.devices, self.room
    cold = most_cold(room.host, n)
    if room.cold >= 0:
      cold = min(cold, room.cold // n * n)
    return max(self.rows - cold - most_cold(room.ssd, n), 0)

  @functools.cached_property
  def _fewer_copies(self) -> list[int]:
    """Ends of the warm rows that may be better than where as many as fit end.

    Of a row with a copy in every node the gradients may cost the network more
    than a stored row, and do so the sooner the rarer it is: what is minimised
    where the hosts' path is hidden falls over warm_end, then rises. Its least
    point, or what all hosts leave.
    """
    ends = self.problem.profile.ends[1:-1]  # with all tiers but the hot one
    if not len(ends):
      return []
    paths = self.problem.paths(self.traffic(0 * ends, ends))
    costs = paths.device + HIDDEN * paths.host
    end = int(ends[np.argmin(costs + 0.0 * ends)])
    return list({end, max(end, self._need)})

  def _balanced_copies(
    self, hot_sync: str, least: float
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Warm rows past `_fewer_copies`' first where H, which falls, meets D.

    Args:
      hot_sync: how hot gradients meet.
      least: a cost; cuts above it are left out.

    Returns:
      (hot rows, warm rows before and after the paths meet): [C] each.
    """
    paths = lambda hot, warm: self.paths(hot, self.traffic(hot, warm), hot_sync)
    hot = self._hots
    high = self._most(hot)
    low = np.clip(min(self._fewer_copies, default=0) - hot, 0, high)
    first, last = paths(hot, low), paths(hot, high)
    meet = (first.device < first.host) & (last.device > last.host)
    meet &= Paths(first.device, last.host).cost < least  # no less is possible
    hot, low, high = hot[meet], low[meet], high[meet]
    while np.any(high - low > 1):
      middle = (low + high) // 2
      found = paths(hot, middle)
      hidden = found.device >= found.host
      low, high = np.where(hidden, low, middle), np.where(hidden, middle, high)
    return hot, low, high


def _crossings(f: Curve, points: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Whole numbers on both sides of where f changes its sign.

  Args:
    f: of whole numbers [C]; its sign changes once between neighbours at most.
    points: [P] ascending.
    values: [P] f there.
  """
  above = np.broadcast_to(values >= 0, points.shape)
  i = np.flatnonzero(above[1:] != above[:-1])
  low, high, side = points[i], points[i + 1], above[i]
  while np.any(high - low > 1):
    middle = (low + high) // 2
    same = (f(middle) >= 0) == side
    low, high = np.where(same, middle, low), np.where(same, high, middle)
  return np.concatenate([low, high])
