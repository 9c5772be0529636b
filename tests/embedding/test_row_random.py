"""A row's random numbers: uniform, its own, and rounding without bias."""

import jax.numpy as jnp
import numpy as np
import pytest

from recjax.embedding import row_random

DIM = 8


def test_first_rows_are_uniform():
  rows = np.asarray(row_random.initial_rows(np.arange(200_000), DIM, 0.25, 3))
  assert rows.dtype == np.float32
  assert rows.min() >= -0.25
  assert rows.max() < 0.25
  n = rows.size
  assert abs(rows.mean()) < 5 * 0.25 / np.sqrt(3 * n)
  variance = 0.25**2 / 3  # of the uniform; that of x^2 is 4/45 scale^4
  assert abs(rows.var() - variance) < 5 * np.sqrt(4 / 45 / n) * 0.25**2
  share, _ = np.histogram(rows, 64, (-0.25, 0.25))
  expected = n / 64
  assert np.sum((share - expected) ** 2 / expected) < 63 + 5 * np.sqrt(126)
  # Neither neighbouring ranks nor columns go together.
  for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
    assert abs(np.mean(a * b)) < 5 * variance / np.sqrt(a.size)


def check_apart(a, b):
  """Asserts that two arrays of rows have nothing to do with each other."""
  assert np.mean(np.asarray(a) == np.asarray(b)) < 0.001
  correlation = np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
  assert abs(correlation) < 5 / np.sqrt(np.size(a))


def test_first_rows_depend_on_the_seed():
  ranks = np.arange(1_000)
  rows = [row_random.initial_rows(ranks, DIM, 1.0, seed) for seed in (0, 1)]
  check_apart(*rows)
  again = row_random.initial_rows(ranks[500:], DIM, 1.0, 0)
  np.testing.assert_array_equal(again, rows[0][500:])


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_groups_have_seeds_of_their_own(seed):
  """The first group's is the run's; rows of equal rank are not alike."""
  seeds = [row_random.group_seed(seed, group) for group in range(200)]
  assert seeds[0] == seed
  assert len(set(seeds)) == len(seeds)
  assert all(0 <= s < 2**32 for s in seeds)
  ranks = np.arange(1_000)
  rows = [row_random.initial_rows(ranks, DIM, 1.0, s) for s in seeds[:3]]
  for a in range(3):
    for b in range(a):
      check_apart(rows[a], rows[b])
  # Nor are the second group of a run and the first of the next run.
  following = row_random.initial_rows(ranks, DIM, 1.0, (seed + 1) % 2**32)
  check_apart(rows[1], following)


def test_rows_of_fewer_columns_are_the_beginning_of_wider_ones():
  """A row's numbers depend on key, rank and column, not on the width."""
  ranks = np.arange(50, dtype=np.int32)
  wide = row_random.row_bits(ranks, 16, 5)
  np.testing.assert_array_equal(row_random.row_bits(ranks, 4, 5), wide[:, :4])
  again = row_random.row_bits(ranks.reshape(5, 10), 16, 5)
  np.testing.assert_array_equal(again.reshape(50, 16), wide)


def test_mix_is_a_bijection():
  """No two of a block of neighbours meet, and half of the bits flip."""
  x = np.arange(1 << 16, dtype=np.uint32)
  mixed = np.asarray(row_random.mix(x))
  assert len(np.unique(mixed)) == len(x)
  flipped = np.asarray(row_random.mix(x ^ np.uint32(1))) ^ mixed
  assert abs(np.bitwise_count(flipped).mean() - 16) < 0.2


def test_stochastic_rounding_is_unbiased():
  x = jnp.full((200_000,), 1.0 + 2.0**-10)  # an eighth of a bfloat16 step
  bits = row_random.row_bits(jnp.arange(200_000), 1, 7)[:, 0]
  rounded = row_random.stochastic_round(x, bits).astype(jnp.float32)
  assert set(np.unique(rounded)) == {1.0, 1.0 + 2.0**-7}
  np.testing.assert_allclose(jnp.mean(rounded), x[0], atol=4e-5)
