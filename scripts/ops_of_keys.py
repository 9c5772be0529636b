"""Sorts of ids and what follows from them, for bench_ops.py."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timed_ops import TimedOps

from recjax.data import power_law
from recjax.embedding.coalesce import NONE, coalesce, places_of


def draw_keys(ops: TimedOps, count: int) -> np.ndarray:  # [count] int32
  """Draws ids of the table."""
  args = ops.args
  keys = power_law.ranks(ops.rng, count, args.rows, args.exponent)
  return keys.astype(np.int32)


def sort_wide(keys):
  """Sorts as `coalesce` does: [m] int32 -> (order, keys)."""
  with jax.enable_x64(True):
    wide = keys.astype(jnp.uint64) << np.uint64(32)
    wide = lax.sort(wide | lax.iota(jnp.uint64, keys.shape[0]))
    order = (wide & np.uint64(0xFFFFFFFF)).astype(jnp.int32)
    return order, (wide >> np.uint64(32)).astype(jnp.int32)


def sort_pairs(keys):
  """Sorts keys with their places, stably: [m] int32 -> (keys, order)."""
  iota = lax.iota(jnp.int32, keys.shape[0])
  return lax.sort((keys, iota), num_keys=1, is_stable=True)


def sort_pairs_unstable(keys):
  """Sorts the same without an order of equal keys, as uint32."""
  iota = lax.iota(jnp.uint32, keys.shape[0])
  return lax.sort((keys.astype(jnp.uint32), iota), num_keys=1, is_stable=False)


def coalesce_by_pairs(keys):
  """Does as `coalesce`, with a sort of pairs."""
  m = keys.shape[0]
  keys, order = sort_pairs(keys)
  new = jnp.concatenate([jnp.ones(1, bool), keys[1:] != keys[:-1]])
  rank = jnp.cumsum(new, dtype=jnp.int32) - 1
  index = jnp.zeros(m, jnp.int32).at[order].set(rank, unique_indices=True)
  at = jnp.where(new, rank, m + lax.iota(jnp.int32, m))
  distinct = (
    jnp.full(m, NONE).at[at].set(keys, mode="drop", unique_indices=True)
  )
  return distinct, index


def sorts(ops: TimedOps) -> None:
  """Times sorts, and permutations of what is sorted along."""
  for m in (ops.args.ids, ops.args.many):
    keys = jnp.asarray(draw_keys(ops, m))
    of = f"of {m:,}"
    ops.add(f"sort uint64, key << 32 | place (as now), {of}", sort_wide, keys)
    ops.add(f"sort (int32, int32) stable, {of}", sort_pairs, keys)
    ops.add(f"sort (uint32, uint32) unstable, {of}", sort_pairs_unstable, keys)
    ops.add(f"sort int32 alone, {of}", lambda x: lax.sort(x), keys)
    ops.add(f"cumsum int32, {of}", jnp.cumsum, keys, moved=8 * m)
    order = jnp.asarray(ops.rng.permutation(m).astype(np.int32))
    ops.add(
      f"permute int32 by scatter, unique, {of}",
      lambda order, x: jnp.zeros_like(x).at[order].set(x, unique_indices=True),
      *(order, keys),
      moved=12 * m,
    )
    ops.add(
      f"permute int32 by gather, {of}",
      lambda order, x: x.at[order].get(mode="promise_in_bounds"),
      *(order, keys),
      moved=12 * m,
    )


def coalescing(ops: TimedOps) -> None:
  """Times `coalesce`, its parts, and other ways."""
  for m in (ops.args.ids, ops.args.many):
    keys = jnp.asarray(draw_keys(ops, m))
    of = f"of {m:,}"
    ops.add(f"coalesce (as now), {of}", coalesce, keys)
    ops.add(f"coalesce by pairs, {of}", coalesce_by_pairs, keys)
    keys = jnp.sort(keys)
    new = jnp.concatenate([jnp.ones(1, bool), keys[1:] != keys[:-1]])
    rank = jnp.cumsum(new, dtype=jnp.int32) - 1
    firsts = jnp.where(new, rank, m + jnp.arange(m, dtype=jnp.int32))
    for name, at, flags in (
      ("sorted flag", rank, {"indices_are_sorted": True}),
      ("no flag", rank, {}),
      ("first ones, unique (as now)", firsts, {"unique_indices": True}),
    ):
      ops.add(
        f"distinct by scatter, {name}, {of}",
        lambda at, x, flags=flags: (
          jnp.zeros_like(x).at[at].set(x, mode="drop", **flags)
        ),
        *(at, keys),
        moved=12 * m,
      )
    ends = [0, ops.args.rows // 2, ops.args.rows]
    ends = jnp.asarray(np.array(ends, np.int32))
    ops.add(f"places of 3 (as now), {of}", places_of, ends, keys)
    for method in ("scan", "scan_unrolled", "compare_all", "sort"):
      ops.add(
        f"searchsorted of 3, {method}, {of}",
        lambda x, e, method=method: jnp.searchsorted(x, e, method=method),
        *(keys, ends),
      )
