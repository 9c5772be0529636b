"""Three tiers -> activations [b, A, d]; and back: gradients -> updated rows.

Both run inside `shard_map`, on a device's part of the batch. The lookup is
linear in the rows: `spread` is the transpose of `pool`, and a table is never
differentiated through.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.embedding import exchange
from recjax.embedding import table_wise as pooled_lib
from recjax.embedding.exchange import NONE, Round, Route
from recjax.embedding.optimizers import Optimizer
from recjax.embedding.tables import (
  DEVICE,
  HOST,
  Tables,
  Tier,
  first_rank,
  gather,
  on_host,
  owners_of,
  row_bits,
  scatter,
)
from recjax.mesh import AXIS
from recjax.plan.plan import Plan
from recjax.schema import Feature


class Trip(NamedTuple):
  """What the lookup leaves for the update of the same batch."""

  ids: jax.Array  # [L] int32
  coefficients: jax.Array | None  # [b, S] float32
  route: Route
  round: Round  # the first
  sent: pooled_lib.Sent | None  # to the owners of pooled tables


# ---- Pooling


def coefficients(ids, weights, features: tuple[Feature, ...]):
  """What each lookup's row is multiplied with; None where all are 1.

  ids [b, S] int32, weights [b, S] float32 or None -> [b, S] float32. A mean
  divides by the number of lookups, a weighted mean by the sum of weights.
  """
  if all(f.pooling != "mean" and not f.weighted for f in features):
    return None
  there = (ids >= 0).astype(jnp.float32)
  out, at = [], 0
  for f in features:
    w = there[:, at : at + f.hotness]
    if f.weighted:
      w = w * weights[:, at : at + f.hotness]
    if f.pooling == "mean":
      total = jnp.sum(w, axis=1, keepdims=True)
      w = w / jnp.where(total == 0, 1, total)
    out.append(w)
    at += f.hotness
  return jnp.concatenate(out, axis=1)


def pool(take, coefficients, features: tuple[Feature, ...]):
  """Activations [b, A, d] float32 of the rows that a batch looks up.

  Each bag is summed where its rows are gathered: the rows of all bags, many
  times the activations, are never there at once.

  Args:
    take: slice of the S columns -> their rows [b, columns, d] float32.
    coefficients: [b, S] or None.
    features: F; neighbours that are not summed are gathered together.
  """
  out, at = [], 0
  alike = itertools.groupby(features, lambda f: f.activations < f.hotness)
  for summed, group in alike:
    widths = [f.hotness for f in group]
    for width in widths if summed else [sum(widths)]:
      columns = slice(at, at + width)
      rows = take(columns)
      if coefficients is not None:
        rows = rows * coefficients[:, columns, None]
      out.append(jnp.sum(rows, axis=1, keepdims=True) if summed else rows)
      at += width
  return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def spread(gradients, coefficients, features: tuple[Feature, ...]):
  """The transpose of `pool`: [b, A, d] float32 -> [b, S, d], of the rows.

  A gather of rows; derived by JAX it would be a sum of padded arrays, one a
  feature, with which a step of 214 lookups took twice (dim 16) and ten times
  (dim 64) as long on XLA:CPU, jax 0.12 (scripts/bench_step.py --multi_hot).
  """
  b, _, dim = gradients.shape
  column, activations = [], 0  # [S]: the activation that it goes to
  for f in features:
    own = range(f.hotness) if f.pooling == "none" else [0] * f.hotness
    column += [activations + i for i in own]
    activations += f.activations
  if activations < len(column):
    first = activations * lax.iota(jnp.int32, b)
    at = first[:, None] + np.array(column, np.int32)[None]
    gradients = gradients.reshape(-1, dim)[at]
  if coefficients is not None:
    gradients = gradients * coefficients[..., None]
  return gradients


# ---- Read


def _hot_slots(ids, plan: Plan):  # [...] int32 -> [...]; other rows: the end
  return jnp.where((ids >= 0) & (ids < plan.hot), ids, plan.hot)


def _rows_at(tier: Tier, slots, host: bool):  # [m] int32 -> [m, d]
  index = jnp.stack([slots, jnp.zeros_like(slots)], axis=1)
  if host:
    index = jax.device_put(index, HOST)
    return on_host(gather, DEVICE)(tier.rows, index)
  return gather(tier.rows, index)


def read(
  tables: Tables,
  ids,  # [b, S] int32 ranks (or positions, see plan/positions.py), -1 = none
  weights,  # [b, S] float32 or None
  features: tuple[Feature, ...],
  plan: Plan,
  exchange_dtype,
):
  """Activations [b, A, d] float32, and the trip for `update`."""
  alone = ids  # that travel row by row
  if plan.pooled:
    alone = jnp.where(pooled_lib.lookups(ids, features, plan), -1, ids)
  flat = alone.reshape(-1)
  coef = coefficients(ids, weights, features)

  def from_buffers(now):
    buffers = []
    for name, way in exchange.ways(plan).items():
      asked = getattr(now, name)
      rows = _rows_at(getattr(tables, name), asked.slots, name == "cold")
      rows = rows.astype(exchange_dtype)
      buffers.append(exchange.bring(rows, asked, way, plan))
    rows = jnp.concatenate(buffers) if len(buffers) > 1 else buffers[0]
    at = exchange.positions(route, now, plan).reshape(ids.shape)
    take = lambda at: rows.at[at].get(mode="fill", fill_value=0)
    return lambda columns: take(at[:, columns])

  def from_replica(columns):
    at = _hot_slots(alone[:, columns], plan)
    return tables.hot.rows.at[at].get(mode="fill", fill_value=0)

  def pooled(*tiers):
    take = lambda columns: sum(x(columns).astype(jnp.float32) for x in tiers)
    return pool(take, coef, features)

  with jax.named_scope("route"):
    route = exchange.route(flat, plan)
    now = exchange.next_round(route, route.starts[:-1], plan)
  with jax.named_scope("lookup"):
    tiers = []
    if plan.hot < plan.rows:
      tiers.append(from_buffers(now))
    if plan.hot:
      tiers.append(from_replica)
    activations = pooled(*tiers)
    if plan.hot < plan.rows and not exchange.one_round(plan, flat.shape[0]):

      def more(carry):
        activations, begin, _ = carry
        now = exchange.next_round(route, begin, plan)
        return activations + pooled(from_buffers(now)), now.end, now.more

      activations, *_ = lax.while_loop(
        lambda c: c[2], more, (activations, now.end, now.more)
      )
    sent = None
    if plan.pooled:
      at, vectors, sent = pooled_lib.read(
        tables.warm, ids, features, plan, exchange_dtype
      )
      activations = activations.at[:, at].add(vectors, unique_indices=True)
  return activations, Trip(flat, coef, route, now, sent)


# ---- Update


def _stochastic_round(x, bits):  # float32, uint32 -> bfloat16
  """Rounds up with the probability that makes the result unbiased."""
  raw = lax.bitcast_convert_type(x, jnp.uint32)
  raw = (raw + (bits & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
  return lax.bitcast_convert_type(raw, jnp.float32).astype(jnp.bfloat16)


def _new_rows(old: Tier, grads, bits, step, optimizer: Optimizer) -> Tier:
  """The optimizer on m touched rows. grads [m, d] float32."""
  rows, slots = optimizer.update(
    old.rows.astype(jnp.float32), old.slots, grads, step
  )
  if bits is not None:
    rows = _stochastic_round(rows, bits)
  return Tier(rows, slots)


def _bits(ranks, plan: Plan, step, seed):
  if plan.dtype == "float32":
    return None
  # Not the bits that the rows began with: their key is the seed.
  return row_bits(ranks, plan.dim, seed + step.astype(jnp.uint32) + 1)


def _summed(slots, grads, size: int, devices: int, copies: int):
  """Each slot once, with its gradient summed over devices, in float32.

  slots [m] int32, those from `size` on are padding; grads [m, d]. The slots
  that come back are all distinct, padding too, as scatter wants them. Each of
  the row's copies gets the same bits: it adds what they sent in their order.
  """
  grads = grads.astype(jnp.float32)
  if devices > 1:  # one device sends no slot twice
    slots, index = exchange.coalesce(jnp.where(slots < size, slots, NONE))
    parts = index.reshape(copies, -1), grads.reshape(copies, -1, grads.shape[1])

    def add(i, total):  # a sender's slots are distinct but for padding
      index, part = (x[i] for x in parts)
      return total.at[index].add(part)

    grads = jnp.zeros_like(grads)
    grads = (
      add(0, grads) if copies == 1 else lax.fori_loop(0, copies, add, grads)
    )
  padding = size + lax.iota(jnp.int32, slots.shape[0])
  return jnp.where(slots < size, slots, padding), grads


def _update_hot_dense(tier: Tier, trip, grads, plan, optimizer, step, seed):
  """Dense all-reduce of the replicas' gradients; untouched rows stay."""
  at = _hot_slots(trip.ids, plan)
  # One more column counts the uses, so that one all-reduce carries both.
  grads = jnp.concatenate([grads, jnp.ones((grads.shape[0], 1))], axis=1)
  total = jnp.zeros((plan.hot, plan.dim + 1)).at[at].add(grads, mode="drop")
  if plan.devices > 1:
    total = lax.psum(total, AXIS)
  touched = total[:, -1] > 0
  bits = _bits(lax.iota(jnp.int32, plan.hot), plan, step, seed)
  new = _new_rows(tier, total[:, :-1], bits, step, optimizer)

  def keep(new, old):  # [hot] or [hot, d]
    mask = touched if old.ndim == 1 else touched[:, None]
    return jnp.where(mask, new, old)

  return jax.tree.map(keep, new, tier)


def _update_hot_sparse(tier: Tier, slots, grads, plan, optimizer, step, seed):
  """Every device gathers what all touched, and updates its replica alike.

  slots [C_hot] int32, grads [C_hot, d].
  """
  slots = exchange.all_gather(slots, AXIS, plan.devices)
  grads = exchange.all_gather(grads, AXIS, plan.devices)
  slots, grads = _summed(slots, grads, plan.hot, plan.devices, plan.devices)
  old = jax.tree.map(lambda x: x.at[slots].get(mode="clip"), tier)
  bits = _bits(slots, plan, step, seed)
  new = _new_rows(old, grads, bits, step, optimizer)
  return jax.tree.map(
    lambda x, y: x.at[slots].set(y, mode="drop", unique_indices=True),
    tier,
    new,
  )


def _update_sharded(name, tier, slots, grads, plan, optimizer, step, seed):
  """Sums what was sent for a row, and updates it once, in place.

  slots [m] int32, grads [m, d]: of exchange.give.
  """
  size = tier.rows.shape[0]
  owners, _ = owners_of(plan, name)
  copies = plan.devices // owners
  slots, grads = _summed(slots, grads, size, plan.devices, copies)
  return _update_rows(name, tier, slots, grads, plan, optimizer, step, seed)


def _update_rows(name, tier, slots, grads, plan, optimizer, step, seed):
  """slots [m] int32, distinct, padding past the end; grads [m, d] float32."""
  owners, axes = owners_of(plan, name)
  owner = lax.axis_index(axes).astype(jnp.int32)
  ranks = first_rank(plan, name) + slots * owners + owner
  bits = _bits(ranks, plan, step, seed)
  index = jnp.stack([slots, jnp.zeros_like(slots)], axis=1)

  def apply(tier, index, grads, bits, step):
    old = jax.tree.map(lambda x: gather(x, index), tier)
    new = _new_rows(old, grads, bits, step, optimizer)
    return jax.tree.map(lambda x, y: scatter(x, index, y), tier, new)

  operands = (index, grads, bits, step)
  if name == "cold":
    return on_host(apply)(tier, *jax.device_put(operands, HOST))
  return apply(tier, *operands)


def update(
  tables: Tables,
  trip: Trip,
  gradients,  # [b, A, d] float32, of the activations
  features: tuple[Feature, ...],
  plan: Plan,
  exchange_dtype,
  optimizer: Optimizer,
  step,  # [] int32
  seed,  # [] uint32, for stochastic rounding
):
  """Every touched row updated once, with its gradient summed over all uses.

  Returns:
    (tables, the number of rounds that it took [] int32).
  """
  grads = spread(gradients, trip.coefficients, features)
  grads = grads.reshape(-1, plan.dim)  # [L, d]

  hot = tables.hot
  sparse = plan.hot > 0 and plan.hot_sync == "sparse"
  if plan.hot and not sparse:
    hot = _update_hot_dense(hot, trip, grads, plan, optimizer, step, seed)
  if plan.hot == plan.rows and not sparse:
    return tables._replace(hot=hot), jnp.ones((), jnp.int32)

  warm = tables.warm
  if trip.sent is not None:
    warm = _update_rows(
      "warm",
      warm,
      *pooled_lib.gradients(
        trip.sent,
        gradients,
        features,
        plan,
        exchange_dtype,
        warm.rows.shape[0],
      ),
      plan,
      optimizer,
      step,
      seed,
    )
  *starts, hot_start, total = exchange.buffer_starts(plan)

  def one_round(tiers: Tables, now) -> Tables:
    at = exchange.positions(trip.route, now, plan)
    buffer = jnp.zeros((total, plan.dim)).at[at].add(grads, mode="drop")
    buffer = buffer.astype(exchange_dtype)
    new = tiers._asdict()
    for name, way in exchange.ways(plan).items():
      start = starts[way.first]
      part = buffer[start : start + way.owners * way.capacity]
      slots, part = exchange.give(part, getattr(now, name), way, plan)
      new[name] = _update_sharded(
        name, new[name], slots, part, plan, optimizer, step, seed
      )
    if sparse:
      slots = exchange.hot_slots(trip.route, now, plan)
      new["hot"] = _update_hot_sparse(
        tiers.hot, slots, buffer[hot_start:], plan, optimizer, step, seed
      )
    return Tables(**new)

  tables = one_round(tables._replace(hot=hot, warm=warm), trip.round)
  rounds = jnp.ones((), jnp.int32)
  if not exchange.one_round(plan, trip.ids.shape[0]):

    def more(carry):
      tables, begin, _, rounds = carry
      now = exchange.next_round(trip.route, begin, plan)
      return one_round(tables, now), now.end, now.more, rounds + 1

    tables, *_, rounds = lax.while_loop(
      lambda c: c[2], more, (tables, trip.round.end, trip.round.more, rounds)
    )
  return tables, rounds
