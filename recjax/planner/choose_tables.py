"""Which tables are table-wise: those of least predicted cost, with the cuts."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from recjax.plan import layout
from recjax.planner.problem import Cuts, Problem
from recjax.planner.stored_rows import Room
from recjax.planner.table_wise import Choice, Placement
from recjax.planner.transport import FLAT

_CUTS = 24  # hot cuts that are tried with table-wise tables
_PAIRS = 8  # tables of which pairs are tried, too


def candidates(problem: Problem) -> list[int]:
  """Tables that may be worth it: those of one lookup a sample never are."""
  return [
    i for i, t in enumerate(problem.profile.tables) if t.hotness > t.bags > 0
  ]


def choose(placement: Placement) -> Choice:
  """The tables of least cost: toggled one by one, and two by two if few.

  The search starts from no table, from all tables, and from those that are
  worth it on their own.
  """
  able = [t for t in candidates(placement.problem) if placement.sizes[t] > 0]
  known: dict[frozenset[int], float] = {}

  def cost(tables: frozenset[int]) -> float:
    if tables not in known:
      traffic = placement.choice(tables).traffic
      known[tables] = float(placement.problem.evaluate(traffic))
    return known[tables]

  none = frozenset[int]()
  alone = frozenset(t for t in able if cost(frozenset([t])) < cost(none))
  starts = (none, alone, frozenset(able))
  best = min((_improve(start, able, cost) for start in starts), key=cost)
  return placement.choice(best)


def _improve(
  now: frozenset[int],
  able: list[int],
  cost: Callable[[frozenset[int]], float],
) -> frozenset[int]:
  """Toggles tables of `now` for as long as the cost falls."""
  moves = [frozenset([t]) for t in able]
  if len(able) <= _PAIRS:
    moves += [frozenset(p) for p in itertools.combinations(able, 2)]
  while moves:
    best = min((now ^ move for move in moves), key=cost)
    if cost(best) >= cost(now):
      break
    now = best
  return now


def best(
  problem: Problem,
  found: Cuts,
  fit: int,
  room: Room,
  *,
  fixed: bool,
  tables: tuple[int, ...] | None = None,
) -> tuple[Cuts, Choice | None]:
  """The cut points and table-wise tables of least cost.

  Args:
    problem: what is minimised.
    found: the cuts that are best without table-wise tables; of the flat
      exchange.
    fit: rows that a device can hold.
    room: of all hosts.
    fixed: whether the cut points are given.
    tables: that are table-wise; None = those of least cost.

  Returns:
    (cuts, choice); the choice is None where no table is table-wise.
  """
  profile, n = problem.profile, problem.shape.devices
  wanted = candidates(problem) if tables is None else tables
  if n == 1 or not wanted:
    return found, None
  tried = _tried(problem, found, fit, room, fixed)

  def cuts(hot: int, warm_end: int) -> Cuts:
    cold_end = int(room.cold_end(profile.rows, warm_end, n))
    return Cuts(hot, warm_end, found.hot_sync, FLAT, cold_end)

  def at(hot: int, warm_end: int) -> Placement:
    most = -(-(warm_end - hot) // n)
    if warm_end == profile.rows:  # memory that no row needs is there to be used
      most = max(most, int(layout.most_sharded(1 << 62, hot, fit, n)) // n)
    return Placement(problem, cuts(hot, warm_end), most)

  def offer(
    ends: tuple[int, int], owner: Iterable[int] | None
  ) -> tuple[float, tuple[int, int], Choice]:
    """(cost, cuts, choice) of these tables, or of the best there."""
    choice = at(*ends).choice(owner) if owner else choose(at(*ends))
    return float(problem.evaluate(choice.traffic)), ends, choice

  least = np.inf if tables else float(problem.cost(found))
  offers = [offer(ends, tables) for ends in {*tried[:1], *tried[-1:]}]
  if len(tried) > 1:
    owner = min(offers, key=lambda x: x[0])[2].owner
    offers += [offer(ends, owner) for ends in tried if owner]
    offers.append(offer(min(offers, key=lambda x: x[0])[1], tables))
  if not offers:
    return found, None
  cost, ends, choice = min(offers, key=lambda x: x[0])
  if not choice.owner or cost >= least:
    return found, None
  return cuts(*ends), choice


def _tried(
  problem: Problem, found: Cuts, fit: int, room: Room, fixed: bool
) -> list[tuple[int, int]]:
  """(hot, warm_end) that are tried, in rising order.

  Rows of table-wise tables may need no replica: fewer hot rows are tried too.
  """
  profile, n = problem.profile, problem.shape.devices
  tried = np.array([(found.hot, found.warm_end)])
  if found.hot and not fixed:
    lower = profile.ends[profile.ends < found.hot]
    hots = lower[np.linspace(0, len(lower) - 1, _CUTS).astype(int)]
    ends = hots + layout.most_sharded(profile.rows, hots, fit, n)
    fits = room.fits(profile.rows - ends, n)
    tried = np.append(tried, np.stack([hots, ends], axis=1)[fits], axis=0)
  return [(int(a), int(b)) for a, b in np.unique(tried, axis=0) if a < b]
