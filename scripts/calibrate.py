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
import datetime
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from refine import refined, timed_steps
from synthetic_step import times_of

from recjax import malloc
from recjax.embedding.exchange import coalesce
from recjax.embedding.tables import DEVICE, HOST, gather, on_host
from recjax.mesh import AXIS, make_mesh, simulate_devices
from recjax.planner import topology

DIM = 32  # of the rows: 128 bytes
ROWS = 1 << 18  # of a device's table, times times_of(mesh)
CACHED = 1 << 12  # of one that caches hold
SHARDED = PartitionSpec(AXIS)
TABLE = PartitionSpec(None, AXIS)  # [rows, n, DIM], as the tiers are


class Bench:
  """Times functions of shards on a mesh."""

  def __init__(self, mesh, repeats: int):
    self.mesh, self.repeats = mesh, repeats
    self.n, self.times = mesh.devices.size, times_of(mesh)
    self.rows = ROWS * self.times
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
      log = self.rng.random(16 * size) * np.log(self.rows)
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
    """Median of each, in rounds, so that noise hits all alike.

    One more call comes first, as another has left the caches.
    """
    out = np.zeros((self.repeats, len(calls)))
    for i, j in np.ndindex(out.shape):
      calls[j]()
      start = time.perf_counter()
      calls[j]()
      out[i, j] = time.perf_counter() - start
    return np.median(out, axis=0)


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


class Operation(NamedTuple):
  """One of a step's, to be timed at several sizes."""

  name: str
  unit: str
  amounts: list[float]  # units, a size each
  calls: list


def operations(bench: Bench) -> list[Operation]:
  n, found = bench.n, []

  def add(name, unit, sizes, amount, call):
    sizes = [bench.times * s for s in sizes]
    amounts = [float(amount(s)) for s in sizes]
    found.append(Operation(name, unit, amounts, [call(s) for s in sizes]))

  add(
    "stream",
    "B",
    [1 << k for k in (18, 20, 22)],
    lambda s: 8 * s,  # read and written
    lambda s: bench.call(lambda x: x + 1, bench.floats(n * s)),
  )
  table = bench.floats(bench.rows, n, DIM, spec=TABLE)
  counts = [1 << k for k in (10, 13, 15)]
  add(
    "gather",
    "B",
    counts,
    lambda s: 4 * DIM * s,
    lambda s: bench.call(
      lambda t, i: gather(t, pairs(i)), table, bench.asked(s)
    ),
  )
  few = bench.floats(CACHED * n, DIM)
  add(
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
  add(
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
  host_table = bench.floats(bench.rows, n, DIM, spec=TABLE, host=True)
  add(
    "host gather",
    "B",
    counts,
    lambda s: 4 * DIM * s * n,  # of the host, all devices together
    lambda s: bench.call(from_host, host_table, bench.asked(s)),
  )
  add(
    "sort",
    "keys",
    counts,
    float,
    lambda s: bench.call(lambda i: sum(coalesce(i)), bench.ids(s, 1 << 20)),
  )
  for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
    add(
      f"matmul {dtype}",
      "FLOP",
      [64, 256, 1_024],
      lambda s: 2 * s * 512 * 512,
      lambda s, dtype=dtype: bench.call(
        jnp.dot,
        bench.floats(n * s, 512, dtype=dtype),
        bench.floats(512, 512, spec=PartitionSpec(), dtype=dtype),
      ),
    )
  if n > 1:
    sizes = [1 << k for k in (6, 12, 15)]
    add(
      "all-to-all",
      "B",
      sizes,
      lambda s: 4 * s * (n - 1),  # sent by a device
      lambda s: bench.call(
        lambda x: lax.all_to_all(x, AXIS, 0, 0), bench.floats(n * n, s)
      ),
    )
    add(
      "all-reduce",
      "B",
      sizes,
      lambda s: 8 * s * (n - 1),  # sent by a device, in a ring
      lambda s: bench.call(
        lambda x: lax.psum(x, AXIS), bench.floats(n * n * s)
      ),
    )
  return found


def measure(bench: Bench) -> dict[str, float]:
  """The rates and latencies of a Topology, by field."""
  found = operations(bench)
  nothing = bench.call(lambda x: x + 1, bench.floats(8 * bench.n))
  calls = [nothing, *(call for x in found for call in x.calls)]
  empty, *times = bench.seconds(calls)
  print(f"{'call':16} {1e6 * empty:.3g} us")
  lines, at = {}, 0
  for name, unit, amounts, calls in found:
    took = np.maximum(np.array(times[at : at + len(calls)]) - empty, 1e-7)
    at += len(calls)
    latency, rate = lines[name] = line(amounts, took)
    shown = ", ".join(
      f"{amount:.2g}: {1e3 * t:.3g} ms"
      for amount, t in zip(amounts, took, strict=True)
    )
    print(f"{name:16} {rate:.3g} {unit}/s + {1e6 * latency:.3g} us ({shown})")
  alone = 1e-7, lines["stream"][1]  # one device has no links
  link_latency, link = lines.get("all-to-all", alone)
  ring_latency, ring = lines.get("all-reduce", alone)
  return {
    "launch": 10 * empty,  # a guess, refined by whole steps
    "tier_latency": 2 * empty,  # the same
    "stream": lines["stream"][1],
    "gather": lines["gather"][1],
    "cached_gather": lines["cached gather"][1],
    "cached_add": lines["cached add"][1],
    "sort": lines["sort"][1],
    "matmul_float32": lines["matmul float32"][1],
    "matmul_bfloat16": lines["matmul bfloat16"][1],
    "link": link,
    "link_latency": link_latency,
    "ring": ring,
    "ring_latency": ring_latency,
    "network": link,
    "network_latency": link_latency,
    "host_gather": lines["host gather"][1],
    "host_latency": empty,
    "host_link": lines["host gather"][1],
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
  return refined(measured, timed_steps(mesh, measured))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True, help="JSON file to write")
  parser.add_argument("--devices", type=int, default=0, help="0 = all")
  parser.add_argument("--repeats", type=int, default=20)
  args = parser.parse_args()
  malloc.keep_freed_memory()
  simulate_devices(args.devices)
  mesh = make_mesh(args.devices)
  measured = calibrated(mesh, Path(args.out).stem, args.repeats)
  topology.save(measured, args.out)
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
