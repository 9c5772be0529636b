"""Checksums of what is on devices; row_checks.py says what they are."""

from collections.abc import Mapping
from typing import NamedTuple

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
from recjax.training.finite import Refusal
from recjax.training.row_checks import NONE, NotFiniteError, factor, folded


def _words(x):  # any shape, 2- or 4-byte dtype -> the same shape, uint32
  """Returns the bits of an array as numbers."""
  kind = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
  return folded(lax.bitcast_convert_type(x, kind).astype(jnp.uint32))


class Check(NamedTuple):
  """What is known of an array, or of several: numbers of NumPy or of JAX."""

  total: jax.Array  # uint32, the checksum
  # uint32: position of the first row that is not finite; NONE = all are.
  not_finite: jax.Array

  def __add__(self, other: "Check") -> "Check":
    """Returns the check of both arrays."""
    first = jnp.minimum(self.not_finite, other.not_finite)
    return Check(self.total + other.total, first)


@jax.jit
def of_dense(tree):  # 2- or 4-byte leaves -> uint32, [leaves] bool
  """Returns (the sum of all leaves, which of them are finite).

  A word's factor is that of its place in all leaves.
  """
  total, first, finite = jnp.uint32(0), 0, []
  for x in jax.tree.leaves(tree):
    at = lax.iota(jnp.uint32, x.size) + np.uint32(first % 2**32)
    total += jnp.sum(_words(x).reshape(-1) * factor(at), dtype=jnp.uint32)
    first += x.size
    finite.append(jnp.all(jnp.isfinite(x)))
  return total, jnp.stack(finite)


def make_checksums(embedding: Embedding, mesh: Mesh):
  """Makes the jitted Tables -> {"group.array": Check}, over resident rows.

  An array is "rows" or a slot variable; its check is that of the rows of all
  tiers in device memory, without those of padded shards.
  """

  def checksums(tables: Tables):
    found: dict[str, Check] = {}
    for g in embedding.groups:
      for tier in g.group.resident:
        for name, x in _tier_checks(tables[g.name][tier.name], tier).items():
          key = f"{g.name}.{name}"
          found[key] = found[key] + x if key in found else x
    return found

  sharded = jax.shard_map(
    checksums,
    mesh=mesh,
    in_specs=(tables_lib.specs(embedding),),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, out_shardings=replicated(mesh))


def _tier_checks(arrays: TierArrays, tier: Tier) -> dict[str, Check]:
  """Checks a tier's rows and slot variables, of all its owners."""

  def check(x, at):  # at [shard rows, 1] or [rows], in the tier
    shape = x.shape if x.ndim > at.ndim else (*x.shape, 1)
    x, at, is_row = x.reshape(shape), at[..., None], at[..., None] < tier.rows
    at += np.uint32(tier.first)
    of_row = jnp.where(is_row, factor(at), 0)
    column = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    fine = jnp.isfinite(x) | ~is_row
    words = _words(x) * of_row * factor(~column)
    where = jnp.where(fine, np.uint32(NONE), at)
    # Both in one pass, without a temporary array.
    total, first = lax.reduce(
      (words, where),
      (np.uint32(0), np.uint32(NONE)),
      lambda a, b: (a[0] + b[0], jnp.minimum(a[1], b[1])),
      range(len(shape)),
    )
    if not tier.axes:
      return Check(total, first)
    # Of copies once.
    return Check(lax.psum(total, tier.axes), lax.pmin(first, tier.axes))

  at = lax.iota(jnp.uint32, tier.rows)
  if tier.axes:
    owner = lax.axis_index(tier.axes).astype(jnp.uint32)
    local = lax.broadcasted_iota(jnp.uint32, (tier.shard_rows, 1), 0)
    at = local * np.uint32(tier.owners) + owner
  slots = {name: check(x, at) for name, x in arrays.slots.items()}
  return {"rows": check(arrays.rows, at), **slots}


# ---- Sums of a state that is finite


def checked_sums(
  dense, checks: Mapping[str, Check], refusal: Refusal
) -> dict[str, int]:
  """Returns the checksums of a state, without its stored rows.

  Args:
    dense: {"params", "opt_state"}.
    checks: of `make_checksums`.
    refusal: what the error says.

  Raises:
    UserError: a number is an infinity or a NaN.
  """
  total, finite = jax.device_get(of_dense(dense))
  if not finite.all():
    path, _ = jax.tree_util.tree_leaves_with_path(dense)[np.argmin(finite)]
    raise refusal.of(jax.tree_util.keystr(path, simple=True, separator="."))
  sums = {"dense": int(total)}
  for key, check in checks.items():
    if check.not_finite != NONE:
      group, array = key.rsplit(".", 1)
      e = NotFiniteError(group, array, int(check.not_finite))
      raise refusal.of_row(e)
    sums[key] = int(check.total)
  return sums
