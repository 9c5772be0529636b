"""Saved while training goes on, restored onto any mesh and plan, or refused."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers_checkpoint import (
  GROUP_PLANS,
  IDENTITY,
  OLDER,
  PLANS,
  PROFILE,
  PROFILE_OF_TWO,
  SAVED,
  assert_same,
  by_rank,
  fresh,
  in_rank_order,
  make_plan,
  restore,
  save,
  sums_of,
  train,
)

from recjax.data.shuffle import Done
from recjax.plan.plan import Plan
from recjax.training import (
  checkpoint,
  checkpoint_reader,
  restore_rows,
  same_run,
)
from recjax.training.state import At, state_shardings

# ---- Round trips


def check_restored(directory, want, name):
  run = restore(directory, name)
  assert_same(in_rank_order(run), want[SAVED])
  placed = state_shardings(run.spec.embedding, run.mesh)
  state = run.state
  assert jax.tree.map(lambda x: x.sharding, state.tables) == placed.tables
  for x in jax.tree.leaves((state.step, state.params, state.opt_state)):
    assert x.sharding.is_fully_replicated
    assert x.sharding.device_set == set(run.mesh.devices.flat)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_restores_onto_any_mesh_and_plan_bit_for_bit(name, saved):
  check_restored(*saved, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUP_PLANS)
def test_groups_restore_onto_any_mesh_and_plan_bit_for_bit(name, saved_groups):
  check_restored(*saved_groups, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "groups"])
def test_training_goes_on_bit_for_bit(name, request):
  """Both after a restore, and in the run whose state was being saved."""
  saved = {"mixed": "saved", "groups": "saved_groups"}[name]
  directory, want = request.getfixturevalue(saved)
  run = train(restore(directory, name), SAVED, SAVED + 3)
  assert_same(in_rank_order(run), want[SAVED + 3])
  for group in want[OLDER][1]:
    rows = [want[step][1][group].rows for step in (OLDER, SAVED, SAVED + 3)]
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])


def test_older_step(saved):
  directory, want = saved
  run = restore(directory, "mixed", OLDER)
  assert_same(in_rank_order(run), want[OLDER])


def check_saved_again(directory, want, other, last, tmp_path):
  with checkpoint.manager(tmp_path) as to:
    save(to, 1, restore(directory, other))
  got = in_rank_order(restore(tmp_path, last, 1))
  want = want[SAVED]
  assert got[0][0] == 1
  assert_same((got[0][1:], got[1]), (want[0][1:], want[1]))


@pytest.mark.parametrize("other", ["1_cold", "8_copies"])
def test_what_another_plan_saves_is_the_same(other, saved, tmp_path):
  """mixed on 8 -> another -> saved -> warm on 2."""
  check_saved_again(*saved, other, "2_warm", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["groups_1_cold", "groups_copies"])
def test_what_another_plan_of_groups_saves_is_the_same(
  other, saved_groups, tmp_path
):
  check_saved_again(*saved_groups, other, "groups_2_apart", tmp_path)


@pytest.mark.parametrize("name", ["mixed", "groups"])
def test_meta_reads_back(name, request):
  saved = {"mixed": "saved", "groups": "saved_groups"}[name]
  directory, _ = request.getfixturevalue(saved)
  meta = checkpoint.read_meta(directory, SAVED)
  assert Plan.from_json(meta["plan"]) == make_plan(name)
  assert checkpoint.at_of(SAVED, meta) == At(SAVED, Done(1, SAVED))
  same_run.check_identity(directory, SAVED, meta, IDENTITY)


CHECKED = {
  "saved": ("8_hot", "1_cold", "mixed", "8_copies"),
  "saved_groups": tuple(GROUP_PLANS),
}


def sum_of(x, first=0):
  """The checksum of rows from a position on, in Python's integers."""
  words = x.reshape(len(x), -1).view(f"u{x.dtype.itemsize}").astype(object)
  words = words ^ (words >> 16)
  row, column = np.arange(first, first + len(x)), np.arange(words.shape[1])
  factors = odd(row)[:, None] * odd(2**32 - 1 - column)
  return int((words * factors).sum()) % 2**32


def odd(x):  # lowbias32, or 1
  x = x.astype(object)
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = (x ^ (x >> shift)) * factor % 2**32
  return (x ^ (x >> 16)) | 1


@pytest.mark.parametrize(
  ("which", "name"),
  [(k, name) for k, names in CHECKED.items() for name in names],
)
def test_checksums_are_those_of_the_resident_ranks(which, name, request):
  directory, want = request.getfixturevalue(which)
  got = sums_of(restore(directory, name))
  keys = set()
  for group in make_plan(name).groups:
    if group.resident:
      of, stop = want[SAVED][1][group.name], group.resident[-1].stop
      for key, x in {"rows": of.rows, **of.slots}.items():
        assert int(got[f"{group.name}.{key}"].total) == sum_of(x[:stop])
        keys.add(f"{group.name}.{key}")
  assert set(got) == keys


@pytest.mark.parametrize("name", ["mixed", "groups"])
def test_checksums_of_stored_tiers_are_those_of_their_ranks(name, request):
  saved = {"mixed": "saved", "groups": "saved_groups"}[name]
  directory, want = request.getfixturevalue(saved)
  part = directory / str(SAVED) / "stored" / "part.0.json"
  got = json.loads(part.read_text())["sums"]
  keys = set()
  for group in make_plan(name).groups:
    for tier in group.stored:
      of = want[SAVED][1][group.name]
      for key, x in {"rows": of.rows, **of.slots}.items():
        key = f"{group.name}.{tier.name}.{key}"
        assert got[key] == sum_of(x[tier.first : tier.stop], tier.first)
        keys.add(key)
  assert keys == set(got) != set()


def test_bfloat16_rows(tmp_path):
  plan = make_plan("mixed", g={"dtype": "bfloat16"})
  run = fresh(plan, seed=3)
  assert run.state.tables["g"]["warm"].rows.dtype == "bfloat16"
  assert run.store.groups["g"].parts[0].rows.dtype == "bfloat16"
  want = in_rank_order(run)[1]
  with checkpoint.manager(tmp_path) as to:
    save(to, 1, run)
  assert_same(in_rank_order(restore(tmp_path, plan, 1))[1], want)


# ---- Bounded memory


def spied(monkeypatch):
  """Small blocks; a list of the reads: (group, array, first, stop, bytes)."""
  asked = []
  read = checkpoint_reader.StoredGroup.read

  def spy(self, name, at):
    got = read(self, name, at)
    assert np.all(np.diff(at) == 1)
    asked.append((self._group.name, name, at[0], at[-1] + 1, got.nbytes))
    return got

  monkeypatch.setattr(restore_rows, "BLOCK_BYTES", 1 << 16)
  monkeypatch.setattr(checkpoint_reader.StoredGroup, "read", spy)
  return asked


def check_reads(asked, plan, slots):
  """A group's blocks adjoin, in rank order; all arrays of one fit a block."""
  for group in plan.groups:
    mine = [x[1:] for x in asked if x[0] == group.name]
    names = ("rows", *slots[group.name])
    for array in names:
      ranges = [(a, b) for key, a, b, _ in mine if key == array]
      assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
      assert ranges[-1][1] == group.rows
    sizes = [size for *_, size in mine]
    for i in range(0, len(sizes), len(names)):
      assert sum(sizes[i : i + len(names)]) <= 1 << 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "8_hot", "1_cold", "8_copies"])
def test_rows_are_read_in_bounded_blocks(name, saved, monkeypatch):
  directory, want = saved
  asked = spied(monkeypatch)
  assert_same(in_rank_order(restore(directory, name)), want[SAVED])
  check_reads(asked, make_plan(name), {"g": ("m", "v")})


@pytest.mark.parametrize("name", ["groups_1_cold", "groups_copies"])
def test_rows_of_groups_are_read_in_bounded_blocks(
  name, saved_groups, monkeypatch
):
  directory, want = saved_groups
  asked = spied(monkeypatch)
  assert_same(in_rank_order(restore(directory, name)), want[SAVED])
  slots = {"g": ("m", "v"), "h": ("acc",), "b": ("acc",)}
  check_reads(asked, make_plan(name), slots)


# Prints the most memory that the new tables, and then a restore, added.
MEASURE = """
import pathlib, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import helpers, numpy as np, optax
from recjax.embedding import host_store, optimizers, tables
from recjax.embedding.embedding import make_embedding
from recjax.mesh import make_mesh, replicated
from recjax.schema import Feature
from recjax.training import checkpoint, checksums, restore_rows
from recjax.training import stored_checkpoint, visiting
from recjax.training.state import At, Identity, Run, StepSpec, TrainState

rows, dim = 1_000_000, 32
restore_rows.BLOCK_BYTES = stored_checkpoint.BLOCK_BYTES = 2 << 20
directory = pathlib.Path(sys.argv[2])
identity = Identity({}, "", rows, {})

def run_of(devices, hot, warm_end):
  plan = helpers.make_plan(
    devices, rows, hot, warm_end - hot, batch_size=8, dim=dim, capacity=1
  )
  mesh = make_mesh(devices)
  embedding = make_embedding(
    plan, (Feature("f", "t"),), {"g": optimizers.sgd(0.1)}
  )
  spec = StepSpec(None, embedding, optax.sgd(0.1))
  zero = jax.device_put(np.int32(0), replicated(mesh))
  w = {"w": jax.device_put(np.ones(3, np.float32), replicated(mesh))}
  t = tables.init(embedding, mesh, 0.5)
  state = TrainState(zero, w, spec.dense_optimizer.init(w), t)
  store = visiting.make_store(spec, mesh)
  host_store.init(store, embedding, 0.5)
  return Run(spec, mesh, state, None, None, identity, None, None, store)

def most():
  # Not ru_maxrss, which a child inherits.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search("VmHWM:\\\\s+(\\\\d+) kB", status)[1]) << 10

if sys.argv[1] != "restore":
  run = run_of(2, 0, 500_000 if sys.argv[1] == "save" else 0)
  sums_of = checksums.make_checksums(run.spec.embedding, run.mesh)
  sums = jax.device_get(sums_of(run.state.tables))
  about = checkpoint.About(identity, At(), sums)
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the most, from now on
  before = most()
  with checkpoint.manager(directory) as to:
    checkpoint.save(to, 1, run, about)
  print((most() - before) / (rows * dim * 4))
else:
  jax.block_until_ready(jax.device_put(np.ones(3)))
  meta = checkpoint.read_meta(directory, 1)
  before = most()
  run = run_of(8, 0, 100_000)
  jax.block_until_ready(run.state)
  fresh = most()
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  now = most()
  state = checkpoint.restore(directory, 1, meta, run)
  jax.block_until_ready(state)
  table = rows * dim * 4
  print((fresh - before) / table, (most() - now) / table)
"""


def measured(mode, directory):
  """The numbers that MEASURE prints."""
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, mode, str(directory)],
    cwd=root,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
  )
  assert done.returncode == 0, done.stderr
  return map(float, done.stdout.split())


@pytest.mark.slow
def test_a_save_never_holds_a_second_store(tmp_path):
  """122 MB of stored rows in 2 MB blocks: a few of them."""
  (more,) = measured("save_stored", tmp_path)
  assert more < 0.5


@pytest.mark.slow
def test_a_restore_never_holds_a_second_table(tmp_path):
  """122 MB of rows in 2 MB blocks: a few blocks, and what never grows."""
  list(measured("save", tmp_path))
  fresh, more = measured("restore", tmp_path)
  assert fresh > 0.9  # it does measure the tables
  assert more < 0.5


# ---- Table-wise tables, whose rows lie elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "1_cold"])
def test_table_wise_tables_move_to_other_plans_and_back(name, tmp_path):
  owned = make_plan(
    "8_other_cuts",
    g={"table_wise": (("u", 6), ("t", 1)), "padding_rows": 49},
  )
  check_moves([owned, make_plan(name)], PROFILE, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two_1_cold"])
def test_groups_with_table_wise_tables_move_to_other_owners(name, tmp_path):
  """One group's owners change, the other's tables get some, and back."""
  first = make_plan(
    "two", g={"table_wise": (("u", 6), ("t", 1)), "padding_rows": 16}
  )
  second = make_plan(
    "two_2",
    g={"table_wise": (("t", 1),)},
    h={"table_wise": (("v", 0),), "padding_rows": 6},
  )
  check_moves([first, second, make_plan(name)], PROFILE_OF_TWO, tmp_path)


def check_moves(plans, profile, tmp_path):
  """Saved under the first plan, restored and saved under each, and back."""
  run = fresh(plans[0], seed=3, profile=profile)
  want = by_rank(run, profile)
  with checkpoint.manager(tmp_path, keep=len(plans) + 1) as to:
    save(to, 1, run)
  for step, plan in enumerate([*plans[1:], plans[0]], 1):
    run = restore(tmp_path, plan, step, profile)
    assert_same(by_rank(run, profile), want)
    with checkpoint.manager(tmp_path, keep=len(plans) + 1) as to:
      save(to, step + 1, run)
  run = restore(tmp_path, plans[0], 1, profile)
  assert_same(by_rank(run, profile), want)
