"""What checkpoints of stored rows take: bytes, time, memory, slower steps.

  python scripts/bench_checkpoint.py [--full_every 5] [--scale 0.25]

A DLRM with Criteo Kaggle's tables, scaled, all of whose rows but a few are in
the host store, trains on ids of a power law. Every so many steps it saves, as
training does: one save of `full_every` is full, the others hold the rows that
were written since. Of each are printed

  rows      stored ones that it holds
  MB        of the item `stored`, and its share of a full one
  blocked   seconds that training waited for `save` to return
  took      seconds until the checkpoint was there, to a step
  step      ms of a step meanwhile, and of one when nothing is saved
  RSS       MB that the process grew while it was saved; all but `stored` is a
            few MB here

The newest checkpoint is then restored, and compared with the run bit for bit.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import shutil
import tempfile
import time

import jax
import machine
import numpy as np
from synthetic_step import (
  INIT_SCALE,
  Run,
  Setting,
  draw,
  plan_of,
  problems_of,
  rank_rows,
  tiers_of,
  topology_here,
)

from recjax import files, malloc
from recjax.data.criteo import KAGGLE_ROWS
from recjax.embedding import host_store
from recjax.mesh import make_mesh
from recjax.training import checkpoint, checksums, state, visiting
from recjax.training.checkpoint import About
from recjax.training.state import At

MB = 1e6


@dataclasses.dataclass
class Save:
  """What a save took."""

  step: int
  full: bool
  rows: int
  bytes: int
  blocked: float
  took: float
  step_seconds: float
  grown: int


def rss() -> int:
  """Returns the bytes of this process in memory."""
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * resource.getpagesize()


def size_of(folder: pathlib.Path) -> int:
  """Returns the bytes of a folder's files."""
  return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def rows_of(folder: pathlib.Path, stored: int) -> int:
  """Returns how many stored rows a step's folder holds."""
  found = json.loads((folder / "stored" / "part.0.json").read_text())["rows"]
  return sum(found.values()) if found else stored


class Trainer:
  """A run that trains, saves, and times both."""

  def __init__(self, run: Run, directory: pathlib.Path):
    self.run, self.directory = run, directory
    self.quiet: list[float] = []  # seconds of steps while nothing is saved
    self._sums = checksums.make_checksums(run.spec.embedding, run.mesh)

  def as_state(self) -> state.Run:
    """Returns the run as a checkpoint takes it."""
    r = self.run
    identity = state.Identity({}, "", r.plan.rows, {})
    none = (None, None)
    return state.Run(r.spec, r.mesh, r.state, *none, identity, *none, r.store)

  def step(self) -> float:
    """Takes a step; returns its seconds."""
    begin = time.perf_counter()
    self.run.state, _ = self.run.step(self.run.state, next(self.run.fed))
    jax.block_until_ready(self.run.state)
    return time.perf_counter() - begin

  def save(self, to, at: int, every: int, steps: int) -> Save:
    """Saves, and trains so many steps; waits where it takes longer."""
    before, most, during = rss(), 0, []
    sums = jax.device_get(self._sums(self.run.state.tables))
    about, now = About(self.as_state().identity, At(), sums), self.as_state()
    begin = time.perf_counter()
    checkpoint.save(to, at, now, about, every)
    blocked, took = time.perf_counter() - begin, 0.0
    folder = self.directory / str(at)
    for _ in range(steps):
      seconds = self.step()
      (self.quiet if took else during).append(seconds)
      most = max(most, rss())
      if not took and folder.exists():
        took = time.perf_counter() - begin
    to.wait_until_finished()
    took = took or time.perf_counter() - begin
    stored = sum(g.records for g in self.run.store.groups.values())
    full = checkpoint.read_meta(self.directory, at)["stored"]["full"]
    return Save(
      at,
      full == at,
      rows_of(folder, stored),
      size_of(folder / "stored"),
      blocked,
      took,
      float(np.median(during)),
      most - before,
    )

  def check(self, step: int) -> float:
    """Restores a step that is the run's, and compares; returns seconds."""
    want, r = self.run.store, self.run
    want.flush()
    store = visiting.make_store(r.spec, r.mesh)
    assert store is not None
    host_store.init(store, r.spec.embedding, INIT_SCALE)
    now = self.as_state()._replace(store=store)
    begin = time.perf_counter()
    meta = checkpoint.read_meta(self.directory, step)
    restored = checkpoint.restore(self.directory, step, meta, now)
    jax.block_until_ready(restored)
    seconds = time.perf_counter() - begin
    for name, got in store.groups.items():
      jax.tree.map(
        np.testing.assert_array_equal, got.parts, want.groups[name].parts
      )
    store.close()
    return seconds


def measure(args: argparse.Namespace, directory: pathlib.Path) -> dict:
  """Trains and saves; returns {"saves", "quiet", "restored", "stored"}."""
  tables = tuple(max(1, int(args.scale * r)) for r in KAGGLE_ROWS)
  setting = Setting(tables, args.exponent, args.dim, args.batch, args.share)
  mesh, ranks = make_mesh(1), rank_rows(setting)
  problems = problems_of(setting, ranks.profile, topology_here(), 1)
  plan = plan_of(setting, problems, setting.share, table_wise=())
  print(f"{setting}\n{tiers_of(plan)}", flush=True)
  run = Run(setting, plan, mesh, routed=True).compile()
  count = args.steps * (args.saves + 1)
  run.start(draw(setting, ranks, mesh, count + 2))
  trainer = Trainer(run, directory)
  found, total = [], sum(g.nbytes for g in run.store.groups.values())
  print(f"{total / MB:,.0f} MB in the host store", flush=True)
  for _ in range(args.steps):
    trainer.step()
  with checkpoint.manager(directory, keep=1) as to:
    for i in range(args.saves):
      at = (i + 1) * args.steps
      save = trainer.save(to, at, args.full_every, args.steps)
      found.append(save)
      print(line(save, found[0].bytes), flush=True)
    checkpoint.save(
      to,
      count,
      trainer.as_state(),
      About(
        trainer.as_state().identity,
        At(),
        jax.device_get(trainer._sums(run.state.tables)),
      ),
      args.full_every,
    )
  quiet = float(np.median(trainer.quiet))
  restored = trainer.check(count)
  run.stop()
  return {
    "saves": [dataclasses.asdict(s) for s in found],
    "quiet": quiet,
    "restored": restored,
    "stored": total,
  }


def line(s: Save, full: int) -> str:
  """Returns a save's line of the table."""
  return (
    f"step {s.step:5}  {'full' if s.full else 'differential':12} "
    f"{s.rows:>11,} rows {s.bytes / MB:>8,.1f} MB {s.bytes / full:>6.1%}  "
    f"blocked {s.blocked:5.2f} s  took {s.took:5.1f} s  "
    f"step {1e3 * s.step_seconds:6.1f} ms  RSS {s.grown / MB:>6,.0f} MB"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--scale", type=float, default=0.25, help="of the tables' rows")
  add("--dim", type=int, default=16)
  add("--batch", type=int, default=2_048)
  add("--share", type=float, default=0.01, help="of the rows, on the device")
  add("--exponent", type=float, default=1.05)
  add("--steps", type=int, default=50, help="between saves")
  add("--saves", type=int, default=6)
  add("--full_every", type=int, default=5)
  add("--directory", help="of the checkpoints; None = a temporary one")
  add("--json", help="file for the figures")
  args = parser.parse_args()
  malloc.keep_freed_memory()
  print(machine.about(), flush=True)
  directory = pathlib.Path(tempfile.mkdtemp(dir=args.directory))
  try:
    found = measure(args, directory)
  finally:
    shutil.rmtree(directory)
  print(
    f"nothing saved: {1e3 * found['quiet']:.1f} ms a step; restored and "
    f"compared: {found['restored']:.1f} s"
  )
  if args.json:
    files.write(args.json, json.dumps(found | machine.about(), indent=1))


if __name__ == "__main__":
  main()
