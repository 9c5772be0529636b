"""Where to cut the rows into hot, warm and cold: the least predicted cost.

Why two cut points are optimal. Let a placement put hot, warm and cold rows
anywhere. The predicted cost depends on it only through how many rows each tier
has and through the tier's expected distinct rows M = sum pi, and it grows with
M_warm and M_cold, with M_cold at least as fast (a cold row takes the same
exchange and then the host). Exchange argument: let row i be hot, j not, and
pi_j > pi_i; swapping them keeps all memory, and lowers M_warm or M_cold by
pi_j - pi_i. Let i be warm, j cold, pi_j > pi_i: swapping moves pi_j - pi_i
from M_cold to M_warm. Neither costs more, so some optimum has the tiers in
frequency order: two cuts. (Where hot rows' touched gradients are exchanged,
hot_sync "sparse", a hot row's cost grows with pi as well, for n > 2 faster
than a warm row's; and where each of several nodes has a copy of the warm rows,
their gradients may cost more than a cold row: there the order is that of the
tables, not the best of all.)

Which cuts. With `hot` given, more warm rows never cost more but for the first
one (latencies), so the devices' memory is full or there is no warm tier. What
remains is a function of `hot` that is concave (linear, without padding)
between the ends of the spectrum's buckets, of equal rows, and the points where
the full memory puts the other cut on such an end: its least value is at one of
those few thousand points, all of which are tried.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

from recjax.plan import layout
from recjax.planner import formulas, step_cost
from recjax.planner.frequency_buckets import Spectrum
from recjax.planner.step_cost import Load, Work
from recjax.planner.topology import Topology

HOT_SYNCS = ("dense", "sparse")  # what embedding/lookup.py has


class Transport(NamedTuple):
  """How sharded rows travel on a mesh of nodes; what embedding/exchange.py has.

  exchange: "flat", all devices ask the owners; or "two_stage", a node's
  devices first unite what they ask of an owner, so that a row crosses the
  network once a node. warm_copies: "one", sharded over all devices; or
  "node", over the devices of each node, whose gradients meet in a gather.
  """

  exchange: str = "flat"
  warm_copies: str = "one"

  def warm_owners(self, work: Work) -> int:
    """Devices that share the warm rows out."""
    return work.devices // (work.nodes if self.warm_copies == "node" else 1)


FLAT = Transport()
TRANSPORTS = tuple(
  Transport(*x)
  for x in itertools.product(("flat", "two_stage"), ("one", "node"))
)


def transports(work: Work) -> tuple[Transport, ...]:
  """Those that differ: on one node, or nodes of one device, all are flat."""
  return TRANSPORTS if 1 < work.nodes < work.devices else (FLAT,)


# ---- The cost of cuts


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """What cuts are judged by: `evaluate` is the cost of any placement."""

  spectrum: Spectrum
  work: Work
  topology: Topology
  overflow_probability: float | None = 1e-2  # None: no padding of buffers
  objective: str = "time"  # or "bytes"

  @functools.cached_property
  def pi(self) -> np.ndarray:
    """[K]: P(a device touches a row of the bucket in a step)."""
    return self.spectrum.touched(self.work.local)

  @functools.cached_property
  def _below(self):
    """The sums of pi and of pi (1 - pi) below a rank."""
    pi = self.pi
    return self.spectrum.below(pi), self.spectrum.below(pi * (1 - pi))

  def distinct(self, start, stop):
    """Expected rows of [start, stop) that a device touches in a step."""
    return self._below[0].between(start, stop)

  def buffers(self, start, stop, owners=0, staged=False):
    """Rows of a device's exchange buffer of the tier [start, stop).

    n C; with other `owners` than all devices so many times C; `staged` where
    another stage follows.
    """
    mean, variance = (x.between(start, stop) for x in self._below)
    top = self.spectrum.at(self.pi, start)
    return self.buffers_of(mean, variance, top, stop - start, owners, staged)

  def buffers_of(self, mean, variance, top, rows, owners=0, staged=False):
    """The same of any rows."""
    owners = owners or self.work.devices
    each = self._each(staged)
    return formulas.buffer_rows(
      mean, variance, top, rows, owners, self.work.ids, each
    )

  def _each(self, staged):
    """Overflow probability of one buffer: of a tier, device and peer."""
    n, nodes = self.work.devices, self.work.nodes
    if self.overflow_probability is None:
      return None
    return self.overflow_probability / (2 * n * (n + staged * nodes))

  @functools.cached_property
  def of_node(self):
    """[K] P(a node touches a row of the bucket in a step), and as `_below`."""
    samples = self.work.local * self.work.devices // self.work.nodes
    pi = self.spectrum.touched(samples)
    return pi, self.spectrum.below(pi), self.spectrum.below(pi * (1 - pi))

  def far(self, start, stop, near, owners):
    """Rows N C_far between nodes of the tier [start, stop).

    A proxy unites what g devices ask of an owner, who is one of `owners`;
    `near`: rows of the buffer that each of them asks with.
    """
    pi, *below = self.of_node
    mean, variance = (x.between(start, stop) for x in below)
    top = self.spectrum.at(pi, start)
    g = self.work.devices // self.work.nodes
    ids = self.work.ids * g
    rows = formulas.buffer_rows(
      mean, variance, top, stop - start, owners, ids, self._each(True)
    )
    return np.minimum(rows, g * near) * (self.work.nodes / owners)

  def gathered(self, hot, sync):
    """Touched hot rows that a device shares with all; None: all-reduced."""
    if sync == "dense":
      return None
    mean, variance = (x(hot) for x in self._below)
    each = self.overflow_probability
    if each is None:
      return mean
    each = each / self.work.devices
    rows = formulas.buffer_rows(
      mean, variance, 0.0, hot, 1, self.work.ids, each
    )
    return np.minimum(rows, hot)

  def evaluate(self, load: Load):
    """Seconds or bytes of a step."""
    if self.objective == "time":
      of = step_cost.step_seconds(self.work, self.topology, load)
    else:
      of = step_cost.sent_bytes(self.work, load)
    return sum(of.values())

  def load_of_cuts(
    self, hot, warm_end, sync="dense", transport=FLAT, capacity=0
  ) -> Load:
    """What cut points [..] ask of a step; `capacity` of all buffers, if > 0."""
    two_stage = transport.exchange == "two_stage"
    copies = transport.warm_copies == "node"
    loads = []
    for start, stop, owners, staged in (
      (hot, warm_end, transport.warm_owners(self.work), two_stage or copies),
      (warm_end, self.spectrum.rows, self.work.devices, two_stage),
    ):
      near = self.buffers(start, stop, owners, staged)
      if capacity:
        most = np.minimum(-(-(stop - start) // owners), self.work.ids)
        near = owners * np.minimum(capacity, most)
      far = self.far(start, stop, near, owners) if staged else None
      if staged and capacity:
        far = np.minimum(far, capacity * self.work.nodes)
      loads.append((near, far))
    (warm, far_warm), (cold, far_cold) = loads
    gathered = self.gathered(hot, sync)
    return Load(hot, warm, cold, gathered, far_warm, far_cold, copies)

  def cost_of_cuts(self, hot, warm_end, sync="dense", transport=FLAT):
    return self.evaluate(self.load_of_cuts(hot, warm_end, sync, transport))


def best_cuts(
  problem: Problem,
  fit: int,
  host_rows: int,
  hot_rows: int = -1,
  warm_rows: int = -1,
  syncs: tuple[str, ...] = HOT_SYNCS,
  ways: tuple[Transport, ...] = (),
) -> tuple[int, int, str, Transport] | None:
  """(hot, warm_end, hot_sync, transport) of least cost; None: nothing fits.

  Args:
    problem: what is minimised.
    fit: rows that a device can hold; host_rows: that all hosts can.
    hot_rows, warm_rows: given, where >= 0.
    syncs, ways: to choose from; no ways = all that the mesh has.
  """
  best = []
  for way in ways or transports(problem.work):
    hot, warm = _candidates(problem, fit, host_rows, hot_rows, warm_rows, way)
    if not len(hot):
      continue
    load = problem.load_of_cuts(hot, hot + warm, transport=way)
    for sync in syncs:
      shared = problem.gathered(hot, sync)
      costs = problem.evaluate(dataclasses.replace(load, gathered=shared))
      # Of equal costs, the one with fewest rows on the host.
      i = np.lexsort((-(hot + warm), costs))[0]
      chosen = int(hot[i]), int(hot[i] + warm[i]), sync, way
      best.append((float(costs[i]), *chosen))
  return min(best, key=lambda x: x[0])[1:] if best else None


def _candidates(problem, fit, host_rows, hot_rows, warm_rows, way):
  """(hot, warm) rows [..] that fit, one of least cost among them."""
  s, n = problem.spectrum, problem.work.devices
  rows, owners = s.rows, way.warm_owners(problem.work)
  ends = s.ends
  copies = way.warm_copies == "node" and warm_rows < 0
  if copies:  # what the hosts must not hold may not all fit the devices
    ends = np.append(ends, max(rows - host_rows // n * n, 0))
  if hot_rows >= 0:
    hot = np.array([min(hot_rows, rows)])
  elif warm_rows >= 0:
    most = max(fit - layout.shard_rows(min(warm_rows, rows), owners), 0)
    hot = np.append(ends, most)
  else:
    hot = np.concatenate([ends, [fit]])
    if owners > 1:  # hot + (end - hot) / owners = fit
      tight = (owners * fit - ends) // (owners - 1)
      hot = np.concatenate([hot, tight, tight - 1])
  hot = np.unique(np.clip(hot, 0, min(fit, rows)))
  if warm_rows >= 0:
    warm = np.minimum(warm_rows, rows - hot)
  else:
    most = layout.most_sharded(rows, hot, fit, owners)
    warm = [most, 0 * most]
    if copies:
      warm += _fewer_copies(problem, hot, most, host_rows, way)
    hot, warm = np.tile(hot, len(warm)), np.concatenate(warm)
  cold = rows - hot - warm
  fits = hot + layout.shard_rows(warm, owners) <= fit
  fits &= layout.shard_rows(cold, n) * n <= host_rows
  return hot[fits], warm[fits]


def _fewer_copies(problem, hot, most, host_rows, way):
  """Warm rows [..] that may be better than as many as fit.

  Of a row with a copy in every node the gradients may cost the network more
  than a cold row, and do so the sooner the rarer it is: the cost over
  warm_end falls, then rises. Its least point, or what the hosts leave.
  """
  s, n = problem.spectrum, problem.work.devices
  ends = s.ends[1:-1]  # with all tiers but the hot one
  if not len(ends):
    return []
  costs = problem.cost_of_cuts(0 * ends, ends, "dense", way)
  end = int(ends[np.argmin(costs)])
  need = max(s.rows - host_rows // n * n, 0)
  return [np.clip(x - hot, 0, most) for x in {end, max(end, need)}]


def plan_groups(
  problems: list[Problem], device_bytes: int, host_bytes: int
) -> list[tuple[int, int, str, Transport]] | None:
  """Cuts of several groups (of other dims or optimizers) in one memory.

  A price of device memory decides jointly: at a price each group takes the
  cuts of least cost plus rent, and takes less the more it costs; the price is
  the least at which all fit (bisection). What is left over then goes to the
  group that gains most. Exact up to that rest, where costs are linear.

  Args:
    problems: the groups', with the same devices and objective; the dense part
      in one of them.
    device_bytes: budget of a device for all groups.
    host_bytes: of all hosts together.

  Returns:
    `best_cuts` of each; None where nothing fits.
  """
  sizes = [p.work.stored for p in problems]

  def solve(price):
    return [_rented(p, price) for p in problems]

  def held(found):
    return [
      (hot + int(layout.shard_rows(end - hot, p.work.devices))) * size
      for (hot, end), p, size in zip(found, problems, sizes, strict=True)
    ]

  low, high = 1e-24, 1e6
  found = solve(0.0)
  if sum(held(found)) > device_bytes:
    for _ in range(100):
      middle = float(np.sqrt(low * high))
      tried = solve(middle)
      if sum(held(tried)) > device_bytes:
        low = middle
      else:
        high, found = middle, tried
  used = held(found)
  if sum(used) > device_bytes:
    return None
  rest = device_bytes - sum(used)
  host_rows = [host_bytes // size for size in sizes]

  def cut(i, extra):
    fit = (used[i] + extra) // sizes[i]
    cuts = best_cuts(problems[i], fit, host_rows[i])
    if cuts is None:
      return np.inf, None
    return float(problems[i].cost_of_cuts(*cuts)), cuts

  now = [cut(i, 0) for i in range(len(problems))]
  more = [cut(i, rest) for i in range(len(problems))]
  gains = [
    a[0] - b[0] if np.isfinite(b[0]) else -np.inf
    for a, b in zip(now, more, strict=True)
  ]
  best = int(np.argmax(gains))
  now[best] = more[best]
  cuts = [x for _, x in now if x is not None]
  cold = sum(
    int(layout.shard_rows(p.spectrum.rows - end, p.work.devices))
    * p.work.devices
    * size
    for (_, end, *_), p, size in zip(cuts, problems, sizes, strict=False)
  )
  return cuts if len(cuts) == len(now) and cold <= host_bytes else None


def _rented(problem: Problem, price: float) -> tuple[int, int]:
  """The cuts of least cost plus price x bytes of a device."""
  s, n = problem.spectrum, problem.work.devices
  rent = price * problem.work.stored
  small = np.full(3, 1e-9)
  slopes = [
    float(problem.evaluate(Load(*(small + 1e6 * unit)))) / 1e6
    - float(problem.evaluate(Load(*small))) / 1e6
    for unit in np.eye(3)
  ]
  saved = problem.pi * (slopes[2] - slopes[1])  # of a row, warm against cold
  end = int(s.ends[np.count_nonzero(saved > rent / n)])
  hot = s.ends
  hot = np.concatenate([hot, hot, hot])
  ends = np.repeat([end, 0, s.rows], len(s.ends))
  ends = np.maximum(hot, ends)
  costs = problem.cost_of_cuts(hot, ends) + rent * (hot + (ends - hot) / n)
  i = int(np.argmin(costs))
  return int(hot[i]), int(ends[i])
