"""The same rows under every plan and mesh, where they belong."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recjax.embedding import host_store, optimizers, tables
from recjax.embedding.embedding import make_embedding
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.row_random import initial_rows
from recjax.mesh import make_mesh
from recjax.plan.plan import HOT, Plan
from recjax.schema import AXES, DEVICE, Feature

ROWS, DIM = 1_003, 8
# Of the group "g": devices, hot, warm_end, and the devices of a node with a
# copy of its warm rows; then (rows, hot, warm_end, dim) of more groups.
PLANS = {
  "hot": (8, ROWS, ROWS),
  "warm": (2, 0, ROWS),
  "cold": (1, 0, 0),
  "cold_on_8": (8, 0, 0),
  "hot_and_cold": (8, 5, 5),
  "mixed": (8, 10, 317),
  "copies": (8, 10, 317, 4),
  "copies_of_all": (4, 0, ROWS, 2),
  "two_groups": (8, 10, 317, 0, (77, 5, 60, 3)),
  "three_groups": (2, 0, ROWS, 0, (77, 77, 77, 3), (51, 0, 0, DIM)),
}


def make_plan(
  devices, hot, warm_end, copies=0, *more, rows=ROWS, dim=DIM, dtype="float32"
) -> Plan:
  groups = [(rows, hot, warm_end, dim), *more]
  made = tuple(
    helpers.make_group(
      devices,
      rows,
      hot,
      warm_end - hot,
      name=name,
      tables=(name,),
      dim=dim,
      dtype=dtype,
      capacity=1,
      node_devices=copies,
      copies=copies > 0,
    )
    for name, (rows, hot, warm_end, dim) in zip("guv", groups, strict=False)
  )
  return Plan(devices, devices, made, copies)


def embedding_of(plan, optimizer="rowwise_adagrad", seed=3):
  features = tuple(Feature(t, t) for g in plan.groups for t in g.tables)
  make = optimizers.OPTIMIZERS[optimizer]
  of_group = {g.name: make(0.1) for g in plan.groups}
  return make_embedding(plan, features, of_group, seed=seed)


@functools.cache
def fresh(name, optimizer="rowwise_adagrad", scale=0.25, seed=3):
  plan = make_plan(*PLANS[name])
  mesh = make_mesh(plan.devices, plan.node_devices)
  embedding = embedding_of(plan, optimizer, seed)
  store = host_store.HostStore(embedding, range(plan.devices))
  host_store.init(store, embedding, scale)
  return embedding, mesh, tables.init(embedding, mesh, scale), store


# ---- Init


@pytest.mark.parametrize("name", PLANS)
def test_first_rows_are_the_same_under_every_plan_and_mesh(name):
  embedding, _, t, store = fresh(name)
  _, _, other, _ = fresh("hot")
  got = helpers.in_rank_order(t, embedding.plan, store)
  assert got["g"].rows.shape == (ROWS, DIM)
  np.testing.assert_array_equal(got["g"].rows, other["g"][HOT].rows)
  for g in embedding.groups:
    of = got[g.name]
    np.testing.assert_array_equal(of.slots["acc"], np.zeros(g.group.rows))
    ranks = np.arange(g.group.rows, dtype=np.int32)
    want = jax.jit(initial_rows, static_argnums=(1, 2))(
      ranks, g.dim, 0.25, np.uint32(g.seed)
    )
    np.testing.assert_array_equal(of.rows, want)


# ---- Placement


@pytest.mark.parametrize("name", PLANS)
def test_shards_lie_with_their_owners(name):
  embedding, mesh, t, store = fresh(name, "adam")
  plan = embedding.plan
  placed = tables.shardings(embedding, mesh)
  jax.tree.map(
    lambda x, s: pytest.fail(f"{x.sharding} != {s}") if x.sharding != s else 0,
    t,
    placed,
  )
  axes = {"hot": None, "warm": AXES}
  if "copies" in name:
    axes["warm"] = DEVICE
  want = helpers.in_rank_order(t, plan, store)
  for group in plan.groups:
    for tier in group.resident:
      arrays = t[group.name][tier.name]
      where = PartitionSpec()
      if axes[tier.name]:
        where = PartitionSpec(None, axes[tier.name])
      for x in jax.tree.leaves(arrays):
        assert x.sharding == NamedSharding(mesh, where)
      if not axes[tier.name]:
        continue
      # Rank r of a tier is local row r // n of owner r % n, in every node of
      # copies.
      n = plan.devices
      if axes[tier.name] == DEVICE:
        n = plan.node_devices
      shards = arrays.rows.addressable_shards
      assert len(shards) == plan.devices
      rows = want[group.name].rows[tier.first : tier.stop]
      for k, shard in enumerate(shards):
        assert shard.device == jax.devices()[k]
        mine = rows[k % n :: n]
        np.testing.assert_array_equal(
          np.asarray(shard.data)[: len(mine), 0], mine
        )


def test_bfloat16_rows_have_float32_slots():
  plan, mesh = make_plan(2, 3, 11, rows=40, dtype="bfloat16"), make_mesh(2)
  embedding = embedding_of(plan, "adam", seed=0)
  store = host_store.HostStore(embedding, range(2))
  host_store.init(store, embedding, 1.0)
  t = tables.init(embedding, mesh, 1.0)
  got = helpers.in_rank_order(t, plan, store)["g"]
  assert got.rows.dtype == "bfloat16"
  assert {s.dtype.name for s in got.slots.values()} == {"float32"}
  want = initial_rows(np.arange(40), DIM, 1.0, 0).astype("bfloat16")
  np.testing.assert_array_equal(got.rows, np.asarray(want))


# ---- Fill


def asked_and_filled(name, block_rows):
  """The ranges that fill asks for, by group, and the tables it returns."""
  embedding, mesh, *_ = fresh(name)
  t = tables.init(embedding, mesh, 0.25)
  asked = {g.name: [] for g in embedding.groups}
  dims = {g.name: g.dim for g in embedding.groups}

  def rows(group, first, stop):
    asked[group].append((first, stop))
    ranks = np.arange(first, stop, dtype=np.float32)
    columns = np.arange(dims[group], dtype=np.float32)
    rows = ranks[:, None] * dims[group] + columns
    return TierArrays(rows, {"acc": -ranks - 1})

  t = tables.fill(t, embedding, mesh, block_rows, rows)
  return embedding, mesh, asked, t


def on_devices(plan: Plan) -> Plan:
  """The plan without its stored rows, which are not `fill`'s."""
  groups = tuple(
    dataclasses.replace(g, tiers=g.resident, visitors=None) for g in plan.groups
  )
  return dataclasses.replace(plan, groups=groups)


def test_a_block_has_a_row_of_each_owner_at_least():
  tier = helpers.make_group(8, 20, 0, 20).tier("warm")
  assert list(tables.blocks(tier, 1)) == [(0, 1), (1, 1), (2, 1)]
  assert list(tables.blocks(tier, 17)) == [(0, 2), (2, 1)]


@pytest.mark.parametrize("block_rows", [100, 10_000])
@pytest.mark.parametrize("name", PLANS)
def test_fill_writes_every_rank_once_in_bounded_blocks(name, block_rows):
  embedding, mesh, asked, t = asked_and_filled(name, block_rows)
  plan = on_devices(embedding.plan)
  got = helpers.in_rank_order(t, plan)
  for g in plan.groups:
    if not g.tiers:
      assert not asked[g.name]
      continue
    want = np.arange(g.rows * g.dim, dtype=np.float32).reshape(g.rows, g.dim)
    np.testing.assert_array_equal(got[g.name].rows, want)
    acc = got[g.name].slots["acc"]
    np.testing.assert_array_equal(acc, -1.0 - np.arange(g.rows))
    firsts, stops = zip(*asked[g.name], strict=True)
    assert list(firsts) == [0, *stops[:-1]]
    assert stops[-1] == g.rows
    assert all(0 < b - a <= block_rows for a, b in asked[g.name])
    most = g.rows / (block_rows - embedding.plan.devices) + len(g.tiers)
    assert len(asked[g.name]) <= most
  placed = tables.shardings(embedding, mesh)
  assert jax.tree.map(lambda x: x.sharding, t) == placed


def test_fill_writes_in_place():
  """Its program aliases the tier, and needs a block, not a tier, more."""
  for name in ("hot", "warm"):
    plan = make_plan(*PLANS[name], dim=64)
    mesh = make_mesh(plan.devices)
    embedding = embedding_of(plan)
    (tier,) = plan.groups[0].tiers
    write = tables.block_writer(tier, ("acc",), mesh)
    t = tables.init(embedding, mesh, 0.25)["g"][name]
    block = jax.tree.map(lambda x: np.zeros((8, *x.shape[1:]), x.dtype), t)
    memory = write.lower(t, block, np.int32(0)).compile().memory_analysis()
    size = tier.shard_rows * (64 + 1) * 4
    aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
    assert aliased >= size, name
    temporary = memory.temp_size_in_bytes + memory.host_temp_size_in_bytes
    assert temporary < size / 4, name


@pytest.mark.slow
def test_rows_past_2_31_numbers_are_read_and_written():
  """A shard's numbers are counted in 64 bits; of a byte each, to fit here."""
  shape = (2**23 + 8, 1, 256)
  local = np.array([0, 2**23 - 1, 2**23, 2**23 + 7], np.int32)
  index = np.stack([local, np.zeros_like(local)], axis=1)
  rows = np.arange(1, 5, dtype=np.int8)[:, None] * np.ones(256, np.int8)
  write = jax.jit(tables.scatter, donate_argnums=0)
  x = write(jax.jit(lambda: jnp.zeros(shape, jnp.int8))(), index, rows)
  np.testing.assert_array_equal(jax.jit(tables.gather)(x, index), rows)
  # Where they would be if the place wrapped, and next to them, is nothing.
  others = np.array([[1, 0], [7, 0], [8, 0], [2**22, 0]], np.int32)
  assert not np.any(jax.jit(tables.gather)(x, others))
  assert int(jnp.sum(x[2**23 - 1 :].astype(jnp.int32))) == 256 * (2 + 3 + 4)
