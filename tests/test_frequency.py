"""Counts -> coverage and fitted exponent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax import frequency
from recjax.frequency import Profile


def profile(counts, table=None, tables=("a", "b"), samples=100):
  counts = np.array(counts, np.int64)
  if table is None:
    table = np.zeros(len(counts))
  return Profile(samples, tables, counts, np.array(table, np.int16))


def test_frequencies_are_at_most_one():
  p = profile([150, 50, 0])  # a bag may look a row up twice
  np.testing.assert_array_equal(p.frequencies(), [1.0, 0.5, 0.0])
  np.testing.assert_array_equal(p.frequencies(1, 2), [0.5])
  assert (p.rows, p.accesses) == (3, 200)


def test_summaries_of_each_table_and_all():
  counts = [50, 30, 10, 5, 3, 1, 1, 0, 0, 0]
  a, b, both = frequency.summaries(profile(counts, [0, 1] * 5))
  assert (a.name, a.rows, a.accesses) == ("a", 5, 64)
  assert (b.name, b.rows, b.accesses) == ("b", 5, 36)
  assert (both.name, both.rows, both.accesses) == ("all", 10, 100)
  assert both.coverage == (0.5, 0.5, 0.5)  # never less than one row
  assert a.coverage[2] == 50 / 64
  text = frequency.describe(profile(counts, [0, 1] * 5))
  assert "100 training samples" in text
  assert text.splitlines()[-1].split()[:3] == ["all", "10", "100"]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200))
def test_coverage_grows_to_one(counts):
  counts.sort(reverse=True)
  p = profile(counts)
  shares = [frequency.coverage(p, f) for f in (0.001, 0.01, 0.1, 0.5, 1.0)]
  assert shares == sorted(shares)
  assert shares[-1] == (1.0 if sum(counts) else 0.0)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 3.0), st.integers(50, 5_000))
def test_exponent_of_a_zipf_law_is_found(s, rows):
  weights = np.arange(1, rows + 1, dtype=np.float64) ** -s
  counts = np.round(weights / weights.sum() * 1e12).astype(np.int64)
  assert frequency.fit_exponent(counts) == pytest.approx(s, abs=1e-3)


@pytest.mark.parametrize("s", [0.0, 0.7, 1.0, 1.15, 2.5])
def test_the_integral_over_many_ranks_equals_the_sum(s):
  rows = 400_000  # more than are summed one by one
  ranks = np.arange(1, rows + 1, dtype=np.float64)
  weights = ranks**-s
  exact = weights @ np.log(ranks) / weights.sum()
  assert frequency._mean_log_rank(rows, s) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("counts", [[], [5], [0, 0, 0]])
def test_no_exponent_without_two_rows_and_an_access(counts):
  assert np.isnan(frequency.fit_exponent(np.array(counts, np.int64)))
