"""Time and memory of a step against the number of rows, same accesses.

  python scripts/bench_rows.py [--rows 1000000 64000000] [--tier warm cold]

Prints a step's median time, its temporary memory and what it aliases, for
tables of each size under the same ids. The time should not grow.
"""

import argparse
import itertools
import platform
import time

import jax
import numpy as np
import optax
from criteo_tables import names
from synthetic_step import INIT_SCALE, spec_of, summed

from recjax.data import power_law
from recjax.embedding import host_store
from recjax.mesh import make_mesh
from recjax.plan.plan import COLD, VISITORS, WARM, Group, Plan, Tier
from recjax.schema import AXES, Feature
from recjax.training import visiting
from recjax.training.inputs import one_ahead
from recjax.training.state import first_state
from recjax.training.step import lower

FEATURES = tuple(map(Feature, names(26), names(26)))


def plan_of(rows: int, tier: str, args) -> Plan:
  """All rows in a tier, with buffers that hold all that a batch looks up."""
  most = args.batch_size * len(FEATURES)
  memory = "host" if tier == COLD else "device"
  one = Tier(tier, 0, rows, 1, AXES, rows, memory, capacity=most)
  visitors = Tier(VISITORS, 0, most, 1, AXES, most, capacity=most)
  tables = tuple(f.table for f in FEATURES)
  group = Group(
    "rows",
    tables,
    args.dim,
    "float32",
    args.optimizer,
    (one,),
    visitors=visitors if tier == COLD else None,
  )
  return Plan(1, args.batch_size, (group,))


def make_batches(smallest: int, args) -> list:
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
    out.append(batch)
  return out


class Sized:
  """A step of tables of some size, its state, and step times."""

  def __init__(self, rows: int, tier: str, args):
    mesh, self.rows, self.times = make_mesh(1), rows, []
    spec = spec_of(plan_of(rows, tier, args), FEATURES, summed, optax.sgd(0.1))
    params = {"scale": np.float32(1)}
    self.compiled = lower(spec, mesh, params, 1)[0].compile()
    self.state = first_state(spec, mesh, params, INIT_SCALE)
    store = visiting.make_store(spec, mesh)
    if store:
      host_store.init(store, spec.embedding, INIT_SCALE)
    self.run = visiting.Step(spec, mesh, store)
    batches = make_batches(min(args.rows), args)
    if args.spread:
      for b in batches:
        b["ids"] = b["ids"] * (rows // min(args.rows))
    prepared = [self.run.prepare(b, True) for b in batches]
    self.batches = one_ahead(map(self.run.place, itertools.cycle(prepared)))

  def step(self, i: int) -> None:
    """Runs step i; the first 8 are not timed."""
    start = time.perf_counter()
    self.state, out = self.run.train(self.state, next(self.batches))
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
