"""Runs that are saved and restored: groups, plans, states, all as numpy."""

import functools
import tempfile
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax.data.shuffle import Done
from recjax.embedding import host_store, optimizers, tables
from recjax.embedding.embedding import make_embedding
from recjax.frequency import Profile
from recjax.mesh import batch_sharding, make_mesh, replicated
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.schema import Feature
from recjax.training import checkpoint, checksums, visiting
from recjax.training.checkpoint import About
from recjax.training.state import At, Identity, Run, StepSpec, TrainState

ROWS, DIM, BATCH, DENSE = 50_003, 8, 16, 3
SAVED, OLDER = 5, 2  # steps


class Part(NamedTuple):
  """A group of tables: how its rows are stored and trained."""

  name: str
  tables: tuple[str, ...]
  rows: int
  dim: int
  optimizer: str
  dtype: str = "float32"


ONE = (Part("g", ("t", "u"), ROWS, DIM, "adam"),)
TWO = (*ONE, Part("h", ("v",), 901, 4, "rowwise_adagrad"))
THREE = (
  Part("g", ("t", "u"), 5_003, DIM, "adam"),
  Part("h", ("v",), 901, 4, "rowwise_adagrad"),
  Part("b", ("w",), 777, 16, "adagrad", "bfloat16"),
)


class Cuts(NamedTuple):
  """A plan: its mesh, and (hot, warm_end) of each group."""

  parts: tuple[Part, ...]
  devices: int
  of_group: tuple[tuple[int, int], ...]
  copies: int = 0  # devices of a node with a copy of the warm rows
  hot_sync: str = "all_reduce"


PLANS = {
  "mixed": Cuts(ONE, 8, ((1_001, 20_000),)),
  "1_cold": Cuts(ONE, 1, ((0, 0),)),
  "2_warm": Cuts(ONE, 2, ((0, ROWS),)),
  "8_hot": Cuts(ONE, 8, ((ROWS, ROWS),)),
  "8_other_cuts": Cuts(ONE, 8, ((30, 49_000),)),
  "8_copies": Cuts(ONE, 8, ((1_001, 20_000),), 4),
  "8_frozen": Cuts(ONE, 8, ((1_001, 20_000),)),
  "4_copies_of_2": Cuts(ONE, 4, ((0, ROWS),), 2),
}
# Of three groups: tiers of other sizes, and tiers that others do not have.
GROUP_PLANS = {
  "groups": Cuts(THREE, 8, ((101, 2_000), (7, 7), (0, 777))),
  "groups_1_cold": Cuts(THREE, 1, ((0, 0), (0, 0), (0, 0))),
  "groups_2_apart": Cuts(THREE, 2, ((0, 5_003), (901, 901), (0, 0))),
  "groups_copies": Cuts(
    THREE, 8, ((30, 4_900), (5, 901), (7, 300)), 4, "all_gather"
  ),
}
TWO_PLANS = {
  "two": Cuts(TWO, 8, ((30, 49_000), (11, 500))),
  "two_2": Cuts(TWO, 2, ((1_001, 20_000), (0, 901))),
  "two_1_cold": Cuts(TWO, 1, ((0, 0), (0, 0))),
}
FROZEN = {"8_frozen": 9_999}  # of the stored rows, on the SSD
ALL = PLANS | GROUP_PLANS | TWO_PLANS


def make_plan(name: str, **of_group) -> Plan:
  """The plan of that name; of_group: {group: more of helpers.make_group}."""
  c = ALL[name]
  groups = []
  for part, (hot, end) in zip(c.parts, c.of_group, strict=True):
    more = {
      "capacity": 6,
      "hot_sync": c.hot_sync,
      "node_devices": c.copies,
      "copies": c.copies > 0,
    } | of_group.get(part.name, {"frozen": FROZEN.get(name, 0)})
    made = part._asdict() | {"hot": hot, "warm": end - hot} | more
    groups.append(helpers.make_group(c.devices, **made))
  return Plan(c.devices, BATCH, tuple(groups), c.copies)


def features_of(parts) -> tuple[Feature, ...]:
  """Three features of the first group's table, one of each other's."""
  first, *others = parts
  looked_up = [first.tables[0]] * 3 + [p.tables[0] for p in others]
  return tuple(Feature("abcde"[i], t) for i, t in enumerate(looked_up))


# Ties are sorted by table, so ranks of a table come in runs.
TABLE = np.repeat(np.int16([0, 1, 0, 1]), [9_000, 11_000, 25_003, 5_000])
PROFILE = Profile(1, ("t", "u"), np.ones(ROWS, np.int64), TABLE)
TABLE_OF_TWO = np.repeat(
  np.int16([0, 2, 1, 0, 2, 1]), [9_000, 400, 11_000, 25_003, 501, 5_000]
)
PROFILE_OF_TWO = Profile(
  1, ("t", "u", "v"), np.ones(len(TABLE_OF_TWO), np.int64), TABLE_OF_TWO
)
IDENTITY = Identity(
  {"model.name": "dlrm", "embedding.dim": DIM, "model.top": [4]},
  "0123456789abcdef" * 4,
  ROWS,
  {"seed": 11, "train.learning_rate": 0.02},
)


# ---- Runs


def apply(params, dense, activations, masks):
  del masks
  flat = [x.reshape(dense.shape[0], -1) for x in activations.values()]
  return jnp.tanh(jnp.concatenate([dense, *flat], 1) @ params["w"]).sum(1)


class Compiled(NamedTuple):
  """What is static in the runs of a plan."""

  spec: StepSpec
  mesh: jax.sharding.Mesh
  checksums: jax.stages.Wrapped


@functools.cache
def compiled(plan: Plan) -> Compiled:
  of_rows = {
    g.name: optimizers.OPTIMIZERS[g.optimizer](0.05) for g in plan.groups
  }
  features = features_of(plan.groups)
  embedding = make_embedding(plan, features, of_rows)
  spec = StepSpec(apply, embedding, optax.adam(0.01))
  mesh = make_mesh(plan.devices, plan.node_devices)
  return Compiled(
    spec,
    mesh,
    checksums.make_checksums(embedding, mesh),
  )


def fresh(plan: Plan | str, seed=7, profile=None, **of_store) -> Run:
  """A run whose numbers are none of the checkpoint's.

  of_store: of make_store.
  """
  plan = make_plan(plan) if isinstance(plan, str) else plan
  spec, mesh, _ = compiled(plan)
  features = spec.embedding.features
  dims = {t: g.dim for g in plan.groups for t in g.tables}
  rng = np.random.default_rng(seed)
  shape = (DENSE + sum(dims[f.table] for f in features), 300)
  params = {"w": rng.normal(size=shape).astype(np.float32) * np.float32(0.01)}
  dense = (params, spec.dense_optimizer.init(params), np.int32(0))
  params, opt_state, count = jax.device_put(dense, replicated(mesh))
  ranks = {}
  if profile is not None:
    of = positions.of_groups(plan, profile)
    ranks = {name: where.ranks for name, where in of.items()}
  # The rows' seed is part of the embedding; only the tables begin elsewhere.
  groups = tuple(
    g._replace(seed=(g.seed + seed) % 2**32) for g in spec.embedding.groups
  )
  seeded = spec.embedding._replace(groups=groups)
  t = tables.init(seeded, mesh, 0.5, ranks)
  of_store = {"directory": tempfile.gettempdir()} | of_store
  store = visiting.make_store(spec, mesh, **of_store)
  if store:
    host_store.init(store, seeded, 0.5)
  state = TrainState(count, params, opt_state, t)
  step = visiting.Step(spec, mesh, store)
  do = step.train, step.forward, IDENTITY, step.prepare, step.place
  return Run(spec, mesh, state, *do, store)


def batch_of(step, plan, mesh):
  rng = np.random.default_rng(step)
  rows = [plan.groups[0].rows] * 3 + [g.rows for g in plan.groups[1:]]
  batch = {
    "label": rng.integers(0, 2, BATCH).astype(np.float32),
    "dense": rng.normal(size=(BATCH, DENSE)).astype(np.float32),
    "ids": rng.integers(0, rows, (BATCH, len(rows))).astype(np.int32),
  }
  return jax.device_put(batch, batch_sharding(mesh))


def train(run: Run, first, last) -> Run:
  state, plan = run.state, run.spec.embedding.plan
  for i in range(first, last):
    state, _ = run.step(state, batch_of(i, plan, run.mesh))
  return run._replace(state=state)


# ---- What is compared


def in_rank_order(run: Run):
  """(step, params, opt_state) and the rows of each group, as numpy."""
  state, plan = run.state, run.spec.embedding.plan
  dense = jax.device_get((state.step, state.params, state.opt_state))
  rows = helpers.in_rank_order(state.tables, plan, run.store)
  return jax.tree.map(np.copy, (dense, rows))


def by_rank(run, profile):
  """The rows of each group by rank, whatever their positions."""
  plan = run.spec.embedding.plan
  where = positions.of_groups(plan, profile)
  found = in_rank_order(run)[1]
  for g in plan.groups:
    if g.name in where:
      ranks = np.arange(g.rows - g.padding_rows, dtype=np.int32)
      at = where[g.name].positions_of(ranks)
      found[g.name] = jax.tree.map(lambda x, at=at: x[at], found[g.name])
  return found


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- Save and restore


def sums_of(run: Run):
  plan = run.spec.embedding.plan
  return jax.device_get(compiled(plan).checksums(run.state.tables))


def save(to, step, run: Run, full_every=1):
  about = About(IDENTITY, At(step, Done(1, step)), sums_of(run))
  checkpoint.save(to, step, run, about, full_every)


def restore(directory, plan, step=SAVED, profile=None) -> Run:
  run = fresh(plan, profile=profile)
  meta = checkpoint.read_meta(directory, step)
  state = checkpoint.restore(directory, step, meta, run, profile)
  return run._replace(state=state)


def save_while_training(directory, plan):
  """{step: whole state} of a run that never waited for a save."""
  run, want, at = fresh(plan, seed=3), {}, 0
  with checkpoint.manager(directory) as to:
    for step in (OLDER, SAVED):
      run = train(run, at, step)
      want[step] = in_rank_order(run)
      save(to, step, run)
      at = step
    run = train(run, SAVED, SAVED + 3)  # donates what is saved
    jax.block_until_ready(run.state)
  want[SAVED + 3] = in_rank_order(run)
  return want
