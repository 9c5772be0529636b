"""What groups may take of the memories that they share, and who gets how much.

An option is a pair of cut points and a transport; options with rows in the same
tiers and the same transport are of a kind. Within a kind costs are linear in
the rows (without padding of buffers), so that a mix of options is as good as
the options between them, and a linear program shares the memory out. The step
takes the longer of the devices' and the hosts' path: the program minimises a
time that is below neither, and its dual values say what a second on either path
is worth, and a byte of either memory. Which rows are frozen is settled before
(planner/stored_rows.py).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from recjax.plan import layout
from recjax.planner import memory_budgets as budgets_lib
from recjax.planner.host_path import HIDDEN, NO_PATHS, Paths
from recjax.planner.problem import Cuts, Problem, joint_paths
from recjax.planner.traffic import Part, StepShape, Traffic, messages
from recjax.planner.transport import Transport

_GRID = 48  # cut points of a grid, in frequency, rank and its logarithm each
_LEVELS = 8  # amounts of the hosts' memory that options are kept for
_CHOICES = 20_000  # of a kind for every group, at most
_PROGRAMS = 40  # linear programs, at most
# What a second of the devices may be worth, one of the hosts worth the rest.
_WEIGHTS = (1.0, 0.9, 0.5, 0.1, 0.0)


class Share(NamedTuple):
  """What a group gets, in bytes, and how its rows travel."""

  device: float
  host: float
  transport: Transport
  rest: Paths = NO_PATHS  # what the other groups do, as planned here


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
  """A group's options of a kind: [P] each."""

  paths: Paths  # seconds, or bytes
  device: np.ndarray  # bytes of a device
  host: np.ndarray  # bytes of all hosts, on their SSDs too where they have any
  transport: Transport
  shape: StepShape
  traffic: Traffic  # of next to no rows in the kind's tiers

  @functools.cached_property
  def collectives(self) -> frozenset[str]:
    """The collectives that the kind shares with other groups."""
    part = Part(self.shape, self.traffic)
    levels = {
      m.level for m in messages([part]) if m.kind == "ids" and m.size > 0
    }
    return frozenset(levels | ({"all-reduce"} if self.traffic.hot else set()))

  def bound(self, prices: np.ndarray) -> float:
    """The least cost of an option with rent.

    Args:
      prices: [4] of a second on the devices and on the hosts, and of a byte of
        a device's and of the hosts' memory.
    """
    held = (*self.paths, self.device, self.host)
    return float(np.min(sum(p * x for p, x in zip(prices, held, strict=True))))


# ---- The options of a group


def of_problem(
  problem: Problem,
  hot_rows: int,
  hot_syncs: tuple[str, ...],
  transports: tuple[Transport, ...],
  cold_end: int | None = None,
) -> list[Options]:
  """A group's options, by kind.

  Of the ways in which hot gradients may meet, an option has the cheapest.

  Args:
    problem: of the group.
    hot_rows: given, where >= 0.
    hot_syncs, transports: to choose from.
    cold_end: rank where rows are frozen if they are stored; None = nowhere.
  """
  grid, rows = _grid(problem), problem.profile.rows
  hot = grid if hot_rows < 0 else np.array([hot_rows])
  a, z = (x.ravel() for x in np.meshgrid(hot, grid))
  a = np.concatenate([a, hot, hot])  # without a warm tier, without a cold one
  z = np.concatenate([z, hot, np.full(len(hot), rows)])
  a, z = a[a <= z], z[a <= z]
  found = []
  for transport in transports:
    cuts = _cuts(problem, a, z, transport)
    if cold_end is not None:
      frozen_from = np.maximum(cuts.warm_end, cold_end)
      cuts = dataclasses.replace(cuts, cold_end=frozen_from)
    traffic = problem.traffic(cuts)
    ways = [
      problem.paths(
        dataclasses.replace(traffic, gathered=problem.gathered(a, hot_sync))
      )
      for hot_sync in hot_syncs
    ]
    seconds = (
      np.min([x.device + 0.0 * a for x in ways], axis=0),
      ways[0].host + 0.0 * a,
    )
    tiers = np.stack([cuts.hot, cuts.warm, rows - cuts.warm_end]) > 0
    kind = np.array([1, 2, 4]) @ tiers
    held = (
      budgets_lib.shard_bytes(problem, cuts),
      budgets_lib.cold_bytes(problem, cuts)
      + budgets_lib.frozen_bytes(problem, cuts),
    )
    for k in np.unique(kind):
      of_kind = np.flatnonzero(kind == k)
      on_device, on_host, device, host = (x[of_kind] for x in (*seconds, *held))
      paths = Paths(on_device, on_host)
      kept = _undominated(paths, device, host)
      on = (np.array([1, 2, 4]) & k) > 0
      found.append(
        Options(
          Paths(on_device[kept], on_host[kept]),
          device[kept].astype(np.float64),
          host[kept].astype(np.float64),
          transport,
          problem.shape,
          _tiny(on, transport),
        )
      )
  return found


def _grid(problem: Problem) -> np.ndarray:
  """Cut points to try: even steps in frequency, in rank and its logarithm."""
  ends, rows = problem.profile.ends, problem.profile.rows
  steps = np.linspace(0, len(ends) - 1, _GRID).astype(int)
  even = np.linspace(0, rows, _GRID).astype(np.int64)
  small = np.geomspace(1, max(rows, 1), _GRID).astype(np.int64)
  return np.unique(np.concatenate([ends[steps], even, small]))


def _cuts(
  problem: Problem, hot: np.ndarray, warm_end: np.ndarray, transport: Transport
) -> Cuts:
  """The cuts; what pads the shards may as well hold rows."""
  if not transport.copies:  # of which more rows may cost more
    owners = transport.warm_owners(problem.shape)
    warm = layout.shard_rows(warm_end - hot, owners) * owners
    warm_end = np.minimum(hot + warm, problem.profile.rows)
  return Cuts(hot, warm_end, transport=transport)


def _tiny(on: np.ndarray, transport: Transport) -> Traffic:
  """Traffic of next to no rows in the tiers (hot, warm, cold) that are on."""
  hot, warm, cold = np.where(on, 1e-9, 0.0).tolist()
  united = transport.two_stage or transport.copies
  return Traffic(
    hot,
    warm,
    cold,
    inter_node_warm=warm if united else None,
    inter_node_cold=cold if transport.two_stage else None,
    copies=transport.copies,
  )


def _undominated(
  paths: Paths, device: np.ndarray, host: np.ndarray
) -> np.ndarray:
  """Indices of options that cost less than all that take no more memory.

  By several weights of the two paths.
  """
  keep = np.zeros(len(device), bool)
  levels = np.quantile(host, np.linspace(1 / _LEVELS, 1, _LEVELS))
  for weight in _WEIGHTS if np.any(paths.host) else _WEIGHTS[:1]:
    cost = weight * paths.device + (1 - weight) * paths.host
    order = np.lexsort((host, cost, device))
    for level in levels:
      inside = order[host[order] <= level]
      least = np.minimum.accumulate(cost[inside])
      keep[inside[cost[inside] < np.append(np.inf, least[:-1])]] = True
  return np.flatnonzero(keep)


# ---- Who gets how much


def best_shares(
  problems: Sequence[Problem],
  options: Sequence[Sequence[Options]],
  budgets: tuple[int, int],
  count: int,
  of_hosts: float = 0.0,
) -> list[list[Share]]:
  """The groups' shares of both memories, for the best choices of kinds.

  Args:
    problems: of the groups.
    options: each group's, by kind.
    budgets: bytes of a device, and of all hosts.
    count: of the choices that are returned, the cheapest first.
    of_hosts: what the hosts do once for all groups.
  """
  limits = np.array(budgets, np.float64)
  relaxed = _program([_joined(kinds) for kinds in options], limits)
  if relaxed is None:
    return []
  most = max(int(_CHOICES ** (1 / len(options))), 1)
  options = [
    sorted(kinds, key=lambda o: o.bound(relaxed.prices))[:most]
    for kinds in options
  ]
  fixed = Paths(_fixed_costs(problems, options, limits), of_hosts)
  bounds = _bounds(options, relaxed.prices, limits, fixed)
  found: list[tuple[float, list[Share]]] = []
  for _ in range(_PROGRAMS):
    choice = np.unravel_index(int(np.argmin(bounds)), bounds.shape)
    if bounds[choice] >= (
      found[count - 1][0] if len(found) >= count else np.inf
    ):
      break
    kinds = [of[k] for of, k in zip(options, choice, strict=True)]
    once = Paths(float(fixed.device[choice]), of_hosts)
    solved = _program(kinds, limits, once)
    if solved is not None:
      found.append((solved.cost, solved.shares))
      found.sort(key=lambda x: x[0])
      again = _bounds(options, solved.prices, limits, fixed)
      bounds = np.maximum(bounds, again)
    bounds[choice] = np.inf  # done
  return [shares for _, shares in found[:count]]


class _Solved(NamedTuple):
  cost: float
  shares: list[Share]
  prices: np.ndarray  # [4], see Options.bound


def _program(
  groups: Sequence[Options], limits: np.ndarray, fixed: Paths = NO_PATHS
) -> _Solved | None:
  """Mixes each group's options within the limits; None where none fit.

  The last variable is the step's time: no less than either path's.

  Args:
    groups: options of each.
    limits: [2] bytes of a device and of all hosts.
    fixed: what is done once for all groups.
  """
  joined = lambda of: np.concatenate([of(o) for o in groups])
  paths = np.stack(
    [joined(lambda o: o.paths.device), joined(lambda o: o.paths.host)]
  )
  held = np.stack([joined(lambda o: o.device), joined(lambda o: o.host)])
  scale = max(float(np.abs(paths).max()), 1e-30)
  unit = np.maximum(limits, 1.0)
  sizes = [len(o.device) for o in groups]
  mixes = sparse.block_diag(
    [sparse.coo_array(np.ones((1, size))) for size in sizes]
  )
  longer, no = np.array([[-1.0], [-1.0]]), np.zeros((2, 1))
  found = optimize.linprog(
    np.append(HIDDEN * paths[1] / scale, 1.0),
    A_ub=np.block([[paths / scale, longer], [held / unit[:, None], no]]),
    b_ub=np.concatenate([-np.array(fixed) / scale, limits / unit]),
    A_eq=sparse.hstack([mixes, sparse.coo_array((len(groups), 1))]),
    b_eq=np.ones(len(groups)),
  )
  if found.status != 0:
    return None
  mix = found.x[:-1]
  taken = Paths(*paths @ mix).beside(fixed)
  shares = []
  for o, (i, j) in zip(
    groups, itertools.pairwise(np.cumsum([0, *sizes])), strict=True
  ):
    device, host, *own = (
      float(x @ mix[i:j]) for x in (o.device, o.host, *o.paths)
    )
    rest = Paths(taken.device - own[0], taken.host - own[1])
    shares.append(Share(device, host, o.transport, rest))
  worth = np.maximum(-found.ineqlin.marginals, 0.0)
  seconds = worth[:2] + np.array([0.0, HIDDEN])
  prices = np.concatenate([seconds, worth[2:] * scale / unit])
  cost = float(found.fun) * scale + HIDDEN * fixed.host
  return _Solved(cost, shares, prices)


def _joined(kinds: Sequence[Options]) -> Options:
  """The options of all kinds, as if mixes of them could be taken."""
  return dataclasses.replace(
    kinds[0],
    paths=Paths(
      np.concatenate([o.paths.device for o in kinds]),
      np.concatenate([o.paths.host for o in kinds]),
    ),
    device=np.concatenate([o.device for o in kinds]),
    host=np.concatenate([o.host for o in kinds]),
  )


def _bounds(
  options: Sequence[Sequence[Options]],
  prices: np.ndarray,
  limits: np.ndarray,
  fixed: Paths,
) -> np.ndarray:
  """What each choice of kinds costs at least, by these prices.

  An axis a group, over its kinds. The longer path is no shorter than any mean
  of both, here the one that the prices of their seconds weigh.
  """
  least = _outer([[o.bound(prices) for o in of] for of in options])
  some = np.isfinite(fixed.device)
  once = prices[0] * np.where(some, fixed.device, 0.0) + prices[1] * fixed.host
  return least + np.where(some, once, np.inf) - float(prices[2:] @ limits)


def _outer(values: Sequence[Sequence[float]]) -> np.ndarray:
  """The sums of a value of each group, an axis a group."""
  return functools.reduce(np.add.outer, map(np.asarray, values))


def _fixed_costs(
  problems: Sequence[Problem],
  options: Sequence[Sequence[Options]],
  limits: np.ndarray,
) -> np.ndarray:
  """Latencies that each choice of kinds shares; infinity where none fit."""
  least = [
    _outer([[float(np.min(getattr(o, name))) for o in of] for of in options])
    for name in ("device", "host")
  ]
  fixed = np.where(
    (least[0] <= limits[0]) & (least[1] <= limits[1]), 0.0, np.inf
  )
  known: dict[frozenset[str], float] = {}
  for choice in np.argwhere(np.isfinite(fixed)):
    kinds = [of[k] for of, k in zip(options, choice, strict=True)]
    key = frozenset[str]().union(*(o.collectives for o in kinds))
    if key not in known:
      known[key] = _shared(problems, kinds)
    fixed[tuple(choice)] = known[key]
  return fixed


def _shared(problems: Sequence[Problem], kinds: Sequence[Options]) -> float:
  """What groups of these kinds pay once: latencies of shared collectives."""
  traffics = [o.traffic for o in kinds]
  own = sum(
    float(p.paths(x).device) for p, x in zip(problems, traffics, strict=True)
  )
  return float(joint_paths(problems, traffics).device) - own
