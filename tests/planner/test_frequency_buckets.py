"""Buckets against the rows themselves, simulated batches, and real ones."""

import gzip
import pathlib

import numpy as np
import pytest
from helpers_planner import profile_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.planner import buffer_sizes, frequency_buckets
from recjax.planner.frequency_buckets import BucketedProfile, Table

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
CRITEO = DATA / "criteo_kaggle_80k.tsv.gz"
MOVIELENS = DATA / "ml-1m" / "ratings.tsv.gz"


@settings(max_examples=100, deadline=None)
@given(
  st.lists(st.integers(0, 10**7), min_size=1, max_size=300),
  st.integers(1, 10**5),
)
def test_buckets_sum_like_their_rows(counts, samples):
  """To 1e-7, as the module says, at the end of every bucket."""
  profile = profile_of(counts, max(counts) + 1)
  s = frequency_buckets.of_profile(profile)
  assert s.rows == profile.rows
  pi = buffer_sizes.touch_probability(profile.frequencies(), samples)
  want = np.concatenate([[0], np.cumsum(pi)])[s.ends]
  got = s.cumulative(s.touched(samples))(s.ends)
  np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-12)
  assert np.all(np.diff(s.p) < 0) or len(s.p) == 1
  assert s.count @ s.uses == pytest.approx(profile.accesses / profile.samples)


def test_small_counts_have_a_bucket_each():
  counts = np.random.default_rng(0).integers(0, 1_024, 5_000)
  s = frequency_buckets.of_profile(profile_of(counts, 2_000))
  found = np.unique(counts)[::-1]
  np.testing.assert_allclose(s.p, found / 2_000, rtol=1e-15)


def test_bags_of_any_size():
  """Distinct rows of simulated batches, sizes drawn from a distribution."""
  sizes = (0.2, 0.3, 0.0, 0.1, 0.0, 0.4)
  rows, samples, batches = 400, 64, 400
  table = Table("t", rows, hotness=5, sizes=sizes)
  assert table.lookups == pytest.approx(0.3 + 3 * 0.1 + 5 * 0.4)
  s = frequency_buckets.power_law((table,), 1.1)
  assert s.count @ s.uses == pytest.approx(table.lookups)
  r = np.arange(1, rows + 1) ** -1.1
  rng = np.random.default_rng(0)
  found = 0
  for _ in range(batches):
    drawn = rng.choice(len(sizes), samples, p=sizes)
    found += len(np.unique(rng.choice(rows, drawn.sum(), p=r / r.sum())))
  want = float(s.cumulative(s.touched(samples))(rows))
  assert found / batches == pytest.approx(want, rel=0.005)


def test_slices_do_not_show(monkeypatch):
  counts = np.random.default_rng(0).zipf(1.2, 5_000).clip(0, 10**6)
  whole = frequency_buckets.of_profile(profile_of(counts, 10**6, 3), (1, 4, 9))
  monkeypatch.setattr(frequency_buckets, "_SLICE", 77)
  parts = frequency_buckets.of_profile(profile_of(counts, 10**6, 3), (1, 4, 9))
  np.testing.assert_allclose(parts.p, whole.p, rtol=1e-12)
  np.testing.assert_array_equal(parts.count, whole.count)


def test_bags():
  """p = 1 - (1 - r)^h for a table with h lookups a sample."""
  profile = profile_of([600, 30, 6], 100, 3)
  s = frequency_buckets.of_profile(profile, (20, 3, 2))
  want = [1 - (1 - 6 / 20) ** 20, 1 - (1 - 0.1) ** 3, 1 - (1 - 0.03) ** 2]
  np.testing.assert_allclose(s.p, want, rtol=1e-12)
  np.testing.assert_allclose(s.uses, [6, 0.3, 0.06], rtol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.05, 1.45])
@pytest.mark.parametrize("hotness", [1, 7])
def test_a_power_law_is_that_of_its_ranks(exponent, hotness):
  tables = (Table("a", 300_000, hotness), Table("b", 50), Table("c", 1))
  s = frequency_buckets.power_law(tables, exponent)
  assert s.rows == 300_051
  p = []
  for t in tables:
    r = np.arange(1, t.rows + 1) ** -exponent
    p.append(buffer_sizes.bag_probability(r / r.sum(), t.hotness))
  p = np.sort(np.concatenate(p))[::-1]
  for samples in (1, 100, 10_000):
    pi = np.concatenate(
      [[0], np.cumsum(buffer_sizes.touch_probability(p, samples))]
    )
    got = s.cumulative(s.touched(samples))
    np.testing.assert_allclose(got(s.ends), pi[s.ends], rtol=2e-5)
    cut = np.random.default_rng(0).integers(0, s.rows, 50)
    np.testing.assert_allclose(got(cut), pi[cut], rtol=2e-3)
  assert s.count @ s.uses == pytest.approx(hotness + 2, rel=1e-6)


def test_a_billion_rows():
  s = frequency_buckets.power_law((Table("a", 10**9), Table("b", 10**8)), 1.05)
  assert s.rows == 11 * 10**8
  assert len(s.p) < 50_000
  assert np.all(np.diff(s.p) < 0)
  assert s.count @ s.p == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize(("hotness", "samples"), [(1, 512), (5, 128)])
def test_simulated_batches_have_the_expected_distinct_rows(hotness, samples):
  """Within 0.5%, for all rows and for the tiers that cuts make."""
  rng = np.random.default_rng(1)
  table = Table("a", 20_000, hotness)
  s = frequency_buckets.power_law((table,), 1.15)
  r = np.arange(1, table.rows + 1) ** -1.15
  cuts = np.array([0, 100, 2_000, table.rows])
  trials = 1_500
  edges = np.cumsum(r / r.sum())
  found = np.zeros(3)
  for _ in range(trials):
    ids = np.searchsorted(edges, rng.random(samples * hotness))
    distinct = np.unique(np.minimum(ids, table.rows - 1))
    found += np.histogram(distinct, cuts)[0]
  want = s.cumulative(s.touched(samples)).between(cuts[:-1], cuts[1:])
  np.testing.assert_allclose(found / trials, want, rtol=5e-3)


def test_measured_ratios_correct_what_is_expected():
  """Batches of repeated samples: half the distinct rows, found and used."""
  rng = np.random.default_rng(0)
  s = frequency_buckets.power_law((Table("a", 100_000),), 1.1)
  r = np.arange(1, 100_001) ** -1.1
  edges = np.cumsum(r / r.sum())

  def batch(size):  # every sample comes twice
    ids = np.searchsorted(edges, rng.random(size // 2))
    return np.repeat(np.minimum(ids, 99_999), 2)[:, None]

  batches = {m: [batch(m) for _ in range(60)] for m in (500, 2_000)}
  measured = frequency_buckets.measure(s, batches)
  real = BucketedProfile(s.tables, s.count, s.p, s.uses, measured)
  for size in (500, 1_000, 2_000):
    want = np.mean([len(np.unique(batch(size))) for _ in range(60)])
    got = real.cumulative(real.touched(size))(s.rows)
    plain = s.cumulative(s.touched(size))(s.rows)
    assert abs(got / want - 1) < 0.03
    assert plain / want > 1.3


def ranked(ids):  # [N, S] ids of distinct columns -> (ranks [N, S], counts)
  counts = np.bincount(ids.ravel())
  order = np.argsort(-counts, kind="stable")
  rank = np.empty_like(order)
  rank[order] = np.arange(len(order))
  return rank[ids], counts


def check_batches(ids, counts, sizes, independent):
  """Measured on every other batch of three sizes, predicts the others'.

  Independent samples would be `independent` off at most; corrected, 3%.
  """
  s = frequency_buckets.of_profile(profile_of(counts, len(ids)))
  slices = lambda m: [ids[i : i + m] for i in range(0, len(ids) - m, m)]
  measured = frequency_buckets.measure(
    s, {m: slices(m)[::2] for m in sizes[::2]}
  )
  real = BucketedProfile(s.tables, s.count, s.p, s.uses, measured)
  for size in sizes:
    found = np.mean([len(np.unique(x)) for x in slices(size)[1::2]])
    got = real.cumulative(real.touched(size))(s.rows)
    plain = s.cumulative(s.touched(size))(s.rows)
    print(f"{size}: independent {plain / found - 1:+.2%}, "
          f"corrected {got / found - 1:+.2%}")  # fmt: skip
    assert abs(got / found - 1) < 0.03
    assert abs(plain / found - 1) < independent


@pytest.mark.skipif(not CRITEO.exists(), reason="no Criteo sample here")
def test_criteo_batches_are_predicted():
  columns = [[] for _ in range(26)]
  with gzip.open(CRITEO, "rt") as f:
    for line in f:
      for column, value in zip(columns, line.split("\t")[14:], strict=True):
        column.append(value.strip())
  ids, base = [], 0
  for column in columns:
    _, codes = np.unique(column, return_inverse=True)
    ids.append(codes + base)
    base += codes.max() + 1
  check_batches(
    *ranked(np.stack(ids, axis=1)), (256, 512, 1_024, 2_048, 4_096), 0.03
  )


@pytest.mark.slow
@pytest.mark.skipif(not MOVIELENS.exists(), reason="no MovieLens here")
def test_movielens_batches_are_predicted():
  """A user's ratings come in a row: independence is far off."""
  with gzip.open(MOVIELENS, "rt") as f:
    ids = np.array([line.split("\t")[:2] for line in f], np.int64)
  ids[:, 1] += ids[:, 0].max() + 1
  sizes = (512, 1_024, 2_048, 4_096, 8_192)
  check_batches(*ranked(ids), sizes, 2.0)
