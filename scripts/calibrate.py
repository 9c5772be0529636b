"""Measures this mesh and writes a topology file for the planner.

  python scripts/calibrate.py --out my_cluster.json [--devices 8]
  python main.py --mode=plan --config ... --config.plan.topology=my_cluster.json

Every operation runs on all devices at once, as in a step, at several sizes;
latency and rate are the line through the median times. Simulated CPU devices
share their cores and memory, and so does what is measured. The mesh counts as
one node: the network's figures are the links' own.
"""

import argparse
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

from recjax import topology
from recjax.exchange import coalesce
from recjax.mesh import AXIS, make_mesh, simulate_devices
from recjax.tables import DEVICE, HOST, gather, on_host

DIM = 32  # of the rows: 128 bytes
ROWS = 1 << 18  # of a device's table
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

  def ids(self, size: int):  # [n size] int32
    x = self.rng.integers(0, ROWS, self.n * size, np.int32)
    return jax.device_put(x, NamedSharding(self.mesh, SHARDED))

  def seconds(self, f, *args) -> float:
    """Median of f, which maps every device's shards to a shard."""
    run = jax.shard_map(
      f,
      mesh=self.mesh,
      in_specs=tuple(x.sharding.spec for x in args),
      out_specs=SHARDED,
      check_vma=False,
    )
    run = jax.jit(run).lower(*args).compile()
    out = []
    for i in range(self.repeats + 3):
      start = time.perf_counter()
      jax.block_until_ready(run(*args))
      if i >= 3:
        out.append(time.perf_counter() - start)
    return float(np.median(out))


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


def from_host(table, slots):
  return on_host(gather, DEVICE)(table, jax.device_put(pairs(slots), HOST))


def measure(bench: Bench) -> dict[str, float]:
  """The rates and latencies of a Topology, by field."""
  n = bench.n

  def fit(name, unit, sizes, amount, seconds):
    times = [max(seconds(s), 1e-7) for s in sizes]
    latency, rate = line([amount(s) for s in sizes], times)
    shown = ", ".join(
      f"{amount(s):.2g}: {1e3 * t:.3g} ms"
      for s, t in zip(sizes, times, strict=True)
    )
    print(f"{name:16} {rate:.3g} {unit}/s + {1e6 * latency:.3g} us ({shown})")
    return latency, rate

  launch = bench.seconds(lambda x: x + 1, bench.floats(8 * n))
  print(f"{'launch':16} {1e6 * launch:.3g} us")
  beyond = lambda f, *args: bench.seconds(f, *args) - launch
  _, stream = fit(
    "stream",
    "B",
    [1 << k for k in (18, 20, 22)],
    lambda s: 8 * s,  # read and written
    lambda s: beyond(lambda x: x + 1, bench.floats(n * s)),
  )
  table = bench.floats(ROWS, n, DIM, spec=TABLE)
  counts = [1 << k for k in (10, 13, 15)]
  _, gathered = fit(
    "gather",
    "B",
    counts,
    lambda s: 4 * DIM * s,
    lambda s: beyond(lambda t, i: gather(t, pairs(i)), table, bench.ids(s)),
  )
  host_table = bench.floats(ROWS, n, DIM, spec=TABLE, host=True)
  host_latency, host_gather = fit(
    "host gather",
    "B",
    counts,
    lambda s: 4 * DIM * s * n,  # of the host, all devices together
    lambda s: beyond(from_host, host_table, bench.ids(s)),
  )
  _, sort = fit(
    "sort",
    "keys",
    [1 << k for k in (10, 14, 17)],
    float,
    lambda s: beyond(lambda i: coalesce(i)[0], bench.ids(s)),
  )

  def matmul(dtype):
    return fit(
      f"matmul {np.dtype(dtype).name}",
      "FLOP",
      [256, 512, 1_024],
      lambda s: 2 * s * 512 * 512,
      lambda s: beyond(
        jnp.dot,
        bench.floats(n * s, 512, dtype=dtype),
        bench.floats(512, 512, spec=PartitionSpec(), dtype=dtype),
      ),
    )[1]

  link_latency, link = 1e-7, stream
  if n > 1:
    link_latency, link = fit(
      "all-to-all",
      "B",
      [1 << k for k in (6, 12, 16)],
      lambda s: 4 * s * (n - 1),  # sent by a device
      lambda s: beyond(
        lambda x: lax.all_to_all(x, AXIS, 0, 0), bench.floats(n * n, s)
      ),
    )
    fit(
      "all-reduce",
      "B",
      [1 << k for k in (10, 14, 18)],
      lambda s: 8 * s * (n - 1) / n,  # sent by a device, in a ring
      lambda s: beyond(lambda x: lax.psum(x, AXIS), bench.floats(n * s)),
    )
  return {
    "launch": launch,
    "stream": stream,
    "gather": gathered,
    "sort": sort,
    "matmul_float32": matmul(jnp.float32),
    "matmul_bfloat16": matmul(jnp.bfloat16),
    "link": link,
    "link_latency": link_latency,
    "network": link,
    "network_latency": link_latency,
    "host_gather": host_gather,
    "host_latency": host_latency,
    "host_link": host_gather,
  }


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
  n, first = mesh.devices.size, mesh.devices.flat[0]
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = (first.memory_stats() or {}).get("bytes_limit", ram / 2 / n)
  today = datetime.date.today().isoformat()
  measured = topology.Topology(
    name=Path(args.out).stem,
    node_devices=n,
    host_devices=n,
    torus=0,
    device_memory=limit,
    host_memory=ram,
    source=f"scripts/calibrate.py on {n} x {first.device_kind}, "
    f"{platform.machine()}, jax {jax.__version__}, {today}",
    **measure(Bench(mesh, args.repeats)),
  )
  topology.save(measured, args.out)
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
