"""The formulas against closed forms and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.planner import buffer_sizes, communication, presets

probabilities = st.floats(0, 1, allow_nan=False)


def test_touch_probability_closed_forms():
  p = np.array([0.0, 1.0, 0.5, 1e-12])
  np.testing.assert_allclose(
    buffer_sizes.touch_probability(p, 1), p, rtol=1e-12
  )
  # (1 - 1e-12)^1e6 loses all digits of 1 - x in float64; the formula none.
  got = buffer_sizes.touch_probability(p, 1_000_000)
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
  missed = lambda m: 1 - buffer_sizes.touch_probability(p, m)
  np.testing.assert_allclose(missed(m + k), missed(m) * missed(k), atol=1e-12)
  assert np.all(buffer_sizes.touch_probability(p, m) >= p - 1e-15)


def test_touch_probability_is_what_samples_do():
  rng = np.random.default_rng(0)
  p = np.array([0.001, 0.01, 0.05, 0.2, 0.9])
  trials, samples = 20_000, 16
  touched = (rng.binomial(samples, p, (trials, len(p))) > 0).mean(0)
  want = buffer_sizes.touch_probability(p, samples)
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
  at = buffer_sizes.capacity(mean, probability)
  assert at >= mean
  assert at <= buffer_sizes.capacity(more, probability)
  assert at >= buffer_sizes.capacity(mean, other)
  assert isinstance(at, int)


@settings(deadline=None)
@given(st.floats(0, 1e6), st.floats(1e-12, 0.5))
def test_capacity_is_bernsteins_bound_and_no_larger(mean, probability):
  bound = lambda t: math.exp(-t * t / (2 * (mean + t / 3)))
  t = buffer_sizes.capacity(mean, probability) - mean
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
  over = sums > buffer_sizes.capacity(p.sum(), probability)
  assert over.mean() <= probability

  p = np.arange(1, rows + 1) ** -1.1
  p /= p.sum()
  samples = 32
  ids = rng.choice(rows, (trials, samples), p=p)
  ids.sort(1)
  distinct = 1 + (np.diff(ids, axis=1) != 0).sum(1)
  mean = buffer_sizes.touch_probability(p, samples).sum()
  assert abs(distinct.mean() - mean) <= 0.1
  assert (
    distinct > buffer_sizes.capacity(mean, probability)
  ).mean() <= probability


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.02, 0.5))
def test_random_sums_of_bernoullis_stay_below_the_bound(seed, probability):
  rng = np.random.default_rng(seed)
  p = rng.random(rng.integers(1, 60)) ** rng.integers(1, 6)
  trials = 2_000
  sums = (rng.random((trials, len(p))) < p).sum(1)
  over = (sums > buffer_sizes.capacity(p.sum(), probability)).mean()
  deviation = math.sqrt(probability * (1 - probability) / trials)
  assert over <= probability + 5 * deviation


def test_hundred_thousand_batches_never_pass_the_bound():
  """Distinct rows of an owner's buffer, with the variance of negatively
  associated rows: overflows of every capacity are rarer than its bound."""
  rng = np.random.default_rng(3)
  rows, samples, n = 400, 48, 4
  p = np.arange(1, rows + 1) ** -1.1
  edges = np.cumsum(p / p.sum())
  pi = buffer_sizes.touch_probability(p / p.sum(), samples)[::n]
  mean, variance = pi.sum(), buffer_sizes.variance_bound(pi)
  counts = np.zeros(rows, np.int64)
  for _ in range(10):
    ids = np.searchsorted(edges, rng.random((10_000, samples)))
    owned = np.zeros((10_000, rows), bool)
    np.put_along_axis(owned, np.minimum(ids, rows - 1), True, axis=1)
    counts += np.bincount(owned[:, ::n].sum(1), minlength=rows)
  found = counts @ np.arange(rows) / 1e5
  assert abs(found / mean - 1) < 5e-3
  assert counts @ (np.arange(rows) - found) ** 2 / 1e5 <= variance * 1.01
  for chance in (0.5, 0.1, 1e-2, 1e-3, 1e-4):
    capacity = buffer_sizes.capacity(mean, chance, variance)
    assert counts[capacity + 1 :].sum() / 1e5 <= chance
    assert buffer_sizes.overflow_bound(mean, capacity, variance) <= chance
    assert capacity <= buffer_sizes.capacity(mean, chance)


# ---- Bytes of a placement


def simulate(n, b, rows, hotness, seed=0):
  """ids [n, b, h] of a power law, and the probability of a lookup."""
  rng = np.random.default_rng(seed)
  r = np.arange(1, rows + 1) ** -1.1
  r /= r.sum()
  return rng.choice(rows, (n, b, hotness), p=r), r


def test_bytes_are_those_of_simulated_exchanges():
  n, b, rows, h, w = 4, 300, 500, 3, 64
  found = dict.fromkeys(("plain", "once", "two", "gathered", "host"), 0.0)
  trials = 60
  for seed in range(trials):
    ids, r = simulate(n, b, rows, h, seed)
    distinct = [np.unique(x) for x in ids]
    nodes = [np.unique(ids[:2]), np.unique(ids[2:])]
    for k, mine in enumerate(distinct):
      # A bag asks for each of its rows once.
      bags = sum(len(np.unique(bag[bag % n != k])) for bag in ids[k])
      found["plain"] += bags * (2 * w + 4) / n
      found["once"] += (mine % n != k).sum() * (2 * w + 4) / n
      found["gathered"] += len(mine) * (n - 1) * (w + 4) / n
    for k, there in enumerate(nodes):
      found["two"] += (there % 4 // 2 != k).sum() * (2 * w + 4) / n
  p = buffer_sizes.bag_probability(r, h)
  pi = buffer_sizes.touch_probability(p, b)
  want = {
    "plain": communication.uncoalesced_bytes(p, b, w, n),
    "once": communication.coalesced_bytes(pi, w, n),
    "two": communication.two_stage_bytes(
      buffer_sizes.touch_probability(p, 2 * b), w, 2, 2
    ),
    "gathered": communication.gathered_bytes(pi, w, n),
  }
  for name, (forward, backward) in want.items():
    total = float(np.sum(forward) + np.sum(backward))
    assert found[name] / trials == pytest.approx(total, rel=0.01), name


@settings(deadline=None)
@given(
  st.floats(0, 1),
  st.integers(1, 1_000),
  st.sampled_from([2, 8, 64]),
  st.sampled_from([64, 512]),
)
def test_which_placement_sends_least(p, b, n, w):
  """What the design says of the table of placements."""
  pi = float(buffer_sizes.touch_probability(np.array([p]), b)[0])
  once = sum(communication.coalesced_bytes(pi, w, n))
  assert once <= sum(communication.uncoalesced_bytes(p, b, w, n)) * (1 + 1e-9)
  # Replicas never save bytes against a coalesced exchange, but for the ids.
  assert (
    sum(communication.all_reduced_bytes(w, n)) >= once - 4 * (n - 1) / n - 1e-9
  )
  # Long bags that share no rows: pooled by the owner.
  h = 100
  whole = sum(communication.table_wise_bytes(1.0, b, h, w, n))
  assert whole <= sum(communication.uncoalesced_bytes(1.0, b, w, n)) * h
  split = sum(communication.table_wise_bytes(1.0, b, h, w, n, owners=4))
  assert whole < split <= 4 * whole


# ---- Seconds of a collective


@pytest.mark.parametrize(
  "seconds",
  [
    communication.all_to_all_seconds,
    communication.all_reduce_seconds,
    communication.all_gather_seconds,
  ],
)
@pytest.mark.parametrize("name", ["dgx_h100", "tpu_v5e", "tpu_v5p"])
def test_collectives(seconds, name):
  t = presets.PRESETS[name]
  assert seconds(1e6, 1, t) == 0
  for n in (2, 8, 64, 512):
    times = [float(seconds(x, n, t)) for x in (0.0, 1.0, 1e6, 1e9)]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[1] >= t.link_latency
    # The bytes that must pass a device's links, at most.
    assert times[3] >= 1e9 * (min(n, t.node_devices) - 1) / n / t.link
  if t.torus == 0:  # more nodes, slower network in the way
    assert seconds(1e9, 64, t) > seconds(1e9, 8, t)


def test_a_torus_is_bound_by_its_bisection():
  """v5e's page: 1.6 TB/s for a pod of 256, half of half the bytes cross."""
  t = presets.PRESETS["tpu_v5e"]
  seconds = communication.all_to_all_seconds(1e9, 256, t) - t.link_latency
  assert seconds == pytest.approx(256 / 4 * 1e9 / (0.75 * 1.6e12), rel=1e-6)
