"""Rows to who needs them and gradients back: what the owners are asked for.

A device coalesces its lookups, so that it asks for each row once (`route`),
and asks the rows' owners (`plan_round`); they send the rows (`fetch_rows`) and
later get the rows' gradients (`return_gradients`). See buckets.py for
addresses.

Two devices share a tier of rows 0 ... 7, cyclically: device 0 owns rows 0, 2,
4, 6 and device 1 rows 1, 3, 5, 7. Device 0 looks up [5, 2, 5, 7, 0, 2]:

  address    5 -> bucket 1 (its owner), local row 2 -> 4 + 2 = 6, and so on:
             [6, 1, 6, 7, 0, 1]
  coalesced  [0, 1, 6, 7], and each lookup's place in it: [2, 1, 2, 3, 0, 1]
  buckets    start at [0, 2] and end at 4: owner 0 is asked for the local rows
             [0, 1], owner 1 for [2, 3]
  round      with buffers of 1 row an owner the first one brings [0], [2]
             (rows 0 and 5), the second [1], [3] (rows 2 and 7)
  buffer     of the first: rows [0, 5]; the lookups lie in it at
             [1, -, 1, -, 0, -]

(tests/embedding/test_exchange.py runs this example.)

An exchange runs in rounds, and every row belongs to one round on all devices:
each device proposes, a bucket, the first address that does not fit its buffer,
and the least proposal of all devices ends the round. The owner thus sees all
gradients of a row in the same round and updates it once. The least address of
a bucket always fits, so every round gets on. Without an overflow there is one
round. The ids of all tiers and groups travel in one all-to-all.

Where a node's devices unite what they ask, device (k, j), the j-th of node k,
is the proxy of its node at all owners (., j) (proxies.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.embedding import proxies
from recjax.embedding.buckets import TierBuckets, buckets_of
from recjax.embedding.coalesce import NONE, coalesce, places_of
from recjax.embedding.wire import all_gather, all_to_all, all_to_all_joined
from recjax.plan.plan import Plan
from recjax.schema import AXES, DEVICE, NODE


class Route(NamedTuple):
  """A local batch's distinct rows that travel, and which lookups use them.

  In arrays of JAX or, made on the host, of NumPy. Z is the number of buckets, L
  that of lookups, group by group.
  """

  addresses: jax.Array  # [L + 1] int32, ascending, then NONE
  starts: jax.Array  # [Z + 1] int32: where each bucket begins in addresses
  bucket: jax.Array  # [L] int32 of a lookup; Z: its row does not travel
  index: jax.Array  # [L] int32: a lookup's row, as a place in addresses


class Requests(NamedTuple):
  """What is asked of this device as an owner of a tier, in a round.

  `local` are its local rows: [n C], or [N C_node] of the proxies (of copies
  [C_node]); those past the shard's end are padding. `index` [g N C] is a peer's
  request as a place in what this proxy asked for; else past its end.
  """

  local: jax.Array  # int32
  index: jax.Array | None  # int32; None without proxies


class Round(NamedTuple):
  """The part [begin, end) of each bucket that travels now."""

  begin: jax.Array  # [Z] int32
  end: jax.Array  # [Z] int32
  more: jax.Array  # [] bool, the same on all devices
  requests: tuple[Requests, ...]  # of each tier of Buckets.sharded


# ---- Route


def _owner(rank, t: TierBuckets, plan: Plan):  # rank [...] int32 in the tier
  """Returns the owner, as a place among the tier's buckets.

  Those of a proxy (., j) are neighbours.
  """
  owner = rank % t.count
  nodes = t.asked_nodes(plan)
  if t.united and nodes > 1:
    g = t.count // nodes
    owner = owner % g * nodes + owner // g
  return owner


def addresses_of(ids: Sequence, plan: Plan, np_or_jnp: Any = jnp):
  """Returns (bucket, address), [L] int32 each, of the lookups of all groups.

  Z and NONE where no row travels. In arrays of jax.numpy, or of numpy; `ids` as
  `route` has them.
  """
  xp, known = np_or_jnp, buckets_of(plan)
  past = np.int32(len(known.capacity))
  buckets, addresses = [], []
  for group, mine in enumerate(ids):
    bucket, address = xp.full_like(mine, past), xp.full_like(mine, NONE)
    for t in known.of_group(group):
      there, rank = mine >= t.tier.first, mine - t.tier.first
      if t.tier != plan.groups[group].on_device[-1]:
        there &= mine < t.tier.stop
      at, local = np.int32(0), rank
      if t.count > 1:
        at, local = _owner(rank, t, plan), rank // t.count
      bucket = xp.where(there, t.first + at, bucket)
      local = t.base + at * t.tier.shard_rows + local
      address = xp.where(there, local, address)
    buckets.append(bucket)
    addresses.append(address)
  joined = lambda x: xp.concatenate(x) if len(x) > 1 else x[0]
  return joined(buckets), joined(addresses)


def route(ids: Sequence[jax.Array], plan: Plan) -> Route:
  """Coalesces a device's lookups of all groups, with one sort.

  Its twin on the host is host_route.py.

  Args:
    ids: of each group, flattened: int32 positions, -1 = no lookup.
    plan: whose rows they are.
  """
  buckets, addresses = addresses_of(ids, plan)
  distinct, index = coalesce(addresses, room=1)
  starts = places_of(buckets_of(plan).bases, distinct)
  return Route(distinct, starts, buckets, index)


def asked_rows(of: Route, plan: Plan):  # -> [] int32
  """Returns how many distinct rows a device asks owners for in a step."""
  sharded = buckets_of(plan).sharded
  counts = [of.starts[t.first + t.count] - of.starts[t.first] for t in sharded]
  return sum(counts, jnp.zeros((), jnp.int32))


# ---- Rounds


def _fit(plan: Plan, lookups: Sequence[int]) -> tuple[bool, bool]:
  """Whether no batch can overflow a device's buffers, and a proxy's.

  Args:
    plan: whose buffers they are.
    lookups: of a device and step, a group.
  """
  g = plan.devices // plan.nodes
  device = proxy = True
  for t in buckets_of(plan).tiers:
    asked = min(-(-t.tier.rows // t.count), lookups[t.group])
    device &= t.tier.capacity >= asked
    if t.united:
      most = min(-(-t.tier.rows // t.count), g * min(t.tier.capacity, asked))
      proxy &= t.tier.node_capacity >= most
  return device, proxy


def one_round(plan: Plan, lookups: Sequence[int]) -> bool:
  """Whether no batch of so many lookups a group can need another round."""
  return all(_fit(plan, lookups))


def plan_round(of: Route, begin, plan: Plan, lookups: tuple[int, ...]) -> Round:
  """Agrees on the round that starts at `begin` and asks the owners for it.

  Args:
    of: what this device looks up.
    begin: [Z] int32; first: where the buckets begin.
    plan: whose rows they are.
    lookups: of a device and step, a group.
  """
  known = buckets_of(plan)
  last = of.starts[1:]
  device_fits, proxy_fits = _fit(plan, lookups)
  stop = jnp.full(len(last), NONE)
  if not device_fits:
    limit = begin + known.capacity
    past = of.addresses[jnp.minimum(limit, of.addresses.shape[0] - 1)]
    stop = lax.pmin(jnp.where(limit < last, past, NONE), AXES)

  def end_of(stop):
    if device_fits and proxy_fits:
      return last
    if plan.devices == 1:  # no other device ends the round before
      return jnp.minimum(begin + known.capacity, last)
    end = places_of(stop, of.addresses)
    return jnp.clip(end, begin, last)

  end = end_of(stop)
  wanted = [_wanted(of, begin, end, t, plan) for t in known.sharded]
  got = _swap_ids(wanted, known.sharded, plan)
  unions = {
    i: proxies.unite(got[i], t, plan)
    for i, t in enumerate(known.sharded)
    if t.united
  }
  if not proxy_fits:
    for i, union in unions.items():
      stop = proxies.first_past(union, stop, known.sharded[i], plan)
    stop = lax.pmin(stop, AXES)
    end = end_of(stop)
  requests = [Requests(x.reshape(-1), None) for x in got]
  for i, asked in proxies.ask(unions, stop, plan).items():
    requests[i] = Requests(*asked)
  more = jnp.any(stop != NONE)
  return Round(begin, end, more, tuple(requests))


def _wanted(of: Route, begin, end, t: TierBuckets, plan):  # [owners, C] int32
  """Returns the local rows that this device asks for; the end is padding."""
  buckets = slice(t.first, t.first + t.count)
  at = begin[buckets, None] + lax.iota(jnp.int32, t.tier.capacity)[None]
  there = of.addresses[jnp.minimum(at, of.addresses.shape[0] - 1)]
  local = there - jnp.asarray(buckets_of(plan).bases)[buckets, None]
  return jnp.where(at < end[buckets, None], local, t.tier.shard_rows)


def _swap_ids(parts, tiers, plan: Plan):
  """Sends requests, [owners, C] of each tier, to those who are asked.

  In one all-to-all between all devices, and one within the nodes for the tiers
  whose requests are united there.
  """
  out = list(parts)
  for united in (False, True):
    members = [i for i, t in enumerate(tiers) if t.united == united]
    if not members:
      continue
    axis, peers = (DEVICE, plan.devices // plan.nodes)
    if not united:
      axis, peers = AXES, plan.devices
    got = all_to_all_joined([parts[i].reshape(peers, -1) for i in members],
                             axis, peers)  # fmt: skip
    for i, x in zip(members, got, strict=True):
      out[i] = x.reshape(parts[i].shape)
  return out


# ---- Rows and gradients


def _send(x, t: TierBuckets, plan: Plan):  # [owners, C, d], by bucket
  """Sends to who asks the owners of the buckets, or back; the same shape."""
  if not t.united:
    return all_to_all(x, AXES, t.count)
  nodes = t.asked_nodes(plan)
  g = t.count // nodes
  x = x.reshape(g, nodes, *x.shape[1:])
  return all_to_all(x, DEVICE, g).reshape(t.count, *x.shape[2:])


def fetch_rows(rows, asked: Requests, t: TierBuckets, plan: Plan):
  """Sends an owner's rows [m, d] of the requests to the devices that asked.

  Returns:
    [owners C, d]: what this device asked for, in its part of the buffer.
  """
  if asked.index is not None:
    rows = _between(rows, t, plan)
    rows = rows.at[asked.index].get(mode="fill", fill_value=0)
  rows = rows.reshape(t.count, t.tier.capacity, -1)
  return _send(rows, t, plan).reshape(-1, rows.shape[-1])


def return_gradients(grads, asked: Requests, t: TierBuckets, plan: Plan):
  """Sends the gradients [owners C, d] of fetched rows to their owners.

  The transpose of `fetch_rows`. Proxies sum in float32.

  Returns:
    (local rows [m] int32, gradients [m, d]) at the owner. A row comes from
    every device, proxy or node that asked for it; those past the end are
    padding.
  """
  grads = grads.reshape(t.count, t.tier.capacity, -1)
  grads = _send(grads, t, plan).reshape(-1, grads.shape[-1])
  if asked.index is None:
    return asked.local, grads
  nodes = t.asked_nodes(plan)
  total = jnp.zeros((nodes * t.tier.node_capacity, grads.shape[-1]))
  total = total.at[asked.index].add(grads.astype(jnp.float32), mode="drop")
  total = total.astype(grads.dtype)
  if nodes > 1:
    return asked.local, _between(total, t, plan)
  both = asked.local, total
  return tuple(all_gather(x, NODE, plan.nodes) for x in both)


def _between(x, t: TierBuckets, plan: Plan):  # [N C_node, d]
  """Sends owners' rows to the proxies that asked, or back."""
  nodes = t.asked_nodes(plan)
  if nodes == 1:
    return x
  x = x.reshape(nodes, t.tier.node_capacity, -1)
  return all_to_all(x, NODE, nodes).reshape(-1, x.shape[-1])


def gathered_rows(of: Route, now: Round, t: TierBuckets):  # -> [C] int32
  """Returns this device's touched replicas of a round; the end is padding.

  Their gradients are in the tier's part of the buffer.
  """
  at = now.begin[t.first] + lax.iota(jnp.int32, t.tier.capacity)
  there = of.addresses[jnp.minimum(at, of.addresses.shape[0] - 1)]
  return jnp.where(at < now.end[t.first], there - t.base, t.tier.rows)


def buffer_places(
  of: Route, now: Round, plan: Plan, lookups: Sequence[int]
) -> list[jax.Array]:
  """Returns where each lookup's row lies in the round's buffer of its group.

  A group's buffer holds its buckets one after the other, each of its capacity.

  Args:
    of: what this device looks up.
    now: the round.
    plan: whose rows they are.
    lookups: of a device and step, a group.

  Returns:
    [lookups] int32 of each group; a lookup of another round, or of a row that
    does not travel, gets the buffer's end.
  """
  known = buckets_of(plan)
  past = jnp.zeros(1, jnp.int32)
  begin = jnp.append(now.begin, past)[of.bucket]
  end = jnp.append(now.end, past)[of.bucket]
  at = jnp.asarray(np.append(known.buffer, 0))[of.bucket] + of.index - begin
  inside = (begin <= of.index) & (of.index < end)
  places, first = [], 0
  for size, count in zip(known.sizes, lookups, strict=True):
    mine = slice(first, first + count)
    places.append(jnp.where(inside[mine], at[mine], size))
    first += count
  return places
