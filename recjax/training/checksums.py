"""Checksums of what is on devices; row_checks.py says what they are."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.tables import Tables
from recjax.mesh import replicated
from recjax.plan.plan import Tier
from recjax.training.row_checks import factor, folded


def _words(x):  # any shape, 2- or 4-byte dtype -> the same shape, uint32
  """Returns the bits of an array as numbers."""
  kind = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
  return folded(lax.bitcast_convert_type(x, kind).astype(jnp.uint32))


@jax.jit
def of_dense(tree):  # 2- or 4-byte leaves -> uint32
  """Returns the sum of all leaves, each word by its place in all of them."""
  total, first = jnp.uint32(0), 0
  for x in jax.tree.leaves(tree):
    at = lax.iota(jnp.uint32, x.size) + np.uint32(first % 2**32)
    total += jnp.sum(_words(x).reshape(-1) * factor(at), dtype=jnp.uint32)
    first += x.size
  return total


def make_checksums(embedding: Embedding, mesh: Mesh):
  """Makes the jitted Tables -> {"group.array": uint32}, over resident rows.

  An array is "rows" or a slot variable; its sum is that of the rows of all
  tiers in device memory, without those of padded shards.
  """

  def checksums(tables: Tables):
    total: dict[str, jax.Array] = {}
    for g in embedding.groups:
      for tier in g.group.resident:
        for name, x in _tier_sums(tables[g.name][tier.name], tier).items():
          key = f"{g.name}.{name}"
          total[key] = total.get(key, jnp.uint32(0)) + x
    return total

  sharded = jax.shard_map(
    checksums,
    mesh=mesh,
    in_specs=(tables_lib.specs(embedding),),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, out_shardings=replicated(mesh))


def _tier_sums(arrays: TierArrays, tier: Tier) -> dict[str, jax.Array]:
  """Sums a tier's rows and slot variables over its owners."""

  def sums(arrays: TierArrays, at):  # at [shard rows, 1] or [rows], in the tier
    def one(x):
      shape = x.shape if x.ndim > at.ndim else (*x.shape, 1)
      column = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
      factors = of_row[..., None] * factor(~column)
      return jnp.sum(_words(x).reshape(shape) * factors, dtype=jnp.uint32)

    of_row = factor(at + np.uint32(tier.first))
    of_row = jnp.where(at < tier.rows, of_row, 0)  # no padding

    slots = {name: one(x) for name, x in arrays.slots.items()}
    return {"rows": one(arrays.rows), **slots}

  if not tier.axes:
    return sums(arrays, lax.iota(jnp.uint32, tier.rows))
  owner = lax.axis_index(tier.axes).astype(jnp.uint32)
  local = lax.broadcasted_iota(jnp.uint32, (tier.shard_rows, 1), 0)
  at = local * np.uint32(tier.owners) + owner
  return lax.psum(sums(arrays, at), tier.axes)  # of copies once
