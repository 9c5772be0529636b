"""Time and memory of a step against the number of rows, same accesses.

  python scripts/bench_rows.py [--rows 1000000 64000000] [--tier warm cold]

Prints a step's median time, its temporary memory and what it aliases, for
tables of each size under the same ids. The time should not grow.
"""

import argparse
import platform
import time

import jax
import numpy as np
import optax
from criteo_tables import names
from jax.sharding import Mesh
from synthetic_step import INIT_SCALE, spec_of, summed

from recjax.data import power_law
from recjax.mesh import batch_sharding, make_mesh
from recjax.plan.plan import COLD, WARM, Group, Plan, Tier
from recjax.schema import AXES, Feature
from recjax.training.state import StepSpec, TrainState, first_state
from recjax.training.step import make_train_step

FEATURES = tuple(map(Feature, names(26), names(26)))


def plan_of(rows: int, tier: str, args) -> Plan:
  """All rows in a tier, with buffers that hold all that a batch looks up."""
  one = Tier(
    tier,
    first=0,
    rows=rows,
    owners=1,
    axes=AXES,
    shard_rows=rows,
    memory="host" if tier == COLD else "device",
    capacity=args.batch_size * len(FEATURES),
  )
  tables = tuple(f.table for f in FEATURES)
  group = Group("rows", tables, args.dim, "float32", args.optimizer, (one,))
  return Plan(1, args.batch_size, (group,))


def build(plan: Plan, mesh: Mesh) -> tuple[StepSpec, TrainState]:
  """Makes the step and its state."""
  spec = spec_of(plan, FEATURES, summed, optax.sgd(0.1))
  params = {"scale": np.float32(1)}
  return spec, first_state(spec, mesh, params, INIT_SCALE)


def make_batches(smallest: int, args, mesh: Mesh) -> list:
  """Draws 8 batches of a power law over the smallest table's rows."""
  rng = np.random.default_rng(0)
  out = []
  for _ in range(8):
    shape = (args.batch_size, len(FEATURES))
    ids = power_law.ranks(rng, shape, smallest, args.exponent)
    batch = {
      "label": rng.integers(0, 2, args.batch_size).astype(np.float32),
      "dense": np.zeros((args.batch_size, 1), np.float32),
      "ids": ids.astype(np.int32),
    }
    out.append(jax.device_put(batch, batch_sharding(mesh)))
  return out


class Sized:
  """A compiled step of tables of some size, its state, and step times."""

  def __init__(self, rows: int, tier: str, args):
    mesh = make_mesh(1)
    spec, self.state = build(plan_of(rows, tier, args), mesh)
    self.rows, self.times = rows, []
    self.batches = make_batches(min(args.rows), args, mesh)
    if args.spread:
      for b in self.batches:
        b["ids"] = b["ids"] * (rows // min(args.rows))
    step = make_train_step(spec, mesh)
    self.compiled = step.lower(self.state, self.batches[0]).compile()

  def step(self, i: int) -> None:
    """Runs step i; the first 8 are not timed."""
    start = time.perf_counter()
    batch = self.batches[i % len(self.batches)]
    self.state, out = self.compiled(self.state, batch)
    jax.block_until_ready(out)
    if i >= 8:
      self.times.append(time.perf_counter() - start)


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--rows", type=int, nargs="+", default=[1_000_000, 64_000_000])
  add("--tier", nargs="+", default=[WARM, COLD])
  add("--dim", type=int, default=16)
  add("--batch_size", type=int, default=8_192)
  add("--optimizer", default="rowwise_adagrad")
  add("--exponent", type=float, default=1.05)
  add("--steps", type=int, default=40)
  add(
    "--spread",
    action="store_true",
    help="spread the rows that are used over the whole table, against the "
    "frequency order: what caches and TLBs cost is then in it",
  )
  return parser.parse_args()


def main() -> None:
  args = parse()
  device = jax.devices()[0].device_kind
  print(
    f"{platform.processor() or platform.machine()}, {device}, "
    f"jax {jax.__version__}, batch {args.batch_size}, dim {args.dim}, "
    f"{args.optimizer}, 26 lookups a sample, exponent {args.exponent}"
  )
  for tier in args.tier:
    runs = [Sized(rows, tier, args) for rows in args.rows]
    for i in range(args.steps + 8):  # sizes alternate: noise hits all alike
      for run in runs:
        run.step(i)
    base = np.median(runs[0].times)
    for run in runs:
      memory = run.compiled.memory_analysis()
      alias = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
      print(
        f"{tier:5} {run.rows:>12,} rows: {np.median(run.times) * 1e3:7.2f} ms "
        f"({np.median(run.times) / base:.2f} x), temp "
        f"{memory.temp_size_in_bytes / 2**20:.1f} MB, aliased "
        f"{alias / 2**20:,.0f} MB",
        flush=True,
      )
    del runs


if __name__ == "__main__":
  main()
