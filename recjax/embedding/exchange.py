"""Coalesced rows to and from their owners: the tables' only collectives.

A bucket is a (tier, owner) pair: first the owners' warm rows, then their cold
rows; the last one holds the hot rows where their gradients are exchanged
rather than all-reduced. A row's address is its position in the order (bucket,
slot), so that a sorted list of addresses is already bucketed.

On a mesh of several nodes an exchange may have two stages. A device (k, j),
the j-th of node k, is the proxy of its node at all owners (., j): the node's
devices send it what they ask of those, it unites that per owner, and only the
union crosses the network, once a node. Gradients are summed on the way back.
Where every node has a copy of the warm rows, the owner is in the node and
unites what its peers ask; the sums of all nodes are then gathered by all, and
every copy is updated alike.

An exchange runs in rounds, and every row belongs to one round on all devices:
each device proposes, a bucket, the first address that does not fit its
buffer, and the least proposal of all devices ends the round. Then the proxies
propose likewise what does not fit their unions. The owner thus sees all
gradients of a row in the same round and updates it once. The least address of
a bucket always fits, so every round gets on. Without an overflow there is one
round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.mesh import AXIS, DEVICES, NODES
from recjax.plan.plan import Plan

NONE = np.int32(2**31 - 1)  # sorts behind every address


class Way(NamedTuple):
  """How a tier's rows travel; all of it static."""

  first: int  # bucket of the tier
  owners: int  # n, or g where every node has a copy
  slots: int  # rows of an owner
  capacity: int  # C
  far: int  # C_far; 0 = all devices ask the owners
  nodes: int  # whose owners a proxy asks: N; 1 where every node has a copy


class Route(NamedTuple):
  """A local batch's distinct rows that are exchanged, and who uses them.

  Z: the number of buckets.
  """

  addresses: jax.Array  # [L + 1] int32, ascending, then NONE
  starts: jax.Array  # [Z + 1] int32: where each bucket begins in addresses
  bucket: jax.Array  # [L] int32 of a lookup; Z - 1: hot; Z: no lookup
  index: jax.Array  # [L] int32: a lookup's row, as a position in addresses


class Asked(NamedTuple):
  """What is asked of this device in a round.

  slots are those that it owns: [n C], or [N C_far] of the proxies (of copies
  [C_far]); those past the tier's end are padding. index [g N C] is a peer's
  request as a position in what this proxy asked for; else past its end.
  """

  slots: jax.Array  # int32
  index: jax.Array | None  # int32; None without proxies


class Round(NamedTuple):
  """The part of each bucket that is exchanged now: [begin, end)."""

  begin: jax.Array  # [Z] int32
  end: jax.Array  # [Z] int32
  more: jax.Array  # [] bool, the same on all devices
  warm: Asked | None
  cold: Asked | None


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


def ways(plan: Plan) -> dict[str, Way]:
  """Of the tiers with rows."""
  n, nodes = plan.devices, plan.nodes
  staged, copies = plan.exchange == "two_stage", plan.warm_copies == "node"
  warm, cold = plan.warm_owners, n
  found = {
    "warm": Way(0, warm, plan.warm_slots, plan.capacity_warm,
                plan.capacity_far_warm if staged or copies else 0,
                1 if copies else nodes),
    "cold": Way(warm, cold, plan.cold_slots, plan.capacity_cold,
                plan.capacity_far_cold if staged else 0, nodes),
  }  # fmt: skip
  return {name: way for name, way in found.items() if way.slots}


def _buckets(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
  """(rows, capacity) of every bucket, [Z] int32."""
  warm, cold, hot = plan.warm_owners, plan.devices, _sparse_hot(plan)
  count = [warm, cold, 1]
  rows = [plan.warm_slots, plan.cold_slots, hot]
  c = [plan.capacity_warm, plan.capacity_cold, plan.capacity_hot if hot else 0]
  return np.repeat(rows, count), np.repeat(c, count)


def _bases(plan: Plan) -> np.ndarray:  # [Z + 1] int32
  """The first address of each bucket, and the end."""
  return np.append(0, np.cumsum(_buckets(plan)[0])).astype(np.int32)


def buffer_starts(plan: Plan) -> np.ndarray:  # [Z + 1] int32
  """Where each bucket begins in a round's buffer of rows, and its size."""
  return np.append(0, np.cumsum(_buckets(plan)[1])).astype(np.int32)


def _bucket(rank, way: Way, plan: Plan):  # rank [..] int32 in the tier
  """The owner's bucket; those of a proxy (., j) are neighbours."""
  owner = rank % way.owners
  if way.far and way.nodes > 1:
    g = way.owners // way.nodes
    owner = owner % g * way.nodes + owner // g
  return way.first + owner


def route(ids, plan: Plan) -> Route:
  """Coalesces a device's lookups. ids [L] int32 ranks, -1 = no lookup."""
  bases = _bases(plan)
  last = len(bases) - 2
  bucket, slot = jnp.full_like(ids, last), ids
  for name, way in ways(plan).items():
    first = plan.hot if name == "warm" else plan.warm_end
    there, rank = ids >= first, ids - first
    bucket = jnp.where(there, _bucket(rank, way, plan), bucket)
    slot = jnp.where(there, rank // way.owners, slot)
  bucket = jnp.where(ids < 0, last + 1, bucket)
  address = jnp.where(
    ids < (0 if _sparse_hot(plan) else plan.hot),
    NONE,
    jnp.asarray(bases)[bucket] + slot,
  )
  addresses, index = coalesce(address)
  addresses = jnp.append(addresses, NONE)
  starts = jnp.searchsorted(addresses, bases).astype(jnp.int32)
  return Route(addresses, starts, bucket, index)


def _fit(plan: Plan, lookups: int) -> tuple[bool, bool]:
  """Whether no batch of `lookups` ids a device can overflow a buffer.

  (Of a device, of a proxy.)
  """
  g = plan.devices // plan.nodes
  rows = {"warm": -(-plan.warm // plan.warm_owners)}
  rows["cold"] = -(-plan.cold // plan.devices)
  near = plan.capacity_hot >= min(_sparse_hot(plan), lookups)
  far = True
  for name, way in ways(plan).items():
    near &= way.capacity >= min(rows[name], lookups)
    most = min(rows[name], g * min(way.capacity, lookups))
    far &= way.far == 0 or way.far >= most
  return near, far


def one_round(plan: Plan, lookups: int) -> bool:
  """Whether no batch of `lookups` ids a device can need another round."""
  return all(_fit(plan, lookups))


def next_round(route: Route, begin, plan: Plan) -> Round:
  """The round that starts at `begin` [Z] int32 (first: all starts)."""
  last = route.starts[1:]
  near_fits, far_fits = _fit(plan, route.index.shape[0])
  stop = jnp.full(len(last), NONE)
  if not near_fits:
    limit = begin + _buckets(plan)[1].astype(np.int32)
    past = route.addresses[jnp.minimum(limit, route.addresses.shape[0] - 1)]
    stop = lax.pmin(jnp.where(limit < last, past, NONE), AXIS)

  def end_of(stop):
    if near_fits and far_fits:
      return last
    end = jnp.searchsorted(route.addresses, stop).astype(jnp.int32)
    return jnp.clip(end, begin, last)

  end = end_of(stop)
  sent = {  # [owners, C], as the owners or the proxies get them
    name: _send(_slots(route, begin, end, way, plan), way, plan)
    for name, way in ways(plan).items()
  }
  unions = {k: _unite(sent[k], w) for k, w in ways(plan).items() if w.far}
  if not far_fits:
    for name, union in unions.items():
      stop = _first_past(union, stop, ways(plan)[name], plan)
    stop = lax.pmin(stop, AXIS)
    end = end_of(stop)
  asked = {
    name: _ask(unions[name], stop, way, plan)
    if way.far
    else Asked(sent[name].reshape(-1), None)
    for name, way in ways(plan).items()
  }
  more = jnp.any(stop != NONE)
  return Round(begin, end, more, asked.get("warm"), asked.get("cold"))


# ---- Collectives


def _as_bits(x, send):
  """bfloat16 as bits: XLA:CPU would send it as float32."""
  if x.dtype != jnp.bfloat16:
    return send(x)
  bits = send(lax.bitcast_convert_type(x, jnp.uint16))
  return lax.bitcast_convert_type(bits, x.dtype)


def all_to_all(x, axis, size: int):  # [size, ...] -> the same, a peer's each
  if size == 1:
    return x
  return _as_bits(x, lambda x: lax.all_to_all(x, axis, 0, 0))


def all_gather(x, axis, size: int):  # [C, ...] -> [size C, ...]
  if size == 1:
    return x
  return _as_bits(x, lambda x: lax.all_gather(x, axis, tiled=True))


# ---- Between a device and the owners, or the proxies of its node


def _send(x, way: Way, plan: Plan):  # [owners, C, ...], by bucket
  """To who asks the owners of the buckets, or back; the same shape."""
  if not way.far:
    return all_to_all(x, AXIS, way.owners)
  g = way.owners // way.nodes
  x = x.reshape(g, way.nodes, *x.shape[1:])
  return all_to_all(x, DEVICES, g).reshape(way.owners, *x.shape[2:])


def _slots(route: Route, begin, end, way: Way, plan: Plan):  # [owners, C] int32
  """What this device asks for; padding asks for the slot past the end."""
  buckets = slice(way.first, way.first + way.owners)
  at = begin[buckets, None] + lax.iota(jnp.int32, way.capacity)[None]
  there = route.addresses[jnp.minimum(at, route.addresses.shape[0] - 1)]
  slot = there - jnp.asarray(_bases(plan))[buckets, None]
  return jnp.where(at < end[buckets, None], slot, way.slots)


# ---- Proxies


class _Union(NamedTuple):
  """What the peers of a node ask of the owners whose proxy this device is.

  A key is an address, counted from the first owner's; NONE = padding.
  """

  keys: jax.Array  # [g N C] int32, of the requests
  index: jax.Array  # [g N C] int32: a request's position in distinct
  distinct: jax.Array  # [g N C + 1] int32, ascending, then NONE
  starts: jax.Array  # [N + 1] int32: where each owner's begin in distinct


def _unite(slots, way: Way) -> _Union:  # [g N, C] int32, as received
  node = jnp.arange(way.owners, dtype=jnp.int32)[:, None] % way.nodes
  keys = jnp.where(slots < way.slots, slots + node * way.slots, NONE).ravel()
  distinct, index = coalesce(keys)
  distinct = jnp.append(distinct, NONE)
  ends = np.arange(way.nodes + 1, dtype=np.int32) * np.int32(way.slots)
  starts = jnp.searchsorted(distinct, ends).astype(jnp.int32)
  return _Union(keys, index, distinct, starts)


def _mine(way: Way, plan: Plan):
  """(bucket, address) of the first owner whose proxy this device is."""
  j = lax.axis_index(DEVICES).astype(jnp.int32) * way.nodes
  return way.first + j, _bases(plan)[way.first] + j * way.slots


def _first_past(union: _Union, stop, way: Way, plan: Plan):  # [Z] int32
  """`stop`, or less where a union does not fit."""
  bucket, base = _mine(way, plan)
  at = union.starts[:-1] + way.far
  past = union.distinct[jnp.minimum(at, union.distinct.shape[0] - 1)] + base
  mine = lax.dynamic_slice(stop, (bucket,), (way.nodes,))
  mine = jnp.where(at < union.starts[1:], jnp.minimum(past, mine), mine)
  return lax.dynamic_update_slice(stop, mine, (bucket,))


def _ask(union: _Union, stop, way: Way, plan: Plan) -> Asked:
  """Asks the owners for what is before `stop` [Z] int32."""
  bucket, base = _mine(way, plan)
  stop = lax.dynamic_slice(stop, (bucket,), (way.nodes,))
  limit = jnp.where(stop == NONE, NONE, stop - base)  # [N], as a key
  node = jnp.arange(way.nodes, dtype=jnp.int32)
  at = union.starts[:-1, None] + lax.iota(jnp.int32, way.far)[None]
  keys = union.distinct[jnp.minimum(at, union.distinct.shape[0] - 1)]
  there = (at < union.starts[1:, None]) & (keys < limit[:, None])
  slots = jnp.where(there, keys - node[:, None] * way.slots, way.slots)
  if way.nodes > 1:
    slots = all_to_all(slots, NODES, way.nodes)
  owner = jnp.broadcast_to(
    jnp.tile(node, way.owners // way.nodes)[:, None],
    (way.owners, way.capacity),
  ).ravel()
  index = owner * way.far + union.index - union.starts[owner]
  index = jnp.where(union.keys < limit[owner], index, way.nodes * way.far)
  return Asked(slots.reshape(-1), index)


# ---- Rows and gradients


def bring(rows, asked: Asked, way: Way, plan: Plan):
  """The rows [m, d] of asked.slots -> each device's buffer [owners C, d]."""
  if way.far:
    rows = _between(rows, way)
    rows = rows.at[asked.index].get(mode="fill", fill_value=0)
  rows = rows.reshape(way.owners, way.capacity, -1)
  return _send(rows, way, plan).reshape(-1, rows.shape[-1])


def give(grads, asked: Asked, way: Way, plan: Plan):
  """The reverse of `bring`: (slots [m], gradients [m, d]) at the owner.

  grads [owners C, d]. A slot comes from every device, proxy or node that asked
  for it; those past the end are padding. Proxies sum in float32.
  """
  grads = grads.reshape(way.owners, way.capacity, -1)
  grads = _send(grads, way, plan).reshape(-1, grads.shape[-1])
  if not way.far:
    return asked.slots, grads
  total = jnp.zeros((way.nodes * way.far, grads.shape[-1]))
  total = total.at[asked.index].add(grads.astype(jnp.float32), mode="drop")
  total = total.astype(grads.dtype)
  if way.nodes > 1:
    return asked.slots, _between(total, way)
  both = asked.slots, total
  return tuple(all_gather(x, NODES, plan.nodes) for x in both)


def _between(x, way: Way):  # [N C_far, d]: owners' rows to proxies, or back
  if way.nodes == 1:
    return x
  return all_to_all(
    x.reshape(way.nodes, way.far, -1), NODES, way.nodes
  ).reshape(x.shape)


def hot_slots(route: Route, now: Round, plan: Plan):
  """[C_hot] int32: the round's hot rows of this device; padding past the end.

  Their gradients are in the last bucket of the buffer.
  """
  at = now.begin[-1] + lax.iota(jnp.int32, plan.capacity_hot)
  there = route.addresses[jnp.minimum(at, route.addresses.shape[0] - 1)]
  return jnp.where(at < now.end[-1], there - _bases(plan)[-2], plan.hot)


def positions(route: Route, now: Round, plan: Plan):  # [L] int32
  """Where each lookup's row lies in the round's buffer; else the buffer's end.

  The buffer holds the buckets one after the other, each of its capacity. A
  lookup of another round, or of nothing that is exchanged, gets the end.
  """
  starts = buffer_starts(plan)
  past = jnp.zeros(1, jnp.int32)
  begin = jnp.append(now.begin, past)[route.bucket]
  end = jnp.append(now.end, past)[route.bucket]
  at = jnp.asarray(starts)[route.bucket] + route.index - begin
  inside = (begin <= route.index) & (route.index < end)
  return jnp.where(inside, at, starts[-1])
