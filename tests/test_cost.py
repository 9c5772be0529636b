"""The formulas against closed forms and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax import cost

probabilities = st.floats(0, 1, allow_nan=False)


def test_touch_probability_closed_forms():
  p = np.array([0.0, 1.0, 0.5, 1e-12])
  np.testing.assert_allclose(cost.touch_probability(p, 1), p, rtol=1e-12)
  # (1 - 1e-12)^1e6 loses all digits of 1 - x in float64; the formula none.
  got = cost.touch_probability(p, 1_000_000)
  np.testing.assert_allclose(got, [0, 1, 1, 1e-6 - 5e-13], rtol=1e-12)


@settings(deadline=None)
@given(
  st.lists(probabilities, min_size=1, max_size=5),
  st.integers(1, 10_000),
  st.integers(1, 10_000),
)
def test_touch_probability_of_independent_samples(p, m, k):
  """Missed by m + k samples = missed by m, and by k others."""
  p = np.array(p)
  missed = lambda m: 1 - cost.touch_probability(p, m)
  np.testing.assert_allclose(missed(m + k), missed(m) * missed(k), atol=1e-12)
  assert np.all(cost.touch_probability(p, m) >= p - 1e-15)


def test_touch_probability_is_what_samples_do():
  rng = np.random.default_rng(0)
  p = np.array([0.001, 0.01, 0.05, 0.2, 0.9])
  trials, samples = 20_000, 16
  touched = (rng.binomial(samples, p, (trials, len(p))) > 0).mean(0)
  want = cost.touch_probability(p, samples)
  deviation = np.sqrt(want * (1 - want) / trials)
  assert np.all(np.abs(touched - want) <= 5 * deviation)


@settings(deadline=None)
@given(
  st.floats(0, 1e7),
  st.floats(0, 1e7),
  st.floats(1e-12, 0.5),
  st.floats(1e-12, 0.5),
)
def test_capacity_is_monotone(mean, more, probability, other):
  mean, more = sorted((mean, more))
  probability, other = sorted((probability, other))
  at = cost.capacity(mean, probability)
  assert at >= mean
  assert at <= cost.capacity(more, probability)
  assert at >= cost.capacity(mean, other)
  assert isinstance(at, int)


@settings(deadline=None)
@given(st.floats(0, 1e6), st.floats(1e-12, 0.5))
def test_capacity_is_bernsteins_bound_and_no_larger(mean, probability):
  bound = lambda t: math.exp(-t * t / (2 * (mean + t / 3)))
  t = cost.capacity(mean, probability) - mean
  assert bound(t) <= probability * (1 + 1e-6)
  if t > 2:
    assert bound(t - 1.001) > probability * (1 - 1e-6)


@pytest.mark.parametrize("probability", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("rows", [5, 50, 1_000])
def test_simulated_overflows_stay_below_the_bound(rows, probability):
  """Sums of unequal Bernoullis, and distinct rows of power-law samples."""
  rng = np.random.default_rng(rows)
  trials = 4_000
  p = rng.beta(0.3, 2.0, rows)
  sums = (rng.random((trials, rows)) < p).sum(1)
  over = sums > cost.capacity(p.sum(), probability)
  assert over.mean() <= probability

  p = np.arange(1, rows + 1) ** -1.1
  p /= p.sum()
  samples = 32
  ids = rng.choice(rows, (trials, samples), p=p)
  ids.sort(1)
  distinct = 1 + (np.diff(ids, axis=1) != 0).sum(1)
  mean = cost.touch_probability(p, samples).sum()
  assert abs(distinct.mean() - mean) <= 0.1
  assert (distinct > cost.capacity(mean, probability)).mean() <= probability


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.02, 0.5))
def test_random_sums_of_bernoullis_stay_below_the_bound(seed, probability):
  rng = np.random.default_rng(seed)
  p = rng.random(rng.integers(1, 60)) ** rng.integers(1, 6)
  trials = 2_000
  sums = (rng.random((trials, len(p))) < p).sum(1)
  over = (sums > cost.capacity(p.sum(), probability)).mean()
  deviation = math.sqrt(probability * (1 - probability) / trials)
  assert over <= probability + 5 * deviation
