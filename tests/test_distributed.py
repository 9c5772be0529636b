"""Several processes are one job: the same result, and a common end."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import lines, quiet

from recjax import config as config_lib
from recjax import distributed, jobs
from recjax import mesh as mesh_lib
from recjax.errors import UserError
from recjax.plan.plan import Plan

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY = 120, 20  # of training; between checkpoints
FIELDS = {  # a run of seconds with all three tiers in use
  "data.format": "synthetic",
  "data.synthetic.samples": 20_000,
  "data.synthetic.rows": 5_000,
  "data.block_samples": 1_024,
  "data.min_count": 1,
  "embedding.dim": 4,
  "model.bottom": (8,),
  "model.top": (8,),
  "mesh.devices": 4,
  "plan.device_memory_mb": 0,
  "plan.hot_rows": 100,
  "plan.warm_rows": 2_000,
  "train.steps": STEPS,
  "train.batch_size": 256,
  "train.log_every_steps": 10,
  "checkpoint.every_steps": EVERY,
  "checkpoint.full_every": 3,
  # What else the file that FLAGS start from changes.
  "data.synthetic.exponent": 1.15,
  "embedding.optimizer": "adagrad",
  "embedding.learning_rate": 0.05,
  "train.optimizer": "adagrad",
  "train.learning_rate": 0.02,
}
FLAGS = (
  "--config=configs/quickstart.py",
  *(f"--config.{path}={value}" for path, value in FIELDS.items()),
)


def config():
  c = config_lib.Config()
  for path, value in FIELDS.items():
    *groups, field = path.split(".")
    group = c
    for name in groups:
      group = getattr(group, name)
    setattr(group, field, value)
  return c


def spawn(*command):
  return subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # Compiling is most of the time.
    env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )


def launch(workdir, *flags, processes=2):
  script = ("scripts/launch_local.py", f"--processes={processes}", "--")
  return spawn(*script, *FLAGS, f"--workdir={workdir}", *flags)


def until(process, begins):
  """Reads until a line begins so; returns the lines."""
  found = []
  for line in process.stdout:
    found.append(line)
    if line.startswith(begins):
      return found
  raise AssertionError("".join(found) + process.stderr.read())


def member(workdir, index):
  """The process id of a process that works in `workdir`."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      command = path.read_bytes().decode().split("\0")
    except OSError:  # it has just ended
      continue
    if {f"--workdir={workdir}", f"--process_id={index}"} <= set(command):
      return int(path.parent.name)
  raise AssertionError(f"no process {index} works in {workdir}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """(workdir, test metrics) of one process with 4 devices."""
  workdir = tmp_path_factory.mktemp("alone")
  c = config()
  c.checkpoint.keep = STEPS
  return workdir, jobs.train(c, workdir, quiet)


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
  """The workdir of two processes with 2 devices each, killed twice.

  They go on from the first checkpoint of `alone`: started as a scheduler would
  start them, then by launch_local, then again by launch_local.
  """
  workdir = tmp_path_factory.mktemp("together")
  shutil.copytree(alone[0] / "data", workdir / "data")
  checkpoint = f"checkpoints/{EVERY}"
  shutil.copytree(alone[0] / checkpoint, workdir / checkpoint)
  shutil.copy(alone[0] / "metrics.jsonl", workdir)

  # ---- No launcher: the one that is left ends by itself, soon
  port = 20_000 + os.getpid() % 10_000
  flags = (f"--coordinator=127.0.0.1:{port}", "--processes=2")
  first, second = (
    spawn(
      "main.py", *FLAGS, f"--workdir={workdir}", *flags, f"--process_id={i}"
    )
    for i in (0, 1)
  )
  printed = until(first, f"step {2 * EVERY + 10} ")
  assert f"restoring step {EVERY} of " in "".join(printed)
  second.kill()
  start = time.monotonic()
  _, said = first.communicate(timeout=60)
  assert time.monotonic() - start < 60
  assert first.returncode == distributed.LOST, said
  assert said.count("\n") == 1
  assert said.startswith("error: process 1 of 2 ended, so process 0 ends too")
  second.communicate()

  # ---- launch_local ends the rest, and says who was first
  launcher = launch(workdir)
  until(launcher, f"step {3 * EVERY + 20} ")
  os.kill(member(workdir, 0), signal.SIGKILL)
  _, said = launcher.communicate(timeout=60)
  assert launcher.returncode == 1
  assert said.count("\n") == 1, said
  assert said.startswith("error: process 0 of 2 ended (killed by SIGKILL)")
  with pytest.raises(AssertionError, match="no process 1"):
    member(workdir, 1)

  # ---- And on to the end
  launcher = launch(workdir)
  printed, said = launcher.communicate(timeout=300)
  assert launcher.returncode == 0, said
  assert printed.count("test metrics at step") == 1  # process 0's
  assert f"restoring step {EVERY} of " not in printed  # but a later one
  return workdir


@pytest.mark.slow
def test_two_processes_train_as_one(alone, together):
  workdir, want = alone
  assert want["samples"] == 2_000  # 8 batches of 256, the last one padded
  got = lines(together, "test")[-1]
  for name, value in want.items():
    # gloo adds in another order than one process, 120 steps long; a learning
    # rate that differs by 5e-8 changes more (docs/clusters.md).
    np.testing.assert_allclose(got[name], value, atol=1e-5)
  got, want = lines(together, "train"), lines(workdir, "train")
  assert [x["step"] for x in got] == [x["step"] for x in want]
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x["distinct_rows"], y["distinct_rows"])
    np.testing.assert_allclose(x["loss"], y["loss"], atol=1e-5)


@pytest.mark.slow
def test_one_process_evaluates_what_two_trained(together):
  c = config()
  c.mesh.devices = 8
  c.plan.hot_rows = c.plan.warm_rows = 0
  got = jobs.evaluate(c, together, quiet)
  want = lines(together, "test")[-1]
  for name, value in got.items():
    np.testing.assert_allclose(value, want[name], atol=1e-6)


@pytest.mark.slow
def test_two_processes_predict_what_they_evaluate(together, tmp_path):
  logs = sorted((together / "data" / "logs").glob("*.tsv"))
  tail = b"".join(log.read_bytes() for log in logs).splitlines(True)[-2_000:]
  (tmp_path / "test.tsv").write_bytes(b"".join(tail))
  output = tmp_path / "p.parquet"
  launcher = launch(
    together,
    "--mode=predict",
    f"--config.data.predict={tmp_path}/test.tsv",
    f"--output={output}",
  )
  printed, said = launcher.communicate(timeout=300)
  assert launcher.returncode == 0, said
  want = lines(together, "test")[-1]
  auc = float(printed.partition("  auc ")[2].split()[0])
  np.testing.assert_allclose(auc, want["auc"], atol=1e-6)
  p = pq.read_table(output)["probability"].to_numpy().astype(np.float64)
  label = np.array([line[:1] == b"1" for line in tail])
  loss = -np.mean(np.log(np.where(label, p, 1 - p)))
  np.testing.assert_allclose(loss, want["log_loss"], atol=1e-6)


@pytest.mark.slow
def test_four_processes_share_rows_in_memory_and_files(alone, tmp_path):
  """From a checkpoint of one process without frozen rows, to the same end."""
  workdir, want = alone
  shutil.copytree(workdir / "data", tmp_path / "data")
  checkpoint = f"checkpoints/{EVERY}"
  shutil.copytree(workdir / checkpoint, tmp_path / checkpoint)
  shutil.copy(workdir / "metrics.jsonl", tmp_path)
  store = tmp_path / "store"
  flags = (
    f"--config.plan.host_store_dir={store}",
    "--config.plan.ssd_memory_mb=16",
    "--config.plan.cold_rows=1000",
  )
  launcher = launch(tmp_path, *flags, processes=4)
  printed, said = launcher.communicate(timeout=300)
  assert launcher.returncode == 0, said
  assert f"restoring step {EVERY} of " in printed
  assert not list(store.iterdir())  # nothing is left behind
  tiers = Plan.from_json((tmp_path / "plan.json").read_text()).groups[0].tiers
  assert [t.name for t in tiers] == ["hot", "warm", "cold", "frozen"]
  got = lines(tmp_path, "test")[-1]
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, atol=1e-5)


@pytest.mark.slow
def test_an_error_of_the_user_is_one_line(tmp_path):
  launcher = launch(tmp_path, "--config.train.batch_size=30000")
  _, said = launcher.communicate(timeout=120)
  assert launcher.returncode == 1
  assert said.count("\n") == 1, said
  assert "lower train.batch_size" in said


@pytest.mark.parametrize(
  ("job", "message"),
  [
    ((None, 2, None), "go together"),
    (("localhost:1", None, 0), "go together"),
    (("localhost:1", 2, 2), "--process_id: 2 found, 0 to 1 expected"),
    (("localhost:1", 2, -1), "--process_id: -1 found"),
  ],
)
def test_flags_that_do_not_fit(job, message):
  with pytest.raises(UserError, match=message), distributed.job(*job):
    pass


def test_devices_are_shared_evenly():
  with pytest.raises(UserError, match=r"mesh\.devices: 8 .* multiple of 3"):
    mesh_lib.simulate_devices(8, 3)


def test_alone_there_is_nobody_to_wait_for():
  assert distributed.from_first(lambda: "x") == "x"
  assert distributed.machines() == 1
