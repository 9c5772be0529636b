"""Pooling against a loop, and its transpose against JAX's."""

import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import given, settings

from recjax import lookup
from recjax.specs import Feature

B, DIM = 3, 2


@st.composite
def lists_of_features(draw):
  pooling = st.sampled_from(["sum", "mean", "none"])
  kinds = st.tuples(st.integers(1, 4), pooling, st.booleans())
  return tuple(
    Feature(f"f{i}", "t", *kind)
    for i, kind in enumerate(draw(st.lists(kinds, min_size=1, max_size=6)))
  )


def arrays(features, seed):
  rng = np.random.default_rng(seed)
  columns = sum(f.hotness for f in features)
  ids = rng.integers(-1, 5, (B, columns)).astype(np.int32)
  weights = rng.random((B, columns), np.float32)
  rows = rng.standard_normal((B, columns, DIM)).astype(np.float32)
  return ids, weights, rows


@settings(deadline=None, max_examples=60)
@given(lists_of_features(), st.integers(0, 99))
def test_pool_against_a_loop_and_spread_against_the_transpose(features, seed):
  ids, weights, rows = arrays(features, seed)
  coef = lookup.coefficients(ids, weights, features)
  pool = lambda rows: lookup.pool(lambda c: rows[:, c], coef, features)
  got = pool(rows)

  want, at = [], 0
  for f in features:
    there = ids[:, at : at + f.hotness] >= 0
    by = np.ones_like(there, np.float32)
    if f.weighted:
      by = weights[:, at : at + f.hotness]
    if f.pooling == "mean" and coef is not None:
      total = (by * there).sum(axis=1, keepdims=True)
      by = by / np.where(total == 0, 1, total)
    if coef is not None:
      by = by * there
    vectors = rows[:, at : at + f.hotness] * by[..., None]
    if f.pooling == "none":
      want.append(vectors)
    else:
      want.append(vectors.sum(axis=1, keepdims=True))
    at += f.hotness
  np.testing.assert_allclose(got, np.concatenate(want, axis=1), atol=1e-6)

  gradients = np.random.default_rng(seed).standard_normal(got.shape, np.float32)
  like = jax.ShapeDtypeStruct(rows.shape, np.float32)
  (transposed,) = jax.linear_transpose(pool, like)(gradients)
  spread = lookup.spread(gradients, coef, features)
  np.testing.assert_allclose(spread, transposed, rtol=1e-6, atol=1e-7)
