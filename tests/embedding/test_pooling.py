"""Pooling against a loop, and its transpose against JAX's."""

from unittest import mock

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from recjax.embedding import pooling
from recjax.schema import Feature, columns_of

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


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(lists_of_features(), st.integers(0, 99))
def test_pool_against_a_loop_and_spread_against_the_transpose(features, seed):
  ids, weights, rows = arrays(features, seed)
  size = sum(f.activations for f in features)
  gradients = np.random.default_rng(seed).standard_normal((B, size, DIM))
  gradients = gradients.astype(np.float32)

  @jax.jit
  def run(ids, weights, rows, gradients):
    coef = pooling.coefficients(ids, weights, features)
    pool = lambda rows: pooling.pool(lambda c: rows[:, c], coef, features)
    (transposed,) = jax.linear_transpose(pool, rows)(gradients)
    spread = pooling.spread(gradients, coef, features)
    return coef, pool(rows), spread, transposed

  coef, got, spread, transposed = run(ids, weights, rows, gradients)
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
  np.testing.assert_allclose(spread, transposed, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(lists_of_features(), st.integers(0, 99))
def test_split_by_feature_and_joined_again(features, seed):
  size = sum(f.activations for f in features)
  whole = np.random.default_rng(seed).standard_normal((B, size, DIM))
  whole = whole.astype(np.float32)
  by_name = pooling.by_feature(whole, features)
  assert list(by_name) == [f.name for f in features]
  for f in features:
    assert by_name[f.name].shape == (B, f.activations, DIM)
  np.testing.assert_array_equal(pooling.joined(by_name, features), whole)


@settings(deadline=None, max_examples=60)
@given(lists_of_features(), st.integers(0, 99))
def test_masks_of_sequences(features, seed):
  ids, _, _ = arrays(features, seed)
  masks = pooling.masks_of(ids, features)
  assert set(masks) == {f.name for f in features if f.pooling == "none"}
  for name, at in columns_of(features).items():
    if name in masks:
      np.testing.assert_array_equal(masks[name], ids[:, at] >= 0)


@settings(deadline=None, max_examples=20)
@given(lists_of_features(), st.integers(0, 99), st.integers(0, 3))
def test_gradients_are_added_in_parts_as_at_once(features, seed, samples):
  """In parts of a sample, of two and a rest, and of all (B = 3)."""
  ids, weights, _ = arrays(features, seed)
  size = sum(f.activations for f in features)
  rng = np.random.default_rng(seed)
  gradients = rng.standard_normal((B, size, DIM)).astype(np.float32)
  total = rng.standard_normal((4, DIM)).astype(np.float32)
  at = rng.integers(0, 6, ids.size).astype(np.int32)
  coef = pooling.coefficients(ids, weights, features)
  rows = np.asarray(pooling.spread(gradients, coef, features))
  want = np.concatenate([total, np.zeros((2, DIM), np.float32)])
  np.add.at(want, at, rows.reshape(-1, DIM))
  one = 4 * ids.shape[1] * DIM  # bytes of a sample's rows
  with mock.patch.object(pooling, "_PART_BYTES", max(1, samples * one)):
    run = jax.jit(lambda *x: pooling.add_spread(*x, features))
    got = run(total, at, gradients, coef)
  np.testing.assert_allclose(got, want[:4], rtol=1e-5, atol=1e-6)
