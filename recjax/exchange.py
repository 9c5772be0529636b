"""Coalesced rows to and from their owners: the tables' only collectives.

A bucket is a (tier, owner) pair: buckets 0..n-1 are the owners' warm rows,
n..2n-1 their cold rows, and 2n holds the hot rows where their gradients are
exchanged rather than all-reduced. A row's address is its position in the
order (bucket, slot), so that a sorted list of addresses is already bucketed.

An exchange runs in rounds, and every row belongs to one round on all devices:
each device proposes, a bucket, the first address that does not fit its
buffer, and the least proposal of all devices ends the round. The owner thus
sees all gradients of a row in the same round and updates it once. Without an
overflow there is one round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.mesh import AXIS
from recjax.planner import Plan

NONE = np.int32(2**31 - 1)  # sorts behind every address


class Route(NamedTuple):
  """A local batch's distinct rows that are exchanged, and who uses them."""

  addresses: jax.Array  # [L + 1] int32, ascending, then NONE
  starts: jax.Array  # [2n + 2] int32: where each bucket begins in addresses
  bucket: jax.Array  # [L] int32 of a lookup; 2n: hot; 2n + 1: no lookup
  index: jax.Array  # [L] int32: a lookup's row, as a position in addresses


class Round(NamedTuple):
  """The part of each bucket that is exchanged now: [begin, end)."""

  begin: jax.Array  # [2n + 1] int32
  end: jax.Array  # [2n + 1] int32
  more: jax.Array  # [] bool, the same on all devices


def coalesce(keys):  # [m] int32; NONE = padding
  """(distinct [m] ascending then NONE, index [m]): keys = distinct[index].

  One sort of `key << 32 | position`: on CPU four times faster than a sort of
  pairs (jax 0.10), on GPU a radix sort either way.
  """
  m = keys.shape[0]
  with jax.enable_x64(True):
    wide = keys.astype(jnp.uint64) << np.uint64(32)
    wide = lax.sort(wide | lax.iota(jnp.uint64, m))
    order = (wide & np.uint64(0xFFFFFFFF)).astype(jnp.int32)
    keys = (wide >> np.uint64(32)).astype(jnp.int32)
  new = jnp.concatenate([jnp.ones(1, bool), keys[1:] != keys[:-1]])
  rank = jnp.cumsum(new, dtype=jnp.int32) - 1
  index = jnp.zeros(m, jnp.int32).at[order].set(rank, unique_indices=True)
  distinct = jnp.full(m, NONE).at[rank].set(keys, indices_are_sorted=True)
  return distinct, index


def _sparse_hot(plan: Plan) -> int:
  """Hot rows whose gradients are exchanged."""
  return plan.hot if plan.hot_sync == "sparse" else 0


def _bases(plan: Plan) -> np.ndarray:  # [2n + 2] int32
  """The first address of each bucket, and the end."""
  n = plan.devices
  sizes = [plan.warm_slots] * n + [plan.cold_slots] * n + [_sparse_hot(plan)]
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def _capacities(plan: Plan) -> np.ndarray:  # [2n + 1] int32
  n = plan.devices
  hot = plan.capacity_hot if _sparse_hot(plan) else 0
  c = [plan.capacity_warm] * n + [plan.capacity_cold] * n + [hot]
  return np.array(c, np.int32)


def buffer_starts(plan: Plan) -> np.ndarray:  # [2n + 2] int32
  """Where each bucket begins in a round's buffer of rows, and its size."""
  return np.concatenate([[0], np.cumsum(_capacities(plan))]).astype(np.int32)


def route(ids, plan: Plan) -> Route:
  """Coalesces a device's lookups. ids [L] int32 ranks, -1 = no lookup."""
  n, bases = plan.devices, _bases(plan)
  cold = ids >= plan.warm_end
  rank = ids - jnp.where(cold, plan.warm_end, plan.hot)
  bucket = rank % n + jnp.where(cold, n, 0)
  slot = rank // n
  bucket = jnp.where(ids < plan.hot, 2 * n, bucket)
  slot = jnp.where(ids < plan.hot, ids, slot)
  bucket = jnp.where(ids < 0, 2 * n + 1, bucket)
  address = jnp.where(
    ids < (0 if _sparse_hot(plan) else plan.hot),
    NONE,
    jnp.asarray(bases)[bucket] + slot,
  )
  addresses, index = coalesce(address)
  addresses = jnp.append(addresses, NONE)
  starts = jnp.searchsorted(addresses, bases).astype(jnp.int32)
  return Route(addresses, starts, bucket, index)


def one_round(plan: Plan, lookups: int) -> bool:
  """Whether no batch of `lookups` ids a device can overflow a buffer."""
  n, hot = plan.devices, _sparse_hot(plan)
  return all(
    capacity >= min(rows, lookups)
    for rows, capacity in (
      (-(-plan.warm // n), plan.capacity_warm),
      (-(-plan.cold // n), plan.capacity_cold),
      (hot, plan.capacity_hot),
    )
  )


def next_round(route: Route, begin, plan: Plan) -> Round:
  """The round that starts at `begin` [2n + 1] int32 (first: all starts)."""
  last = route.starts[1:]
  if one_round(plan, route.index.shape[0]):
    return Round(begin, last, jnp.zeros((), bool))
  limit = begin + _capacities(plan)
  past = route.addresses[jnp.minimum(limit, route.addresses.shape[0] - 1)]
  stop = lax.pmin(jnp.where(limit < last, past, NONE), AXIS)
  end = jnp.searchsorted(route.addresses, stop).astype(jnp.int32)
  return Round(begin, jnp.clip(end, begin, last), jnp.any(stop != NONE))


def _tiers(plan: Plan):
  """(buckets of the tier, slots a device, capacity), warm then cold."""
  n = plan.devices
  return (
    (slice(0, n), plan.warm_slots, plan.capacity_warm),
    (slice(n, 2 * n), plan.cold_slots, plan.capacity_cold),
  )


def all_to_all(x, plan: Plan):  # [n, C, ...] -> the same, a peer's part each
  if plan.devices == 1:
    return x
  if x.dtype == jnp.bfloat16:  # as bits: XLA:CPU would send it as float32
    bits = lax.bitcast_convert_type(x, jnp.uint16)
    return lax.bitcast_convert_type(all_to_all(bits, plan), x.dtype)
  return lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0)


def all_gather(x, plan: Plan):  # [C, ...] -> [n C, ...]
  if plan.devices == 1:
    return x
  if x.dtype == jnp.bfloat16:
    bits = lax.bitcast_convert_type(x, jnp.uint16)
    return lax.bitcast_convert_type(all_gather(bits, plan), x.dtype)
  return lax.all_gather(x, AXIS, tiled=True)


def request(route: Route, now: Round, plan: Plan):
  """What the peers ask of this device: (warm, cold) slots [n, C] int32.

  Padding asks for the slot past the end. A tier without rows gives None.
  """
  bases = _bases(plan)
  out = []
  for buckets, slots, capacity in _tiers(plan):
    if not slots:
      out.append(None)
      continue
    at = now.begin[buckets, None] + lax.iota(jnp.int32, capacity)[None]
    there = route.addresses[jnp.minimum(at, route.addresses.shape[0] - 1)]
    slot = there - jnp.asarray(bases)[buckets, None]
    slot = jnp.where(at < now.end[buckets, None], slot, slots)
    out.append(all_to_all(slot, plan))
  return tuple(out)


def hot_slots(route: Route, now: Round, plan: Plan):
  """[C_hot] int32: the round's hot rows of this device; padding past the end.

  Their gradients are in the last bucket of the buffer.
  """
  at = now.begin[-1] + lax.iota(jnp.int32, plan.capacity_hot)
  there = route.addresses[jnp.minimum(at, route.addresses.shape[0] - 1)]
  return jnp.where(at < now.end[-1], there - _bases(plan)[-2], plan.hot)


def positions(route: Route, now: Round, plan: Plan):  # [L] int32
  """Where each lookup's row lies in the round's buffer; else the buffer's end.

  The buffer is [n C_warm + n C_cold + C_hot, d], bucket by bucket. A lookup
  of another round, or of nothing that is exchanged, gets the end.
  """
  starts = buffer_starts(plan)
  past = jnp.zeros(1, jnp.int32)
  begin = jnp.append(now.begin, past)[route.bucket]
  end = jnp.append(now.end, past)[route.bucket]
  at = jnp.asarray(starts)[route.bucket] + route.index - begin
  inside = (begin <= route.index) & (route.index < end)
  return jnp.where(inside, at, starts[-1])
