"""The host's route of a batch equals the device's, array by array."""

import functools

import dense_reference as dense
import helpers
import jax
import numpy as np
import pytest
from helpers_exchange import COLUMNS, NODE_PLANS, PLANS, SAMPLES
from helpers_step import spec_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.embedding import exchange, host_route, table_wise
from recjax.embedding.embedding import make_embedding
from recjax.embedding.optimizers import OPTIMIZERS
from recjax.plan.plan import Plan
from recjax.schema import Feature
from recjax.training import step as step_lib
from recjax.training import visiting

ALL = PLANS | NODE_PLANS


def embedding_of(plan):
  """The plan's groups, COLUMNS features each, in turns."""
  features = tuple(
    Feature(f"{g.name}{i}", g.tables[0])
    for i in range(COLUMNS)
    for g in plan.groups
  )
  optimizers = {g.name: OPTIMIZERS["sgd"](0.1) for g in plan.groups}
  return make_embedding(plan, features, optimizers)


@functools.cache
def on_device(plan):
  """Compiled ids [L] of each group -> Route."""
  run = jax.jit(lambda ids: exchange.route(ids, plan))
  ids = [np.zeros(SAMPLES * COLUMNS, np.int32)] * len(plan.groups)
  return run.lower(ids).compile(helpers.FAST)


def drawn(embedding, samples, seed):
  """Ids [samples, S] of all rows of the groups, of few, or none."""
  rng = np.random.default_rng(seed)
  ids = np.empty((samples, embedding.columns), np.int32)
  for g in embedding.groups:
    rows = min(g.group.rows, int(rng.choice([1, 5, 10**9])))
    for at in g.columns:
      ids[:, at] = rng.integers(-1, rows, (samples, 1))
  ids[rng.random(ids.shape) < rng.choice([0, 0.3, 1], p=[0.6, 0.3, 0.1])] = -1
  return ids


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.integers(0, 2**32))
def test_equals_the_devices_route(name, seed):
  plan = ALL[name]
  embedding = embedding_of(plan)
  devices = min(plan.devices, 2)  # of a process
  ids = drawn(embedding, devices * SAMPLES, seed)
  got = host_route.routes(ids, embedding, devices)
  for device, mine in enumerate(np.split(ids, devices)):
    flat = [np.asarray(g.take(mine)).reshape(-1) for g in embedding.groups]
    want = on_device(plan)(flat)
    for field, x, y in zip(want._fields, got, want, strict=True):
      np.testing.assert_array_equal(x[device], y, field)
      assert x.dtype == np.int32, field


def test_a_group_looks_up_its_columns_of_however_few_samples():
  embedding = embedding_of(ALL["two_groups"])
  for samples in (1, COLUMNS, 2 * COLUMNS + 1):
    ids = np.arange(samples * 2 * COLUMNS, dtype=np.int32)
    ids = ids.reshape(samples, -1)  # [b, S]
    for g, flat in enumerate(host_route.flat_ids(ids, embedding)):
      np.testing.assert_array_equal(flat, ids[:, g::2].reshape(-1))


def test_a_tables_owner_gets_its_lookups_without_a_route():
  group = helpers.make_group(
    2,
    20,
    2,
    18,
    tables=("t", "u"),
    table_wise=(("u", 1),),
    padding_rows=3,
  )
  plan = Plan(2, 2 * SAMPLES, (group,))
  features = (Feature("t", "t", 2), Feature("u", "u", 3))
  embedding = make_embedding(plan, features, {"g": OPTIMIZERS["sgd"](0.1)})
  ids = drawn(embedding, SAMPLES, 0)
  (flat,) = host_route.flat_ids(ids, embedding)
  there = np.asarray(table_wise.to_owners(ids, embedding.groups[0], 2))
  assert there.any() and not there[:, :2].any()
  np.testing.assert_array_equal(flat, np.where(there, -1, ids).reshape(-1))


@pytest.mark.parametrize(
  ("hot", "warm", "sync", "training", "wanted"),
  [
    (20, 0, "all_reduce", True, False),
    (20, 0, "all_gather", True, True),
    (20, 0, "all_gather", False, False),
    (5, 15, "all_reduce", False, True),
  ],
)
def test_a_batch_gets_a_route_where_rows_travel(
  hot, warm, sync, training, wanted
):
  plan = case_plan(2, 3 * hot, 3 * warm, hot_sync=sync)
  spec, mesh = spec_of(CASE, plan)
  batch = {"ids": drawn(spec.embedding, 8, 0)}
  for on_host in (True, False):
    step = visiting.Step(spec, mesh, None, on_host=on_host)
    found = step.prepare(batch, training)
    assert ("route" in found) == (wanted and on_host)
    assert "route" not in batch  # Grain may give it to another reader


PART = dense.Part("g", ("t", "u"), 60, 4, "adagrad")
CASE = dense.Case((PART,), (Feature("t", "t", 2), Feature("u", "u")))


def case_plan(devices, hot, warm, **kw):
  group = helpers.make_group(
    devices, hot=hot, warm=warm, **PART._asdict(), **kw
  )
  return Plan(devices, dense.BATCH, (group,), kw.get("node_devices", 0))


@pytest.mark.parametrize(
  "plan",
  [
    case_plan(1, 60, 0, hot_sync="all_gather"),
    case_plan(8, 5, 55, capacity=1),
    case_plan(8, 9, 51, hot_sync="all_gather", two_stage=True, node_devices=4),
  ],
)
def test_a_step_with_the_hosts_routes_equals_one_dense_table(plan):
  dense.check(CASE, plan, on_host=True)


def test_a_step_with_the_hosts_route_does_not_sort():
  spec, mesh = spec_of(CASE, case_plan(1, 60, 0, hot_sync="all_gather"))
  params = dense.init_params(CASE)
  sorts = [
    step_lib.lower(spec, mesh, params, dense.DENSE, routed=routed)[0]
    .as_text()
    .count("stablehlo.sort")
    for routed in (False, True)
  ]
  assert sorts == [1, 0]
