"""Checksums of what is on devices: wrapping sums of words."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.tables import Tables
from recjax.mesh import replicated
from recjax.plan.plan import Tier


def _words(x):  # any shape, 2- or 4-byte dtype -> the same shape, uint32
  """Returns the bits of an array as numbers."""
  kind = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
  return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


@jax.jit
def of_dense(tree):  # 2- or 4-byte leaves -> uint32
  """Returns the wrapping sum of all bits: one damaged word changes it."""
  return sum(jnp.sum(_words(x)) for x in jax.tree.leaves(tree))


def make_checksums(embedding: Embedding, mesh: Mesh):
  """Makes the jitted Tables -> {"group.array": uint32}, over resident rows.

  An array is "rows" or a slot variable; its sum is that of the words of all
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
  """Sums the words of a tier's rows and slot variables over its owners."""

  def sums(arrays: TierArrays, valid):  # valid [shard rows, 1] or [rows] bool
    def one(x):
      words = _words(x)
      mask = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
      return jnp.sum(jnp.where(mask, words, words - words), dtype=jnp.uint32)

    slots = {name: one(x) for name, x in arrays.slots.items()}
    return {"rows": one(arrays.rows), **slots}

  if not tier.axes:
    return sums(arrays, jnp.ones(tier.rows, bool))
  owner = lax.axis_index(tier.axes).astype(jnp.int32)
  local = lax.broadcasted_iota(jnp.int32, (tier.shard_rows, 1), 0)
  valid = local * tier.owners + owner < tier.rows
  return lax.psum(sums(arrays, valid), tier.axes)  # of copies once
