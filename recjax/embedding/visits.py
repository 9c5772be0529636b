"""Which stored rows a batch uses, and where they stand among the visitors.

Stored rows (cold and frozen ones) are not in device memory. Those that a batch
uses visit: each owner's device gets its own, once, in rank order, and the
batch's ids are translated to where they stand. The i-th visitor of owner o has
the position `first + i n + o`, as a row of any sharded tier has: all that
follows, the exchange and the update, sees a small sharded tier.

Two devices own the stored rows 100, 101, ... in turn. A batch that looks up
[3, 107, 101, 104, 107] uses the rows 0 -> [4 // 2] of owner 0 and [0, 3] of
owner 1 (local rows), so the visitors are [2] and [0, 3], and the ids become
[3, 103, 101, 100, 103].

The same is done twice: by NumPy for all devices, where a process has the whole
batch and its devices are CPUs, and on the devices.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from recjax.embedding import host_route, wire
from recjax.embedding.coalesce import NONE, coalesce, places_of
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.optimizers import TierArrays
from recjax.schema import AXES

# Of each group with stored rows, by its name, each owner's local rows [v]
# int32, ascending.
Lists = dict[str, list[np.ndarray]]


class Beside(NamedTuple):
  """What a step needs of a group's visitors beside their rows, on the mesh."""

  stored: jax.Array  # [V, n] int32: their local rows in the store
  forwarded: jax.Array  # [V, n] int32: places in `before`, NONE = fetched
  before: TierArrays  # [V', n, ...]: the visitors of the step before, updated


# ---- By NumPy


def on_host(ids: np.ndarray, embedding: Embedding) -> tuple[np.ndarray, Lists]:
  """Returns a global batch's ids [B, S] translated, and all owners' rows."""
  ids, lists = ids.copy(), {}
  for g in embedding.visited:
    first, n = g.group.visitors.first, g.group.visitors.owners
    lists[g.name] = _translate(ids, g, first, n)
  return ids, lists


def _translate(ids, g: EmbeddingGroup, first: int, n: int) -> list[np.ndarray]:
  """Translates a group's columns in place; returns the owners' rows."""
  there = np.zeros(ids.shape, bool)
  for at in g.columns:
    there[:, at] = ids[:, at] >= first
  rows, index = host_route.coalesce(ids[there] - np.int32(first))
  rows = rows[: np.searchsorted(rows, NONE)]
  local, owner = np.divmod(rows, np.int32(n))
  lists, place = [], np.empty_like(rows)
  for o in range(n):
    mine = np.flatnonzero(owner == o)
    lists.append(local[mine])
    place[mine] = np.arange(len(mine)) * n + (first + o)
  ids[there] = place[index]
  return lists


# ---- On the devices


class Asked(NamedTuple):
  """What the devices found out of a batch; on the mesh."""

  ids: jax.Array  # [B, S] int32, translated
  rows: dict[str, jax.Array]  # of a group [V, n] int32: an owner's, then NONE
  # Of a group [2] int32: the most rows of an owner, and the most that a device
  # asks an owner for. Where either passes its room, all else is void.
  need: dict[str, jax.Array]


Room = Mapping[str, tuple[int, int]]  # V of a group, and rows asked of an owner


def make_on_devices(embedding: Embedding, mesh: Mesh, room: Room):
  """Makes the jitted (ids [B, S] int32) -> Asked, for so much room."""

  def visit(ids):  # [b, S]
    rows, need = {}, {}
    for g in embedding.visited:
      ids, rows[g.name], need[g.name] = _ask(ids, g, *room[g.name])
    return Asked(ids, rows, need)

  specs = Asked(PartitionSpec(AXES), PartitionSpec(None, AXES), PartitionSpec())
  return jax.jit(
    jax.shard_map(
      visit,
      mesh=mesh,
      in_specs=PartitionSpec(AXES),
      out_specs=specs,
      check_vma=False,
    )
  )


def _ask(ids, g: EmbeddingGroup, v: int, c: int):  # [b, S] int32
  """Asks the owners of a group's stored rows, and learns where they stand.

  Returns:
    (ids [b, S], this owner's rows [v, 1] int32, need [2] int32).
  """
  tier = g.group.visitors
  first, n = tier.first, tier.owners
  mine = g.take(ids).reshape(-1)
  there, rank = mine >= first, mine - first
  owner = jnp.where(there, rank % n, n)
  size = sum(t.shard_rows for t in g.group.stored)
  # A row's key is below 2^31: positions are, and shards are padded little.
  keys = jnp.where(there, owner * size + rank // n, NONE)
  distinct, index = coalesce(keys)
  distinct = jnp.append(distinct, NONE)
  starts = places_of(
    np.arange(n + 1, dtype=np.int32) * np.int32(size), distinct
  )
  at = starts[:-1, None] + lax.iota(jnp.int32, c)[None]  # [n, c]
  base = lax.broadcasted_iota(jnp.int32, (n, 1), 0) * size
  asked = distinct[jnp.minimum(at, distinct.shape[0] - 1)] - base
  asked = jnp.where(at < starts[1:, None], asked, NONE)
  got = wire.all_to_all(asked, AXES, n)
  rows, place = coalesce(got.reshape(-1))
  count = jnp.sum(rows != NONE, dtype=jnp.int32)
  most = jnp.max(starts[1:] - starts[:-1])
  need = lax.pmax(jnp.stack([count, most]), AXES)
  answer = wire.all_to_all(place.reshape(n, c), AXES, n)
  o = jnp.minimum(owner, n - 1)
  i = answer[o, jnp.clip(index - starts[o], 0, c - 1)]
  new = jnp.where(there, first + i * n + o, mine).reshape(-1, g.lookups)
  padded = jnp.concatenate([rows, jnp.full(v, NONE)])[:v]
  return g.put(ids, new), padded[:, None], need


# ---- From one batch to the next


def forwarded(before: np.ndarray, now: np.ndarray) -> np.ndarray:
  """Returns where rows `now` [v] stand in `before` [u]: [v] int32; NONE = not.

  Both ascend.
  """
  if not len(before):
    return np.full(len(now), NONE)
  at = np.minimum(np.searchsorted(before, now), len(before) - 1)
  return np.where(before[at] == now, at, NONE).astype(np.int32)
