"""Distinct keys, and each key's place among them, against numpy."""

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.embedding import coalesce as coalesce_lib
from recjax.embedding.coalesce import NONE


@functools.cache
def coalesce(size):
  return jax.jit(coalesce_lib.coalesce)


@settings(max_examples=200, deadline=None)
@given(
  st.sampled_from([1, 2, 16, 33]),
  st.sampled_from([1, 5, 1_000, NONE - 1]),
  st.integers(0, 2**32),
)
def test_coalesce_is_unique(size, most, seed):
  rng = np.random.default_rng(seed)
  keys = rng.integers(0, most, size, np.int32, endpoint=True)
  keys[rng.random(size) < 0.3] = NONE
  distinct, index = map(np.asarray, coalesce(size)(keys))
  want, inverse = np.unique(keys, return_inverse=True)
  np.testing.assert_array_equal(distinct[: len(want)], want)
  assert np.all(distinct[len(want) :] == NONE)
  np.testing.assert_array_equal(index, inverse)
  assert (distinct.dtype, index.dtype) == (np.int32, np.int32)
