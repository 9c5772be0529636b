"""How good plans are, and how soon: against bounds and other placements.

  python scripts/bench_plan.py [--rivals_python PYTHON_WITH_TORCHREC]

1. The Criteo Kaggle and Terabyte tables, three exponents, 1 to 1,024 devices:
   the planned cost over its lower bound (no placement costs less), seconds.
2. A counted profile of 33.8 M rows: seconds to a plan.
3. MLPerf's multi-hot tables, feature by feature, against all pooled at one
   owner (table-wise) and all coalesced.
4. The plan beside other placements and, where it is installed, TorchRec's.
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

from recjax import baselines, bounds, cost, cuts, planner, presets, spectrum
from recjax.frequency import Profile
from recjax.plan import describe
from recjax.spectrum import Table

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
MLPERF = (
  40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956,
  405282, 10, 2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000,
  590152, 12973, 108, 36,
)  # fmt: skip
MULTI_HOT = (
  3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3,
  1, 1,
)  # fmt: skip
EXPONENTS = (1.05, 1.15, 1.45)


def tables_of(rows) -> tuple[Table, ...]:
  return tuple(Table(f"C{i + 1}", r) for i, r in enumerate(rows))


def problem_of(rows, exponent, devices, batch_size, dim, **changes):
  return planner.make_problem(
    spectrum.power_law(tables_of(rows), exponent),
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
          found = cuts.best_cuts(problem, fit, host, syncs=("dense",))
          seconds = time.perf_counter() - start
          got = float(problem.cost_of_cuts(*found))
          bound = min(
            bounds.lower_bound(problem, fit, host, way)
            for way in cuts.transports(problem.work)
          )
          padded = dataclasses.replace(problem, overflow_probability=1e-2)
          start = time.perf_counter()
          cuts.best_cuts(padded, fit, host)
          print(
            f"{name:9} {exponent:5} {n:5} {objective:9} {found[0]:>10,} "
            f"{found[1] - found[0]:>12,} {total - found[1]:>12,} "
            f"{got / bound - 1:>11.5%} {time.perf_counter() - start:>9.2f} "
            f"{seconds:>5.2f}"
          )


def counted() -> None:
  rng = np.random.default_rng(0)
  s = spectrum.power_law(tables_of(KAGGLE), 1.15)
  counts = rng.poisson(np.repeat(s.uses, s.count) * 45e6)
  counts = np.sort(counts)[::-1].copy()
  profile = Profile(45_000_000, ("t",), counts, np.zeros(len(counts), np.int16))
  start = time.perf_counter()
  plan = planner.plan(
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


def multi_hot() -> None:
  """Which tables are pooled, and bytes a sample of each feature and of all.

  Of features: expected bytes, buffers not padded. Ours of a pooled feature:
  its ids, vectors and gradients, and the rows that its owner cannot hold.
  """
  n, b = 8, 8_192
  rows = tuple(
    Table(f"C{i + 1}", *x)
    for i, x in enumerate(zip(MLPERF, MULTI_HOT, strict=True))
  )
  print(f"{'dim':>4} {'s':>5} {'ours':>8} {'coalesced':>10} {'table-wise':>11} "
        f"{'better of both, a feature':>26} {'worst feature':>14} "
        f"{'padded':>8} {'pooled':>7} {'s':>5}")  # fmt: skip
  for dim in (16, 128):
    for exponent in EXPONENTS:
      start = time.perf_counter()
      s = spectrum.power_law(rows, exponent)
      plans = []
      for chance in (None, 1e-6):
        problem = planner.make_problem(
          s, devices=n, batch_size=n * b, lookups=sum(MULTI_HOT), dim=dim,
          dtype="float32", slot_bytes=4, objective="bytes",
          overflow_probability=chance,
        )  # fmt: skip
        plans.append(
          planner.solve(
            problem, hosts=1, device_bytes=1 << 37, host_bytes=1 << 40
          )
        )
      seconds = (time.perf_counter() - start) / 2
      plan, padded = plans
      w, owner, pi = 4 * dim, dict(plan.pooled), problem.pi
      # Here every row is warm, and every pooled row with its owner.
      assert plan.hot == plan.cold == 0
      assert plan.warm_slots >= max(MLPERF) or not owner
      coalesced = [
        sum(cost.coalesced_bytes(float(x @ pi), w, n)) for x in s.of_table
      ]
      table = [sum(cost.pooled_bytes(1.0, b, h, w, n)) for h in MULTI_HOT]
      ours = [
        t if f"C{i + 1}" in owner else c
        for i, (c, t) in enumerate(zip(coalesced, table, strict=True))
      ]
      best = list(map(min, coalesced, table))
      sent = sum(v for k, v in plan.sent if k != "host")
      assert abs(sum(ours) / sent - 1) < 1e-3  # nothing is left out
      worst = max(x / y for x, y in zip(ours, best, strict=True))
      real = sum(v for k, v in padded.sent if k != "host")
      print(
        f"{dim:4} {exponent:5} {sum(ours) / b:>8,.0f} "
        f"{sum(coalesced) / b:>10,.0f} {sum(table) / b:>11,.0f} "
        f"{sum(best) / b:>26,.0f} {worst:>14.4f} {real / b:>8,.0f} "
        f"{len(owner):>7} {seconds:>5.2f}"
      )


def placements(rivals_python: str | None) -> None:
  for n in (8, 16, 64):
    problem = problem_of(
      TERABYTE, 1.15, n, 65_536, 128, topology=presets.get("dgx_h200", n)
    )
    hosts = problem.topology.hosts(n)
    device, host = int(115e9), int(1.8e12)
    plan = planner.solve(
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
  for part in (optimality, counted, multi_hot):
    print(f"# {part.__name__}", flush=True)
    part()
  print("# placements", flush=True)
  placements(args.rivals_python)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"peak memory {peak:.2f} GB")


if __name__ == "__main__":
  main()
