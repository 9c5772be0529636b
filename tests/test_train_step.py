"""Every placement, mesh and capacity equals one dense table on one device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax import sparse_optim, tables, train_step
from recjax.mesh import batch_sharding, make_mesh, replicated
from recjax.planner import Plan
from recjax.specs import Feature

ROWS, DIM, BATCH, DENSE, STEPS = 203, 8, 32, 3, 20
LEARNING_RATE = 0.1

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
# hot and warm rows of a plan; the rest is cold
TIERS = {
  "hot": (ROWS, 0),
  "warm": (0, ROWS),
  "cold": (0, 0),
  "mixed": (10, 61),
}


def make_plan(devices, tiers, capacity, batch=BATCH, dtype="float32"):
  hot, warm = TIERS[tiers]
  enough = capacity or ROWS
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
          bag = jnp.where(total == 0, 0.0, bag / jnp.where(total == 0, 1, total))
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
      new, new_slots = table - LEARNING_RATE * g, {}
    elif optimizer == "adagrad":
      acc = slots["acc"] + g**2
      new = table - LEARNING_RATE * g / (jnp.sqrt(acc) + 1e-8)
      new_slots = {"acc": acc}
    elif optimizer == "rowwise_adagrad":
      acc = slots["acc"] + (g**2).mean(1)
      new = table - LEARNING_RATE * g / (jnp.sqrt(acc) + 1e-8)[:, None]
      new_slots = {"acc": acc}
    else:
      m = 0.9 * slots["m"] + 0.1 * g
      v = 0.999 * slots["v"] + 0.001 * g**2
      hat = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
      new, new_slots = table - LEARNING_RATE * hat, {"m": m, "v": v}
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
  mesh = make_mesh(plan.devices)
  model = train_step.Model(
    apply=apply,
    features=features,
    dense_optimizer=optax.adagrad(LEARNING_RATE),
    sparse_optimizer=sparse_optim.OPTIMIZERS[optimizer](LEARNING_RATE),
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
  return model, mesh, train_step.TrainState(step, params, opt_state, t)


def train(features, plan, optimizer, **kw):
  model, mesh, state = build(features, plan, optimizer, **kw)
  first = rank_order(state.tables, plan).rows
  step = train_step.make_train_step(model, mesh)
  rounds = []
  for batch in batches(features):
    batch = jax.device_put(batch, batch_sharding(mesh))
    state, metrics = step(state, batch)
    rounds.append(int(metrics["rounds"]))
  return first, state, rounds


@pytest.mark.parametrize("optimizer", list(sparse_optim.OPTIMIZERS))
@pytest.mark.parametrize("kind", list(FEATURES))
@pytest.mark.parametrize("tiers", list(TIERS))
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_equals_one_dense_table(devices, tiers, kind, optimizer):
  features = FEATURES[kind]
  want = None
  for capacity in (0, 1):
    plan = make_plan(devices, tiers, capacity)
    first, state, rounds = train(features, plan, optimizer)
    if want is None:
      want = reference(
        features,
        optimizer,
        first,
        init_params(features),
        optax.adagrad(LEARNING_RATE),
      )
    got = rank_order(state.tables, plan)
    assert np.any(np.asarray(want[0]) != first)
    close = lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5 * np.abs(b).max()
    )
    close(got.rows, want[0])
    jax.tree.map(close, got.slots, want[1])
    jax.tree.map(close, state.params, want[2])
    if capacity == 1 and tiers != "hot":
      assert max(rounds) > 1
    else:
      assert max(rounds) == 1
