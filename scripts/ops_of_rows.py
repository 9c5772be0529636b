"""Gathers, scatters and sums of rows, for bench_ops.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ops_of_keys import draw_keys
from timed_ops import TimedOps

from recjax.embedding.tables import gather, scatter

_SORTED, _UNIQUE = {"indices_are_sorted": True}, {"unique_indices": True}


def pairs(local):  # [m] int32 -> [m, 2]
  """Returns the index of local rows in a shard [rows, 1, d]."""
  return jnp.stack([local, jnp.zeros_like(local)], axis=1)


def take(table, local):
  """Gathers rows."""
  return gather(table, pairs(local))


def put(table, local, rows):
  """Scatters distinct rows."""
  return scatter(table, pairs(local), rows)


def sgd(table, local, grads):
  """Updates distinct rows."""
  at = pairs(local)
  return scatter(table, at, gather(table, at) - 0.01 * grads)


def into(size: int, dim: int, **flags: bool) -> Callable:
  """Returns what adds gradients [m, d] into rows [size, d], at [m]."""

  def add(grads, at):
    return jnp.zeros((size, dim)).at[at].add(grads, mode="drop", **flags)

  return add


def _distinct(ops: TimedOps, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws keys: (distinct rows [U], the place of each key in them [count])."""
  distinct, index = np.unique(draw_keys(ops, count), return_inverse=True)
  print(f"{count:,} ids of a power law: U = {len(distinct):,} distinct rows")
  ops.found.append({"name": f"U of {count}", "rows": len(distinct)})
  return distinct, index.astype(np.int32)


def rows_of_tables(ops: TimedOps) -> None:
  """Times gathers and scatters of a table's rows: m distinct ones, or U."""
  args = ops.args
  m, dim, w = args.ids, args.dim, 4 * args.dim
  table = jnp.zeros((args.rows, 1, dim)) + 0.5
  mixed = ops.rng.choice(args.rows, m, replace=False).astype(np.int32)
  ordered, mixed = jnp.asarray(np.sort(mixed)), jnp.asarray(mixed)
  distinct, index = _distinct(ops, m)
  keys, u = jnp.asarray(distinct[index]), len(distinct)
  distinct, index = jnp.asarray(distinct), jnp.asarray(index)
  rows = jax.random.normal(jax.random.key(1), (m, dim))
  both = 2 * m * w
  ops.add("gather m rows, ascending", take, table, ordered, moved=both)
  ops.add("gather m rows, any order", take, table, mixed, moved=both)
  ops.add("gather m rows, power law", take, table, keys, moved=both)
  ops.add("gather U rows", take, table, distinct, moved=2 * u * w)
  ops.add(
    "gather m rows of a buffer [U, d], fill",
    lambda x, i: x.at[i].get(mode="fill", fill_value=0),
    *(rows[:u], index),
    moved=both,
  )
  uncoalesced = lambda t, i, g: t.at[i, 0].add(-1e-4 * g, mode="drop")
  for name, f, local, new, amount in (
    ("scatter m rows, ascending, unique", put, ordered, rows, both),
    ("scatter m rows, any order, unique", put, mixed, rows, both),
    ("gather, SGD, scatter of m rows, ascending", sgd, ordered, rows,
     3 * m * w),
    ("gather, SGD, scatter of U rows", sgd, distinct, rows[:u], 3 * u * w),
    ("table.at[power law, 0].add(m rows): no coalescing", uncoalesced, keys,
     rows, m * w + 2 * u * w),
  ):  # fmt: skip
    table = ops.add(name, f, table, local, new, moved=amount, donate=True)


def sums(ops: TimedOps) -> None:
  """Times the sum of gradients [m, d] into distinct rows."""
  m, dim = ops.args.ids, ops.args.dim
  w = 4 * dim
  grads = jax.random.normal(jax.random.key(2), (m, dim))
  _, index = _distinct(ops, m)
  u = int(index.max()) + 1
  order = np.argsort(index, kind="stable").astype(np.int32)
  mixed = jnp.asarray(ops.rng.permutation(m).astype(np.int32))
  iota = jnp.arange(m, dtype=jnp.int32)
  index, ascending = jnp.asarray(index), jnp.asarray(index[order])
  order = jnp.asarray(order)

  def sort_then_add(grads, order, at):
    return into(u, dim, **_SORTED)(grads[order], at)

  one, few = 2 * m * w, m * w + u * w
  for name, f, operands, amount in (
    ("add into m rows, any order", into(m, dim), (mixed,), one),
    ("add into m rows, any order, unique", into(m, dim, **_UNIQUE), (mixed,),
     one),
    ("add into m rows, ascending", into(m, dim), (iota,), one),
    ("add into m rows, sorted flag", into(m, dim, **_SORTED), (iota,), one),
    ("add into m rows, sorted, unique", into(m, dim, **_SORTED, **_UNIQUE),
     (iota,), one),
    ("add into [m, d], power law, any order (as now)", into(m, dim), (index,),
     few),
    ("add into [U, d], power law, any order", into(u, dim), (index,), few),
    ("add into [U, d], power law, ascending", into(u, dim), (ascending,), few),
    ("add into [U, d], power law, sorted flag", into(u, dim, **_SORTED),
     (ascending,), few),
    ("permute m gradients", lambda g, o: g.at[o].get(mode="promise_in_bounds"),
     (order,), one),
    ("permute, then add sorted into [U, d]", sort_then_add,
     (order, ascending), few),
  ):  # fmt: skip
    ops.add(name, f, grads, *operands, moved=amount)


def bags(ops: TimedOps) -> None:
  """Times sums of the gradients of bags into rows, 8.2 lookups in a bag."""
  m, dim = ops.args.many, ops.args.dim
  count, w = m * 26 // 214, 4 * dim
  grads = jax.random.normal(jax.random.key(3), (count, dim))
  _, index = _distinct(ops, m)
  u = int(index.max()) + 1
  bag = (np.arange(m) * count // m).astype(np.int32)
  order = np.argsort(index, kind="stable").astype(np.int32)
  spread = lambda x, at: x.at[at].get(mode="promise_in_bounds")

  def apart(grads, bag, index):
    return into(u, dim)(lax.optimization_barrier(spread(grads, bag)), index)

  def fused(grads, bag, index):
    return into(u, dim)(spread(grads, bag), index)

  def ordered(grads, bag, order, index):
    return into(u, dim, **_SORTED)(spread(grads, bag[order]), index)

  def halves(grads, bag, order, index):
    return ordered(grads.astype(jnp.bfloat16), bag, order, index)

  def pooled(rows, bag, index):
    return into(count, dim, **_SORTED)(spread(rows, index), bag)

  bag, ascending = jnp.asarray(bag), jnp.asarray(index[order])
  index, order = jnp.asarray(index), jnp.asarray(order)
  by_row = bag, order, ascending
  amount = m * w + 2 * u * w
  for name, f, operands in (
    ("spread, then add unsorted (as now)", apart, (bag, index)),
    ("spread and add unsorted, fused", fused, (bag, index)),
    ("spread and add in row order", ordered, by_row),
    ("spread and add in row order, bfloat16 gradients", halves, by_row),
  ):
    ops.add(f"bags: {name}", f, grads, *operands, moved=amount)
  rows = jax.random.normal(jax.random.key(4), (u, dim))
  ops.add(
    "bags: forward, gather and add in bag order",
    *(pooled, rows, bag, index),
    moved=m * w + count * w,
  )
