"""Rows of a bag -> its activation, and the gradient back to the rows.

`pool` sums the rows that a group's features look up; `spread` is its transpose.
Both are linear in the rows, so that no table is ever differentiated through.
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from recjax.schema import Feature, activations_of, columns_of

_FUSED = 20  # columns that are summed in one kernel on CPUs
_PART_BYTES = 1 << 20  # gradients of rows that are written at a time on CPUs


def coefficients(ids, weights, features: tuple[Feature, ...]):
  """Returns what each lookup's row is multiplied with; None where all are 1.

  A mean divides by the number of lookups, a weighted mean by the sum of
  weights.

  Args:
    ids: [b, S] int32, of these features, -1 = no lookup.
    weights: [b, S] float32, or None.
    features: whose columns they are.

  Returns:
    [b, S] float32 or None.
  """
  if all(f.pooling != "mean" and not f.weighted for f in features):
    return None
  there, columns = (ids >= 0).astype(jnp.float32), columns_of(features)
  out = []
  for f in features:
    w = there[:, columns[f.name]]
    if f.weighted:
      w = w * weights[:, columns[f.name]]
    if f.pooling == "mean":
      total = jnp.sum(w, axis=1, keepdims=True)
      w = w / jnp.where(total == 0, 1, total)
    out.append(w)
  return jnp.concatenate(out, axis=1)


def pool(
  take: Callable[[slice], jax.Array],
  coefficients,  # [b, S] float32, or None
  features: tuple[Feature, ...],
):
  """Returns the activations [b, A, d] float32 of the rows of a batch.

  Each bag is summed where its rows are gathered: the rows of all bags, many
  times the activations, are never there at once.

  Args:
    take: slice of the S columns -> their rows [b, columns, d] float32.
    coefficients: of `coefficients`.
    features: whose columns they are; neighbours that are not summed are
      gathered together.
  """
  out, at = [], 0
  alike = itertools.groupby(features, lambda f: f.activations < f.hotness)
  for summed, group in alike:
    widths = [f.hotness for f in group]
    for width in widths if summed else [sum(widths)]:
      columns = slice(at, at + width)
      weighted = functools.partial(_weighted, take, coefficients)
      out.append(_summed(weighted, columns) if summed else weighted(columns))
      at += width
  return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _weighted(take, coefficients, columns: slice):  # -> [b, columns, d]
  rows = take(columns)
  if coefficients is None:
    return rows
  return rows * coefficients[:, columns, None]


def _summed(take: Callable[[slice], jax.Array], columns: slice):
  """Returns the sum of columns' rows, [b, 1, d].

  XLA:CPU writes all rows of a bag before it sums them, unless they are summed
  column by column: 100 lookups of 2,048 samples take 34 ms that way (dim 64, on
  a core) and 7 ms this way; 5.1 and 2.5 ms at dim 16 (jax 0.12; 0.10 alike).
  """
  parts = [slice(i, i + 1) for i in range(columns.start, columns.stop)]

  def by_column():
    total = take(parts[0])
    for i, part in enumerate(parts[1:], 1):
      total = total + take(part)
      if i % _FUSED == 0:  # not thousands of operations in a kernel
        total = lax.optimization_barrier(total)
    return total

  return lax.platform_dependent(
    cpu=by_column, default=lambda: jnp.sum(take(columns), axis=1, keepdims=True)
  )


def spread(gradients, coefficients, features: tuple[Feature, ...]):
  """Returns the gradients of the rows: the transpose of `pool`.

  [b, A, d] float32 -> [b, S, d]. A gather of rows; derived by JAX it would be a
  sum of padded arrays, one a feature, with which a step of 214 lookups took
  twice (dim 16) and ten times (dim 64) as long on XLA:CPU, jax 0.12
  (scripts/bench_step.py --multi_hot).
  """
  b, activations, dim = gradients.shape
  column = []  # [S]: the activation that it goes to
  for f, at in zip(features, activations_of(features).values(), strict=True):
    own = range(f.hotness) if f.pooling == "none" else [0] * f.hotness
    column += [at.start + i for i in own]
  if activations < len(column):
    first = activations * lax.iota(jnp.int32, b)
    at = first[:, None] + np.array(column, np.int32)[None]
    gradients = gradients.reshape(-1, dim)[at]
  if coefficients is not None:
    gradients = gradients * coefficients[..., None]
  return gradients


def add_spread(total, at, gradients, coefficients, features):
  """Returns total [m, d] with the gradients of the rows added at `at`.

  XLA:CPU writes the gradients of all rows before it adds them, unless a part of
  the samples is spread and added after the other: 438,272 lookups take 35 ms
  that way (dim 64, on a core) and 24 this way; 8 and 3 ms at dim 16 (jax 0.12;
  0.10 alike).

  Args:
    total: float32.
    at: [b S] int32, of the lookups; those past the end are dropped.
    gradients, coefficients, features: as `spread` has them.
  """
  b, _, dim = gradients.shape
  at = at.reshape(b, -1)

  def add(total, first, samples):
    part = lambda x: lax.dynamic_slice_in_dim(x, first, samples)
    scale = None if coefficients is None else part(coefficients)
    rows = spread(part(gradients), scale, features).reshape(-1, dim)
    return total.at[part(at).reshape(-1)].add(rows, mode="drop")

  size = max(1, _PART_BYTES // (at.shape[1] * dim * 4))  # samples of a part

  def by_part():
    found = lax.fori_loop(
      0, b // size, lambda i, x: add(x, i * size, size), total
    )
    return add(found, b - b % size, b % size) if b % size else found

  whole = lambda: add(total, 0, b)
  if size >= b:
    return whole()
  return lax.platform_dependent(cpu=by_part, default=whole)


# ---- By feature


def by_feature(activations, features: tuple[Feature, ...]):
  """Splits [b, A, d] into {feature: [b, h, d]}."""
  places = activations_of(features)
  return {name: activations[:, at] for name, at in places.items()}


def joined(by_name: Mapping[str, jax.Array], features: tuple[Feature, ...]):
  """Joins {feature: [b, h, d]} to [b, A, d]: the inverse of `by_feature`."""
  parts = [by_name[f.name] for f in features]
  return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def masks_of(ids, features: tuple[Feature, ...]):
  """Returns which positions of a sequence hold an id: {feature: [b, h] bool}.

  Of the features that are not pooled; ids [b, S] int32 of these features.
  """
  columns = columns_of(features)
  return {
    f.name: ids[:, columns[f.name]] >= 0
    for f in features
    if f.pooling == "none"
  }
