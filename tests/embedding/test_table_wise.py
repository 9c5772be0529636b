"""Bags pooled at their owners give what one dense table gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step as dense
from test_compiled_collectives import on_64_devices
from test_compiled_step import big_plan

from recjax.embedding import tables
from recjax.frequency import Profile
from recjax.mesh import batch_sharding
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.planner import compiled_collectives, frequency_buckets
from recjax.planner import solve as solve_lib
from recjax.schema import Feature
from recjax.training import step as step_lib

ROWS, DIM, BATCH = dense.ROWS, dense.DIM, dense.BATCH
FEATURES = {
  "bags": (
    Feature("one", "a"),
    Feature("sum", "b", hotness=5),
    Feature("mean", "c", hotness=3, pooling="mean"),
    Feature("again", "b", hotness=2, pooling="mean"),
    Feature("list", "d", hotness=2, pooling="none"),
    Feature("alone", "e"),
  ),
}
# tables and their owners, for 8 devices; fewer take them modulo
POOLED = {
  "one": (("b", 3),),
  "one_owner": (("b", 1), ("c", 1)),
  "uneven": (("b", 0), ("c", 5), ("e", 5)),
}


def make_plan(devices, tiers, capacity, pooled, spare=0, **changes) -> Plan:
  plan = dense.make_plan(devices, tiers, capacity, **changes)
  pooled = tuple((name, owner % devices) for name, owner in POOLED[pooled])
  return dataclasses.replace(
    plan,
    pooled=pooled,
    spare=spare,
    rows=plan.rows + spare,
    warm_end=plan.warm_end + spare,
  )


def profile_of(features) -> Profile:
  """Ranks belong to the tables in turn, as those of `dense.batches` do."""
  names = tuple(dict.fromkeys(f.table for f in features))
  table = np.arange(ROWS, dtype=np.int16) % len(names)
  return Profile(1, names, np.ones(ROWS, np.int64), table)


def build(features, plan, optimizer, **kw):
  model, mesh, state = dense.build(features, plan, optimizer, **kw)
  where = positions.of(plan, profile_of(features))
  rows = tables.init(
    plan, model.sparse_optimizer, mesh, 0.5, 3, warm_ranks=where.ranks
  )
  return model, mesh, state._replace(tables=rows), where


def in_rank_order(t, plan, where):
  """Rows and slots as numpy; nothing is in the positions without a row."""
  every = dense.rank_order(t, plan)
  ranks = where.ranks_of(0, plan.rows)
  for x in jax.tree.leaves(every):
    assert not np.any(x[ranks < 0].astype(np.float32))
  at = where.positions_of(np.arange(ROWS, dtype=np.int32))
  return jax.tree.map(lambda x: x[at], every)


def train(features, plan, optimizer, options=None, **kw):
  """(rows before, rows and slots after, parameters, rounds of each step)."""
  model, mesh, state, where = build(features, plan, optimizer, **kw)
  first = in_rank_order(state.tables, plan, where).rows
  step = step_lib.make_train_step(model, mesh)
  compiled, rounds = None, []
  for batch in dense.batches(features):
    batch["ids"] = where.positions_of(batch["ids"])
    batch = jax.device_put(batch, batch_sharding(mesh))
    if compiled is None:
      compiled = step.lower(state, batch).compile(options)
    state, metrics = compiled(state, batch)
    rounds.append(int(metrics["rounds"]))
  return first, in_rank_order(state.tables, plan, where), state.params, rounds


@functools.cache
def wanted(kind, optimizer):
  """The reference's rows, slots and parameters, and the rows it began with."""
  features = FEATURES[kind]
  plan = dense.make_plan(1, "warm", 0)
  _, _, state = dense.build(features, plan, optimizer)
  first = dense.rank_order(state.tables, plan).rows
  params = dense.init_params(features)
  adagrad = optax.adagrad(dense.LEARNING_RATE)
  end = dense.reference(features, optimizer, first, params, adagrad)
  assert np.abs(np.asarray(end[0]) - first).max() > 0.1
  return first, jax.device_get(end)


CASES = [
  (1, "mixed", "planned", "uneven", "adagrad", 0),
  (2, "mixed_sparse", "one_row", "one_owner", "adagrad", 0),
  (8, "warm", "planned", "one", "adagrad", 0),
  (8, "mixed", "planned", "uneven", "adagrad", 0),
  (8, "mixed", "one_row", "uneven", "adagrad", 14),
  *((2, "warm", "planned", "uneven", name, 14) for name in dense.OPTIMIZERS),
]


@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "pooled", "optimizer", "spare"), CASES
)
def test_equals_one_dense_table(
  devices, tiers, capacity, pooled, optimizer, spare
):
  capacity = 1 if capacity == "one_row" else 0
  check(make_plan(devices, tiers, capacity, pooled, spare), optimizer, capacity)


@pytest.mark.parametrize("way", [dense.FLAT, dense.STAGES])
@pytest.mark.parametrize("capacity", [0, 1])
def test_several_nodes_equal_one_dense_table(way, capacity):
  plan = make_plan(8, "mixed", capacity, "uneven", nodes=(4, way))
  assert plan.nodes == 2
  check(plan, "adagrad", capacity)


def check(plan, optimizer, capacity):
  features = FEATURES["bags"]
  first, got, params, rounds = train(features, plan, optimizer, dense.FAST)
  want_first, (rows, slots, want_params) = wanted("bags", optimizer)
  np.testing.assert_array_equal(first, want_first)
  dense.assert_close((got.rows, got.slots, params), (rows, slots, want_params))
  assert (max(rounds) > 1) == (capacity == 1)


# ---- What travels


def planned(devices, dtype="float32", pooled=("b", "c")):
  """A plan of counted rows, some hot, and one round for any batch."""
  profile = profile_of(FEATURES["bags"])
  counts = np.maximum(2_000 // np.arange(1, ROWS + 1), 1)
  profile = dataclasses.replace(profile, samples=1_000, counts=counts)
  s = frequency_buckets.of_profile(
    profile, (1, 7, 3, 2, 1), bags=(1, 2, 1, 0, 1)
  )
  problem = solve_lib.make_problem(
    s,
    devices=devices,
    batch_size=max(BATCH, devices),
    lookups=14,
    dim=DIM,
    dtype="float32",
    slot_bytes=4 * DIM,
    exchange_dtype=dtype,
  )
  return solve_lib.solve(
    problem,
    hosts=1,
    device_bytes=1 << 30,
    host_bytes=1 << 30,
    hot_rows=6,
    warm_rows=100,
    capacity=ROWS,
    pooled=pooled,
  )


def check_sent(devices, dtype):
  """Plan.sent of rows and pooled vectors equals the collectives'."""
  plan = planned(devices, dtype)
  features = FEATURES["bags"]
  model, mesh, state, _ = build(
    features, plan, "adagrad", exchange_dtype=jnp.dtype(dtype)
  )
  lowered, _ = step_lib.lower(model, mesh, state.params, dense.DENSE)
  text = lowered.compile(dense.FAST).as_text()
  sent = dict(plan.sent)
  want = sum(sent[k] for k in sent if k not in ("host", "hot gradients"))
  assert sent["pooled ids"] > 0
  found = compiled_collectives.of_step(text, devices)
  kinds = ("all-to-all", "collective-permute")
  got = sum(c.sent(devices) for c in found if c.kind in kinds)
  assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
  ("devices", "dtype"), [(2, "float32"), (8, "bfloat16")]
)
def test_the_compiled_step_sends_what_the_plan_says(devices, dtype):
  check_sent(devices, dtype)


def test_on_64_devices():
  on_64_devices("import test_table_wise as t; t.check_sent(64, 'float32')")


def test_tables_are_updated_in_place():
  features, rows = FEATURES["bags"], 16_000_000
  small = make_plan(8, "warm", 1, "uneven")
  model, mesh, state, _ = build(features, small, "adam")
  plan = dataclasses.replace(big_plan(rows, "warm"), pooled=POOLED["uneven"])
  model = model._replace(plan=plan)
  lowered, shapes = step_lib.lower(model, mesh, state.params, dense.DENSE)
  compiled, t = lowered.compile(), shapes.tables
  memory = compiled.memory_analysis()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) // 8
  assert memory.alias_size_in_bytes >= size > 1 << 26
  assert memory.temp_size_in_bytes < 1 << 20
