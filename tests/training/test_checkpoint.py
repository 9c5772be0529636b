"""Saved while training goes on, restored onto any mesh and plan, or refused."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.embedding import optimizers, tables
from recjax.frequency import Profile
from recjax.mesh import batch_sharding, make_mesh, replicated
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.schema import Feature
from recjax.training import checkpoint
from recjax.training import step as step_lib
from recjax.training.checkpoint import Identity

ROWS, DIM, BATCH, DENSE = 50_003, 8, 16, 3
FEATURES = (Feature("a", "t"), Feature("b", "t"), Feature("c", "t"))
OPTIMIZER = optimizers.adam(0.05)
IDENTITY = Identity(
  {"model.name": "dlrm", "embedding.dim": DIM, "model.top": [4]},
  "0123456789abcdef" * 4,
  ROWS,
)
# Ties are sorted by table, so ranks of a table come in runs.
TABLE = np.repeat(np.int16([0, 1, 0, 1]), [9_000, 11_000, 25_003, 5_000])
PROFILE = Profile(1, ("t", "u"), np.ones(ROWS, np.int64), TABLE)
# devices, hot, warm_end, and the devices of a node with a copy of warm rows
PLANS = {
  "mixed": (8, 1_001, 20_000),
  "1_cold": (1, 0, 0),
  "2_warm": (2, 0, ROWS),
  "8_hot": (8, ROWS, ROWS),
  "8_other_cuts": (8, 30, 49_000),
  "8_copies": (8, 1_001, 20_000, 4),
  "4_copies_of_2": (4, 0, ROWS, 2),
}
SAVED, OLDER = 5, 2  # steps


def make_plan(name, dtype="float32"):
  devices, hot, warm_end, *copies = PLANS[name]
  return Plan(
    devices=devices,
    batch_size=BATCH,
    rows=ROWS,
    dim=DIM,
    dtype=dtype,
    hot=hot,
    warm_end=warm_end,
    capacity_warm=6 if warm_end > hot else 0,
    capacity_cold=6 if warm_end < ROWS else 0,
    node_devices=sum(copies),
    warm_copies="node" if copies else "one",
    capacity_far_warm=6 if copies else 0,
  )


def apply(params, dense, activations):
  x = jnp.concatenate([dense, activations.reshape(dense.shape[0], -1)], 1)
  return jnp.tanh(x @ params["w"]).sum(1)


@functools.cache
def model_of(name):
  plan = make_plan(name)
  model = step_lib.Model(
    apply=apply,
    features=FEATURES,
    dense_optimizer=optax.adam(0.01),
    sparse_optimizer=OPTIMIZER,
    plan=plan,
    exchange_dtype=jnp.float32,
    seed=0,
  )
  return model, make_mesh(plan.devices, plan.node_devices)


def fresh(name, seed=7):
  """A state whose numbers are none of the checkpoint's."""
  model, mesh = model_of(name)
  rng = np.random.default_rng(seed)
  shape = (DENSE + DIM * len(FEATURES), 300)
  params = {"w": rng.normal(size=shape).astype(np.float32) * 0.01}
  dense = (params, model.dense_optimizer.init(params), np.int32(0))
  params, opt_state, step = jax.device_put(dense, replicated(mesh))
  t = tables.init(model.plan, OPTIMIZER, mesh, scale=0.5, seed=seed)
  return step_lib.TrainState(step, params, opt_state, t)


def batch_of(step, mesh):
  rng = np.random.default_rng(step)
  batch = {
    "label": rng.integers(0, 2, BATCH).astype(np.float32),
    "dense": rng.normal(size=(BATCH, DENSE)).astype(np.float32),
    "ids": rng.integers(0, ROWS, (BATCH, len(FEATURES))).astype(np.int32),
  }
  return jax.device_put(batch, batch_sharding(mesh))


@functools.cache
def compiled(name):
  return step_lib.make_train_step(*model_of(name)), checkpoint.make_checksums(
    *model_of(name)
  )


def train(name, state, first, last):
  step, _ = compiled(name)
  for i in range(first, last):
    state, _ = step(state, batch_of(i, model_of(name)[1]))
  return state


def rank_order(t: tables.Tables, plan):
  """Rows and slots as numpy, in rank order."""
  parts = []
  for name, count in zip(
    t._fields, (plan.hot, plan.warm, plan.cold), strict=True
  ):
    if count:
      flat = lambda x, n=name: x if n == "hot" else x.reshape(-1, *x.shape[2:])
      take = lambda x, f=flat, c=count: f(np.asarray(x))[:c]
      parts.append(jax.tree.map(take, getattr(t, name)))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def in_rank_order(state, name):
  """The whole state as numpy, the same for every plan."""
  plan = make_plan(name)
  dense = jax.device_get((state.step, state.params, state.opt_state))
  return jax.tree.map(np.copy, (dense, rank_order(state.tables, plan)))


def save(to, step, state, name="mixed", identity=IDENTITY):
  sums = jax.device_get(compiled(name)[1](state.tables))
  position = {"next": step}
  plan = make_plan(name)
  checkpoint.save(to, step, state, plan, identity, position, 11, sums)


def restore(directory, name, step=SAVED):
  meta = checkpoint.read_meta(directory, step)
  return checkpoint.restore(directory, step, meta, fresh(name), *model_of(name))


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(directory, {step: whole state}) of a run that never waited for a save."""
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  state, want, at = fresh("mixed", seed=3), {}, 0
  with checkpoint.manager(directory) as to:
    for step in (OLDER, SAVED):
      state = train("mixed", state, at, step)
      want[step] = in_rank_order(state, "mixed")
      save(to, step, state)
      at = step
    state = train("mixed", state, SAVED, SAVED + 3)  # donates what is saved
    jax.block_until_ready(state)
  want[SAVED + 3] = in_rank_order(state, "mixed")
  return directory, want


# ---- Round trips


@pytest.mark.parametrize("name", PLANS)
def test_restores_onto_any_mesh_and_plan_bit_for_bit(name, saved):
  directory, want = saved
  state = restore(directory, name)
  assert_same(in_rank_order(state, name), want[SAVED])
  model, mesh = model_of(name)
  placed = step_lib.state_shardings(model, mesh)
  assert jax.tree.map(lambda x: x.sharding, state.tables) == placed.tables
  for x in jax.tree.leaves((state.step, state.params, state.opt_state)):
    assert x.sharding.is_fully_replicated
    assert x.sharding.device_set == set(mesh.devices.flat)


def test_training_goes_on_bit_for_bit(saved):
  """Both after a restore, and in the run whose state was being saved."""
  directory, want = saved
  state = train("mixed", restore(directory, "mixed"), SAVED, SAVED + 3)
  assert_same(in_rank_order(state, "mixed"), want[SAVED + 3])
  rows = [want[step][1].rows for step in (OLDER, SAVED, SAVED + 3)]
  assert not np.array_equal(rows[0], rows[1])
  assert not np.array_equal(rows[1], rows[2])


def test_older_step(saved):
  directory, want = saved
  state = restore(directory, "mixed", OLDER)
  assert_same(in_rank_order(state, "mixed"), want[OLDER])


@pytest.mark.parametrize("other", ["1_cold", "8_copies"])
def test_what_another_plan_saves_is_the_same(other, saved, tmp_path):
  """mixed on 8 -> another -> saved -> warm on 2."""
  directory, want = saved
  with checkpoint.manager(tmp_path) as to:
    save(to, 1, restore(directory, other), other)
  state = restore(tmp_path, "2_warm", 1)
  got = in_rank_order(state, "2_warm")
  want = want[SAVED]
  assert got[0][0] == 1
  assert_same((got[0][1:], got[1]), (want[0][1:], want[1]))


def test_meta_reads_back(saved):
  directory, _ = saved
  meta = checkpoint.read_meta(directory, SAVED)
  assert Plan.from_json(meta["plan"]) == make_plan("mixed")
  assert (meta["position"], meta["seed"]) == ({"next": SAVED}, 11)
  checkpoint.check_identity(directory, SAVED, meta, IDENTITY)


@pytest.mark.parametrize("name", ["8_hot", "1_cold", "mixed", "8_copies"])
def test_checksums_are_those_of_the_ranks(name, saved):
  directory, want = saved
  state = restore(directory, name)
  got = jax.device_get(compiled(name)[1](state.tables))
  tier = want[SAVED][1]
  for key, x in {"rows": tier.rows, **tier.slots}.items():
    total = x.view(np.uint32).sum(dtype=np.uint64)
    assert int(got[key]) == int(total) % 2**32


def test_bfloat16_rows(tmp_path):
  plan, mesh = make_plan("mixed", "bfloat16"), make_mesh(8)
  model = model_of("mixed")[0]._replace(plan=plan)
  t = tables.init(plan, OPTIMIZER, mesh, 0.5, 3)
  state = fresh("mixed")._replace(tables=t)
  sums = jax.device_get(checkpoint.make_checksums(model, mesh)(t))
  want = rank_order(t, plan)
  with checkpoint.manager(tmp_path) as to:
    checkpoint.save(to, 1, state, plan, IDENTITY, {}, 0, sums)
  state = state._replace(tables=tables.init(plan, OPTIMIZER, mesh, 0.5, 4))
  meta = checkpoint.read_meta(tmp_path, 1)
  state = checkpoint.restore(tmp_path, 1, meta, state, model, mesh)
  assert_same(rank_order(state.tables, plan), want)


# ---- Bounded memory


@pytest.mark.parametrize("name", ["mixed", "8_hot", "1_cold", "8_copies"])
def test_rows_are_read_in_bounded_blocks(name, saved, monkeypatch):
  directory, want = saved
  block = 1 << 16
  asked = []
  read = checkpoint._Stored.read

  def spy(self, name, at):
    got = read(self, name, at)
    asked.append((name, at[0], at[-1] + 1, got.nbytes))
    return got

  monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", block)
  monkeypatch.setattr(checkpoint._Stored, "read", spy)
  assert_same(in_rank_order(restore(directory, name), name), want[SAVED])
  for array in ("rows", "m", "v"):
    ranges = [(a, b) for key, a, b, _ in asked if key == array]
    assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
    assert ranges[-1][1] == ROWS
  sizes = [size for *_, size in asked]
  for i in range(0, len(sizes), 3):
    assert sum(sizes[i : i + 3]) <= block


# Prints the most memory that the new tables, and then a restore, added.
MEASURE = """
import re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import pathlib
import numpy as np, optax
from recjax.embedding import optimizers, tables
from recjax.mesh import make_mesh, replicated
from recjax.plan.plan import Plan
from recjax.training import checkpoint
from recjax.training import step as step_lib

rows, dim = 1_000_000, 32
checkpoint._BLOCK_BYTES = 2 << 20
directory = pathlib.Path(sys.argv[2])

def state_of(devices, hot, warm_end):
  plan = Plan(devices, 8, rows, dim, "float32", hot, warm_end, 1, 1)
  mesh = make_mesh(devices)
  optimizer = optimizers.sgd(0.1)
  model = step_lib.Model(
    None, (), optax.sgd(0.1), optimizer, plan, np.float32, 0
  )
  zero = jax.device_put(np.int32(0), replicated(mesh))
  w = {"w": jax.device_put(np.ones(3, np.float32), replicated(mesh))}
  t = tables.init(plan, optimizer, mesh, 0.5, 0)
  opt_state = model.dense_optimizer.init(w)
  return model, mesh, step_lib.TrainState(zero, w, opt_state, t)

def most():
  # Not ru_maxrss, which a child inherits.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search("VmHWM:\\s+(\\d+) kB", status)[1]) << 10

if sys.argv[1] == "save":
  model, mesh, state = state_of(2, 0, 500_000)
  sums = jax.device_get(checkpoint.make_checksums(model, mesh)(state.tables))
  identity = checkpoint.Identity({}, "", rows)
  with checkpoint.manager(directory) as to:
    checkpoint.save(to, 1, state, model.plan, identity, {}, 0, sums)
else:
  jax.block_until_ready(jax.device_put(np.ones(3)))
  meta = checkpoint.read_meta(directory, 1)
  before = most()
  model, mesh, state = state_of(8, 0, 100_000)
  jax.block_until_ready(state)
  fresh = most()
  state = checkpoint.restore(directory, 1, meta, state, model, mesh)
  jax.block_until_ready(state)
  table = rows * dim * 4
  print((fresh - before) / table, (most() - fresh) / table)
"""


def test_a_restore_never_holds_a_second_table(tmp_path):
  """122 MB of rows in 2 MB blocks: a few blocks, and what never grows."""
  run = lambda mode: subprocess.run(
    [sys.executable, "-c", MEASURE, mode, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  done = run("save")
  assert done.returncode == 0, done.stderr
  done = run("restore")
  assert done.returncode == 0, done.stderr
  fresh, more = map(float, done.stdout.split())
  assert fresh > 0.9  # it does measure the tables
  assert more < 0.5


# ---- Pooled tables, whose rows lie elsewhere


def pooled_state(plan, seed):
  mesh = make_mesh(plan.devices)
  model = model_of("mixed")[0]._replace(plan=plan)
  where = positions.of(plan, PROFILE)
  ranks = where and where.ranks
  t = tables.init(plan, OPTIMIZER, mesh, 0.5, seed, ranks)
  return model, mesh, fresh("mixed", seed)._replace(tables=t), where


@pytest.mark.parametrize("name", ["mixed", "1_cold"])
def test_pooled_tables_move_to_other_plans_and_back(name, tmp_path):
  pooled = dataclasses.replace(
    make_plan("8_other_cuts"),
    pooled=(("u", 6), ("t", 1)),
    spare=49,
    rows=ROWS + 49,
    warm_end=49_000 + 49,
  )
  plain = make_plan(name)
  model, mesh, state, where = pooled_state(pooled, 3)
  want = rank_order(state.tables, pooled)
  at = where.positions_of(np.arange(ROWS, dtype=np.int32))
  want = jax.tree.map(lambda x: x[at], want)
  sums = jax.device_get(checkpoint.make_checksums(model, mesh)(state.tables))
  with checkpoint.manager(tmp_path) as to:
    checkpoint.save(to, 1, state, pooled, IDENTITY, {}, 0, sums)
  for step, plan in ((1, plain), (2, pooled), (1, pooled)):
    model, mesh, state, where = pooled_state(plan, 9)
    meta = checkpoint.read_meta(tmp_path, step)
    state = checkpoint.restore(
      tmp_path, step, meta, state, model, mesh, PROFILE
    )
    got = rank_order(state.tables, plan)
    if where:
      got = jax.tree.map(lambda x, at=at: x[at], got)
    assert_same(got, want)
    if step == 1 and plan == plain:
      sums = jax.device_get(
        checkpoint.make_checksums(model, mesh)(state.tables)
      )
      with checkpoint.manager(tmp_path) as to:
        checkpoint.save(to, 2, state, plan, IDENTITY, {}, 0, sums)
