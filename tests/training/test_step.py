"""Every placement, mesh and capacity equals one dense table on one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.embedding import optimizers, tables
from recjax.mesh import batch_sharding, make_mesh, replicated
from recjax.plan.plan import Plan
from recjax.planner.cut_points import FLAT, TRANSPORTS
from recjax.schema import Feature
from recjax.training import step as step_lib

ROWS, DIM, BATCH, DENSE, STEPS = 203, 8, 32, 3, 20
LEARNING_RATE = 0.1
# Of the rows; such that 20 steps move them far under every optimizer.
ROW_RATES = {"sgd": 20.0, "rowwise_adagrad": 0.1, "adagrad": 0.1, "adam": 0.1}

FEATURES = {
  "one_hot": (Feature("a", "a"), Feature("b", "b"), Feature("c", "c")),
  "multi_hot_mean": (
    Feature("a", "a"),
    Feature("bag", "b", hotness=4, pooling="mean"),
    Feature("list", "c", hotness=3, pooling="none"),
  ),
  "weighted": (
    Feature("a", "a", hotness=3, weighted=True),
    Feature("b", "b", hotness=4, pooling="mean", weighted=True),
  ),
  "shared_table": (
    Feature("a", "t", hotness=2),
    Feature("b", "t"),
    Feature("c", "t", hotness=3, pooling="mean"),
  ),
}
# Large, so that rounding is not amplified: an adaptive optimizer with an eps of
# 1e-8 turns a gradient of 1e-9, which is noise, into a step of its full rate.
EPS = 1e-3
OPTIMIZERS = {
  name: functools.partial(make, ROW_RATES[name], **kw)
  for (name, make), kw in zip(
    optimizers.OPTIMIZERS.items(),
    ({}, {"eps": EPS}, {"eps": EPS}, {"eps": EPS}),
    strict=True,
  )
}
# hot and warm rows of a plan; the rest is cold
TIERS = {
  "hot": (ROWS, 0),
  "hot_sparse": (ROWS, 0),
  "warm": (0, ROWS),
  "cold": (0, 0),
  "mixed": (10, 61),
  "mixed_sparse": (10, 61),
}


def make_plan(
  devices, tiers, capacity, batch=BATCH, dtype="float32", nodes=(0, FLAT)
):
  """nodes: (devices of each, transport)."""
  hot, warm = TIERS[tiers]
  enough = capacity or ROWS
  node_devices, way = nodes
  staged = way.exchange == "two_stage"
  copies = way.warm_copies == "node"
  return Plan(
    devices=devices,
    batch_size=batch,
    rows=ROWS,
    dim=DIM,
    dtype=dtype,
    hot=hot,
    warm_end=hot + warm,
    capacity_warm=enough if warm else 0,
    capacity_cold=enough if hot + warm < ROWS else 0,
    hot_sync="sparse" if "sparse" in tiers else "dense",
    capacity_hot=enough if "sparse" in tiers else 0,
    node_devices=node_devices,
    exchange=way.exchange,
    warm_copies=way.warm_copies,
    capacity_far_warm=enough if warm and (staged or copies) else 0,
    capacity_far_cold=enough if hot + warm < ROWS and staged else 0,
  )


def batches(features, steps=STEPS, seed=0):
  """Power-law ids over each table's part of the ranks, interleaved."""
  rng = np.random.default_rng(seed)
  names = tuple(dict.fromkeys(f.table for f in features))
  for _ in range(steps):
    columns = []
    for f in features:
      ranks = np.arange(names.index(f.table), ROWS, len(names))
      draw = np.minimum(rng.zipf(1.3, (BATCH, f.hotness)) - 1, len(ranks) - 1)
      ids = ranks[draw]
      length = rng.integers(0, f.hotness + 1, (BATCH, 1))
      if f.hotness > 1:
        ids = np.where(np.arange(f.hotness)[None] < length, ids, -1)
      columns.append(ids)
    ids = np.concatenate(columns, 1).astype(np.int32)
    batch = {
      "label": rng.integers(0, 2, BATCH).astype(np.float32),
      "dense": rng.normal(size=(BATCH, DENSE)).astype(np.float32),
      "ids": ids,
    }
    if any(f.weighted for f in features):
      w = rng.uniform(0.5, 2, ids.shape)
      batch["weights"] = w.astype(np.float32)
    yield batch


def apply(params, dense, activations):
  x = jnp.concatenate([dense, activations.reshape(dense.shape[0], -1)], 1)
  x = jnp.tanh(x @ params["w1"])
  return (x @ params["w2"])[:, 0]


def init_params(features):
  width = DENSE + DIM * sum(f.activations for f in features)
  rng = np.random.default_rng(1)
  w = lambda a, b: (rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32)
  return {"w1": w(width, 16), "w2": w(16, 1)}


# ---- The dense reference: its own lookup, its own optimizers


def reference(features, optimizer, rows, params, dense_optimizer):
  """Trains with jnp.take, autodiff through the table, whole-table updates."""

  def forward(table, params, batch):
    at, out = 0, []
    for f in features:
      ids = batch["ids"][:, at : at + f.hotness]
      there = (ids >= 0).astype(jnp.float32)
      got = jnp.take(table, jnp.maximum(ids, 0), axis=0)  # [b, h, d]
      w = there
      if f.weighted:
        w = w * batch["weights"][:, at : at + f.hotness]
      got = got * w[:, :, None]
      if f.pooling == "none":
        out.append(got)
      else:
        bag = jnp.sum(got, 1, keepdims=True)
        if f.pooling == "mean":
          total = jnp.sum(w, 1)[:, None, None]
          bag = jnp.where(
            total == 0, 0.0, bag / jnp.where(total == 0, 1, total)
          )
        out.append(bag)
      at += f.hotness
    logits = apply(params, batch["dense"], jnp.concatenate(out, 1))
    y = batch["label"]
    return jnp.mean(jnp.logaddexp(0.0, logits) - y * logits)

  @jax.jit
  def step(t, table, slots, params, opt_state, batch):
    g, dense_grads = jax.grad(forward, argnums=(0, 1))(table, params, batch)
    seen = jnp.zeros(ROWS).at[jnp.where(batch["ids"] < 0, ROWS, batch["ids"])]
    seen = seen.add(1.0, mode="drop") > 0
    if optimizer == "sgd":
      new, new_slots = table - ROW_RATES[optimizer] * g, {}
    elif optimizer == "adagrad":
      acc = slots["acc"] + g**2
      new = table - ROW_RATES[optimizer] * g / (jnp.sqrt(acc) + EPS)
      new_slots = {"acc": acc}
    elif optimizer == "rowwise_adagrad":
      acc = slots["acc"] + (g**2).mean(1)
      new = table - ROW_RATES[optimizer] * g / (jnp.sqrt(acc) + EPS)[:, None]
      new_slots = {"acc": acc}
    else:
      m = 0.9 * slots["m"] + 0.1 * g
      v = 0.999 * slots["v"] + 0.001 * g**2
      hat = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + EPS)
      new, new_slots = table - ROW_RATES[optimizer] * hat, {"m": m, "v": v}
    keep = lambda a, b: jnp.where(seen if a.ndim == 1 else seen[:, None], a, b)
    updates, opt_state = dense_optimizer.update(dense_grads, opt_state, params)
    return (
      keep(new, table),
      {k: keep(new_slots[k], slots[k]) for k in slots},
      optax.apply_updates(params, updates),
      opt_state,
    )

  shapes = {
    "sgd": {},
    "adagrad": {"acc": (ROWS, DIM)},
    "rowwise_adagrad": {"acc": (ROWS,)},
    "adam": {"m": (ROWS, DIM), "v": (ROWS, DIM)},
  }[optimizer]
  slots = {k: jnp.zeros(s) for k, s in shapes.items()}
  opt_state = dense_optimizer.init(params)
  table = jnp.asarray(rows)
  for t, batch in enumerate(batches(features), 1):
    table, slots, params, opt_state = step(
      jnp.float32(t), table, slots, params, opt_state, batch
    )
  return table, slots, params


# ---- The system


def rank_order(t: tables.Tables, plan):
  """Rows and slots as numpy, in rank order."""
  parts = []
  for tier, count in zip(t, (plan.hot, plan.warm, plan.cold), strict=True):
    if tier is None:
      continue
    flat = lambda x, hot=tier is t.hot: np.asarray(
      x if hot else x.reshape(-1, *x.shape[2:])
    )
    parts.append(jax.tree.map(lambda x, f=flat, c=count: f(x)[:c], tier))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def build(features, plan, optimizer, exchange_dtype=jnp.float32):
  mesh = make_mesh(plan.devices, plan.node_devices)
  model = step_lib.Model(
    apply=apply,
    features=features,
    dense_optimizer=optax.adagrad(LEARNING_RATE),
    sparse_optimizer=OPTIMIZERS[optimizer](),
    plan=plan,
    exchange_dtype=exchange_dtype,
    seed=0,
  )
  params = init_params(features)
  params, opt_state, step = jax.device_put(
    (params, model.dense_optimizer.init(params), np.int32(0)),
    replicated(mesh),
  )
  t = tables.init(plan, model.sparse_optimizer, mesh, scale=0.5, seed=3)
  return model, mesh, step_lib.TrainState(step, params, opt_state, t)


# Compiled fast rather than well: these tests compile hundreds of steps.
FAST = {"xla_backend_optimization_level": 0}


def train(features, plan, optimizer, options=None, **kw):
  """(rows before, state after, rounds of each step)."""
  model, mesh, state = build(features, plan, optimizer, **kw)
  first = rank_order(state.tables, plan).rows
  step = step_lib.make_train_step(model, mesh)
  compiled, rounds = None, []
  for batch in batches(features):
    batch = jax.device_put(batch, batch_sharding(mesh))
    if compiled is None:
      compiled = step.lower(state, batch).compile(options)
    state, metrics = compiled(state, batch)
    rounds.append(int(metrics["rounds"]))
  return first, state, rounds


@functools.cache
def wanted(kind, optimizer):
  """The reference's rows, slots and parameters, and the rows it began with."""
  features = FEATURES[kind]
  plan = make_plan(1, "warm", 0)
  _, _, state = build(features, plan, optimizer)
  first = rank_order(state.tables, plan).rows
  params = init_params(features)
  adagrad = optax.adagrad(LEARNING_RATE)
  end = reference(features, optimizer, first, params, adagrad)
  assert np.abs(np.asarray(end[0]) - first).max() > 0.1
  return first, jax.device_get(end)


def assert_close(got, want):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), b, rtol=1e-5, atol=1e-5 * np.abs(b).max()
    ),
    got,
    want,
  )


CASES = [
  *itertools.product((1, 2, 8), ("hot",), ("planned",), FEATURES, OPTIMIZERS),
  *itertools.product(
    (1, 2, 8),
    ("warm", "cold", "mixed"),
    ("planned", "one_row"),
    FEATURES,
    OPTIMIZERS,
  ),
  # Hot rows by another way, the rest as above.
  *itertools.product(
    (1, 8),
    ("hot_sparse", "mixed_sparse"),
    ("planned", "one_row"),
    ("shared_table",),
    OPTIMIZERS,
  ),
]


@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "kind", "optimizer"), CASES
)
def test_equals_one_dense_table(devices, tiers, capacity, kind, optimizer):
  plan = make_plan(devices, tiers, 1 if capacity == "one_row" else 0)
  first, state, rounds = train(FEATURES[kind], plan, optimizer, FAST)
  want_first, (rows, slots, params) = wanted(kind, optimizer)
  np.testing.assert_array_equal(first, want_first)
  got = rank_order(state.tables, plan)
  assert_close((got.rows, got.slots, state.params), (rows, slots, params))
  assert (max(rounds) > 1) == (capacity == "one_row")


COPIES, STAGES, BOTH = TRANSPORTS[1:]
# Devices of a node, and the buffers' rows (0: enough for all).
NODES = [
  (4, COPIES, "mixed", 0, "adam"),
  (4, STAGES, "mixed", 0, "adagrad"),
  (4, STAGES, "mixed", 1, "adam"),
  (4, BOTH, "mixed_sparse", 1, "rowwise_adagrad"),
  (2, COPIES, "warm", 1, "adam"),
  (2, BOTH, "mixed", 2, "adagrad"),
]


@pytest.mark.parametrize(("g", "way", "tiers", "capacity", "optimizer"), NODES)
def test_several_nodes_equal_one_dense_table(
  g, way, tiers, capacity, optimizer
):
  kind = "shared_table"
  plan = make_plan(8, tiers, capacity, nodes=(g, way))
  first, state, rounds = train(FEATURES[kind], plan, optimizer, FAST)
  want_first, (rows, slots, params) = wanted(kind, optimizer)
  np.testing.assert_array_equal(first, want_first)
  got = rank_order(state.tables, plan)
  assert_close((got.rows, got.slots, state.params), (rows, slots, params))
  assert (max(rounds) > 1) == (capacity > 0)
  check_copies(state)


def check_copies(state):
  """All replicas of an array are the same, bit by bit."""
  for x in jax.tree.leaves(state.tables):
    by_part = {}
    for shard in x.addressable_shards:
      by_part.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    for first, *others in by_part.values():
      for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("nodes", [(0, FLAT), (2, BOTH)])
def test_bfloat16_exchange_stays_close(nodes):
  plan = make_plan(8, "mixed", 0, nodes=nodes)
  _, state, _ = train(
    FEATURES["one_hot"], plan, "sgd", exchange_dtype=jnp.bfloat16
  )
  _, (rows, _, _) = wanted("one_hot", "sgd")
  got = rank_order(state.tables, plan).rows
  assert not np.array_equal(got, rows)
  np.testing.assert_allclose(got, rows, atol=2e-2)
  check_copies(state)


@pytest.mark.parametrize("tiers", ["hot", "warm", "cold", "copies"])
def test_bfloat16_rows_are_the_same_on_every_mesh_and_near_float32(tiers):
  got = []
  nodes = (4, BOTH) if tiers == "copies" else (0, FLAT)
  tiers = "warm" if tiers == "copies" else tiers
  for devices in (1, 8):
    of = nodes if devices > 1 else (0, FLAT)
    plan = make_plan(devices, tiers, 0, dtype="bfloat16", nodes=of)
    _, state, _ = train(FEATURES["one_hot"], plan, "sgd")
    got.append(rank_order(state.tables, plan).rows.astype(np.float32))
  # A rare sum on a rounding edge may fall to the other side.
  assert np.mean(got[0] != got[1]) < 0.01
  _, (rows, _, _) = wanted("one_hot", "sgd")
  np.testing.assert_allclose(got[0], rows, atol=3e-2)
