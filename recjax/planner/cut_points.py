"""Where to cut a group's rows into hot, warm and cold: least predicted cost.

Why two cut points are optimal. Let a placement put hot, warm and cold rows
anywhere. The predicted cost depends on it only through how many rows each tier
has and through the tier's expected distinct rows M = sum pi, and it grows with
M_warm and M_cold, with M_cold at least as fast (a cold row takes the same
exchange and then the host). Exchange argument: let row i be hot, j not, and
pi_j > pi_i; swapping them keeps all memory, and lowers M_warm or M_cold by
pi_j - pi_i. Let i be warm, j cold, pi_j > pi_i: swapping moves pi_j - pi_i
from M_cold to M_warm. Neither costs more, so some optimum has the tiers in
frequency order: two cuts. (Where hot rows' touched gradients are gathered,
hot_sync "all_gather", a hot row's cost grows with pi as well, for n > 2 faster
than a warm row's; and where each of several nodes has a copy of the warm rows,
their gradients may cost more than a cold row: there the order is that of the
tables, not the best of all.)

Which cuts. With `hot` given, more warm rows never cost more but for the first
one (latencies), so the devices' memory is full or there is no warm tier. What
remains is a function of `hot` that is concave (linear, without padding)
between the ends of the profile's buckets, of equal rows, and the points where
the full memory puts the other cut on such an end: its least value is at one of
those few thousand points, all of which are tried.
"""

import dataclasses

import numpy as np

from recjax.plan import layout
from recjax.planner import transport as transport_lib
from recjax.planner.problem import HOT_SYNCS, Cuts, Problem
from recjax.planner.transport import Transport


def best_cuts(
  problem: Problem,
  fit: int,
  host_rows: int,
  *,
  hot_rows: int = -1,
  warm_rows: int = -1,
  hot_syncs: tuple[str, ...] = HOT_SYNCS,
  transports: tuple[Transport, ...] = (),
) -> Cuts | None:
  """The cuts of least cost; None where nothing fits.

  Args:
    problem: what is minimised.
    fit: rows that a device can hold.
    host_rows: rows that all hosts can hold.
    hot_rows, warm_rows: given, where >= 0.
    hot_syncs, transports: to choose from; no transports = all that the mesh
      has.
  """
  found: list[tuple[float, Cuts]] = []
  for transport in transports or transport_lib.available(problem.shape):
    hot, warm = _candidates(
      problem, fit, host_rows, transport, (hot_rows, warm_rows)
    )
    if not len(hot):
      continue
    cuts = Cuts(hot, hot + warm, transport=transport)
    traffic = problem.traffic(cuts)
    for hot_sync in hot_syncs:
      gathered = problem.gathered(hot, hot_sync)
      costs = problem.evaluate(dataclasses.replace(traffic, gathered=gathered))
      # Of equal costs, the one with fewest rows on the host.
      i = np.lexsort((-(hot + warm), costs))[0]
      chosen = Cuts(int(hot[i]), int(hot[i] + warm[i]), hot_sync, transport)
      found.append((float(costs[i]), chosen))
  return min(found, key=lambda x: x[0])[1] if found else None


def _candidates(
  problem: Problem,
  fit: int,
  host_rows: int,
  transport: Transport,
  given: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts that fit, one of least cost among them.

  Args:
    problem, fit, host_rows: see `best_cuts`.
    transport: how rows travel.
    given: (hot rows, warm rows), each -1 where it is to be chosen.

  Returns:
    (hot, warm) rows, [C] int64 each.
  """
  hot_rows, warm_rows = given
  n, rows = problem.shape.devices, problem.profile.rows
  owners, ends = transport.warm_owners(problem.shape), problem.profile.ends
  copies = transport.copies and warm_rows < 0
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
    choices = [most, 0 * most]
    if copies:
      choices += _fewer_copies(problem, hot, most, host_rows, transport)
    hot, warm = np.tile(hot, len(choices)), np.concatenate(choices)
  cold = rows - hot - warm
  fits = hot + layout.shard_rows(warm, owners) <= fit
  fits &= layout.shard_rows(cold, n) * n <= host_rows
  return hot[fits], warm[fits]


def _fewer_copies(
  problem: Problem,
  hot: np.ndarray,
  most: np.ndarray,
  host_rows: int,
  transport: Transport,
) -> list[np.ndarray]:
  """Warm rows [C] that may be better than as many as fit.

  Of a row with a copy in every node the gradients may cost the network more
  than a cold row, and do so the sooner the rarer it is: the cost over
  warm_end falls, then rises. Its least point, or what the hosts leave.
  """
  n, rows = problem.shape.devices, problem.profile.rows
  ends = problem.profile.ends[1:-1]  # with all tiers but the hot one
  if not len(ends):
    return []
  costs = problem.cost(Cuts(0 * ends, ends, transport=transport))
  end = int(ends[np.argmin(costs)])
  need = max(rows - host_rows // n * n, 0)
  return [np.clip(x - hot, 0, most) for x in {end, max(end, need)}]
