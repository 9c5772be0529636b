"""The forward pass of the embedding: a batch's ids -> each feature's vectors.

Runs inside `shard_map`, on a device's part of the batch. The lookup is linear
in the rows; its transpose is update.py, and a table is never differentiated
through.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from recjax.embedding import exchange, table_wise
from recjax.embedding.buckets import buckets_of
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.exchange import Round, Route
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.pooling import by_feature, coefficients, masks_of, pool
from recjax.embedding.table_wise import BagResiduals
from recjax.embedding.tables import Tables, gather
from recjax.plan.plan import Tier


class GroupResiduals(NamedTuple):
  """What the lookup of a group leaves for its update."""

  ids: jax.Array  # [L] int32 positions, -1 = none or with a table's owner
  coefficients: jax.Array | None  # [b, S] float32; None = 1
  bags: BagResiduals | None  # of table-wise tables
  stored: jax.Array | None = None  # [V, 1] int32: visitors' stored local rows


class Residuals(NamedTuple):
  """What the lookup of a batch leaves for the update."""

  groups: tuple[GroupResiduals, ...]
  route: Route | None  # None where no row travels
  round: Round | None  # the first

  @property
  def lookups(self) -> tuple[int, ...]:
    """L of each group."""
    return tuple(g.ids.shape[0] for g in self.groups)


def forward(embedding: Embedding, tables: Tables, batch: Mapping[str, Any]):
  """Looks up the rows of a batch.

  Args:
    embedding: the groups.
    tables: a device's shards, visitors among them.
    batch: ids [b, S] int32, positions of the rows in their groups (ranks,
      unless tables are table-wise: plan/positions.py; those of stored rows
      translated: visits.py), -1 = none; maybe weights [b, S] float32, and the
      route of these ids, made on the host (host_route.py): Route of [1, ...]
      arrays; and of groups with visitors their stored local rows, {group:
      [V, 1] int32}.

  Returns:
    ({feature: [b, h, d] float32}, Residuals).

  Raises:
    ValueError: a group's visitors are missing.
  """
  plan, ids = embedding.plan, batch["ids"]
  for g in embedding.visited:
    if g.group.visitors.name not in tables[g.name]:
      raise ValueError(
        f"group {g.name} has rows in host memory, which this lookup cannot "
        "fetch: use run.step and run.forward, or a plan with all rows on the "
        "devices (config.plan.device_memory_mb, config.plan.warm_rows = -1)"
      )
  groups, own_ids = [], []
  for g in embedding.groups:
    mine = g.take(ids)
    weights = g.take(batch["weights"]) if "weights" in batch else None
    coef = coefficients(mine, weights, g.features)
    own_ids.append(mine)
    if g.group.table_wise:
      there = table_wise.to_owners(mine, g, plan.devices)
      mine = jnp.where(there, -1, mine)
    stored = batch.get("stored", {}).get(g.name)
    groups.append(GroupResiduals(mine.reshape(-1), coef, None, stored))
  residuals = Residuals(tuple(groups), None, None)
  if buckets_of(plan).tiers:
    with jax.named_scope("route"):
      route = _given_route(batch)
      if route is None:
        route = exchange.route([x.ids for x in groups], plan)
      now = exchange.plan_round(
        route, route.starts[:-1], plan, residuals.lookups
      )
    residuals = residuals._replace(route=route, round=now)
  with jax.named_scope("lookup"):
    return _read(embedding, tables, own_ids, residuals)


def _given_route(batch) -> Route | None:
  """Returns this device's route, where the batch brings it."""
  if "route" not in batch:
    return None
  return Route(*(x[0] for x in batch["route"]))


def masks(embedding: Embedding, ids):  # [b, S] int32
  """Returns which positions of sequences hold an id: {feature: [b, h] bool}."""
  found = {}
  for g in embedding.groups:
    found |= masks_of(g.take(ids), g.features)
  return found


def _read(embedding: Embedding, tables: Tables, ids, residuals: Residuals):
  """Returns the activations by feature, and the residuals with the bags'."""
  now, plan = residuals.round, embedding.plan
  arrived = {} if now is None else _fetch(embedding, tables, residuals, now)
  vectors = []
  for i, g in enumerate(embedding.groups):
    sources = [arrived[i]] if i in arrived else []
    if g.group.hot:
      mine = residuals.groups[i].ids.reshape(-1, g.lookups)
      sources.append(_of_replicas(tables[g.name], mine, g))
    vectors.append(_pooled(sources, residuals.groups[i], g))
  if arrived and not exchange.one_round(plan, residuals.lookups):
    vectors = _more_rounds(embedding, tables, residuals, vectors)
  activations, groups = {}, list(residuals.groups)
  for i, g in enumerate(embedding.groups):
    if g.group.table_wise:
      tier = g.group.table_wise_tier
      at, of_bags, bags = table_wise.read_bags(
        tables[g.name][tier.name], ids[i], g, embedding
      )
      vectors[i] = vectors[i].at[:, at].add(of_bags, unique_indices=True)
      groups[i] = groups[i]._replace(bags=bags)
    activations |= by_feature(vectors[i], g.features)
  return activations, residuals._replace(groups=tuple(groups))


def _pooled(sources: list[Callable], of: GroupResiduals, g: EmbeddingGroup):
  """Returns [b, A, d] of the sum of what each source has of the rows."""
  take = lambda columns: sum(x(columns).astype(jnp.float32) for x in sources)
  return pool(take, of.coefficients, g.features)


def _of_replicas(tiers: dict[str, TierArrays], ids, g: EmbeddingGroup):
  """Returns a taker of columns' hot rows; other rows are 0."""
  tier = g.group.hot
  return _taker(tiers[tier.name].rows, replica_rows(ids, tier))


def replica_rows(ids, tier: Tier):  # [...] int32 -> [...] int32
  """Returns the local rows of hot ids; of others the tier's end."""
  return jnp.where((ids >= 0) & (ids < tier.rows), ids, tier.rows)


def _fetch(embedding, tables, residuals: Residuals, now: Round):
  """Fetches a round's rows: {group: taker of columns}; other rows are 0."""
  plan, route = embedding.plan, residuals.route
  known = buckets_of(plan)
  buffers: dict[int, list] = {}
  for t, asked in zip(known.sharded, now.requests, strict=True):
    g = embedding.groups[t.group]
    rows = _rows_at(tables[g.name][t.tier.name], asked.local)
    rows = rows.astype(embedding.wire_dtype)
    rows = exchange.fetch_rows(rows, asked, t, plan)
    buffers.setdefault(t.group, []).append(rows)
  places = exchange.buffer_places(route, now, plan, residuals.lookups)
  found = {}
  for i, parts in buffers.items():
    buffer = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    at = places[i].reshape(-1, embedding.groups[i].lookups)
    found[i] = _taker(buffer, at)
  return found


def _taker(buffer, at):  # [C, d], [b, S] int32 -> columns -> [b, columns, d]
  """Returns a taker of columns' rows; those past the end are 0.

  With one mask for all columns, which a gather that is to fill would make anew
  for each `take`: 7 kernels less with half of the rows hot (H100, jax 0.12).
  """
  there = at < buffer.shape[0]
  at = jnp.minimum(at, buffer.shape[0] - 1)

  def take(columns):
    rows = buffer.at[at[:, columns]].get(mode="promise_in_bounds")
    return jnp.where(there[:, columns, None], rows, 0)

  return take


def _rows_at(arrays: TierArrays, local):  # [m] int32 -> [m, d]
  index = jnp.stack([local, jnp.zeros_like(local)], axis=1)
  return gather(arrays.rows, index)


def _more_rounds(embedding, tables, residuals: Residuals, vectors):
  """Adds the rows of the rounds after the first, while there are any."""
  plan, route = embedding.plan, residuals.route

  def add(carry):
    vectors, begin, _ = carry
    now = exchange.plan_round(route, begin, plan, residuals.lookups)
    arrived = _fetch(embedding, tables, residuals, now)
    vectors = list(vectors)
    for i, take in arrived.items():
      of, g = residuals.groups[i], embedding.groups[i]
      vectors[i] = vectors[i] + _pooled([take], of, g)
    return vectors, now.end, now.more

  first = residuals.round
  vectors, *_ = lax.while_loop(
    lambda c: c[2], add, (vectors, first.end, first.more)
  )
  return vectors
