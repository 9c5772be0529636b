"""The tables: every group's rows in tiers, a pytree outside Flax.

A sharded tier of K rows is stored as [ceil(K / n), n, d], its second axis over
the mesh: flattened it is the rank order, and the cyclic ownership is its
sharding. Where every node has a copy of the rows, n is the devices of a node
and the copies are replicas of the array. It is indexed as it is, never
reshaped: a reshape around an update would copy the shard.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.row_random import initial_rows
from recjax.plan.plan import Tier
from recjax.schema import AXES

# Of each group, by its name, its tiers in device memory, by their names: in
# rank order, or in the order of positions where tables are table-wise.
Tables = dict[str, dict[str, TierArrays]]


def spec_of(tier: Tier) -> PartitionSpec:
  """Returns the PartitionSpec of a tier's arrays."""
  if not tier.axes:
    return PartitionSpec()
  return PartitionSpec(None, tier.axes if len(tier.axes) > 1 else tier.axes[0])


def specs(embedding: Embedding, visitors: bool = False) -> Tables:
  """Returns the PartitionSpecs of the tables, as `shard_map` wants them.

  Args:
    embedding: the groups.
    visitors: whether they are among the tables.
  """
  return {
    g.name: {
      t.name: TierArrays(
        spec_of(t), dict.fromkeys(g.optimizer.slots, spec_of(t))
      )
      for t in (g.group.on_device if visitors else g.group.resident)
    }
    for g in embedding.groups
  }


def shapes(embedding: Embedding, visitors: bool = False) -> Tables:
  """Returns the shapes and dtypes of the tables; see `specs`."""
  found: Tables = {}
  for g in embedding.groups:
    found[g.name] = {}
    for t in g.group.on_device if visitors else g.group.resident:
      found[g.name][t.name] = tier_shapes(g, t)
  return found


def tier_shapes(g: EmbeddingGroup, t: Tier) -> TierArrays:
  """Returns the shapes and dtypes of a tier's arrays."""
  shape = (t.shard_rows, t.owners) if t.axes else (t.rows,)
  slots = {
    name: jax.ShapeDtypeStruct((*shape, g.dim) if wide else shape, jnp.float32)
    for name, wide in g.optimizer.slots.items()
  }
  rows = jax.ShapeDtypeStruct((*shape, g.dim), g.group.dtype)
  return TierArrays(rows, slots)


def shardings(embedding: Embedding, mesh: Mesh) -> Tables:
  """Returns the NamedShardings of the tables."""
  return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(embedding))


def gather(x, index):  # [s, 1, ...], [m, 2] int32 -> [m, ...]
  """Returns rows x[local row, 0] of a shard; past its end, some row."""
  tail = x.shape[2:]
  dims = lax.GatherDimensionNumbers(
    offset_dims=tuple(range(1, 1 + len(tail))),
    collapsed_slice_dims=(0, 1),
    start_index_map=(0, 1),
  )
  mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS  # XLA clamps the index
  return lax.gather(x, index, dims, (1, 1, *tail), mode=mode)


def scatter(x, index, rows):  # [s, 1, ...], [m, 2] int32, [m, ...]
  """Sets x[local row, 0] = row, for distinct rows; drops those past the end."""
  dims = lax.ScatterDimensionNumbers(
    update_window_dims=tuple(range(1, rows.ndim)),
    inserted_window_dims=(0, 1),
    scatter_dims_to_operand_dims=(0, 1),
  )
  mode = lax.GatherScatterMode.FILL_OR_DROP
  return lax.scatter(x, index, rows, dims, unique_indices=True, mode=mode)


# ---- First values


def init(
  embedding: Embedding,
  mesh: Mesh,
  scale: float,
  ranks: Mapping[str, np.ndarray] | None = None,
) -> Tables:
  """Makes rows uniform in +-scale by (seed, rank, column), slot variables 0.

  Those in device memory; host_store.py has the stored ones. Every shard is
  computed where it belongs, without a temporary copy.

  Args:
    embedding: the groups.
    mesh: where they go.
    scale: of the rows.
    ranks: of groups with table-wise tables, the ranks [positions] int32 of that
      tier's positions; one without a row, -1, gets zeros.
  """
  place = PartitionSpec(None, AXES)
  given = {
    g.name: _placed_ranks(g, (ranks or {})[g.name], NamedSharding(mesh, place))
    for g in embedding.groups
    if g.group.table_wise
  }
  seeds = np.array([g.seed for g in embedding.groups], np.uint32)
  return make_init(embedding, mesh, scale)(seeds, given)


def make_init(embedding: Embedding, mesh: Mesh, scale: float):
  """Makes the jitted (seeds [groups] uint32, ranks by group) -> Tables.

  ranks [shard rows, n] int32 of the groups with table-wise tables.
  """

  def make(seeds, given):  # a device's shards
    return {
      g.name: {
        t.name: _first_tier(g, t, scale, seeds[i], given.get(g.name))
        for t in g.group.resident
      }
      for i, g in enumerate(embedding.groups)
    }

  make = jax.shard_map(
    make,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(None, AXES)),
    out_specs=specs(embedding),
    check_vma=False,
  )
  return jax.jit(make, out_shardings=shardings(embedding, mesh))


def _placed_ranks(g: EmbeddingGroup, ranks: np.ndarray, place: NamedSharding):
  """Returns the table-wise tier's ranks as [shard rows, n], over the mesh."""
  tier = g.group.table_wise_tier
  assert tier is not None
  padding = tier.shard_rows * tier.owners - len(ranks)
  ranks = np.pad(ranks, (0, padding), constant_values=-1)
  ranks = ranks.reshape(-1, tier.owners)
  return jax.make_array_from_callback(ranks.shape, place, lambda i: ranks[i])


def _first_tier(g: EmbeddingGroup, tier: Tier, scale: float, seed, ranks):
  """Returns a device's part of a tier; ranks [shard rows, 1] where given."""

  def values(ranks, seed):
    shape = {True: (*ranks.shape, g.dim), False: ranks.shape}
    slots = {
      name: jnp.zeros(shape[wide], jnp.float32)
      for name, wide in g.optimizer.slots.items()
    }
    rows = initial_rows(ranks, g.dim, scale, seed).astype(g.group.dtype)
    return TierArrays(rows, slots)

  def of_owner(owner, seed):
    local = lax.broadcasted_iota(jnp.int32, (tier.shard_rows, 1), 0)
    first = g.group.first_rank(tier)
    return values(local * tier.owners + owner.reshape(1, 1) + first, seed)

  if not tier.axes:
    return values(lax.iota(jnp.int32, tier.rows), seed)
  if tier == g.group.table_wise_tier:
    made = values(ranks, seed)
    return made._replace(rows=jnp.where(ranks[..., None] < 0, 0, made.rows))
  return of_owner(lax.axis_index(tier.axes).astype(jnp.int32), seed)


# ---- Filling, block by block


def blocks(tier: Tier, block_rows: int) -> Iterator[tuple[int, int]]:
  """Yields (first local row, local rows) of every block, in rank order.

  Local rows [s, s + k) of all n owners are the tier's ranks [s n, (s + k) n).
  """
  total = -(-tier.rows // tier.owners)
  step = max(1, block_rows // tier.owners)
  for start in range(0, total, step):
    yield start, min(step, total - start)


@functools.cache
def block_writer(tier: Tier, slots: tuple[str, ...], mesh: Mesh):
  """Returns the jitted (tier's arrays, block, first local row) -> arrays.

  In place.

  Args:
    tier: whose arrays they are.
    slots: names of the slot variables.
    mesh: where the tier is.
  """
  spec = TierArrays(spec_of(tier), dict.fromkeys(slots, spec_of(tier)))
  out = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)

  def write(arrays, block, start):
    return jax.tree.map(
      lambda x, new: lax.dynamic_update_slice_in_dim(x, new, start, 0),
      arrays,
      block,
    )

  write = jax.shard_map(
    write,
    mesh=mesh,
    in_specs=(spec, spec, PartitionSpec()),
    out_specs=spec,
    check_vma=False,
  )
  return jax.jit(write, donate_argnums=0, out_shardings=out)


def fill(
  tables: Tables,
  embedding: Embedding,
  mesh: Mesh,
  block_rows: int,
  rows: Callable[[str, int, int], TierArrays],
) -> Tables:
  """Writes every row in device memory, group by group in rank order, by blocks.

  In place.

  Args:
    tables: donated.
    embedding: the groups.
    mesh: where the tables are.
    block_rows: rows of a block, about.
    rows: (group, first, stop) -> arrays of numpy, [stop - first] of them; asked
      for in ascending, adjoining ranges that cover the positions of the tiers
      in device memory.
  """
  placed = shardings(embedding, mesh)
  out: Tables = {}
  for g in embedding.groups:
    out[g.name] = {}
    for tier in g.group.resident:
      arrays, n = tables[g.name][tier.name], tier.owners
      place = placed[g.name][tier.name]
      write = block_writer(tier, tuple(g.optimizer.slots), mesh)
      for start, count in blocks(tier, block_rows):
        first = tier.first + start * n
        stop = min(first + count * n, tier.stop)
        block = rows(g.name, first, stop)
        if tier.axes:
          block = jax.tree.map(
            lambda x, n=n, k=count: _padded(x, k * n).reshape(
              k, n, *x.shape[1:]
            ),
            block,
          )
        block = jax.tree.map(
          lambda x, s: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, s.spec), lambda i, x=x: x[i]
          ),
          block,
          place,
        )
        arrays = write(arrays, block, np.int32(start))
      out[g.name][tier.name] = arrays
  return out


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
