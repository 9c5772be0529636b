"""Random ranks of a power law."""

import numpy as np
import pytest

from recjax.data import power_law


@pytest.mark.parametrize("exponent", [1.0, 1.15])
def test_ids_follow_the_power_law(exponent):
  rng = np.random.default_rng(0)
  rank = power_law.ranks(rng, 200_000, 1_000, exponent)
  assert (rank.min(), rank.max()) == (0, 999)
  share = np.bincount(rank, minlength=1_000) / len(rank)
  slope = np.polyfit(np.log(np.arange(10, 100)), np.log(share[9:99]), 1)[0]
  assert slope == pytest.approx(-exponent, abs=0.1)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("rows", [1, 2, 10])
def test_ranks_are_those_of_the_table(exponent, rows):
  rank = power_law.ranks(np.random.default_rng(0), (50, 20), rows, exponent)
  assert (rank.shape, rank.dtype) == ((50, 20), np.int64)
  assert set(np.unique(rank)) == set(range(rows))
