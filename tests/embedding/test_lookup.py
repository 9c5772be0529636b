"""Lookups and updates through the exchange, against indexing."""

import functools
from typing import NamedTuple

import helpers
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from helpers_exchange import (
  COLUMNS,
  NODE_PLANS,
  PLANS,
  draws,
  rounds_of,
)
from hypothesis import given, settings
from jax.sharding import PartitionSpec

from recjax.embedding import lookup, optimizers, tables, update
from recjax.embedding.embedding import make_embedding
from recjax.embedding.optimizers import TierArrays
from recjax.mesh import batch_sharding, make_mesh
from recjax.plan.plan import Plan
from recjax.schema import AXES, Feature, columns_of

SGD = optimizers.sgd(0.1)
NODE_LOOKUPS = (
  "two_stage_one_row",
  "two_stage_tight_between",
  "copies_tight_between",
  "copies_and_two_stage",
  "two_groups_apart",
)


def features_of(plan) -> tuple[Feature, ...]:
  """Two features a group, a sequence and one id; the groups take turns."""
  tables = [g.tables[0] for g in plan.groups]
  return (
    *(Feature(f"{t}_a", t, hotness=2, pooling="none") for t in tables),
    *(Feature(f"{t}_b", t) for t in tables),
  )


def numbered(rank, dim):
  """Rows [..., dim] of ranks: [r, -r, r, ...]."""
  signs = np.resize(np.float32([1, -1]), dim)
  return np.asarray(rank, np.float32)[..., None] * signs


def tables_of(embedding, mesh):
  """Tables of numbered rows; nothing reads their padding, NaN."""
  place = tables.shardings(embedding, mesh)
  found = {}
  for g in embedding.plan.groups:
    found[g.name] = {}
    for t in g.tiers:
      x = numbered(np.arange(t.first, t.stop), g.dim)
      if t.axes:
        padding = t.shard_rows * t.owners - t.rows
        x = np.concatenate([x, np.full((padding, g.dim), np.nan, x.dtype)])
        x = x.reshape(t.shard_rows, t.owners, g.dim)
      x = jax.device_put(x, place[g.name][t.name].rows)
      found[g.name][t.name] = TierArrays(x, {})
  return found


class Seen(NamedTuple):
  """What a step of lookup and update gives, on the host."""

  activations: dict  # of each feature [B, h, d]
  masks: dict
  rounds: np.ndarray  # [n]
  tables: dict


@functools.cache
def reader(plan: Plan):
  """(ids of each group) -> Seen, compiled; see check_read."""
  mesh = make_mesh(plan.devices, plan.node_devices)
  features = features_of(plan)
  columns = columns_of(features)
  embedding = make_embedding(plan, features, {g.name: SGD for g in plan.groups})
  t = tables_of(embedding, mesh)

  def f(t, ids):
    batch = {"ids": ids}
    activations, residuals = lookup.forward(embedding, t, batch)
    masks = lookup.masks(embedding, ids)
    new, rounds = update.backward(
      embedding, t, residuals, activations, np.int32(0)
    )
    return activations, masks, rounds[None], new

  place = tables.specs(embedding)
  there = PartitionSpec(AXES)
  sharded = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=(place, there),
    out_specs=(there, there, there, place),
    check_vma=False,
  )

  def put(ids):
    joined = np.zeros((plan.batch_size, embedding.columns), np.int32)
    for g, mine in zip(plan.groups, ids, strict=True):
      own = [columns[f.name] for f in features if f.table in g.tables]
      joined[:, np.r_[tuple(own)]] = mine
    return jax.device_put(joined, batch_sharding(mesh))

  ids = [np.zeros((plan.batch_size, COLUMNS))] * len(plan.groups)
  compiled = jax.jit(sharded).lower(t, put(ids)).compile(helpers.FAST)
  return lambda ids: Seen(*jax.device_get(compiled(t, put(ids))))


def check_read(plan, ids):
  """Lookup and update equal direct indexing. Returns the number of rounds.

  The gradients are the activations: a row that is used k times moves by
  -0.1 k of itself.
  """
  plan = helpers.as_seen(plan)
  seen = reader(plan)(ids)
  rows = helpers.in_rank_order(seen.tables, plan)
  for g, mine in zip(plan.groups, ids, strict=True):
    want = numbered(np.where(mine >= 0, mine, 0), g.dim)
    (a, b), mask = (f"{g.tables[0]}_{x}" for x in "ab"), mine[:, :2] >= 0
    np.testing.assert_array_equal(seen.activations[a], want[:, :2])
    np.testing.assert_array_equal(seen.activations[b], want[:, 2:])
    np.testing.assert_array_equal(seen.masks[a], mask)
    assert b not in seen.masks
    used = np.bincount(mine[mine >= 0], minlength=g.rows)
    want = numbered(np.arange(g.rows) * (1 - 0.1 * used), g.dim)
    np.testing.assert_allclose(rows[g.name].rows, want, rtol=2e-5, atol=1e-3)
  assert np.all(seen.rounds == seen.rounds[0])
  return seen.rounds[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PLANS, *NODE_LOOKUPS])
def test_lookup_equals_indexing_and_reports_its_rounds(name):
  plan = (PLANS | NODE_PLANS)[name]
  for ids in draws(plan):
    rounds = check_read(plan, ids)
    assert rounds == len(list(rounds_of(plan, ids)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
  st.data(),
  st.sampled_from(
    [
      "one_row_buffers",
      "random_0",
      "copies_and_two_stage",
      "two_stage_one_row",
      "gathered",
      "two_groups_apart",
    ]
  ),
)
def test_lookup_of_any_ids_equals_indexing(data, name):
  plan = (PLANS | NODE_PLANS)[name]
  size = plan.batch_size * COLUMNS
  ids = []
  for g in plan.groups:
    few = st.lists(st.integers(-1, g.rows - 1), min_size=1, max_size=20)
    few = data.draw(few)
    pick = data.draw(st.lists(st.sampled_from(few), max_size=size))
    mine = np.array(pick + [few[0]] * (size - len(pick)))
    ids.append(mine.reshape(-1, COLUMNS))
  check_read(plan, ids)
