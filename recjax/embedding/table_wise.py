"""Table-wise tables: bags to their table's owner, and one vector a bag back.

A device sends a table's owner the local rows of its bags; the owner sums them
and returns a vector a bag; later it gets the bag's gradient. All sizes are
static, [b, hotness] rows and [b] vectors, so there are no rounds. Owners'
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

from recjax.embedding import wire
from recjax.embedding.coalesce import NONE, coalesce
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.tables import gather
from recjax.plan import layout
from recjax.schema import AXES, Feature, activations_of, columns_of


class Bags(NamedTuple):
  """Whose bags go where: owner o's k-th column, and its v-th vector."""

  owner: np.ndarray  # [S] int32, of a column's table; -1: not table-wise
  column: np.ndarray  # [n, W] int32, of the group's; S = padding
  vector: np.ndarray  # [n, W] int32, that the column is added to
  columns: tuple[int, ...]  # of each owner
  vectors: tuple[int, ...]  # of each owner
  # Of all P table-wise features: its owner, its vector there, its activation,
  # its columns, and whether it is a mean.
  owners: np.ndarray  # [P] int32
  at: np.ndarray  # [P] int32
  activation: np.ndarray  # [P] int32
  spans: tuple[tuple[int, int], ...]
  mean: tuple[bool, ...]


class BagResiduals(NamedTuple):
  """What reading bags leaves for their gradients."""

  local: jax.Array  # [n, W, b] int32, rows asked of this owner by each peer
  scale: jax.Array | None  # [b, P] float32; None = 1


def _bags_of(g: EmbeddingGroup, devices: int) -> Bags:
  return bags_of(g.features, g.group.table_wise, devices)


@functools.cache
def bags_of(
  features: tuple[Feature, ...],
  owners: tuple[tuple[str, int], ...],
  devices: int,
) -> Bags:
  """Returns where the bags of a group's table-wise features go.

  Args:
    features: of the group.
    owners: (table, its owner) of the table-wise tables.
    devices: n.
  """
  n, owner_of = devices, dict(owners)
  size = sum(f.hotness for f in features)
  owner = np.full(size, -1, np.int32)
  columns: list[list[int]] = [[] for _ in range(n)]
  into: list[list[int]] = [[] for _ in range(n)]
  vectors = [0] * n
  found = []
  at, activation = columns_of(features), activations_of(features)
  for f in features:
    o, mine = owner_of.get(f.table, -1), at[f.name]
    if o < 0:
      continue
    owner[mine] = o
    columns[o] += range(mine.start, mine.stop)
    into[o] += [vectors[o]] * f.hotness
    span = (mine.start, mine.stop)
    first = activation[f.name].start
    found.append((o, vectors[o], first, span, f.pooling == "mean"))
    vectors[o] += 1
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
  return lax.axis_index(AXES).astype(jnp.int32)


def _travel(x, counts: tuple[int, ...], *, back: bool):
  """Exchanges x [n, K, ...], a part for each peer, for what the peers sent.

  Device i sends owner o the first counts[o] of x[o]; `back`, owner o sends
  each peer p the first counts[o] of x[p].
  """
  n = len(counts)
  if n == 1:
    return x
  me, out = _me(), []
  for start, stop, members in layout.layers(counts):
    part = x[:, start:stop]
    if len(members) == n:
      out.append(wire.all_to_all(part, AXES, n))
      continue
    got = jnp.zeros_like(part).at[me].set(part[me])
    for shift in range(1, n):
      pairs = [(i, (i + shift) % n) for i in range(n)]
      pairs = [p for p in pairs if p[0 if back else 1] in members]
      there = wire.shift(part[(me + shift) % n], AXES, pairs)
      got = got.at[(me - shift) % n].set(there)
    out.append(got)
  return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def to_owners(ids, g: EmbeddingGroup, devices: int):
  """Returns which lookups go to a table's owner: [b, S] bool.

  ids [b, S] int32 of JAX or NumPy: positions, of the group's columns.
  """
  tier = g.group.table_wise_tier
  assert tier is not None
  owner = _bags_of(g, devices).owner[None]
  there = (ids >= tier.first) & (ids < tier.stop)
  return there & ((ids - tier.first) % devices == owner)


def read_bags(arrays: TierArrays, ids, g: EmbeddingGroup, embedding: Embedding):
  """Fetches the parts of bags' sums or means that `to_owners` says.

  Args:
    arrays: the table-wise tier's.
    ids: [b, S] int32 positions of the group's columns, -1 = none.
    g: the group.
    embedding: all of them.

  Returns:
    (activations' indices [P], vectors [b, P, d] float32, BagResiduals).
  """
  n, b = embedding.plan.devices, ids.shape[0]
  bags, tier = _bags_of(g, n), g.group.table_wise_tier
  assert tier is not None
  size = tier.shard_rows
  local = jnp.where(to_owners(ids, g, n), (ids - tier.first) // n, size)
  local = jnp.concatenate([local, jnp.full((b, 1), size, jnp.int32)], axis=1)
  local = local.T[bags.column]  # [n, W, b]
  local = _travel(local, bags.columns, back=False)
  mine = lax.iota(jnp.int32, local.shape[1]) < jnp.asarray(bags.columns)[_me()]
  local = jnp.where(mine[None, :, None], local, size)  # the others: padding
  sums = _sums(arrays, local, bags)
  got = _travel(sums.astype(embedding.wire_dtype), bags.vectors, back=True)
  vectors = got[bags.owners, bags.at].astype(jnp.float32)  # [P, b, d]
  vectors = jnp.swapaxes(vectors, 0, 1)
  scale = _scale(ids, bags)
  if scale is not None:
    vectors = vectors * scale[..., None]
  return bags.activation, vectors, BagResiduals(local, scale)


def _scale(ids, bags: Bags):
  """Returns what a bag's vector is multiplied with, [b, P] float32 or None."""
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


def _sums(arrays: TierArrays, local, bags: Bags):
  """Sums an owner's vectors for each peer: [n, W, b] -> [n, V, b, d] float32.

  Column by column: all rows at once would be n W b of them.
  """
  n, columns, b = local.shape
  size, _, d = arrays.rows.shape
  into = jnp.asarray(bags.vector)[_me()]

  def add(k, sums):
    row = local[:, k].reshape(-1)
    index = jnp.stack([row, jnp.zeros_like(row)], axis=1)
    rows = gather(arrays.rows, index).astype(jnp.float32)
    rows = jnp.where(row[:, None] < size, rows, 0).reshape(n, b, d)
    return sums.at[:, into[k]].add(rows)

  zeros = jnp.zeros((n, max(bags.vectors), b, d))
  return lax.fori_loop(0, columns, add, zeros)


def return_bag_gradients(
  residuals: BagResiduals,
  grads,  # [b, A, d] float32, of the group's activations
  g: EmbeddingGroup,
  embedding: Embedding,
):
  """Sends the bags' gradients to the owners, and sums them by row there.

  Returns:
    (local rows [m] int32, gradients [m, d] float32) at the owner: each row
    once, with its gradient summed over all uses; padding is distinct rows past
    the shard's end.
  """
  bags, tier = _bags_of(g, embedding.plan.devices), g.group.table_wise_tier
  assert tier is not None
  size, d = tier.shard_rows, g.dim
  n, columns, b = residuals.local.shape
  grads = grads[:, bags.activation]  # [b, P, d]
  if residuals.scale is not None:
    grads = grads * residuals.scale[..., None]
  buffer = jnp.zeros((n, max(bags.vectors), b, d), embedding.wire_dtype)
  grads = jnp.swapaxes(grads, 0, 1).astype(embedding.wire_dtype)
  buffer = buffer.at[bags.owners, bags.at].set(grads)
  got = _travel(buffer, bags.vectors, back=False)

  keys = jnp.where(residuals.local < size, residuals.local, NONE)
  local, index = coalesce(keys.reshape(-1))
  m = min(local.shape[0], size)
  index = index.reshape(residuals.local.shape)
  into = jnp.asarray(bags.vector)[_me()]

  def add(k, total):
    part = got[:, into[k]].reshape(n * b, d).astype(jnp.float32)
    return total.at[index[:, k].reshape(-1)].add(part, mode="drop")

  total = lax.fori_loop(0, columns, add, jnp.zeros((m, d)))
  local = local[:m]
  padding = size + lax.iota(jnp.int32, m)
  return jnp.where(local < size, local, padding), total
