"""Trains tables of 1.5 times the memory that it is allowed, rows on an SSD.

  python scripts/bench_ssd.py WORKDIR [--times 1.5] [--steps 240]

Two runs of configs/quickstart.py with wide rows, on the same batches: one in
memory, and one in a cgroup whose limit the tables exceed --times, with a budget
for cold rows of a sixth of that limit, the rest in files of WORKDIR. The second
one is killed (SIGKILL) once it has saved, started again, and evaluated by a
process of its own in the cgroup. Both must end with the same losses. Printed
are the sizes, the most that the cgroup held, and samples/s of both.

Needs Linux and a memory cgroup to write into (root).
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
from machine import about

ROOT = pathlib.Path(__file__).parents[1]
_V1 = pathlib.Path("/sys/fs/cgroup/memory")
_V2 = pathlib.Path("/sys/fs/cgroup")


class Cgroup:
  """A memory cgroup of Linux, version 1 or 2."""

  def __init__(self, mb: int):
    """Makes it; mb: its limit, MiB."""
    root, limit, self._most = _V2, "memory.max", "memory.peak"
    if _V1.exists():
      root, limit = _V1, "memory.limit_in_bytes"
      self._most = "memory.max_usage_in_bytes"
    try:
      self._path = pathlib.Path(tempfile.mkdtemp(dir=root, prefix="recjax"))
      (self._path / limit).write_text(str(mb << 20))
    except OSError as e:
      raise SystemExit(f"error: no memory cgroup can be made: {e}") from None

  def enter(self) -> None:
    """Puts the calling process into it."""
    (self._path / "cgroup.procs").write_text(str(os.getpid()))

  @property
  def anonymous(self) -> int:
    """Bytes that are not pages of files, now."""
    stat = dict(
      line.split() for line in (self._path / "memory.stat").open("rt")
    )
    return int(stat.get("rss", stat.get("anon", 0)))

  @property
  def most(self) -> int:
    """The most bytes that it held, pages of files among them."""
    return int((self._path / self._most).read_text())

  def remove(self) -> None:
    """Removes it; its processes must have ended."""
    self._path.rmdir()


def flags(args: argparse.Namespace) -> list[str]:
  """What all runs share."""
  c = {
    "data.synthetic.rows": args.rows,
    "data.synthetic.exponent": args.exponent,
    "embedding.dim": args.dim,
    "mesh.devices": 1,
    "train.batch_size": args.batch,
    "train.steps": args.steps,
    "train.log_every_steps": args.every,
    "checkpoint.every_steps": args.steps // 4,
    "checkpoint.full_every": 2,
    "plan.hot_rows": 0,
    "plan.warm_rows": args.warm,
    "plan.device_memory_mb": 1 << 20,
    "data.block_samples": 1_024,
  }
  return [f"--config.{k}={v}" for k, v in c.items()]


def start(workdir, more, group=None, mode="train") -> subprocess.Popen:
  """Starts main.py; group: the cgroup that it runs in."""
  config = ROOT / "configs" / "quickstart.py"
  return subprocess.Popen(
    [
      *(sys.executable, ROOT / "main.py", f"--config={config}"),
      *(f"--workdir={workdir}", f"--mode={mode}", *more),
    ],
    stdout=subprocess.PIPE,
    text=True,
    preexec_fn=group and group.enter,
  )


def finish(process: subprocess.Popen, until: str = "\0") -> tuple[str, int]:
  """Passes on what a process prints; kills it at a line that has `until`.

  Returns:
    (all that it printed, its exit code).
  """
  printed = []
  assert process.stdout is not None
  for line in process.stdout:
    print("  " + line, end="", flush=True)
    printed.append(line)
    if until in line:
      process.send_signal(signal.SIGKILL)
  return "".join(printed), process.wait()


def done(process: subprocess.Popen) -> str:
  """As `finish`, of a process that must succeed."""
  printed, code = finish(process)
  if code:
    raise SystemExit(f"error: a run ended with {code}")
  return printed


def logged(workdir: pathlib.Path) -> dict[int, dict]:
  """Returns {step: metrics} of a run's training."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return {x["step"]: x for x in found if x["split"] == "train"}


def measure(args: argparse.Namespace) -> dict:
  """Does it all; returns the figures."""
  base = args.workdir.absolute()
  memory, ssd = base / "memory", base / "ssd"
  for old in (memory / "checkpoints", memory / "metrics.jsonl", ssd):
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(True)
  common = flags(args)
  done(start(memory, common, mode="prepare"))
  print("in memory", flush=True)
  done(start(memory, common))
  plan = json.loads((memory / "plan.json").read_text())
  held = sum(t["bytes"] for t in plan["prediction"]["tiers"])
  limit = int(held / args.times) >> 20
  print(f"in {limit:,} MiB: {held / 2**20:,.0f} of tables", flush=True)
  ssd.mkdir()
  shutil.copytree(memory / "data", ssd / "data")
  group = Cgroup(limit)
  try:
    more = [
      *common,
      f"--config.plan.host_memory_mb={limit // 6}",
      f"--config.plan.host_store_dir={ssd / 'store'}",
    ]
    past = args.steps // 2 + args.every
    finish(start(ssd, more, group), f"step {past:,} of")
    evaluated = done(start(ssd, more, group))
    done(start(ssd, more, group, "evaluate"))
    most = group.most
  finally:
    group.remove()
  a, b = logged(memory), logged(ssd)
  rate = lambda found: float(
    np.median([x["samples_per_second"] for x in list(found.values())[1:]])
  )
  losses = [abs(a[s]["loss"] - b[s]["loss"]) for s in a]
  return {
    **about(),
    "limit_mib": limit,
    "tables_mib": held / 2**20,
    "ratio": held / (limit << 20),
    "most_held_mib": most / 2**20,
    "in_memory": rate(a),
    "on_ssd": rate(b),
    "loss_difference": max(losses),
    "left": sorted(x.name for x in (ssd / "store").iterdir()),
    "auc": re.findall(r"auc ([\d.]+)", evaluated),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdir", type=pathlib.Path)
  add = parser.add_argument
  add("--times", type=float, default=1.5, help="the memory that it is allowed")
  add("--exponent", type=float, default=1.0, help="of the ids")
  add("--warm", type=int, default=200_000, help="warm rows")
  add("--rows", type=int, default=12_000_000, help="that the logs draw from")
  add("--dim", type=int, default=128)
  add("--batch", type=int, default=2_048)
  add("--steps", type=int, default=240)
  add("--every", type=int, default=10, help="steps, for samples/s")
  args = parser.parse_args()
  print(json.dumps(measure(args), indent=2))


if __name__ == "__main__":
  main()
