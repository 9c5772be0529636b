"""The backward pass: gradients of a batch's activations -> updated rows.

Every touched row is updated once, with its gradient summed over all uses in
the global batch, by the devices that hold it, in place.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.embedding import exchange, table_wise, wire
from recjax.embedding.buckets import TierBuckets, buckets_of
from recjax.embedding.coalesce import NONE, coalesce
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.lookup import Residuals, replica_rows
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.pooling import add_spread, joined, spread
from recjax.embedding.row_random import row_bits, stochastic_round
from recjax.embedding.tables import Tables, gather, scatter
from recjax.plan.plan import Tier
from recjax.schema import AXES


def backward(
  embedding: Embedding,
  tables: Tables,
  residuals: Residuals,
  gradients: Mapping[str, jax.Array],
  step,
):
  """Updates the rows that a batch touched.

  Args:
    embedding: the groups.
    tables: a device's shards; give them up (donate) to update in place.
    residuals: of `lookup.forward`.
    gradients: {feature: [b, h, d] float32} of the activations, of the loss
      summed over all devices.
    step: [] int32, counts from 0.

  Returns:
    (tables, the number of rounds that it took [] int32).
  """
  by_bag = []  # of each group, [b, A, d]
  tables = {name: dict(tiers) for name, tiers in tables.items()}
  for g, of in zip(embedding.groups, residuals.groups, strict=True):
    grads = joined(gradients, g.features)
    by_bag.append(grads)
    if g.group.hot and g.group.hot_sync == "all_reduce":
      rows = spread(grads, of.coefficients, g.features).reshape(-1, g.dim)
      _update_replicas(embedding, tables, g, of.ids, (rows, step))
    if of.bags is not None:
      _update_bags(embedding, tables, g, of.bags, (grads, step))
  one = jnp.ones((), jnp.int32)
  if residuals.round is None:
    return tables, one
  update = lambda tables, now: _update_round(
    embedding, tables, residuals, by_bag, (now, step)
  )
  first = residuals.round
  tables = update(tables, first)
  plan, lookups = embedding.plan, residuals.lookups
  if exchange.one_round(plan, lookups):
    return tables, one

  def more(carry):
    tables, begin, _, rounds = carry
    now = exchange.plan_round(residuals.route, begin, plan, lookups)
    return update(tables, now), now.end, now.more, rounds + 1

  tables, *_, rounds = lax.while_loop(
    lambda c: c[2], more, (tables, first.end, first.more, one)
  )
  return tables, rounds


# ---- The optimizer on touched rows


def _bits(ranks, g: EmbeddingGroup, step):  # [...] int32 -> [..., d] uint32
  """Returns the bits that rounding takes; None where rows are float32."""
  if g.group.dtype == "float32":
    return None
  # Not the bits that the rows began with: their key is the seed.
  key = jnp.uint32(g.seed) + step.astype(jnp.uint32) + np.uint32(1)
  return row_bits(ranks, g.dim, key)


def _new_rows(old: TierArrays, grads, bits, step, g: EmbeddingGroup):
  """Applies the optimizer to m touched rows. grads [m, d] float32."""
  rows, slots = g.optimizer.update(
    old.rows.astype(jnp.float32), old.slots, grads, step
  )
  if bits is not None:
    rows = stochastic_round(rows, bits)
  return TierArrays(rows, slots)


def _summed(local, grads, size: int, senders: int, copies: int):
  """Sums the gradients of each row over those who sent some, in float32.

  Args:
    local: [m] int32 rows; those from `size` on are padding.
    grads: [m, d].
    size: rows of the shard.
    senders: of the rows; one sends no row twice.
    copies: of the row; each gets the same bits, as it adds what the copies'
      nodes sent in their order.

  Returns:
    (local [m], grads [m, d]), all rows distinct, padding too, as scatter wants
    them.
  """
  grads = grads.astype(jnp.float32)
  if senders > 1:
    local, index = coalesce(jnp.where(local < size, local, NONE))
    parts = index.reshape(copies, -1), grads.reshape(copies, -1, grads.shape[1])

    def add(i, total):  # a sender's rows are distinct but for padding
      index, part = (x[i] for x in parts)
      return total.at[index].add(part)

    grads = jnp.zeros_like(grads)
    grads = (
      add(0, grads) if copies == 1 else lax.fori_loop(0, copies, add, grads)
    )
  padding = size + lax.iota(jnp.int32, local.shape[0])
  return jnp.where(local < size, local, padding), grads


# ---- Replicas


def _update_replicas(embedding, tables, g: EmbeddingGroup, ids, what):
  """All-reduces the replicas' gradients; rows that none touched stay.

  ids [L] int32; what: (gradients of their rows [L, d], [] int32 step).
  """
  (by_row, step), tier = what, g.group.hot
  at = replica_rows(ids, tier)
  # One more column counts the uses, so that one all-reduce carries both.
  by_row = jnp.concatenate([by_row, jnp.ones((by_row.shape[0], 1))], axis=1)
  total = jnp.zeros((tier.rows, g.dim + 1)).at[at].add(by_row, mode="drop")
  if embedding.plan.devices > 1:
    total = lax.psum(total, AXES)
  touched = total[:, -1] > 0
  bits = _bits(lax.iota(jnp.int32, tier.rows), g, step)
  old = tables[g.name][tier.name]
  new = _new_rows(old, total[:, :-1], bits, step, g)

  def keep(new, old):  # [hot] or [hot, d]
    mask = touched if old.ndim == 1 else touched[:, None]
    return jnp.where(mask, new, old)

  tables[g.name][tier.name] = jax.tree.map(keep, new, old)


def _update_gathered(old: TierArrays, local, grads, g: EmbeddingGroup, step):
  """Updates every replica alike, from what all devices touched.

  local [n C] int32, grads [n C, d]: of all devices.
  """
  tier = g.group.hot
  assert tier is not None
  senders = local.shape[0] // tier.capacity
  local, grads = _summed(local, grads, tier.rows, senders, senders)
  rows = jax.tree.map(lambda x: x.at[local].get(mode="clip"), old)
  new = _new_rows(rows, grads, _bits(local, g, step), step, g)
  return jax.tree.map(
    lambda x, y: x.at[local].set(y, mode="drop", unique_indices=True), old, new
  )


# ---- Sharded rows


def _update_local(arrays: TierArrays, local, grads, place, step):
  """Updates an owner's rows in place.

  Args:
    arrays: a device's shard.
    local: [m] int32, distinct; padding past the end.
    grads: [m, d] float32.
    place: (EmbeddingGroup, Tier, the stored local rows of visitors or None).
    step: [] int32.
  """
  g, tier, stored = place
  owner = lax.axis_index(tier.axes).astype(jnp.int32)
  row = local if stored is None else stored.at[local, 0].get(mode="clip")
  bits = _bits(tier.first + row * tier.owners + owner, g, step)
  index = jnp.stack([local, jnp.zeros_like(local)], axis=1)
  old = jax.tree.map(lambda x: gather(x, index), arrays)
  new = _new_rows(old, grads, bits, step, g)
  return jax.tree.map(lambda x, y: scatter(x, index, y), arrays, new)


def _update_bags(embedding, tables, g: EmbeddingGroup, bags, what):
  """Updates the rows of table-wise tables at their owners.

  bags: BagResiduals; what: (gradients [b, A, d], [] int32 step).
  """
  grads, step = what
  tier: Tier = g.group.table_wise_tier
  local, summed = table_wise.return_bag_gradients(bags, grads, g, embedding)
  tables[g.name][tier.name] = _update_local(
    tables[g.name][tier.name], local, summed, (g, tier, None), step
  )


def _update_round(embedding, tables, residuals: Residuals, by_bag, when):
  """Updates the rows of a round, group by group.

  Args:
    embedding, tables, residuals: as `backward` has them.
    by_bag: of each group the gradients of its activations, [b, A, d] float32.
    when: (the round, [] int32 step).
  """
  now, step = when
  plan, known = embedding.plan, buckets_of(embedding.plan)
  places = exchange.buffer_places(residuals.route, now, plan, residuals.lookups)
  requests = dict(zip(known.sharded, now.requests, strict=True))
  out = {name: dict(tiers) for name, tiers in tables.items()}
  for i, g in enumerate(embedding.groups):
    if not known.of_group(i):
      continue
    buffer = jnp.zeros((known.sizes[i], g.dim))
    buffer = add_spread(
      buffer,
      places[i],
      by_bag[i],
      residuals.groups[i].coefficients,
      g.features,
    )
    buffer = buffer.astype(embedding.wire_dtype)
    for t in known.of_group(i):
      part = buffer[t.buffer : t.buffer + t.rows]
      arrays = tables[g.name][t.tier.name]
      out[g.name][t.tier.name] = (
        _update_sharded(
          embedding,
          arrays,
          part,
          (t, requests[t], residuals.groups[i].stored),
          step,
        )
        if t.tier.axes
        else _update_gathered(
          arrays, *_gather(embedding, residuals.route, now, t, part), g, step
        )
      )
  return out


def _update_sharded(embedding, arrays, part, asked, step):
  """Sends a tier's gradients [owners C, d] home, sums and applies them."""
  plan, (t, requests, stored) = embedding.plan, asked
  t: TierBuckets
  local, grads = exchange.return_gradients(part, requests, t, plan)
  size, copies = t.tier.shard_rows, plan.devices // t.tier.owners
  local, grads = _summed(local, grads, size, plan.devices, copies)
  g = embedding.groups[t.group]
  place = g, t.tier, stored if t.tier == g.group.visitors else None
  return _update_local(arrays, local, grads, place, step)


def _gather(embedding, route, now, t: TierBuckets, part):
  """Gathers the replicas' touched rows and gradients of all devices."""
  n = embedding.plan.devices
  local = exchange.gathered_rows(route, now, t)
  return wire.all_gather(local, AXES, n), wire.all_gather(part, AXES, n)
