"""The same rows under every plan and mesh, where they belong."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recjax.embedding import optimizers, tables
from recjax.embedding.tables import Tier
from recjax.mesh import make_mesh
from recjax.plan.plan import Plan

ROWS, DIM = 1_003, 8
ADAM = optimizers.adam(0.1)
ROWWISE = optimizers.rowwise_adagrad(0.1)
# devices, hot, warm_end, and the devices of a node with a copy of warm rows
PLANS = {
  "hot": (8, ROWS, ROWS),
  "warm": (2, 0, ROWS),
  "cold": (1, 0, 0),
  "cold_on_8": (8, 0, 0),
  "hot_and_cold": (8, 5, 5),
  "mixed": (8, 10, 317),
  "copies": (8, 10, 317, 4),
  "copies_of_all": (4, 0, ROWS, 2),
}


def make_plan(
  devices, hot, warm_end, copies=0, rows=ROWS, dim=DIM, dtype="float32"
):
  return Plan(
    devices=devices,
    batch_size=devices,
    rows=rows,
    dim=dim,
    dtype=dtype,
    hot=hot,
    warm_end=warm_end,
    capacity_warm=1 if warm_end > hot else 0,
    capacity_cold=1 if rows > warm_end else 0,
    node_devices=copies,
    warm_copies="node" if copies else "one",
    capacity_far_warm=1 if copies else 0,
  )


def counts(plan):
  return {"hot": plan.hot, "warm": plan.warm, "cold": plan.cold}


def rank_order(t: tables.Tables, plan):
  """Rows and slots as numpy, in rank order."""
  parts = []
  for name, count in counts(plan).items():
    tier = getattr(t, name)
    assert (tier is None) == (count == 0)
    if tier is not None:
      flat = lambda x, n=name: x if n == "hot" else x.reshape(-1, *x.shape[2:])
      take = lambda x, f=flat, c=count: f(np.asarray(x))[:c]
      parts.append(jax.tree.map(take, tier))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.cache
def fresh(name, optimizer="rowwise_adagrad", scale=0.25, seed=3):
  plan = make_plan(*PLANS[name])
  mesh = make_mesh(plan.devices, plan.node_devices)
  optimizer = optimizers.OPTIMIZERS[optimizer](0.1)
  return plan, mesh, tables.init(plan, optimizer, mesh, scale, seed)


# ---- Init


@pytest.mark.parametrize("name", PLANS)
def test_first_rows_are_the_same_under_every_plan_and_mesh(name):
  plan, _, t = fresh(name)
  _, _, other = fresh("hot")
  got = rank_order(t, plan)
  assert got.rows.shape == (ROWS, DIM)
  np.testing.assert_array_equal(got.rows, other.hot.rows)
  np.testing.assert_array_equal(got.slots["acc"], np.zeros(ROWS))


def test_first_rows_are_uniform():
  rows = np.asarray(tables.initial_rows(np.arange(200_000), DIM, 0.25, 3))
  assert rows.dtype == np.float32
  assert rows.min() >= -0.25
  assert rows.max() < 0.25
  n = rows.size
  assert abs(rows.mean()) < 5 * 0.25 / np.sqrt(3 * n)
  variance = 0.25**2 / 3  # of the uniform; that of x^2 is 4/45 scale^4
  assert abs(rows.var() - variance) < 5 * np.sqrt(4 / 45 / n) * 0.25**2
  share, _ = np.histogram(rows, 64, (-0.25, 0.25))
  expected = n / 64
  assert np.sum((share - expected) ** 2 / expected) < 63 + 5 * np.sqrt(126)
  # Neither neighbouring ranks nor columns go together.
  for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
    assert abs(np.mean(a * b)) < 5 * variance / np.sqrt(a.size)


def test_first_rows_depend_on_the_seed():
  ranks = np.arange(1_000)
  rows = [tables.initial_rows(ranks, DIM, 1.0, seed) for seed in (0, 1)]
  assert np.mean(np.asarray(rows[0]) == np.asarray(rows[1])) < 0.001
  correlation = np.corrcoef(np.ravel(rows[0]), np.ravel(rows[1]))[0, 1]
  assert abs(correlation) < 5 / np.sqrt(rows[0].size)
  again = tables.initial_rows(ranks[500:], DIM, 1.0, 0)
  np.testing.assert_array_equal(again, rows[0][500:])


# ---- Placement


@pytest.mark.parametrize("name", PLANS)
def test_shards_lie_with_their_owners_in_the_right_memory(name):
  plan, mesh, t = fresh(name, "adam")
  placed = tables.shardings(plan, ADAM, mesh)
  jax.tree.map(
    lambda x, s: pytest.fail(f"{x.sharding} != {s}") if x.sharding != s else 0,
    t,
    placed,
  )
  device = jax.devices()[0].default_memory().kind
  spec = lambda tier: PartitionSpec(None, tables.owners_of(plan, tier)[1])
  for tier, (where, wide) in {
    "hot": (PartitionSpec(), device),
    "warm": (spec("warm"), device),
    "cold": (spec("cold"), "pinned_host"),
  }.items():
    for x in jax.tree.leaves(getattr(t, tier)):
      assert x.sharding == NamedSharding(mesh, where, memory_kind=wide)
  # Rank r of a tier is slot r // n of owner r % n, in every node of copies.
  want = rank_order(t, plan).rows
  for tier, first in (("warm", plan.hot), ("cold", plan.warm_end)):
    if getattr(t, tier) is None:
      continue
    n = plan.warm_owners if tier == "warm" else plan.devices
    shards = getattr(t, tier).rows.addressable_shards
    assert len(shards) == plan.devices
    for k, shard in enumerate(shards):
      assert shard.device == jax.devices()[k]
      mine = want[first : first + counts(plan)[tier]][k % n :: n]
      np.testing.assert_array_equal(
        np.asarray(shard.data)[: len(mine), 0], mine
      )


def test_bfloat16_rows_have_float32_slots():
  plan, mesh = make_plan(2, 3, 11, rows=40, dtype="bfloat16"), make_mesh(2)
  t = tables.init(plan, ADAM, mesh, 1.0, 0)
  got = rank_order(t, plan)
  assert got.rows.dtype == "bfloat16"
  assert {s.dtype.name for s in got.slots.values()} == {"float32"}
  want = tables.initial_rows(np.arange(40), DIM, 1.0, 0).astype("bfloat16")
  np.testing.assert_array_equal(got.rows, np.asarray(want))


# ---- Fill


def asked_and_filled(name, block_rows):
  """The ranges that fill asks for, and the tables that it returns."""
  plan = make_plan(*PLANS[name])
  mesh = make_mesh(plan.devices, plan.node_devices)
  t = tables.init(plan, ROWWISE, mesh, 0.25, 3)
  asked = []

  def rows(first, stop):
    asked.append((first, stop))
    ranks = np.arange(first, stop, dtype=np.float32)
    columns = np.arange(DIM, dtype=np.float32)
    return Tier(ranks[:, None] * DIM + columns, {"acc": -ranks - 1})

  t = tables.fill(t, plan, ROWWISE, mesh, block_rows, rows)
  return plan, mesh, asked, t


@pytest.mark.parametrize("block_rows", [100, 10_000])
@pytest.mark.parametrize("name", PLANS)
def test_fill_writes_every_rank_once_in_bounded_blocks(name, block_rows):
  plan, mesh, asked, t = asked_and_filled(name, block_rows)
  got = rank_order(t, plan)
  want = np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM)
  np.testing.assert_array_equal(got.rows, want)
  np.testing.assert_array_equal(got.slots["acc"], -1.0 - np.arange(ROWS))
  firsts, stops = zip(*asked, strict=True)
  assert list(firsts) == [0, *stops[:-1]]
  assert stops[-1] == ROWS
  assert all(0 < b - a <= block_rows for a, b in asked)
  tiers = sum(count > 0 for count in counts(plan).values())
  assert len(asked) <= ROWS / (block_rows - plan.devices) + tiers
  placed = tables.shardings(plan, ROWWISE, mesh)
  assert jax.tree.map(lambda x: x.sharding, t) == placed


def test_fill_writes_in_place():
  """Its program aliases the tier, and needs a block, not a tier, more."""
  for name in ("hot", "warm", "cold"):
    plan = make_plan(*PLANS[name], dim=64)
    mesh = make_mesh(plan.devices)
    slots = tuple(sorted(ROWWISE.slots.items()))
    write = tables._block_writer(plan, slots, mesh, name)
    t = getattr(tables.init(plan, ROWWISE, mesh, 0.25, 3), name)
    block = jax.tree.map(lambda x: np.zeros((8, *x.shape[1:]), x.dtype), t)
    memory = write.lower(t, block, np.int32(0)).compile().memory_analysis()
    shard = plan.hot or plan.warm_slots or plan.cold_slots
    size = shard * (64 + 1) * 4
    aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
    assert aliased >= size, name
    temporary = memory.temp_size_in_bytes + memory.host_temp_size_in_bytes
    assert temporary < size / 4, name
