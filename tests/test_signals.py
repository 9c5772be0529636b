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
