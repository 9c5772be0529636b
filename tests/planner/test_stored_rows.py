"""Pages of frozen rows against draws; the hosts' memory against all choices."""

import itertools

import numpy as np
import pytest
from helpers_planner import buckets_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.plan import layout
from recjax.planner import stored_rows
from recjax.planner.stored_rows import Room, Stored
from recjax.planner.topology import PAGE_BYTES


@pytest.mark.parametrize("size", [4, 36, 512, 4_096, 6_000, 8_192])
@pytest.mark.parametrize("pi", [1e-4, 0.05, 0.7])
def test_pages_are_those_that_touched_rows_lie_in(size, pi):
  rng, rows, trials = np.random.default_rng(0), 5_000, 200
  found = 0
  for _ in range(trials):
    touched = np.flatnonzero(rng.random(rows) < pi)
    first, last = touched * size, (touched + 1) * size - 1
    pages = [
      np.arange(a, b + 1)
      for a, b in zip(first // PAGE_BYTES, last // PAGE_BYTES, strict=True)
    ]
    found += len(np.unique(np.concatenate([[], *pages])))
  want = rows * stored_rows.pages_of_row(np.array([pi]), (size,))[0]
  # Of a row larger than a page a page has one or two parts, which is read less
  # often than one of their mean.
  off = 0.05 * (size > PAGE_BYTES)
  chance = 5 / np.sqrt(found)  # five standard deviations
  assert found / trials == pytest.approx(want, rel=off + chance)


def test_rows_and_slot_variables_have_pages_of_their_own():
  pi = np.array([1.0, 0.3, 1e-3, 0.0])
  both = stored_rows.pages_of_row(pi, (64, 4))
  each = [stored_rows.pages_of_row(pi, (size,)) for size in (64, 4)]
  np.testing.assert_allclose(both, np.sum(each, axis=0))
  np.testing.assert_allclose(both[[0, 3]], [68 / PAGE_BYTES, 0])
  assert np.all(np.diff(both) < 0)


@settings(max_examples=300, deadline=None)
@given(
  st.integers(0, 5_000),
  st.sampled_from([1, 2, 3, 8]),
  st.integers(0, 3_000),
  st.integers(0, 6_000),
  st.integers(-1, 6_000),
)
def test_cold_rows_fill_the_hosts_memory(stored, n, host, ssd, kept):
  room = Room(host, ssd, kept)
  cold = int(room.cold_rows(np.array(stored), n))
  frozen = stored - cold
  assert 0 <= cold <= stored
  assert frozen == 0 or cold % n == 0  # the owners go on in turn
  padded = lambda rows: int(layout.shard_rows(rows, n)) * n
  fits = padded(cold) <= host and padded(frozen) <= ssd
  assert bool(room.fits(np.array(stored), n)) == fits
  if kept >= 0:
    assert frozen == 0 or kept - n < cold <= kept
  elif ssd and frozen:  # not one more row of each owner
    assert padded(cold) <= host and padded(cold + n) > host
  assert room.cold_end(stored + 7, np.array(7), n) == cold + 7


@settings(max_examples=200, deadline=None)
@given(
  st.lists(
    st.tuples(
      st.lists(st.floats(0, 1), min_size=1, max_size=6),
      st.sampled_from([64, 256, 6_000]),
    ),
    min_size=1,
    max_size=3,
  ),
  st.integers(0, 20_000),
  st.sampled_from([1, 2]),
)
def test_a_byte_of_memory_goes_where_it_saves_most_pages(groups, budget, n):
  """No other cold rows of the groups save more, but for one row each."""
  stored = []
  for p, size in groups:
    s = buckets_of(p)
    pages = stored_rows.pages_of_row(s.p, (size,))
    stored.append(stored_rows.of_group(s, pages, 0, size))
  cold = stored_rows.share_out(stored, budget, n)

  def held(cold) -> int:
    return sum(
      -(-c // n) * n * g.size for c, g in zip(cold, stored, strict=True)
    )

  def saved(cold) -> float:
    return sum(
      float(g.saved[:c].sum()) * g.size
      for c, g in zip(cold, stored, strict=True)
    )

  assert held(cold) <= budget
  for c, g in zip(cold, stored, strict=True):
    assert c == g.rows or c % n == 0
  every = itertools.product(*(range(g.rows + 1) for g in stored))
  best = max(saved(c) for c in every if held(c) <= budget)
  one = sum(n * float(g.saved[0]) * g.size for g in stored)
  assert saved(cold) >= best - one - 1e-12


def test_rows_from_the_middle_of_a_bucket_on():
  s = buckets_of([0.5, 0.4, 0.3])
  found = stored_rows.of_group(s, np.array([3.0, 2.0, 1.0]), 1, 2)
  assert (found.rows, found.size) == (2, 2)
  np.testing.assert_array_equal(found.saved, [1.0, 0.5])
  many = Stored(np.array([10, 10]), np.array([1.0, 0.5]), 4)
  assert stored_rows.share_out([many], 60, 2) == [14]
  assert stored_rows.share_out([many], 80, 2) == [20]
