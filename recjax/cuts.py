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
than a warm row's: there the order is that of the tables, not the best of all.)

Which cuts. With `hot` given, more warm rows never cost more but for the first
one (latencies), so the devices' memory is full or there is no warm tier. What
remains is a function of `hot` that is concave (linear, without padding)
between the ends of the spectrum's buckets, of equal rows, and the points where
the full memory puts the other cut on such an end: its least value is at one of
those few thousand points, all of which are tried.
"""

import dataclasses
import functools

import numpy as np

from recjax import cost, step_cost
from recjax.spectrum import Spectrum
from recjax.step_cost import Load, Work
from recjax.topology import Topology

HOT_SYNCS = ("dense", "sparse")  # what lookup.py has


def _bits(x):
  """x.bit_length(), of arrays too; exact below 2^53."""
  return np.frexp(np.asarray(x, np.float64))[1]


def slots_of(rows, devices: int):
  """A device's part of a tier, padded by less than 1/256.

  The padded size has a large power of two as a factor, so that a checkpoint
  can store a shard in equal chunks. Rows may be an array.
  """
  slots = -(-rows // devices)
  if isinstance(slots, np.ndarray):
    unit = 1 << np.maximum(0, _bits(slots) - 9).astype(np.int64)
  else:
    unit = 1 << max(0, int(slots).bit_length() - 9)
  return -(-slots // unit) * unit


def most_warm(rows: int, hot, fit: int, devices: int):
  """Rows that may be warm where `fit` rows fit a device and `hot` are hot."""
  room = np.asarray(fit - hot, np.int64)
  unit = 1 << np.maximum(0, _bits(room) - 9).astype(np.int64)
  return np.minimum(rows - hot, room // unit * unit * devices)


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

  def buffers(self, start, stop):
    """Rows n C of the exchange buffer of the tier [start, stop)."""
    mean, variance = (x.between(start, stop) for x in self._below)
    top = self.spectrum.at(self.pi, start)
    return self.buffers_of(mean, variance, top, stop - start)

  def buffers_of(self, mean, variance, top, rows):
    """The same of any rows."""
    n, each = self.work.devices, self.overflow_probability
    if each is not None:
      each = each / (2 * n * n)  # of a tier, device and peer
    return cost.buffer_rows(mean, variance, top, rows, n, self.work.ids, each)

  def gathered(self, hot, sync):
    """Touched hot rows that a device shares with all; None: all-reduced."""
    if sync == "dense":
      return None
    mean, variance = (x(hot) for x in self._below)
    each = self.overflow_probability
    if each is None:
      return mean
    each = each / self.work.devices
    rows = cost.buffer_rows(mean, variance, 0.0, hot, 1, self.work.ids, each)
    return np.minimum(rows, hot)

  def evaluate(self, load: Load):
    """Seconds or bytes of a step."""
    if self.objective == "time":
      of = step_cost.step_seconds(self.work, self.topology, load)
    else:
      of = step_cost.sent_bytes(self.work, load)
    return sum(of.values())

  def load_of_cuts(self, hot, warm_end, sync="dense") -> Load:
    """What cut points [..] ask of a step."""
    return Load(
      hot,
      self.buffers(hot, warm_end),
      self.buffers(warm_end, self.spectrum.rows),
      self.gathered(hot, sync),
    )

  def cost_of_cuts(self, hot, warm_end, sync="dense"):
    return self.evaluate(self.load_of_cuts(hot, warm_end, sync))


def best_cuts(
  problem: Problem,
  fit: int,
  host_rows: int,
  hot_rows: int = -1,
  warm_rows: int = -1,
  syncs: tuple[str, ...] = HOT_SYNCS,
) -> tuple[int, int, str] | None:
  """(hot, warm_end, hot_sync) of least cost; None where nothing fits.

  Args:
    problem: what is minimised.
    fit: rows that a device can hold; host_rows: that all hosts can.
    hot_rows, warm_rows: given, where >= 0.
    syncs: ways to choose from.
  """
  s, n = problem.spectrum, problem.work.devices
  rows = s.rows
  if hot_rows >= 0:
    hot = np.array([min(hot_rows, rows)])
  elif warm_rows >= 0:
    most = max(fit - slots_of(min(warm_rows, rows), n), 0)
    hot = np.append(s.ends, most)
  else:
    hot = np.concatenate([s.ends, [fit]])
    if n > 1:  # hot + (end - hot) / n = fit
      tight = (n * fit - s.ends) // (n - 1)
      hot = np.concatenate([hot, tight, tight - 1])
  hot = np.unique(np.clip(hot, 0, min(fit, rows)))
  if warm_rows >= 0:
    warm = np.minimum(warm_rows, rows - hot)
  else:
    warm = most_warm(rows, hot, fit, n)
    hot, warm = np.append(hot, hot), np.append(warm, 0 * warm)
  cold = rows - hot - warm
  fits = (hot + slots_of(warm, n) <= fit) & (slots_of(cold, n) * n <= host_rows)
  hot, warm = hot[fits], warm[fits]
  if not len(hot):
    return None
  best = []
  for sync in syncs:
    costs = problem.cost_of_cuts(hot, hot + warm, sync)
    # Of equal costs, the one with fewest rows on the host.
    i = np.lexsort((-(hot + warm), costs))[0]
    best.append((float(costs[i]), int(hot[i]), int(hot[i] + warm[i]), sync))
  return min(best, key=lambda x: x[0])[1:]


def lower_bound(problem: Problem, fit: int, host_rows: int) -> float:
  """No placement costs less, not even with rows split between tiers.

  The Lagrangian dual: with prices of device and host memory each row takes its
  cheapest tier, and any prices give a bound; the best are searched for. The
  latencies of a tier that has rows at all make it one dual for every set of
  tiers. For problems without padding, whose costs are linear.
  """
  n, rows = problem.work.devices, problem.spectrum.rows
  best = np.inf
  for tiers in range(1, 8):
    hot, warm, cold = (bool(tiers >> k & 1) for k in range(3))
    room = (n * fit if warm else fit if hot else 0) + cold * host_rows
    if rows <= room:
      on = np.array([hot, warm, cold])
      best = min(best, _bound(problem, fit, host_rows, on))
  return best


def _bound(problem, fit, host_rows, on) -> float:
  """`lower_bound` with rows in the tiers `on` [3] bool."""
  s, n = problem.spectrum, problem.work.devices
  pi = problem.pi
  rows = s.count.astype(np.float64)
  tiny = np.where(on, 1e-9, 0.0)
  fixed = float(problem.evaluate(Load(*tiny)))
  slopes = [
    (float(problem.evaluate(Load(*(tiny + 1e6 * unit)))) - fixed) / 1e6
    for unit in np.eye(3)
  ]
  each = np.stack([slopes[0] + 0 * pi, slopes[1] * pi, slopes[2] * pi])[on]
  of_device = np.array([1, 1 / n, 0])[on][:, None]  # of a row of the tier
  of_host = np.array([0, 0, 1])[on][:, None]
  top = max(float(np.abs(each).max()), 1e-30) * n

  def dual(price, host_price):
    costs = each + price * of_device + host_price * of_host
    paid = price * fit + host_price * host_rows
    return fixed + float(rows @ costs.min(axis=0)) - paid

  def search(f):
    return _highest(f, 1e-12 * top, 1e3 * top)

  if host_rows >= s.rows:
    return search(lambda price: dual(price, 0.0))
  return search(lambda host: search(lambda price: dual(price, host)))


def _highest(f, low: float, high: float) -> float:
  """The largest value of a concave f on 0 and [low, high]; golden section."""
  ratio = (np.sqrt(5) - 1) / 2
  a, b = np.log(low), np.log(high)
  x, y = b - ratio * (b - a), a + ratio * (b - a)
  fx, fy = f(np.exp(x)), f(np.exp(y))
  best = max(f(0.0), fx, fy)
  for _ in range(75):
    if fx >= fy:
      b, y, fy = y, x, fx
      x = b - ratio * (b - a)
      fx = f(np.exp(x))
    else:
      a, x, fx = x, y, fy
      y = a + ratio * (b - a)
      fy = f(np.exp(y))
    best = max(best, fx, fy)
  return best


def plan_groups(
  problems: list[Problem], device_bytes: int, host_bytes: int
) -> list[tuple[int, int, str]] | None:
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
    (hot, warm_end, hot_sync) of each; None where nothing fits.
  """
  sizes = [p.work.stored for p in problems]

  def solve(price):
    return [_rented(p, price) for p in problems]

  def held(found):
    return [
      (hot + int(slots_of(end - hot, p.work.devices))) * size
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
    int(slots_of(p.spectrum.rows - end, p.work.devices)) * p.work.devices * size
    for (_, end, _), p, size in zip(cuts, problems, sizes, strict=False)
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
