"""Stored rows in checkpoints: saved while training goes on, differentially."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers_checkpoint import (
  ALL,
  assert_same,
  fresh,
  in_rank_order,
  make_plan,
  restore,
  save,
  train,
)

from recjax.errors import UserError
from recjax.training import checkpoint, stored_checkpoint


def slow(monkeypatch, block_bytes, aside_bytes):
  """Small blocks that take a while; a list of the snapshots that are taken."""
  monkeypatch.setattr(stored_checkpoint, "BLOCK_BYTES", block_bytes)
  monkeypatch.setattr(stored_checkpoint, "ASIDE_BYTES", aside_bytes)
  put, write = stored_checkpoint._Writer.put, stored_checkpoint.write
  taken = []

  def later(self, place, x):
    time.sleep(random.random() * 0.01)
    put(self, place, x)

  def spied(folder, store, snapshots):
    taken.extend(snapshots.values())
    write(folder, store, snapshots)

  monkeypatch.setattr(stored_checkpoint._Writer, "put", later)
  monkeypatch.setattr(stored_checkpoint, "write", spied)
  return taken


def delay():
  time.sleep(random.random() * 0.005)


# Of a whole record of group g: 96 bytes, and 16 to find it.
@pytest.mark.slow
@pytest.mark.parametrize("room", [5, 200, 10**6])
@pytest.mark.parametrize("name", ["mixed", "8_frozen", "groups"])
def test_a_save_is_of_its_step_while_training_goes_on(
  name, room, tmp_path, monkeypatch
):
  """Bit for bit, full and differential, whoever waits; and so is training."""
  taken = slow(monkeypatch, 1 << 16, room * 112)
  run, want = fresh(name, seed=3, delay=delay), {}
  with checkpoint.manager(tmp_path, keep=9) as to:
    for step in range(0, 12, 3):
      run = train(run, step, step + 3)
      want[step + 3] = in_rank_order(run)
      save(to, step + 3, run, full_every=3)
      run = train(run, step + 3, step + 3)
    run = train(run, 12, 24)
    want[24] = in_rank_order(run)
  assert sum(s.kept for s in taken) > 0
  waits = sum(s.waits for s in taken)
  assert waits > 0 if room == 5 else waits == 0 or room == 200
  for step in (3, 6, 9, 12):
    assert_same(in_rank_order(restore(tmp_path, name, step)), want[step])
  assert [full_of(tmp_path, s) for s in (3, 6, 9, 12)] == [3, 3, 3, 12]
  alone = train(fresh(name, seed=3), 0, 24)
  assert_same(in_rank_order(alone), want[24])


def full_of(directory, step):
  return checkpoint.read_meta(directory, step)["stored"]["full"]


def rows_of(directory, step):
  """How many rows of group g a differential save holds."""
  part = directory / str(step) / "stored" / "part.0.json"
  return json.loads(part.read_text())["rows"].get("g.cold")


def steps_in(directory):
  return sorted(int(p.name) for p in directory.iterdir())


def saves(directory, run, steps, **of_save):
  """Trains to each step and saves; {step: whole state}, and the run."""
  want, at = {}, int(run.state.step)
  with checkpoint.manager(directory, keep=of_save.pop("keep", 9)) as to:
    for step in steps:
      run = train(run, at, step)
      want[step] = in_rank_order(run)
      save(to, step, run, **of_save)
      at = step
  return want, run


@pytest.fixture(scope="module")
def differential(tmp_path_factory):
  """(directory, {step: whole state}): 2 is full, 4 and 5 refer to it."""
  directory = tmp_path_factory.mktemp("differential") / "checkpoints"
  return directory, saves(
    directory, fresh("mixed", seed=3), (2, 4, 5), full_every=5
  )[0]


@pytest.fixture
def copied(differential, tmp_path):
  directory = tmp_path / "checkpoints"
  shutil.copytree(differential[0], directory)
  return directory


@pytest.mark.parametrize("name", ["mixed", "1_cold", "2_warm", "8_frozen"])
def test_a_differential_save_restores_onto_any_plan(name, differential):
  directory, want = differential
  for step in (2, 4, 5):
    assert_same(in_rank_order(restore(directory, name, step)), want[step])


def test_a_differential_save_holds_the_rows_written_since(differential):
  directory, want = differential
  first = make_plan("mixed").group("g").tier("cold").first
  rows = {k: of[1]["g"].rows[first:] for k, of in want.items()}
  for step in (4, 5):  # since 2, both
    changed = np.any(rows[step] != rows[2], 1)
    assert rows_of(directory, step) == np.sum(changed) > 10
  assert rows_of(directory, 2) is None
  size = lambda step: sum(
    p.stat().st_size for p in (directory / str(step) / "stored").glob("*/0*")
  )
  assert size(2) == -(-len(rows[2]) // 8) * 8 * 96  # as many of each owner
  assert size(5) == rows_of(directory, 5) * 100


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_save_is_kept_as_long_as_it_is_needed(keep, tmp_path):
  want, _ = saves(
    tmp_path, fresh("mixed", seed=3), range(1, 5), full_every=4, keep=keep
  )
  assert [full_of(tmp_path, s) for s in (1, 4)] == [1, 1]
  assert steps_in(tmp_path) == [1, *range(5 - keep, 5)]
  assert_same(in_rank_order(restore(tmp_path, "mixed", 4)), want[4])
  # After a restart, too; 5 is full, and 1 is needed by 4 alone.
  run = restore(tmp_path, "mixed", 4)
  _, run = saves(tmp_path, run, (5,), full_every=4, keep=keep)
  assert full_of(tmp_path, 5) == 5
  assert steps_in(tmp_path) == ([5] if keep == 1 else [1, 4, 5])
  want, _ = saves(tmp_path, run, (6, 7), full_every=4, keep=keep)
  assert steps_in(tmp_path) == [5, *range(8 - keep, 8)]
  assert_same(in_rank_order(restore(tmp_path, "mixed", 7)), want[7])


def test_a_restored_run_goes_on_differentially(copied):
  """What was written before the restart is in it, and the number of saves."""
  run = restore(copied, "mixed", 4)
  shutil.rmtree(copied / "5")
  want, run = saves(copied, run, (5, 6, 7, 8), full_every=5)
  assert [full_of(copied, s) for s in (5, 6, 7, 8)] == [2, 2, 2, 8]
  for step in (5, 6, 7, 8):
    assert_same(in_rank_order(restore(copied, "mixed", step)), want[step])
  assert rows_of(copied, 4) < rows_of(copied, 5) < rows_of(copied, 6)


ALL["4_mixed"] = ALL["mixed"]._replace(devices=4)


def test_on_another_mesh_it_goes_on_differentially(copied):
  run = restore(copied, "4_mixed", 5)
  want, _ = saves(copied, run, (6,), full_every=5)
  assert full_of(copied, 6) == 2
  for name in ("mixed", "4_mixed", "8_other_cuts"):
    assert_same(in_rank_order(restore(copied, name, 6)), want[6])


@pytest.mark.parametrize("name", ["8_other_cuts", "8_frozen"])
def test_where_other_rows_are_stored_the_next_save_is_full(name, copied):
  want, _ = saves(copied, restore(copied, name, 5), (6, 7), full_every=5)
  assert [full_of(copied, s) for s in (6, 7)] == [6, 6]
  assert_same(in_rank_order(restore(copied, "mixed", 7)), want[7])


def test_after_a_restore_of_other_rows_the_next_save_is_full(copied, tmp_path):
  """Into a run that has saved: its rows did not change from those."""
  there = tmp_path / "b"
  _, run = saves(there, fresh("8_other_cuts"), (1,), full_every=5)
  meta = checkpoint.read_meta(copied, 5)
  state = checkpoint.restore(copied, 5, meta, run)
  want, _ = saves(there, run._replace(state=state), (6,), full_every=5)
  assert [full_of(there, s) for s in (1, 6)] == [1, 6]
  assert_same(in_rank_order(restore(there, "mixed", 6)), want[6])


def test_in_another_folder_the_next_save_is_full(copied, tmp_path):
  want, _ = saves(
    tmp_path / "b", restore(copied, "mixed", 5), (6,), full_every=5
  )
  assert full_of(tmp_path / "b", 6) == 6
  assert_same(in_rank_order(restore(tmp_path / "b", "mixed", 6)), want[6])


def test_without_the_full_save_the_next_one_is_full(copied):
  run = restore(copied, "mixed", 5)
  shutil.rmtree(copied / "2")
  want, _ = saves(copied, run, (6,), full_every=5)
  assert full_of(copied, 6) == 6
  assert_same(in_rank_order(restore(copied, "mixed", 6)), want[6])


def test_a_run_without_differential_saves_remembers_nothing(copied):
  run = restore(copied, "mixed", 5)
  saves(copied, run, (6,))
  assert run.store.full is None
  assert run.store.groups["g"].written is None


# ---- Killed

# Saves step 1, and then step after step, slowly, while it trains.
ENDLESS = """
import pathlib, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
from helpers_checkpoint import fresh, save, train
from recjax.training import checkpoint, stored_checkpoint

put = stored_checkpoint._Writer.put
def later(self, place, x):
  time.sleep(0.02)
  put(self, place, x)
stored_checkpoint._Writer.put = later
stored_checkpoint.BLOCK_BYTES = 1 << 17
run = fresh("mixed", seed=3)
with checkpoint.manager(pathlib.Path(sys.argv[1]), keep=1) as to:
  for step in range(1, 1000):
    run = train(run, step - 1, step)
    save(to, step, run, full_every=3)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_checkpoint_of_its_step(tmp_path):
  rng, root = random.Random(0), pathlib.Path(__file__).parents[2]
  path = os.pathsep.join((str(root), str(root / "tests")))
  halves, run, done = 0, fresh("mixed", seed=3), 0
  for last in (2, 3, 5):  # beside a full one, a differential one, both
    directory = tmp_path / str(last)
    child = subprocess.Popen(
      [sys.executable, "-c", ENDLESS, str(directory)],
      env=os.environ | {"PYTHONPATH": path},
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
      if line == f"{last}\n":
        break
    time.sleep(rng.random() * 0.3)
    child.kill()
    child.communicate()
    halves += len([p for p in directory.iterdir() if not p.name.isdigit()])
    step = checkpoint.newest(directory)
    assert step in (last - 1, last, last + 1)
    run = train(run, done, step)
    done = step
    want = in_rank_order(run)
    assert_same(in_rank_order(restore(directory, "mixed", step)), want)
    with checkpoint.manager(directory, keep=1) as to:  # and it goes on
      save(to, 999, restore(directory, "mixed", step), full_every=3)
    assert_same(in_rank_order(restore(directory, "mixed", 999))[1], want[1])
    assert [p.name for p in directory.iterdir() if not p.name.isdigit()] == []
  assert halves > 0


# ---- Damage


def largest_file(folder):
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def at_file(d):
  return largest_file(d / "5/stored/g.cold.at.0")


DAMAGES = {
  "it needs checkpoint 2, but ": lambda d: shutil.rmtree(d / "2"),
  "2/meta": lambda d: (d / "2/meta/metadata").unlink(),
  "2/stored/part.0.json": lambda d: (d / "2/stored/part.0.json").unlink(),
  "2/stored/g.cold.m": lambda d: shutil.rmtree(d / "2/stored/g.cold.m"),
  "the checksum of g.cold.rows is ": lambda d: flip(
    largest_file(d / "2/stored/g.cold.rows")
  ),
  "the checksum of g.cold.v (changed) is ": lambda d: flip(
    largest_file(d / "5/stored/g.cold.v.0")
  ),
  "5/stored/g.cold.at.0 is not what was written": lambda d: flip(at_file(d)),
  "5/stored/g.cold.at.0/0": lambda d: at_file(d).unlink(),
  "5/stored/g.cold.rows.0": lambda d: shutil.rmtree(
    d / "5/stored/g.cold.rows.0"
  ),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damage_to_either_is_noticed(says, copied):
  DAMAGES[says](copied)
  with pytest.raises(UserError) as e:
    restore(copied, "mixed", 5)
  message = str(e.value)
  assert message.startswith(f"checkpoint 5 in {copied} is damaged: ")
  assert says in message
  assert "\n" not in message


def test_a_save_that_fails_lets_training_go_on(tmp_path, monkeypatch):
  """The disk is full, say: nobody waits for it, and the error is raised."""
  monkeypatch.setattr(stored_checkpoint, "ASIDE_BYTES", 500)

  def full(self, place, x):
    time.sleep(0.2)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(stored_checkpoint._Writer, "put", full)
  run = fresh("mixed", seed=3)
  with checkpoint.manager(tmp_path) as to:
    save(to, 1, run)
    run = train(run, 0, 3)
    with pytest.raises(UserError, match="No space left") as e:
      to.wait_until_finished()
  assert str(e.value).startswith(f"checkpoint 1 in {tmp_path} cannot be saved")
  assert "\n" not in str(e.value)
  assert checkpoint.newest(tmp_path) is None
  alone = train(fresh("mixed", seed=3), 0, 3)
  assert_same(in_rank_order(run), in_rank_order(alone))
