"""Time and memory of a step against the number of rows, same accesses.

  python scripts/bench_rows.py [--rows 1000000 64000000] [--tier warm cold]

Prints a step's median time, its temporary memory and what it aliases, for
tables of each size under the same ids. The time should not grow.
"""

import argparse
import pathlib
import platform
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax.embedding import optimizers, tables
from recjax.mesh import batch_sharding, make_mesh, replicated
from recjax.plan.plan import Plan
from recjax.schema import Feature
from recjax.training import step as step_lib

FEATURES = tuple(Feature(f"C{i}", f"C{i}") for i in range(26))


def build(rows: int, tier: str, args):
  plan = Plan(
    devices=1,
    batch_size=args.batch_size,
    rows=rows,
    dim=args.dim,
    dtype="float32",
    hot=0,
    warm_end=rows if tier == "warm" else 0,
    capacity_warm=args.batch_size * 26 if tier == "warm" else 0,
    capacity_cold=args.batch_size * 26 if tier == "cold" else 0,
  )
  mesh = make_mesh(1)
  model = step_lib.Model(
    apply=lambda params, dense, x: jnp.sum(x, axis=(1, 2)) * params["scale"],
    features=FEATURES,
    dense_optimizer=optax.sgd(0.1),
    sparse_optimizer=optimizers.OPTIMIZERS[args.optimizer](0.1),
    plan=plan,
    exchange_dtype=jnp.float32,
    seed=0,
  )
  params = {"scale": np.float32(1)}
  dense = (params, model.dense_optimizer.init(params), np.int32(0))
  params, opt_state, step = jax.device_put(dense, replicated(mesh))
  t = tables.init(plan, model.sparse_optimizer, mesh, 0.05, 0)
  state = step_lib.TrainState(step, params, opt_state, t)
  return model, mesh, state


def make_batches(smallest: int, args, mesh):
  rng = np.random.default_rng(0)
  out = []
  for _ in range(8):
    # Power law by the inverse of its continuous distribution function.
    s = 1 - args.exponent
    u = rng.random((args.batch_size, 26))
    ids = ((u * (smallest**s - 1) + 1) ** (1 / s)).astype(np.int32) - 1
    batch = {
      "label": rng.integers(0, 2, args.batch_size).astype(np.float32),
      "dense": np.zeros((args.batch_size, 1), np.float32),
      "ids": np.minimum(ids, smallest - 1),
    }
    out.append(jax.device_put(batch, batch_sharding(mesh)))
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--rows", type=int, nargs="+", default=[1_000_000, 64_000_000]
  )
  parser.add_argument("--tier", nargs="+", default=["warm", "cold"])
  parser.add_argument("--dim", type=int, default=16)
  parser.add_argument("--batch_size", type=int, default=8_192)
  parser.add_argument("--optimizer", default="rowwise_adagrad")
  parser.add_argument("--exponent", type=float, default=1.05)
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument(
    "--spread",
    action="store_true",
    help="spread the rows that are used over the whole table, against the "
    "frequency order: what caches and TLBs cost is then in it",
  )
  args = parser.parse_args()
  device = jax.devices()[0].device_kind
  print(
    f"{platform.processor() or platform.machine()}, {device}, "
    f"jax {jax.__version__}, batch {args.batch_size}, dim {args.dim}, "
    f"{args.optimizer}, 26 lookups a sample, exponent {args.exponent}"
  )
  for tier in args.tier:
    runs = []
    for rows in args.rows:
      model, mesh, state = build(rows, tier, args)
      batches = make_batches(min(args.rows), args, mesh)
      if args.spread:
        for b in batches:
          b["ids"] = b["ids"] * (rows // min(args.rows))
      step = step_lib.make_train_step(model, mesh)
      compiled = step.lower(state, batches[0]).compile()
      runs.append([rows, compiled, state, batches, []])
    for i in range(args.steps + 8):  # sizes alternate: noise hits all alike
      for run in runs:
        _, compiled, state, batches, times = run
        start = time.perf_counter()
        state, out = compiled(state, batches[i % len(batches)])
        jax.block_until_ready(out)
        run[2] = state
        if i >= 8:
          times.append(time.perf_counter() - start)
    base = np.median(runs[0][4])
    for rows, compiled, _, _, times in runs:
      memory = compiled.memory_analysis()
      alias = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
      print(
        f"{tier:5} {rows:>12,} rows: {np.median(times) * 1e3:7.2f} ms "
        f"({np.median(times) / base:.2f} x), temp "
        f"{memory.temp_size_in_bytes / 2**20:.1f} MB, aliased "
        f"{alias / 2**20:,.0f} MB"
      )
    del runs, state


if __name__ == "__main__":
  main()
