"""SIGTERM and Ctrl-C: what is saved, what is said, the exit code."""

import os
import pathlib
import signal
import subprocess
import sys

import attack_kills
import pytest
from helpers import lines

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = (
  *attack_kills.FLAGS,
  "--config.data.synthetic.samples=20000",
  "--config.mesh.devices=2",
  "--config.train.log_every_steps=1",
  "--config.checkpoint.every_steps=0",
)


def run(workdir, signum=None, begins=""):
  """Runs; sends a signal when a line begins so: (code, stdout, stderr)."""
  process = subprocess.Popen(
    [sys.executable, "main.py", *FLAGS, f"--workdir={workdir}"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )
  assert process.stdout is not None
  printed = []
  for line in process.stdout:
    printed.append(line)
    if signum and line.startswith(begins):
      process.send_signal(signum)
      break
  rest, said = process.communicate(timeout=120)
  return process.returncode, "".join(printed) + rest, said


# A run whose checkpoint takes a minute to write.
SAVING = """
import time
from recjax import signals

signals.listen()
with signals.saving(lambda: "saved") as begin:
  begin()
  print("training", flush=True)
  while not signals.asked():
    time.sleep(0.01)
  print("saving", flush=True)
  time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_another_ctrl_c_does_not_wait_for_the_checkpoint(first):
  """Another SIGTERM does: who sends it often sends it twice."""
  with subprocess.Popen(
    [sys.executable, "-c", SAVING],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(first)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
  assert process.returncode == 130, said
  name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[first]
  assert said.splitlines() == [
    f"{name}: a checkpoint first; Ctrl-C ends at once",
    "ended by Ctrl-C: at once; the same command goes on from what is done",
  ]


@pytest.mark.slow
def test_a_run_saves_itself_before_it_ends(tmp_path):
  """While preparing at once; while training after a step; then to the end."""
  code, _, said = run(tmp_path, signal.SIGINT, "prepare: stage")
  assert (code, said.count("\n")) == (130, 1), said
  assert said.startswith("ended by Ctrl-C: the same command goes on")
  code, _, said = run(tmp_path, signal.SIGTERM, "step 3 ")
  assert (code, said.count("\n")) == (143, 2), said
  saved = max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
  assert 3 <= saved < 70
  assert f"ended by SIGTERM: checkpoint {saved} in " in said
  code, printed, said = run(tmp_path)
  assert code == 0, said
  assert f"restoring step {saved} of " in printed
  steps = [x["step"] for x in lines(tmp_path, "train")]
  assert steps == list(range(1, 71))
