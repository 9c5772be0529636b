"""Proxies: the devices of a node unite what they ask of an owner.

On a mesh of several nodes device (k, j), the j-th of node k, is the proxy of
its node at all owners (., j): the node's devices send it what they ask of
those, it unites that per owner, and only the union crosses the network, once a
node. Gradients are summed on the way back. Where every node has a copy of the
rows, the owner is in the node and unites what its peers ask; the sums of all
nodes are then gathered by all, and every copy is updated alike.

A round ends where a buffer of a device is full; then the proxies propose
likewise what does not fit their unions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.embedding.buckets import TierBuckets, buckets_of
from recjax.embedding.coalesce import NONE, coalesce, places_of
from recjax.embedding.wire import all_to_all_joined
from recjax.plan.plan import Plan
from recjax.schema import DEVICE, NODE


class Union(NamedTuple):
  """What the peers of a node ask of the owners whose proxy this device is.

  A key is an address, counted from the first owner's; NONE = padding.
  """

  keys: jax.Array  # [g N C] int32, of the requests
  index: jax.Array  # [g N C] int32: a request's place in distinct
  distinct: jax.Array  # [g N C + 1] int32, ascending, then NONE
  starts: jax.Array  # [N + 1] int32: where each owner's begin in distinct


def unite(local, t: TierBuckets, plan: Plan) -> Union:  # [g N, C] int32
  """Coalesces the local rows that the node's devices ask this proxy for."""
  nodes, rows = t.asked_nodes(plan), t.tier.shard_rows
  node = jnp.arange(t.count, dtype=jnp.int32)[:, None] % nodes
  keys = jnp.where(local < rows, local + node * rows, NONE).ravel()
  distinct, index = coalesce(keys)
  distinct = jnp.append(distinct, NONE)
  ends = np.arange(nodes + 1, dtype=np.int32) * np.int32(rows)
  starts = places_of(ends, distinct)
  return Union(keys, index, distinct, starts)


def _mine(t: TierBuckets, plan: Plan):
  """Returns (bucket, address) of the first owner whose proxy this device is."""
  j = lax.axis_index(DEVICE).astype(jnp.int32) * t.asked_nodes(plan)
  return t.first + j, t.base + j * t.tier.shard_rows


def first_past(union: Union, stop, t: TierBuckets, plan: Plan):  # [Z] int32
  """Returns `stop`, or less where a union does not fit."""
  bucket, base = _mine(t, plan)
  at = union.starts[:-1] + t.tier.node_capacity
  past = union.distinct[jnp.minimum(at, union.distinct.shape[0] - 1)] + base
  mine = lax.dynamic_slice(stop, (bucket,), (t.asked_nodes(plan),))
  mine = jnp.where(at < union.starts[1:], jnp.minimum(past, mine), mine)
  return lax.dynamic_update_slice(stop, mine, (bucket,))


def ask(unions: dict[int, Union], stop, plan: Plan):
  """Asks the owners for what is before `stop` [Z] int32.

  Args:
    unions: of tiers, by their index in Buckets.sharded.
    stop: first address of each bucket that has to wait.
    plan: whose rows they are.

  Returns:
    {tier: (local rows [N C_node] that this device is asked for, of copies
    [C_node]; each peer's request [g N C] as a place in what this proxy asked
    for, else past its end)}.
  """
  tiers = buckets_of(plan).sharded
  local, index = {}, {}
  for i, union in unions.items():
    local[i], index[i] = _of_union(union, stop, tiers[i], plan)
  across = [i for i in unions if tiers[i].asked_nodes(plan) > 1]
  if across:
    got = all_to_all_joined([local[i] for i in across], NODE, plan.nodes)
    local |= dict(zip(across, got, strict=True))
  return {i: (local[i].reshape(-1), index[i]) for i in unions}


def _of_union(union: Union, stop, t: TierBuckets, plan: Plan):
  """Returns (local rows [N, C_node] to ask for, index of `ask`)."""
  nodes, rows, far = (
    t.asked_nodes(plan),
    t.tier.shard_rows,
    t.tier.node_capacity,
  )
  bucket, base = _mine(t, plan)
  stop = lax.dynamic_slice(stop, (bucket,), (nodes,))
  limit = jnp.where(stop == NONE, NONE, stop - base)  # [N], as a key
  node = jnp.arange(nodes, dtype=jnp.int32)
  at = union.starts[:-1, None] + lax.iota(jnp.int32, far)[None]
  keys = union.distinct[jnp.minimum(at, union.distinct.shape[0] - 1)]
  there = (at < union.starts[1:, None]) & (keys < limit[:, None])
  local = jnp.where(there, keys - node[:, None] * rows, rows)
  owner = jnp.broadcast_to(
    jnp.tile(node, t.count // nodes)[:, None], (t.count, t.tier.capacity)
  ).ravel()
  index = owner * far + union.index - union.starts[owner]
  return local, jnp.where(union.keys < limit[owner], index, nodes * far)
