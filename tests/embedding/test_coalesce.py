"""Distinct keys, and each key's place among them, against numpy."""

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.embedding import coalesce as coalesce_lib
from recjax.embedding.coalesce import NONE


@functools.cache
def coalesce(size, room):
  del size
  return jax.jit(functools.partial(coalesce_lib.coalesce, room=room))


@settings(max_examples=200, deadline=None)
@given(
  st.sampled_from([(1, 0), (2, 2), (16, 0), (33, 0), (33, 7)]),
  st.sampled_from([1, 5, 1_000, NONE - 1]),
  st.integers(0, 2**32),
)
def test_coalesce_is_unique(of, most, seed):
  size, room = of
  rng = np.random.default_rng(seed)
  keys = rng.integers(0, most, size, np.int32, endpoint=True)
  keys[rng.random(size) < 0.3] = NONE
  distinct, index = map(np.asarray, coalesce(size, room)(keys))
  assert distinct.shape == (size + room,)
  want, inverse = np.unique(keys, return_inverse=True)
  np.testing.assert_array_equal(distinct[: len(want)], want)
  assert np.all(distinct[len(want) :] == NONE)
  np.testing.assert_array_equal(index, inverse)
  assert (distinct.dtype, index.dtype) == (np.int32, np.int32)


@functools.cache
def places(queries, keys):
  """The way of CPUs, and that of accelerators."""
  del queries, keys
  ways = coalesce_lib.places_of, coalesce_lib.places_in_two_steps
  return jax.jit(lambda *x: [way(*x) for way in ways])


@settings(max_examples=200, deadline=None)
@given(
  st.sampled_from([1, 3]),
  st.sampled_from([1, 2, 3, 16, 17, 80]),
  st.sampled_from([1, 5, 1_000]),
  st.integers(0, 2**32),
)
def test_places_are_how_many_keys_are_below(queries, size, most, seed):
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(0, most, n, np.int32, endpoint=True)
  keys, asked = np.sort(draw(size)), draw(queries)
  keys[size - rng.integers(0, size + 1) :] = NONE
  asked[rng.random(queries) < 0.2] = NONE
  for got in places(queries, size)(asked, keys):
    np.testing.assert_array_equal(got, np.searchsorted(keys, asked))
    assert got.dtype == np.int32
