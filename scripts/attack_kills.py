"""Kills a run at any moment, starts it again, and looks at its end.

  python scripts/attack_kills.py [--tries 100] [--processes 1] [--seed 0]

A run of seconds of main.py, or of scripts/launch_local.py with several
processes, is ended by SIGKILL, SIGTERM or SIGINT at a moment that a line of its
output and a fraction of a second choose, and started again, until it is done;
then another one begins. Right is

- the exit code and a line or two of each signal, and no traceback,
- that it goes on from the newest checkpoint that was there,
- in the end the metrics, to the last digit, of a run that nobody disturbed, and
  each step once in its log.

Prints what was tried, from which steps runs went on, what was right and wrong;
exits with 1 where anything was wrong.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = (
  "--config=configs/quickstart.py",
  "--config.data.synthetic.samples=30000",
  "--config.data.synthetic.rows=5000",
  "--config.data.block_samples=1024",
  "--config.embedding.dim=4",
  "--config.model.bottom=8,8",
  "--config.model.top=8,8",
  "--config.mesh.devices=8",
  "--config.plan.hot_rows=100",
  "--config.plan.warm_rows=2000",
  "--config.train.batch_size=256",
  "--config.train.log_every_steps=5",
  "--config.checkpoint.every_steps=10",
  "--config.checkpoint.full_every=3",
)
# The beginning of a line, in the order in which they come, and the most seconds
# after it. A line that does not come any more is not waited for: any later one
# will do.
MOMENTS = (
  ("synthetic: ", 0.1),
  ("prepare: stage", 0.05),
  ("prepare: pack", 0.05),
  ("placement ", 2.0),
  ("step 15 ", 0.1),
  ("step 35 ", 0.3),
  ("step 60 ", 0.3),
  ("step 105 ", 0.2),
)
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
_SECONDS = 300  # for a run to end


class Try(NamedTuple):
  """What came of a signal."""

  signum: int  # 0: none; the run went to its end
  newest: int  # checkpoint that was there at the start; 0 = none
  resumed: int  # the step that it went on from; 0 = the first
  wrong: str


def start(workdir: pathlib.Path, processes: int) -> subprocess.Popen:
  """Starts or goes on with a run."""
  command = ["main.py"]
  if processes > 1:
    command = ["scripts/launch_local.py", f"--processes={processes}", "--"]
  return subprocess.Popen(
    [sys.executable, *command, *FLAGS, f"--workdir={workdir}"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,  # a group of processes, as in a terminal
    env=os.environ
    | {"PYTHONUNBUFFERED": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )


def newest(workdir: pathlib.Path) -> int:
  """Returns the newest checkpoint's step; 0 = there is none."""
  folder = workdir / "checkpoints"
  steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
  return max(steps, default=0)


def deliver(process: subprocess.Popen, processes, signum, rng) -> int:
  """Sends a signal as a job gets it; returns the exit code that it asks for.

  A terminal's Ctrl-C goes to all processes, SIGTERM to the one that launched
  them, and any of them may be killed.
  """
  if processes == 1:
    process.send_signal(signum)
    return SIGNALS[signum]
  if signum == signal.SIGINT:
    os.killpg(process.pid, signum)
  elif signum == signal.SIGTERM:
    process.send_signal(signum)
  else:
    of = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if pids := of.read_text().split():
      os.kill(int(rng.choice(pids)), signum)
    return 1
  return SIGNALS[signum]


def once(workdir, processes, moment, signum, rng) -> Try:
  """Starts a run, and ends it by a signal; 0 = lets it go to its end."""
  there = newest(workdir)
  process = start(workdir, processes)
  assert process.stdout and process.stderr
  printed, code = [], 0
  if signum:
    after = tuple(begins for begins, _ in MOMENTS[moment:])
    for line in process.stdout:
      printed.append(line)
      if line.startswith(after):
        break
    time.sleep(rng.uniform(0, MOMENTS[moment][1]))
    code = deliver(process, processes, signum, rng)
  rest, said = process.communicate(timeout=_SECONDS)
  printed.append(rest)
  text = "".join(printed)
  _, found, step = text.partition("restoring step ")
  resumed = int(step.split()[0]) if found else 0
  wrong = ""
  if "Traceback" in said or said.count("\n") > 2 * processes:
    wrong = f"it printed {said[:600]!r}"
  elif process.returncode not in (code, 0):
    wrong = f"exit code {process.returncode}: {said[:600]!r}"
  elif resumed != there and (found or not signum):
    wrong = f"it went on from step {resumed}, and {there} was there"
  return Try(signum, there, resumed, wrong)


def lines(workdir: pathlib.Path, split: str) -> list[dict]:
  """Returns the lines of a split in metrics.jsonl."""
  text = (workdir / "metrics.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  return [line for line in found if line["split"] == split]


def wrong_end(workdir: pathlib.Path, whole: pathlib.Path) -> str:
  """Returns what is wrong with the end of a run; "" = nothing."""
  got, want = lines(workdir, "test"), lines(whole, "test")
  if got != want:
    return f"the end is {got}, not {want}"
  steps = [line["step"] for line in lines(workdir, "train")]
  return "" if steps == sorted(set(steps)) else f"steps {steps} in its log"


def attack(tries: int, processes: int = 1, seed: int = 0) -> list[Try]:
  """Returns what came of so many signals, and of the starts to the end."""
  rng = random.Random(seed)
  found: list[Try] = []
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder, "whole")
    found.append(once(whole, processes, 0, 0, rng))
    run = 0
    while tries:
      workdir = pathlib.Path(folder, f"run{run}")
      # Later ones in turn, so that there is a checkpoint to go on from.
      moments = range(run % 2, len(MOMENTS), 2)[:tries]
      for moment in moments:
        signum = rng.choice(list(SIGNALS))
        found.append(once(workdir, processes, moment, signum, rng))
      end = once(workdir, processes, 0, 0, rng)
      wrong = end.wrong or wrong_end(workdir, whole)
      found.append(end._replace(wrong=wrong))
      tries, run = tries - len(moments), run + 1
  return found


def main() -> None:
  """Attacks as the command line says."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tries", type=int, default=100)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  found = attack(args.tries, args.processes, args.seed)
  bad = [x for x in found if x.wrong]
  for x in bad:
    name = signal.Signals(x.signum).name if x.signum else "the end"
    print(f"{name}: {x.wrong}")
  resumed = collections.Counter(x.resumed for x in found)
  print(f"starts went on from steps {dict(sorted(resumed.items()))}")
  print(f"tried {args.tries} signals in {len(found)} starts, wrong {len(bad)}")
  sys.exit(bool(bad))


if __name__ == "__main__":
  main()
