"""Counts -> coverage, fitted exponent, and the row spaces of groups."""

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


@st.composite
def profiles(draw):
  tables = tuple("abcde"[: draw(st.integers(1, 5))])
  rows = draw(st.integers(0, 60))
  counts = np.sort(
    np.array(draw(st.lists(st.integers(0, 30), min_size=rows, max_size=rows)))
  )[::-1]
  table = draw(
    st.lists(st.integers(0, len(tables) - 1), min_size=rows, max_size=rows)
  )
  return profile(counts, table, tables)


@settings(max_examples=60, deadline=None)
@given(profiles(), st.integers(1, 9), st.data())
def test_groups_have_their_tables_rows_in_rank_order(p, rows, data):
  """Against a plain walk over the rows, in slices of any length."""
  order = data.draw(st.permutations(p.tables))
  cut = data.draw(st.integers(0, len(order)))
  groups = [g for g in (order[:cut], order[cut:]) if g]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frequency, "_SLICE", rows)
    ranks = frequency.group_ranks(p, groups)
    parts = [p.of_tables(g) for g in groups]
    sizes = p.table_rows()
  assert (ranks.dtype, ranks.shape) == (np.int32, (p.rows,))
  names = [p.tables[i] for i in p.table]
  assert sizes == {t: names.count(t) for t in p.tables}
  for group, part in zip(groups, parts, strict=True):
    theirs = [r for r, name in enumerate(names) if name in group]
    assert part.tables == tuple(group)
    assert part.samples == p.samples
    assert [part.tables[i] for i in part.table] == [names[r] for r in theirs]
    np.testing.assert_array_equal(part.counts, p.counts[theirs])
    np.testing.assert_array_equal(ranks[theirs], np.arange(len(theirs)))


def test_all_tables_are_the_profile_itself():
  p = profile([3, 2, 1], [0, 1, 0])
  assert p.of_tables(["a", "b"]) is p


@pytest.mark.parametrize("groups", [["a"], ["ab", "b"], ["ab", "c"]])
def test_every_table_is_in_one_group(groups):
  with pytest.raises(ValueError, match="must be in one group"):
    frequency.group_ranks(profile([2, 1]), groups)


def test_an_exponent_outside_of_the_range_is_its_end():
  assert frequency.fit_exponent(np.array([7, 7, 7])) == 0.0
  assert frequency.fit_exponent(np.array([5, 0, 0])) == 10.0
