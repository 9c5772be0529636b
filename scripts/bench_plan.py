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
from criteo_tables import names, terabyte_config

from recjax.data.criteo import KAGGLE_ROWS
from recjax.frequency import Profile
from recjax.planner import (
  baselines,
  cut_points,
  describe,
  frequency_buckets,
  lower_bound,
  presets,
)
from recjax.planner import solve as solve_lib
from recjax.planner import transport as transport_lib
from recjax.planner.frequency_buckets import BucketedProfile, Table
from recjax.planner.problem import Problem, make_problem
from recjax.planner.table_shards import Shard
from recjax.schema import TableGroup

EXPONENTS = (1.05, 1.15, 1.45)


def power_law(rows: tuple[int, ...], exponent: float) -> BucketedProfile:
  """Returns tables of these rows, each a power law."""
  tables = map(Table, names(len(rows)), rows)
  return frequency_buckets.power_law(tuple(tables), exponent)


def problem_of(
  profile: Profile | BucketedProfile,
  devices: int,
  batch_size: int,
  dim: int,
  **changes,
) -> Problem:
  """Returns the problem of one group of one-hot tables with Adagrad."""
  options = {
    "lookups": len(profile.tables),
    "dtype": "float32",
    "slot_bytes": 4 * dim,
  }
  return make_problem(
    profile,
    devices=devices,
    batch_size=batch_size,
    dim=dim,
    **(options | changes),
  )


def groups_of(
  problem: Problem, optimizer: str = "adagrad"
) -> tuple[TableGroup, ...]:
  """Returns the one group that a problem's tables are."""
  tables = tuple(t.name for t in problem.profile.tables)
  dim = problem.shape.dim
  return (TableGroup("all", tables, dim, "float32", optimizer, 0.1),)


def optimality() -> None:
  """Prints the cost over its bound, with device memory for a third of rows."""
  print(f"{'tables':9} {'s':>5} {'n':>5} {'objective':9} {'hot':>10} "
        f"{'warm':>12} {'cold':>12} {'over bound':>11} {'padded s':>9} "
        f"{'s':>5}")  # fmt: skip
  terabyte = terabyte_config().data.rows
  for name, rows in (("kaggle", KAGGLE_ROWS), ("terabyte", terabyte)):
    for exponent in EXPONENTS:
      for n in (1, 8, 64, 1024):
        for objective in ("time", "bytes"):
          start = time.perf_counter()
          problem = problem_of(
            power_law(rows, exponent), n, 65_536, 128, objective=objective,
            topology=presets.get("dgx_h200", n), overflow_probability=None,
          )  # fmt: skip
          total = problem.profile.rows
          fit, host = total // 3 // n, 2 * total
          cuts = cut_points.best_cuts(
            problem, fit, host, hot_syncs=("all_reduce",)
          )
          seconds = time.perf_counter() - start
          assert cuts is not None
          got = float(problem.cost(cuts))
          bound = min(
            lower_bound.lower_bound(problem, fit, host, transport)
            for transport in transport_lib.available(problem.shape)
          )
          padded = dataclasses.replace(problem, overflow_probability=1e-2)
          start = time.perf_counter()
          cut_points.best_cuts(padded, fit, host)
          print(
            f"{name:9} {exponent:5} {n:5} {objective:9} {cuts.hot:>10,} "
            f"{cuts.warm:>12,} {total - cuts.warm_end:>12,} "
            f"{got / bound - 1:>11.5%} {time.perf_counter() - start:>9.2f} "
            f"{seconds:>5.2f}"
          )


def counted() -> None:
  """Prints how long it takes to plan counts of 33.8 M rows, and the plan."""
  rng = np.random.default_rng(0)
  s = power_law(KAGGLE_ROWS, 1.15)
  counts = rng.poisson(np.repeat(s.uses, s.count) * 45e6)
  counts = np.sort(counts)[::-1].copy()
  profile = Profile(45_000_000, ("t",), counts, np.zeros(len(counts), np.int16))
  start = time.perf_counter()
  problem = problem_of(profile, 8, 65_536, 128, lookups=26)
  plan = solve_lib.solve(
    [problem],
    groups_of(problem),
    hosts=1,
    device_bytes=1 << 30,
    host_bytes=1 << 40,
  )
  seconds = time.perf_counter() - start
  print(f"{len(counts):,} counted rows: {seconds:.2f} s")
  print(describe.describe(plan))


def torchrec(problem: Problem, python: str) -> baselines.Baseline:
  """Costs TorchRec's plan by our model, as shards pooled at owners."""
  shape, t = problem.shape, problem.topology
  tables = problem.profile.tables
  asked = {
    "tables": [dataclasses.asdict(x) for x in tables],
    "dim": shape.dim,
    "devices": shape.devices,
    "node_devices": t.node_devices,
    "local_batch": shape.local,
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
  replicated = {(0, x["table"]) for x in found if x["kind"] == "data_parallel"}
  shards = [
    Shard(
      x["table"],
      x["device"],
      x["rows"],
      max(1, round(tables[x["table"]].rows / x["rows"])),
      x["columns"] / shape.dim,
      "uvm" in x["kernel"],
    )
    for x in found
    if x["kind"] != "data_parallel"
  ]
  placed = baselines.of_shards(
    "TorchRec's planner", [problem], shards, sorted(replicated)
  )
  return dataclasses.replace(placed, note=", ".join(kinds))


def placements(rivals_python: str | None) -> None:
  """Prints the plan beside the usual placements on 8, 16 and 64 devices."""
  profile = power_law(terabyte_config().data.rows, 1.15)
  for n in (8, 16, 64):
    problem = problem_of(
      profile, n, 65_536, 128, topology=presets.get("dgx_h200", n)
    )
    hosts = problem.topology.hosts(n)
    device, host = int(115e9), int(1.8e12)
    plan = solve_lib.solve(
      [problem],
      groups_of(problem),
      hosts=hosts,
      device_bytes=device,
      host_bytes=host,
    )
    print(f"Terabyte, exponent 1.15, {n} H200 (no dense part):")
    placed = baselines.compare([problem], plan, device, hosts * host)
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
