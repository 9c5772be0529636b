"""Measures this mesh and writes a topology file for the planner.

  python scripts/calibrate.py --out my_cluster.json [--devices 8] \
    [--store_dir FOLDER_ON_AN_SSD]
  python main.py --mode=plan --config ... --config.plan.topology=my_cluster.json

Every operation runs on all devices at once, as in a step, at several sizes;
latency and rate are the line through the median times. On accelerators a time
is what the device works on a call, from a trace: the host takes longer to start
one than most of them last. Whole train steps then refine the rates. Simulated
CPU devices share their cores and memory, and so does what is measured. The mesh
counts as one node: the network's figures are the links' own. Without
--store_dir an SSD's are assumed, and the file says so.
"""

import argparse
import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import calibrate_ssd
import jax
import numpy as np
from calibrate_operations import (
  HOST,
  HOST_GATHER,
  HOST_LINK,
  Bench,
  Operation,
  collectives,
  of_tables,
  of_the_dense_part,
  of_the_host,
)
from jax.sharding import Mesh
from refine import refined, timed_steps
from step_profile import busy_seconds

from recjax import malloc
from recjax.mesh import make_mesh, simulate_devices
from recjax.planner import topology
from recjax.planner.topology import Topology


def line(amounts, seconds) -> tuple[float, float]:
  """Returns (latency s, rate a second): seconds = latency + amount / rate.

  Least squares of relative errors, so that small sizes count for the latency.
  """
  amounts, seconds = np.array(amounts, float), np.array(seconds)
  a = np.stack([np.ones_like(amounts), amounts], axis=1) / seconds[:, None]
  (latency, slope), *_ = np.linalg.lstsq(a, np.ones_like(seconds), rcond=None)
  if latency < 0 or slope <= 0:  # noise: the largest size says it all
    return 1e-7, float(amounts[-1] / seconds[-1])
  return float(latency), float(1 / slope)


def times(bench: Bench, found: Sequence[Operation]) -> tuple[float, np.ndarray]:
  """Returns seconds of an empty call, and of all calls beyond that.

  On accelerators a call is timed by what the device works on it, but for the
  host's own gathers.
  """
  nothing = bench.call(lambda x: x + 1, bench.floats(8 * bench.n))
  if bench.cpu:
    calls = [nothing, *(call for x in found for call in x.calls)]
    empty, *took = bench.seconds(calls)
    return empty, np.maximum(np.array(took) - empty, 1e-7)
  took = []
  for x in found:
    if x.name in HOST:
      took += list(bench.seconds(x.calls))
    else:
      took += [busy_seconds(call, bench.repeats) for call in x.calls]
  (empty,) = bench.seconds([nothing])
  return empty, np.maximum(np.array(took), 1e-7)


def measure(bench: Bench) -> dict[str, float]:
  """Measures the rates and latencies of a Topology, by field."""
  found = [
    *of_the_dense_part(bench),
    *of_tables(bench),
    *of_the_host(bench),
    *collectives(bench),
  ]
  empty, took = times(bench, found)
  print(f"{'call':16} {1e6 * empty:.3g} us")
  lines, at = {}, 0
  for name, unit, amounts, calls in found:
    seconds = took[at : at + len(calls)]
    at += len(calls)
    latency, rate = lines[name] = line(amounts, seconds)
    shown = ", ".join(
      f"{amount:.2g}: {1e3 * t:.3g} ms"
      for amount, t in zip(amounts, seconds, strict=True)
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
    "host_gather": lines[HOST_GATHER][1],
    "host_latency": empty,
    "host_link": lines[HOST_LINK][1],
  }


def calibrated(
  mesh: Mesh,
  name: str,
  repeats: int = 20,
  *,
  steps: str = "all",
  out: str = "",
  store_dir: str = "",
) -> Topology:
  """Returns what is measured of a mesh, and what the machine says of itself.

  Args:
    mesh: of all devices.
    name: of the topology.
    repeats: of each call.
    steps: whole train steps that refine the rates: "all", "device" (those
      without cold rows) or "none".
    out: file that gets the rates before they are refined, which takes minutes.
    store_dir: folder on an SSD; "" = none is measured.
  """
  n, first = mesh.devices.size, mesh.devices.flat[0]
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = (first.memory_stats() or {}).get("bytes_limit", ram / 2 / n)
  today = datetime.date.today().isoformat()
  ssd = calibrate_ssd.measure(store_dir) if store_dir else {}
  measured = Topology(
    name=name,
    node_devices=n,
    host_devices=n,
    torus=0,
    device_memory=limit,
    host_memory=ram,
    source=f"scripts/calibrate.py on {n} x {first.device_kind}, "
    f"{platform.machine()}, jax {jax.__version__}, {today}"
    + ("" if ssd else "; ssd_read, ssd_latency assumed"),
    **measure(Bench(mesh, repeats)),
    **ssd,
  )
  if out:
    topology.save(measured, out)
  if steps == "none":
    return measured
  return refined(measured, timed_steps(mesh, measured, cold=steps == "all"))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True, help="JSON file to write")
  parser.add_argument("--devices", type=int, default=0, help="0 = all")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument(
    "--steps",
    choices=["all", "device", "none"],
    default="all",
    help="whole train steps that refine the rates; device: no cold rows",
  )
  parser.add_argument("--store_dir", default="", help="folder on an SSD")
  args = parser.parse_args()
  malloc.keep_freed_memory()
  simulate_devices(args.devices)
  mesh = make_mesh(args.devices)
  measured = calibrated(
    mesh,
    Path(args.out).stem,
    args.repeats,
    steps=args.steps,
    out=args.out,
    store_dir=args.store_dir,
  )
  topology.save(measured, args.out)
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
