"""Measures this mesh and writes a topology file for the planner.

  python scripts/calibrate.py --out my_cluster.json [--devices 8]
  python main.py --mode=plan --config ... --config.plan.topology=my_cluster.json

Every operation runs on all devices at once, as in a step, at several sizes;
latency and rate are the line through the median times. Whole train steps then
refine the rates. Simulated CPU devices share their cores and memory, and so
does what is measured. The mesh counts as one node: the network's figures are
the links' own.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from synthetic_step import LARGE, Run, Setting, draw, problem_of

from recjax import planner, step_cost, topology
from recjax.exchange import coalesce
from recjax.mesh import AXIS, make_mesh, simulate_devices
from recjax.tables import DEVICE, HOST, gather, on_host

DIM = 32  # of the rows: 128 bytes
ROWS = 1 << 18  # of a device's table
CACHED = 1 << 12  # of one that caches hold
SHARDED = PartitionSpec(AXIS)
TABLE = PartitionSpec(None, AXIS)  # [ROWS, n, DIM], as the tiers are


class Bench:
  """Times functions of shards on a mesh."""

  def __init__(self, mesh, repeats: int):
    self.mesh, self.repeats = mesh, repeats
    self.n = mesh.devices.size
    self.rng = np.random.default_rng(0)

  def floats(self, *shape, spec=SHARDED, dtype=np.float32, host=False):
    x = self.rng.standard_normal(shape, np.float32).astype(dtype)
    kind = "pinned_host" if host else None
    return jax.device_put(x, NamedSharding(self.mesh, spec, memory_kind=kind))

  def ids(self, size: int, rows: int):  # [n size] int32 below rows
    x = self.rng.integers(0, rows, self.n * size, np.int32)
    return jax.device_put(x, NamedSharding(self.mesh, SHARDED))

  def asked(self, size: int):  # [n size] int32
    """Slots that n peers ask of each shard: each peer its distinct rows.

    Rows are used by a power law of exponent 1, so that peers ask for the same
    ones in part, which caches then hold.
    """
    parts = []
    for _ in range(self.n * self.n):
      log = self.rng.random(16 * size) * np.log(ROWS)
      rows = np.exp(log).astype(np.int32) - 1
      first = np.sort(np.unique(rows, return_index=True)[1])
      parts.append(rows[first][: -(-size // self.n)])
    x = np.stack(parts).reshape(self.n, -1)[:, :size].reshape(-1)
    return jax.device_put(x, NamedSharding(self.mesh, SHARDED))

  def call(self, f, *args):
    """f, which maps every device's shards to a shard, compiled with args."""
    run = jax.shard_map(
      f,
      mesh=self.mesh,
      in_specs=tuple(x.sharding.spec for x in args),
      out_specs=SHARDED,
      check_vma=False,
    )
    run = jax.jit(run).lower(*args).compile()
    return lambda: jax.block_until_ready(run(*args))

  def seconds(self, calls) -> np.ndarray:
    """Median of each, in rounds, so that noise hits all alike."""
    out = np.zeros((self.repeats + 3, len(calls)))
    for i, j in np.ndindex(out.shape):
      start = time.perf_counter()
      calls[j]()
      out[i, j] = time.perf_counter() - start
    return np.median(out[3:], axis=0)


def line(amounts, seconds) -> tuple[float, float]:
  """(latency s, rate a second): seconds = latency + amount / rate.

  Least squares of relative errors, so that small sizes count for the latency.
  """
  amounts, seconds = np.array(amounts, float), np.array(seconds)
  a = np.stack([np.ones_like(amounts), amounts], axis=1) / seconds[:, None]
  (latency, slope), *_ = np.linalg.lstsq(a, np.ones_like(seconds), rcond=None)
  if latency < 0 or slope <= 0:  # noise: the largest size says it all
    return 1e-7, float(amounts[-1] / seconds[-1])
  return float(latency), float(1 / slope)


def pairs(slots):  # [m] int32 -> [m, 2]
  return jnp.stack([slots, jnp.zeros_like(slots)], axis=1)


def from_shard(table, slots):
  return gather(table, pairs(slots))


def from_host(table, slots):
  return on_host(gather, DEVICE)(table, jax.device_put(pairs(slots), HOST))


# Whole steps that the rates are refined by: none that bench_choice.py runs.
_TABLES = (400_000, 90_000, 40_000, 9_000, 2_000, 500, 100, 20)
STEPS = (
  Setting((1_000,) * 8, 1.05, 16, 0, 1.0),  # of one sample a device
  Setting(_TABLES, 1.1, 16, 8_192, 1.0),
  Setting(_TABLES, 1.1, 64, 2_048, 1.0, "adagrad"),
  Setting(_TABLES, 1.25, 32, 4_096, 1.0, "sgd", layers=LARGE),
)
# Hot rows, whether the others are warm, how hot gradients meet.
CUTS = (
  (0, True, "dense"),
  (0, False, "dense"),
  (400, True, "dense"),
  (400, False, "dense"),
  (6_000, True, "sparse"),
  (40_000, True, "dense"),
)
# What steps are made of; latencies first.
FITTED = (
  *("launch", "link_latency", "ring_latency", "host_latency"),
  *("stream", "gather", "cached_gather", "cached_add", "sort"),
  *("matmul_float32", "link", "ring", "host_gather", "host_link"),
)
_TRUST = 0.02  # of a rate's own measurement against the steps'; see refined


def scaled(t: topology.Topology, field: str, factor: float):
  """t, where what the field stands for takes `factor` times as long."""
  value = getattr(t, field)
  value = value * factor if FITTED.index(field) < 4 else value / factor
  return dataclasses.replace(t, **{field: value})


def refined(mesh, t: topology.Topology) -> topology.Topology:
  """Rates that whole train steps show, near those of single operations.

  The model of a step (step_cost.py) is a sum of terms, each as long as one
  rate says. The factors f of the rates minimise the squares of the relative
  errors of measured steps, plus `_TRUST` (f - 1)^2 each: a step's operations
  run in another neighbourhood than alone.
  """
  n = mesh.devices.size
  terms, seconds = [], []
  for setting in STEPS:
    if not setting.batch:
      setting = dataclasses.replace(setting, batch=n)
    problem = problem_of(setting, t, n)
    rows, stored = problem.spectrum.rows, problem.work.stored
    runs = []
    for hot, warm, sync in CUTS:
      plan = planner.solve(
        problem,
        hosts=1,
        device_bytes=2 * rows * stored,
        host_bytes=2 * rows * stored,
        hot_rows=hot,
        warm_rows=rows if warm else 0,
        syncs=(sync,),
        pooled=(),
      )
      runs.append(Run(setting, plan, mesh))
      load = problem.load_of_cuts(plan.hot, plan.warm_end, sync)
      took = lambda t, w=problem.work, x=load: float(
        sum(step_cost.step_seconds(w, t, x).values())
      )
      terms.append([took(scaled(t, f, 2.0)) - took(t) for f in FITTED])
    drawn = draw(setting, mesh, 4)
    for run in runs:
      run.start(drawn)
    for _ in range(8):
      for run in runs:
        run.steps(3)
    for run in runs:
      run.stop()
      seconds.append(float(np.median(run.seconds)))
  shares = np.array(terms) / np.array(seconds)[:, None]
  known = np.sqrt(_TRUST) * np.eye(len(FITTED))
  left = np.concatenate([shares, known])
  right = np.concatenate([np.ones(len(shares)), known.sum(axis=1)])
  factors = np.clip(np.linalg.lstsq(left, right, rcond=None)[0], 0.25, 4.0)
  for name, x in (("alone", np.ones(len(FITTED))), ("refined", factors)):
    off = shares @ x - 1
    off = (off.min(), off.max(), np.sqrt(np.mean(off**2)))
    print(
      "steps by rates {}: {:+.0%} to {:+.0%}, rms {:.0%}".format(name, *off)
    )
  for field, factor in zip(FITTED, factors, strict=True):
    t = scaled(t, field, float(factor))
    print(f"{field:16} {getattr(t, field):.3g}, {factor:.2f} times as long")
  network = {"network": t.link, "network_latency": t.link_latency}
  return dataclasses.replace(t, **network)


def measure(bench: Bench) -> dict[str, float]:
  """The rates and latencies of a Topology, by field."""
  n = bench.n

  empty = bench.seconds([bench.call(lambda x: x + 1, bench.floats(8 * n))])[0]
  print(f"{'call':16} {1e6 * empty:.3g} us")

  def fit(name, unit, sizes, amount, call):
    times = bench.seconds([call(s) for s in sizes]) - empty
    times = np.maximum(times, 1e-7)
    latency, rate = line([amount(s) for s in sizes], times)
    shown = ", ".join(
      f"{amount(s):.2g}: {1e3 * t:.3g} ms"
      for s, t in zip(sizes, times, strict=True)
    )
    print(f"{name:16} {rate:.3g} {unit}/s + {1e6 * latency:.3g} us ({shown})")
    return latency, rate

  _, stream = fit(
    "stream",
    "B",
    [1 << k for k in (18, 20, 22)],
    lambda s: 8 * s,  # read and written
    lambda s: bench.call(lambda x: x + 1, bench.floats(n * s)),
  )
  table = bench.floats(ROWS, n, DIM, spec=TABLE)
  counts = [1 << k for k in (10, 13, 15)]
  _, gathered = fit(
    "gather",
    "B",
    counts,
    lambda s: 4 * DIM * s,
    lambda s: bench.call(
      lambda t, i: gather(t, pairs(i)), table, bench.asked(s)
    ),
  )
  few = bench.floats(CACHED * n, DIM)
  _, cached_gather = fit(
    "cached gather",
    "B",
    counts,
    lambda s: 4 * DIM * s,
    lambda s: bench.call(
      lambda t, i: t.at[i].get(mode="fill", fill_value=0),
      few,
      bench.ids(s, CACHED),
    ),
  )
  _, cached_add = fit(
    "cached add",
    "B",
    counts,
    lambda s: 4 * DIM * s,
    lambda s: bench.call(
      lambda t, i, g: jnp.zeros_like(t).at[i].add(g, mode="drop"),
      few,
      bench.ids(s, CACHED),
      bench.floats(n * s, DIM),
    ),
  )
  host_table = bench.floats(ROWS, n, DIM, spec=TABLE, host=True)
  _, host_gather = fit(
    "host gather",
    "B",
    counts,
    lambda s: 4 * DIM * s * n,  # of the host, all devices together
    lambda s: bench.call(from_host, host_table, bench.asked(s)),
  )
  _, sort = fit(
    "sort",
    "keys",
    [1 << k for k in (10, 13, 15)],
    float,
    lambda s: bench.call(lambda i: sum(coalesce(i)), bench.ids(s, 1 << 20)),
  )

  def matmul(dtype):
    return fit(
      f"matmul {np.dtype(dtype).name}",
      "FLOP",
      [64, 256, 1_024],
      lambda s: 2 * s * 512 * 512,
      lambda s: bench.call(
        jnp.dot,
        bench.floats(n * s, 512, dtype=dtype),
        bench.floats(512, 512, spec=PartitionSpec(), dtype=dtype),
      ),
    )[1]

  link_latency = ring_latency = 1e-7
  link = ring = stream
  if n > 1:
    sizes = [1 << k for k in (6, 12, 15)]
    link_latency, link = fit(
      "all-to-all",
      "B",
      sizes,
      lambda s: 4 * s * (n - 1),  # sent by a device
      lambda s: bench.call(
        lambda x: lax.all_to_all(x, AXIS, 0, 0), bench.floats(n * n, s)
      ),
    )
    ring_latency, ring = fit(
      "all-reduce",
      "B",
      sizes,
      lambda s: 8 * s * (n - 1),  # sent by a device, in a ring
      lambda s: bench.call(
        lambda x: lax.psum(x, AXIS), bench.floats(n * n * s)
      ),
    )
  return {
    "launch": 20 * empty,  # a guess, refined by whole steps
    "stream": stream,
    "gather": gathered,
    "cached_gather": cached_gather,
    "cached_add": cached_add,
    "sort": sort,
    "matmul_float32": matmul(jnp.float32),
    "matmul_bfloat16": matmul(jnp.bfloat16),
    "link": link,
    "link_latency": link_latency,
    "ring": ring,
    "ring_latency": ring_latency,
    "network": link,
    "network_latency": link_latency,
    "host_gather": host_gather,
    "host_latency": empty,
    "host_link": host_gather,
  }


def calibrated(mesh, name: str, repeats: int = 20) -> topology.Topology:
  """What is measured of a mesh, and what the machine says of itself."""
  n, first = mesh.devices.size, mesh.devices.flat[0]
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = (first.memory_stats() or {}).get("bytes_limit", ram / 2 / n)
  today = datetime.date.today().isoformat()
  measured = topology.Topology(
    name=name,
    node_devices=n,
    host_devices=n,
    torus=0,
    device_memory=limit,
    host_memory=ram,
    source=f"scripts/calibrate.py on {n} x {first.device_kind}, "
    f"{platform.machine()}, jax {jax.__version__}, {today}",
    **measure(Bench(mesh, repeats)),
  )
  return refined(mesh, measured)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True, help="JSON file to write")
  parser.add_argument("--devices", type=int, default=0, help="0 = all")
  parser.add_argument("--repeats", type=int, default=20)
  args = parser.parse_args()
  topology.keep_freed_memory()
  simulate_devices(args.devices)
  mesh = make_mesh(args.devices)
  measured = calibrated(mesh, Path(args.out).stem, args.repeats)
  topology.save(measured, args.out)
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
