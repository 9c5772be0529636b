"""Bags of pooled tables to their owners, and one vector a bag back.

A device sends a table's owner the slots of its bags' rows; the owner sums them
and returns a vector a bag; later it gets the bag's gradient. All sizes are
static, [b, hotness] slots and [b] vectors, so there are no rounds. Owners'
loads differ, and only real bytes travel: columns that all owners have go in
one all-to-all, those beyond in point-to-point shifts to (or from) the owners
that have them. On a device, arrays are padded to the busiest owner.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.embedding import exchange
from recjax.embedding.exchange import NONE
from recjax.embedding.tables import Tier, gather
from recjax.mesh import AXIS
from recjax.plan import layout
from recjax.plan.plan import Plan
from recjax.schema import Feature


class Bags(NamedTuple):
  """Whose bags go where: owner o's k-th column, and its v-th vector."""

  owner: np.ndarray  # [S] int32, of a column's table; -1: not pooled
  column: np.ndarray  # [n, W] int32, in the ids; S = padding
  vector: np.ndarray  # [n, W] int32, that the column is added to
  columns: tuple[int, ...]  # of each owner
  vectors: tuple[int, ...]
  # Of all P pooled features: its owner, its vector there, its activation, and
  # its columns of the ids.
  owners: np.ndarray  # [P] int32
  at: np.ndarray  # [P] int32
  activation: np.ndarray  # [P] int32
  spans: tuple[tuple[int, int], ...]
  mean: tuple[bool, ...]


class Sent(NamedTuple):
  """What a read leaves for the update."""

  slots: jax.Array  # [n, W, b] int32, asked of this owner by each peer
  scale: jax.Array | None  # [b, P] float32; None = 1


@functools.cache
def bags_of(features: tuple[Feature, ...], plan: Plan) -> Bags:
  n, owner_of = plan.devices, dict(plan.pooled)
  size = sum(f.hotness for f in features)
  owner = np.full(size, -1, np.int32)
  columns: list[list[int]] = [[] for _ in range(n)]
  into: list[list[int]] = [[] for _ in range(n)]
  vectors = [0] * n
  found = []
  column = activation = 0
  for f in features:
    o, stop = owner_of.get(f.table, -1), column + f.hotness
    if o >= 0:
      owner[column:stop] = o
      columns[o] += range(column, stop)
      into[o] += [vectors[o]] * f.hotness
      span = (column, stop)
      found.append((o, vectors[o], activation, span, f.pooling == "mean"))
      vectors[o] += 1
    column, activation = stop, activation + f.activations
  widest = max(map(len, columns))
  pad = lambda lists, value: np.array(
    [x + [value] * (widest - len(x)) for x in lists], np.int32
  )
  owner_of_bag, at, activations, spans, mean = zip(*found, strict=True)
  index = lambda x: np.array(x, np.int32)
  return Bags(
    owner,
    pad(columns, size),
    pad(into, 0),
    tuple(map(len, columns)),
    tuple(vectors),
    index(owner_of_bag),
    index(at),
    index(activations),
    spans,
    mean,
  )


def _me():
  return lax.axis_index(AXIS).astype(jnp.int32)


def _travel(x, counts: tuple[int, ...], plan: Plan, *, back: bool):
  """x [n, K, ...], a peer's part each -> the same, of what the peers sent.

  Device i sends owner o the first counts[o] of x[o]; `back`, owner o sends
  each peer p the first counts[o] of x[p].
  """
  n = plan.devices
  if n == 1:
    return x
  if x.dtype == jnp.bfloat16:  # as bits, see exchange.all_to_all
    bits = lax.bitcast_convert_type(x, jnp.uint16)
    bits = _travel(bits, counts, plan, back=back)
    return lax.bitcast_convert_type(bits, x.dtype)
  me, out = _me(), []
  for start, stop, members in layout.layers(counts):
    part = x[:, start:stop]
    if len(members) == n:
      out.append(exchange.all_to_all(part, AXIS, n))
      continue
    got = jnp.zeros_like(part).at[me].set(part[me])
    for shift in range(1, n):
      pairs = [(i, (i + shift) % n) for i in range(n)]
      pairs = [p for p in pairs if p[0 if back else 1] in members]
      there = lax.ppermute(part[(me + shift) % n], AXIS, pairs)
      got = got.at[(me - shift) % n].set(there)
    out.append(got)
  return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def lookups(ids, features: tuple[Feature, ...], plan: Plan):
  """Which of ids [b, S] (positions) go to a pooling owner: [b, S] bool."""
  owner = jnp.asarray(bags_of(features, plan).owner)[None]
  warm = (ids >= plan.hot) & (ids < plan.warm_end)
  return warm & ((ids - plan.hot) % plan.devices == owner)


def read(
  tier: Tier,
  ids,  # [b, S] int32 positions, -1 = none
  features: tuple[Feature, ...],
  plan: Plan,
  exchange_dtype,
):
  """(Activations' indices [P], vectors [b, P, d] float32, Sent).

  The vectors are the parts of the bags' sums or means that `lookups` says.
  """
  bags, n, b = bags_of(features, plan), plan.devices, ids.shape[0]
  size = tier.rows.shape[0]
  slots = jnp.where(lookups(ids, features, plan), (ids - plan.hot) // n, size)
  slots = jnp.concatenate([slots, jnp.full((b, 1), size, jnp.int32)], axis=1)
  slots = slots.T[bags.column]  # [n, W, b]
  slots = _travel(slots, bags.columns, plan, back=False)
  mine = lax.iota(jnp.int32, slots.shape[1]) < jnp.asarray(bags.columns)[_me()]
  slots = jnp.where(mine[None, :, None], slots, size)  # the others: padding
  sums = _sums(tier, slots, bags, plan)
  got = _travel(sums.astype(exchange_dtype), bags.vectors, plan, back=True)
  vectors = got[bags.owners, bags.at].astype(jnp.float32)  # [P, b, d]
  vectors = jnp.swapaxes(vectors, 0, 1)
  scale = _scale(ids, bags)
  if scale is not None:
    vectors = vectors * scale[..., None]
  return bags.activation, vectors, Sent(slots, scale)


def _scale(ids, bags: Bags):
  """What a bag's vector is multiplied with, [b, P] float32; None: nothing."""
  if not any(bags.mean):
    return None
  there = (ids >= 0).astype(jnp.float32)
  one = jnp.ones(ids.shape[0])
  return jnp.stack(
    [
      1 / jnp.maximum(jnp.sum(there[:, a:z], axis=1), 1) if mean else one
      for (a, z), mean in zip(bags.spans, bags.mean, strict=True)
    ],
    axis=1,
  )


def _sums(tier: Tier, slots, bags: Bags, plan: Plan):
  """An owner's vectors for each peer. slots [n, W, b] -> [n, V, b, d] float32.

  Column by column: all rows at once would be n W b of them.
  """
  n, columns, b = slots.shape
  size, d = tier.rows.shape[0], plan.dim
  into = jnp.asarray(bags.vector)[_me()]

  def add(k, sums):
    slot = slots[:, k].reshape(-1)
    index = jnp.stack([slot, jnp.zeros_like(slot)], axis=1)
    rows = gather(tier.rows, index).astype(jnp.float32)
    rows = jnp.where(slot[:, None] < size, rows, 0).reshape(n, b, d)
    return sums.at[:, into[k]].add(rows)

  zeros = jnp.zeros((n, max(bags.vectors), b, d))
  return lax.fori_loop(0, columns, add, zeros)


def gradients(
  sent: Sent,
  grads,  # [b, A, d] float32, of the activations
  features: tuple[Feature, ...],
  plan: Plan,
  exchange_dtype,
  size: int,  # slots of the owner's shard
):
  """The owner's rows that were used: (slots [m] int32, grads [m, d] float32).

  Each slot once, with its gradient summed over all uses; padding is distinct
  slots from `size` on.
  """
  bags = bags_of(features, plan)
  n, columns, b = sent.slots.shape
  grads = grads[:, bags.activation]  # [b, P, d]
  if sent.scale is not None:
    grads = grads * sent.scale[..., None]
  buffer = jnp.zeros((n, max(bags.vectors), b, plan.dim), exchange_dtype)
  grads = jnp.swapaxes(grads, 0, 1).astype(exchange_dtype)
  buffer = buffer.at[bags.owners, bags.at].set(grads)
  got = _travel(buffer, bags.vectors, plan, back=False)

  keys = jnp.where(sent.slots < size, sent.slots, NONE)
  slots, index = exchange.coalesce(keys.reshape(-1))
  m = min(slots.shape[0], size)
  index = index.reshape(sent.slots.shape)
  into = jnp.asarray(bags.vector)[_me()]

  def add(k, total):
    part = got[:, into[k]].reshape(n * b, plan.dim).astype(jnp.float32)
    return total.at[index[:, k].reshape(-1)].add(part, mode="drop")

  total = lax.fori_loop(0, columns, add, jnp.zeros((m, plan.dim)))
  slots = slots[:m]
  padding = size + lax.iota(jnp.int32, m)
  return jnp.where(slots < size, slots, padding), total
