"""How good plans are, and how soon: against bounds and other placements.

  python scripts/bench_plan.py [--rivals_python PYTHON_WITH_TORCHREC]

1. The Criteo Kaggle and Terabyte tables, three exponents, 1 to 1,024 devices:
   the planned cost over its lower bound (no placement costs less), seconds.
2. A counted profile of 33.8 M rows: seconds to a plan.
3. The plan beside other placements and, where it is installed, TorchRec's.
Ends with the peak memory of it all.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import subprocess
import time

import numpy as np

from recjax.frequency import Profile
from recjax.plan.plan import describe
from recjax.planner import (
  baselines,
  cut_points,
  frequency_buckets,
  lower_bound,
  presets,
)
from recjax.planner import solve as solve_lib
from recjax.planner.frequency_buckets import Table

KAGGLE = (
  1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593,
  3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105,
  142572,
)  # fmt: skip
TERABYTE = (
  227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956,
  405282, 10, 2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510,
  590152, 12973, 108, 36,
)  # fmt: skip
# MLPerf's DLRM-DCNv2: the Terabyte log's tables of at most 40 M rows, and the
# lookups of a sample in each (mlcommons/training, dlrm_dcnv2).
EXPONENTS = (1.05, 1.15, 1.45)


def tables_of(rows) -> tuple[Table, ...]:
  return tuple(Table(f"C{i + 1}", r) for i, r in enumerate(rows))


def problem_of(rows, exponent, devices, batch_size, dim, **changes):
  return solve_lib.make_problem(
    frequency_buckets.power_law(tables_of(rows), exponent),
    devices=devices,
    batch_size=batch_size,
    lookups=len(rows),
    dim=dim,
    dtype="float32",
    slot_bytes=4 * dim,
    **changes,
  )


def optimality() -> None:
  """Budgets that make all tiers useful: device memory for a third."""
  print(f"{'tables':9} {'s':>5} {'n':>5} {'objective':9} {'hot':>10} "
        f"{'warm':>12} {'cold':>12} {'over bound':>11} {'padded s':>9} "
        f"{'s':>5}")  # fmt: skip
  for name, rows in (("kaggle", KAGGLE), ("terabyte", TERABYTE)):
    for exponent in EXPONENTS:
      for n in (1, 8, 64, 1024):
        for objective in ("time", "bytes"):
          start = time.perf_counter()
          problem = problem_of(
            rows, exponent, n, 65_536, 128, objective=objective,
            topology=presets.get("dgx_h200", n), overflow_probability=None,
          )  # fmt: skip
          total = problem.spectrum.rows
          fit, host = total // 3 // n, 2 * total
          found = cut_points.best_cuts(problem, fit, host, syncs=("dense",))
          seconds = time.perf_counter() - start
          got = float(problem.cost_of_cuts(*found))
          bound = min(
            lower_bound.lower_bound(problem, fit, host, way)
            for way in cut_points.transports(problem.work)
          )
          padded = dataclasses.replace(problem, overflow_probability=1e-2)
          start = time.perf_counter()
          cut_points.best_cuts(padded, fit, host)
          print(
            f"{name:9} {exponent:5} {n:5} {objective:9} {found[0]:>10,} "
            f"{found[1] - found[0]:>12,} {total - found[1]:>12,} "
            f"{got / bound - 1:>11.5%} {time.perf_counter() - start:>9.2f} "
            f"{seconds:>5.2f}"
          )


def counted() -> None:
  rng = np.random.default_rng(0)
  s = frequency_buckets.power_law(tables_of(KAGGLE), 1.15)
  counts = rng.poisson(np.repeat(s.uses, s.count) * 45e6)
  counts = np.sort(counts)[::-1].copy()
  profile = Profile(45_000_000, ("t",), counts, np.zeros(len(counts), np.int16))
  start = time.perf_counter()
  plan = solve_lib.plan(
    profile, devices=8, batch_size=65_536, lookups=26, dim=128, dtype="float32",
    slot_bytes=512, hosts=1, device_bytes=1 << 30, host_bytes=1 << 40,
  )  # fmt: skip
  seconds = time.perf_counter() - start
  print(f"{len(counts):,} counted rows: {seconds:.2f} s")
  print(describe(plan))


def torchrec(problem, python: str) -> baselines.Placed:
  """TorchRec's plan, costed by our model as table shards pooled at owners."""
  work, t = problem.work, problem.topology
  tables = problem.spectrum.tables
  asked = {
    "tables": [dataclasses.asdict(x) for x in tables],
    "dim": work.dim,
    "devices": work.devices,
    "node_devices": t.node_devices,
    "local_batch": work.local,
    "device_bytes": int(t.device_memory),  # it takes off its own reserve
    "host_bytes": int(t.host_memory / t.host_devices),
  }
  script = pathlib.Path(__file__).with_name("torchrec_plan.py")
  answer = subprocess.run(
    [python, str(script)],
    input=json.dumps(asked),
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  ).stdout
  found = [x for x in json.loads(answer) if x["rows"]]
  kinds = sorted({x["kind"] for x in found})
  replicas = sum(x["rows"] for x in found if x["kind"] == "data_parallel")
  shards = [
    baselines.Shard(
      x["table"],
      x["device"],
      x["rows"],
      max(1, round(tables[x["table"]].rows / x["rows"])),
      x["columns"] / work.dim,
      "uvm" in x["kernel"],
    )
    for x in found
    if x["kind"] != "data_parallel"
  ]
  placed = baselines.of_shards("TorchRec's planner", problem, shards, replicas)
  return dataclasses.replace(placed, note=", ".join(kinds))


def placements(rivals_python: str | None) -> None:
  for n in (8, 16, 64):
    problem = problem_of(
      TERABYTE, 1.15, n, 65_536, 128, topology=presets.get("dgx_h200", n)
    )
    hosts = problem.topology.hosts(n)
    device, host = int(115e9), int(1.8e12)
    plan = solve_lib.solve(
      problem, hosts=hosts, device_bytes=device, host_bytes=host
    )
    print(f"Terabyte, exponent 1.15, {n} H200 (no dense part):")
    placed = baselines.compare(problem, plan, device, hosts * host)
    if rivals_python:
      placed += (torchrec(problem, rivals_python),)
    print(baselines.describe(placed))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rivals_python", help="a Python that has torchrec")
  args = parser.parse_args()
  for part in (optimality, counted):
    print(f"# {part.__name__}", flush=True)
    part()
  print("# placements", flush=True)
  placements(args.rivals_python)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"peak memory {peak:.2f} GB")


if __name__ == "__main__":
  main()
