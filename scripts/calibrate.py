"""Measures this mesh and writes a topology file for the planner.

  python scripts/calibrate.py --out my_cluster.json [--devices 8]
  python main.py --mode=plan --config ... --config.plan.topology=my_cluster.json

Every operation runs on all devices at once, as in a step, at several sizes;
latency and rate are the line through the median times. Simulated CPU devices
share their cores and memory, and so does what is measured. The mesh counts as
one node: the network's figures are the links' own.
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
from synthetic_step import Run, Setting, draw, problem_of

from recjax import planner, topology
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


def step_beyond(mesh, t: topology.Topology, cold_rows: int) -> float:
  """Seconds of a step of a sample a device, beyond those predicted.

  What a step costs whatever its size: its hundreds of operations. Rows are
  hot, warm and, where there are any, cold.
  """
  n = mesh.devices.size
  setting = Setting((1_000,) * 8, 1.05, 16, n, 1.0)
  problem = problem_of(setting, t, n)
  warm = problem.spectrum.rows - 100 - cold_rows
  stored = problem.work.stored
  plan = planner.solve(
    problem,
    hosts=1,
    device_bytes=problem.spectrum.rows * stored,
    host_bytes=2 * problem.spectrum.rows * stored,
    hot_rows=100,
    warm_rows=warm,
    syncs=("dense",),
  )
  run, batches = Run(setting, plan, mesh), draw(setting, mesh, 1)
  run.start()
  for _ in range(10):
    run.steps(batches, 4)
  run.stop()
  return max(float(np.median(run.seconds)) - plan.step_seconds, 1e-7)


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
    "launch": 0.0,
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
    "host_latency": 0.0,
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
  # What is left of a step is its launch, and then what cold rows add to it.
  measured = dataclasses.replace(measured, launch=0.0, host_latency=0.0)
  launch = step_beyond(mesh, measured, 0)
  measured = dataclasses.replace(measured, launch=launch)
  host_latency = step_beyond(mesh, measured, 1_000) / 2  # forward, backward
  print(f"{'launch':16} {1e6 * launch:.3g} us")
  print(f"{'host latency':16} {1e6 * host_latency:.3g} us")
  return dataclasses.replace(measured, host_latency=host_latency)


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
