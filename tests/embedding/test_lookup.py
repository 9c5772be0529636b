"""Lookups against indexing; pooling against a loop, spread against JAX."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec
from test_exchange import (
  COLUMNS,
  DIM,
  FAST,
  NODE_PLANS,
  PLANS,
  ROWS,
  draws,
  rounds_of,
)

from recjax.embedding import lookup, optimizers, tables
from recjax.embedding.tables import Tier
from recjax.mesh import AXIS, batch_sharding, make_mesh
from recjax.schema import Feature

B = 3
FEATURES = (
  Feature("a", "t", hotness=2, pooling="none"),
  Feature("b", "t"),
)
SGD = optimizers.sgd(0.1)
NODE_LOOKUPS = (
  "two_stage_one_row",
  "two_stage_tight_between",
  "copies_tight_between",
  "copies_and_two_stage",
)


@st.composite
def lists_of_features(draw):
  pooling = st.sampled_from(["sum", "mean", "none"])
  kinds = st.tuples(st.integers(1, 4), pooling, st.booleans())
  return tuple(
    Feature(f"f{i}", "t", *kind)
    for i, kind in enumerate(draw(st.lists(kinds, min_size=1, max_size=6)))
  )


def arrays(features, seed):
  rng = np.random.default_rng(seed)
  columns = sum(f.hotness for f in features)
  ids = rng.integers(-1, 5, (B, columns)).astype(np.int32)
  weights = rng.random((B, columns), np.float32)
  rows = rng.standard_normal((B, columns, DIM)).astype(np.float32)
  return ids, weights, rows


@settings(deadline=None, max_examples=60)
@given(lists_of_features(), st.integers(0, 99))
def test_pool_against_a_loop_and_spread_against_the_transpose(features, seed):
  ids, weights, rows = arrays(features, seed)
  coef = lookup.coefficients(ids, weights, features)
  pool = lambda rows: lookup.pool(lambda c: rows[:, c], coef, features)
  got = pool(rows)

  want, at = [], 0
  for f in features:
    there = ids[:, at : at + f.hotness] >= 0
    by = np.ones_like(there, np.float32)
    if f.weighted:
      by = weights[:, at : at + f.hotness]
    if f.pooling == "mean" and coef is not None:
      total = (by * there).sum(axis=1, keepdims=True)
      by = by / np.where(total == 0, 1, total)
    if coef is not None:
      by = by * there
    vectors = rows[:, at : at + f.hotness] * by[..., None]
    if f.pooling == "none":
      want.append(vectors)
    else:
      want.append(vectors.sum(axis=1, keepdims=True))
    at += f.hotness
  np.testing.assert_allclose(got, np.concatenate(want, axis=1), atol=1e-6)

  gradients = np.random.default_rng(seed).standard_normal(got.shape, np.float32)
  like = jax.ShapeDtypeStruct(rows.shape, np.float32)
  (transposed,) = jax.linear_transpose(pool, like)(gradients)
  spread = lookup.spread(gradients, coef, features)
  np.testing.assert_allclose(spread, transposed, rtol=1e-6, atol=1e-7)


# ---- Through the exchange: the rank itself is the row


def numbered(plan, mesh):
  """Tables whose row r is [r, -r]; nothing reads their padding, NaN."""
  ranks = np.arange(ROWS, dtype=np.float32)
  rows = np.stack([ranks, -ranks], axis=1)
  cuts = {
    "hot": (0, plan.hot, None),
    "warm": (plan.hot, plan.warm_end, plan.warm_owners),
    "cold": (plan.warm_end, ROWS, plan.devices),
  }
  place = tables.shardings(plan, SGD, mesh)
  tiers = {}
  for name, (first, stop, owners) in cuts.items():
    x = rows[first:stop]
    if first == stop:
      tiers[name] = None
      continue
    if owners:
      slots = getattr(plan, f"{name}_slots")
      padding = np.full((slots * owners - len(x), DIM), np.nan, x.dtype)
      x = np.concatenate([x, padding]).reshape(slots, owners, DIM)
    x = jax.device_put(x, getattr(place, name).rows)
    tiers[name] = Tier(x, {})
  return tables.Tables(**tiers)


@functools.cache
def reader(plan):
  """(ids) -> (activations [B, A, d], rounds, updated tables), compiled."""
  mesh = make_mesh(plan.devices, plan.node_devices)
  t = numbered(plan, mesh)

  def f(t, ids):
    activations, trip = lookup.read(
      t, ids, None, FEATURES, plan, np.dtype(np.float32)
    )
    new, rounds = lookup.update(
      t,
      trip,
      activations,
      FEATURES,
      plan,
      np.dtype(np.float32),
      SGD,
      np.int32(0),
      np.uint32(0),
    )
    return activations, rounds[None], new

  place = tables.specs(plan, SGD)
  sharded = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=(place, PartitionSpec(AXIS)),
    out_specs=(PartitionSpec(AXIS), PartitionSpec(AXIS), place),
    check_vma=False,
  )
  ids = np.zeros((plan.batch_size, COLUMNS), np.int32)
  put = lambda x: jax.device_put(x.astype(np.int32), batch_sharding(mesh))
  compiled = jax.jit(sharded).lower(t, put(ids)).compile(FAST)
  return lambda ids: jax.device_get(compiled(t, put(ids)))


def check_read(plan, ids):
  """Lookup and update equal direct indexing. Returns the number of rounds.

  The gradients are the activations: a row that is used k times moves by
  -0.1 k of itself.
  """
  activations, rounds, new = reader(plan)(ids)
  want = np.where(ids >= 0, ids, 0).astype(np.float32)
  want = np.stack([want, -want], axis=-1)
  np.testing.assert_array_equal(activations, want)
  assert np.all(rounds == rounds[0])
  rows = np.concatenate(
    [
      np.asarray(tier.rows).reshape(-1, DIM)[:count]
      for tier, count in zip(new, (plan.hot, plan.warm, plan.cold), strict=True)
      if tier is not None
    ]
  )
  used = np.bincount(ids[ids >= 0], minlength=ROWS)
  want = np.arange(ROWS) * (1 - 0.1 * used)
  np.testing.assert_allclose(
    rows, np.stack([want, -want], axis=1), rtol=2e-5, atol=1e-3
  )
  return rounds[0]


@pytest.mark.parametrize("name", [*PLANS, *NODE_LOOKUPS])
def test_lookup_equals_indexing_and_reports_its_rounds(name):
  plan = (PLANS | NODE_PLANS)[name]
  for ids in draws(plan):
    rounds = check_read(plan, ids)
    assert rounds == len(list(rounds_of(plan, ids)))


@settings(max_examples=60, deadline=None)
@given(
  st.data(),
  st.sampled_from(
    ["one_row_buffers", "random_0", "copies_and_two_stage", "two_stage_one_row"]
  ),
)
def test_lookup_of_any_ids_equals_indexing(data, name):
  plan = (PLANS | NODE_PLANS)[name]
  size = plan.batch_size * COLUMNS
  few = data.draw(st.lists(st.integers(-1, ROWS - 1), min_size=1, max_size=20))
  pick = data.draw(st.lists(st.sampled_from(few), max_size=size))
  ids = np.array(pick + [few[0]] * (size - len(pick)))
  check_read(plan, ids.reshape(-1, COLUMNS))


def test_stochastic_rounding_is_unbiased():
  x = jnp.full((200_000,), 1.0 + 2.0**-10)  # an eighth of a bfloat16 step
  bits = tables.row_bits(jnp.arange(200_000), 1, 7)[:, 0]
  rounded = lookup._stochastic_round(x, bits).astype(jnp.float32)
  assert set(np.unique(rounded)) == {1.0, 1.0 + 2.0**-7}
  np.testing.assert_allclose(jnp.mean(rounded), x[0], atol=4e-5)
