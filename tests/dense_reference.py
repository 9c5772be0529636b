"""One dense table a group on one device: what every plan must equal.

The reference has its own lookup (jnp.take, differentiated through the table)
and its own optimizers, on whole tables.
"""

import functools
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax.embedding import host_store, optimizers
from recjax.embedding.embedding import make_embedding
from recjax.frequency import Profile
from recjax.mesh import make_mesh
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.schema import Feature, columns_of
from recjax.training import inputs, visiting
from recjax.training.state import Identity, Run, StepSpec, first_state

BATCH, DENSE, STEPS = 32, 3, 20
LEARNING_RATE = 0.1
# Of the rows; such that 20 steps move them far under every optimizer.
ROW_RATES = {"sgd": 20.0, "rowwise_adagrad": 0.1, "adagrad": 0.1, "adam": 0.1}
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


class Part(NamedTuple):
  """A group of a case: its tables' rows, and how they are trained."""

  name: str
  tables: tuple[str, ...]
  rows: int
  dim: int = 8
  optimizer: str = "sgd"
  dtype: str = "float32"


class Case(NamedTuple):
  """Groups, and the features that look them up."""

  parts: tuple[Part, ...]
  features: tuple[Feature, ...]
  # What a batch's rows have to do with the last one's: "some" are the same,
  # "all" are, or "none".
  repeats: str = "some"

  def part_of(self, feature: Feature) -> Part:
    return next(p for p in self.parts if feature.table in p.tables)


def batches(case: Case, steps=STEPS, seed=0):
  """Power-law ids over each table's part of its group's ranks, interleaved."""
  rng = np.random.default_rng(seed)
  used = [f.table for f in case.features]
  for step in range(steps):
    columns = []
    if case.repeats == "all":
      rng = np.random.default_rng(seed)
    for f in case.features:
      part = case.part_of(f)
      names = [t for t in dict.fromkeys(used) if t in part.tables]
      ranks = np.arange(names.index(f.table), part.rows, len(names))
      if case.repeats == "none":
        ranks = ranks[step % 2 :: 2]
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
    if any(f.weighted for f in case.features):
      w = rng.uniform(0.5, 2, ids.shape)
      batch["weights"] = w.astype(np.float32)
    yield batch


def apply_of(case: Case):
  """A small dense model: (params, dense, activations, masks) -> logits."""

  def apply(params, dense, activations, masks):
    assert set(masks) == {f.name for f in case.features if f.pooling == "none"}
    flat = [activations[f.name].reshape(len(dense), -1) for f in case.features]
    x = jnp.tanh(jnp.concatenate([dense, *flat], 1) @ params["w1"])
    return (x @ params["w2"])[:, 0]

  return apply


def init_params(case: Case):
  width = DENSE + sum(
    case.part_of(f).dim * f.activations for f in case.features
  )
  rng = np.random.default_rng(1)
  w = lambda a, b: (rng.normal(size=(a, b)) / np.sqrt(a)).astype(np.float32)
  return {"w1": w(width, 16), "w2": w(16, 1)}


# ---- The reference


def _activations(case: Case, dense_tables, batch):
  """{feature: [b, h, d]} by indexing whole tables {group: [R, d]}."""
  found = {}
  for f, at in zip(
    case.features, columns_of(case.features).values(), strict=True
  ):
    ids = batch["ids"][:, at]
    there = (ids >= 0).astype(jnp.float32)
    table = dense_tables[case.part_of(f).name]
    got = jnp.take(table, jnp.maximum(ids, 0), axis=0)  # [b, h, d]
    w = there * batch["weights"][:, at] if f.weighted else there
    got = got * w[:, :, None]
    if f.pooling != "none":
      got = jnp.sum(got, 1, keepdims=True)
      if f.pooling == "mean":
        total = jnp.sum(w, 1)[:, None, None]
        got = jnp.where(total == 0, 0.0, got / jnp.where(total == 0, 1, total))
    found[f.name] = got
  return found


def _touched(case: Case, part: Part, ids):  # -> [R] bool
  columns = columns_of(case.features)
  mine = [ids[:, columns[f.name]].ravel() for f in case.features
          if f.table in part.tables]  # fmt: skip
  mine = jnp.concatenate(mine)
  seen = jnp.zeros(part.rows).at[jnp.where(mine < 0, part.rows, mine)]
  return seen.add(1.0, mode="drop") > 0


def _updated(part: Part, t, table, slots, g):
  """(rows, slot variables) of a whole table after step t = 1, 2, ..."""
  rate = ROW_RATES[part.optimizer]
  if part.optimizer == "sgd":
    return table - rate * g, {}
  if part.optimizer == "adagrad":
    acc = slots["acc"] + g**2
    return table - rate * g / (jnp.sqrt(acc) + EPS), {"acc": acc}
  if part.optimizer == "rowwise_adagrad":
    acc = slots["acc"] + (g**2).mean(1)
    return table - rate * g / (jnp.sqrt(acc) + EPS)[:, None], {"acc": acc}
  m = 0.9 * slots["m"] + 0.1 * g
  v = 0.999 * slots["v"] + 0.001 * g**2
  hat = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + EPS)
  return table - rate * hat, {"m": m, "v": v}


def _first_slots(part: Part):
  shapes = {
    "sgd": {},
    "adagrad": {"acc": (part.rows, part.dim)},
    "rowwise_adagrad": {"acc": (part.rows,)},
    "adam": {"m": (part.rows, part.dim), "v": (part.rows, part.dim)},
  }[part.optimizer]
  return {k: jnp.zeros(s) for k, s in shapes.items()}


def reference(case: Case, first, dense_optimizer):
  """Trains from rows {group: [R, d]}: ({group: (rows, slots)}, params)."""
  apply = apply_of(case)

  def loss(dense_tables, params, batch):
    activations = _activations(case, dense_tables, batch)
    masks = {f.name: None for f in case.features if f.pooling == "none"}
    logits = apply(params, batch["dense"], activations, masks)
    y = batch["label"]
    return jnp.mean(jnp.logaddexp(0.0, logits) - y * logits)

  @jax.jit
  def step(t, state, params, opt_state, batch):
    dense_tables = {k: rows for k, (rows, _) in state.items()}
    g, dense_grads = jax.grad(loss, argnums=(0, 1))(dense_tables, params, batch)
    new = {}
    for p in case.parts:
      rows, slots = state[p.name]
      seen = _touched(case, p, batch["ids"])
      keep = lambda a, b, seen=seen: jnp.where(
        seen if a.ndim == 1 else seen[:, None], a, b
      )
      after = _updated(p, t, rows, slots, g[p.name])
      new[p.name] = jax.tree.map(keep, after, (rows, slots))
    updates, opt_state = dense_optimizer.update(dense_grads, opt_state, params)
    return new, optax.apply_updates(params, updates), opt_state

  params = init_params(case)
  opt_state = dense_optimizer.init(params)
  state = {p.name: (jnp.asarray(first[p.name]), _first_slots(p))
           for p in case.parts}  # fmt: skip
  compiled = None
  for t, batch in enumerate(batches(case), 1):
    args = np.float32(t), state, params, opt_state, batch
    if compiled is None:
      compiled = step.lower(*args).compile(helpers.FAST)
    state, params, opt_state = compiled(*args)
  return state, params


@functools.cache
def wanted(case: Case):
  """(rows that training begins with, the reference's end)."""
  plan = Plan(
    1,
    BATCH,
    tuple(
      helpers.make_group(
        1, p.rows, 0, p.rows, name=p.name, tables=p.tables, dim=p.dim,
        optimizer=p.optimizer,
      )
      for p in case.parts
    ),
  )  # fmt: skip
  run = build(case, plan)
  first = helpers.in_rank_order(run.state.tables, plan)
  first = {name: of.rows for name, of in first.items()}
  end = jax.device_get(reference(case, first, optax.adagrad(LEARNING_RATE)))
  for name, rows in first.items():
    assert np.abs(end[0][name][0] - rows).max() > 0.1
  return first, end


# ---- The system


def build(
  case: Case,
  plan: Plan,
  *,
  wire_dtype=jnp.float32,
  options=None,
  on_host=False,
  **of_store,
) -> Run:
  """A fresh run of a case under a plan, which cannot be saved.

  Args:
    case, plan: what to run.
    wire_dtype: of the exchange.
    options: the compiler's; helpers.FAST if None.
    on_host: whether the host finds out what visits, and makes the routes.
    **of_store: of make_store.
  """
  mesh = make_mesh(plan.devices, plan.node_devices)
  optimizer_of = {p.name: OPTIMIZERS[p.optimizer]() for p in case.parts}
  embedding = make_embedding(
    plan, case.features, optimizer_of, wire_dtype=wire_dtype, seed=3
  )
  spec = StepSpec(apply_of(case), embedding, optax.adagrad(LEARNING_RATE))
  where = positions.of_groups(plan, profile_of(case))
  ranks = {name: of.ranks for name, of in where.items()}
  store = visiting.make_store(spec, mesh, **of_store)
  if store:
    host_store.init(store, embedding, 0.5)
  step = visiting.Step(
    spec, mesh, store, on_host=on_host, options=options or helpers.FAST
  )
  return Run(
    spec,
    mesh,
    first_state(spec, mesh, init_params(case), 0.5, ranks),
    step.train,
    step.forward,
    Identity({}, "", 0, {}),
    step.prepare,
    step.place,
    store,
  )


def profile_of(case: Case) -> Profile:
  """Ranks of a group belong to its tables in turn, as those of `batches` do."""
  names, table = [], [np.zeros(0, np.int16)]
  for p in case.parts:
    mine = [f.table for f in case.features if f.table in p.tables]
    mine = list(dict.fromkeys(mine))
    table.append(np.arange(p.rows) % len(mine) + len(names))
    names += mine
  table = np.concatenate(table).astype(np.int16)
  return Profile(1, tuple(names), np.ones(len(table), np.int64), table)


def by_rank(case: Case, run: Run):
  """{group: rows and slot variables}, wherever table-wise rows lie."""
  plan = run.spec.embedding.plan
  found = helpers.in_rank_order(run.state.tables, plan, run.store)
  for name, where in positions.of_groups(plan, profile_of(case)).items():
    ranks = where.ranks_of(0, plan.group(name).rows)
    for x in jax.tree.leaves(found[name]):  # nothing where there is no row
      assert not np.any(x[ranks < 0].astype(np.float32))
    at = where.positions_of(np.arange(np.sum(ranks >= 0), dtype=np.int32))
    found[name] = jax.tree.map(lambda x, at=at: x[at], found[name])
  return found


def train(case: Case, plan: Plan, *, ahead=True, **kw):
  """Trains as the system does, and moves nothing between host and device.

  Args:
    case, plan: what to train.
    ahead: whether batches are looked ahead for.
    **kw: of build.

  Returns:
    (tables before in rank order, the run after, rounds of each step).
  """
  run = build(case, plan, **kw)
  where = positions.of_groups(plan, profile_of(case))
  columns = columns_of(case.features)
  first = by_rank(case, run)

  def placed():
    for batch in batches(case):
      for f in case.features:
        mine = where.get(case.part_of(f).name)
        if mine:
          at = columns[f.name]
          batch["ids"][:, at] = mine.positions_of(batch["ids"][:, at])
      yield run.place(run.prepare(batch, training=True))

  state, rounds = run.state, []
  for batch in inputs.one_ahead(placed()) if ahead else placed():
    with jax.transfer_guard("disallow"):
      state, metrics = run.step(state, batch)
    rounds.append(int(metrics["rounds"]))
  return first, run._replace(state=state), rounds


def check(case: Case, plan: Plan, *, overflows=None, **kw):
  """Asserts that training under a plan equals the dense reference."""
  first, run, rounds = train(case, plan, **kw)
  want_first, (tables_end, params) = wanted(case)
  got = by_rank(case, run)
  for name, rows in want_first.items():
    np.testing.assert_array_equal(first[name].rows, rows)
    helpers.assert_close(tuple(got[name]), tables_end[name])
  helpers.assert_close(run.state.params, params)
  if overflows is not None:
    assert (max(rounds) > 1) == overflows
  if run.store:
    run.store.close()
  return run.state
