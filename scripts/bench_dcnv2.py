"""Samples/s of MLPerf's DLRM-DCNv2 on one accelerator, tables capped.

  python scripts/bench_dcnv2.py [--cap 2000000] [--json out.json]
  python scripts/bench_dcnv2.py --cap 500 --batch 32 --runs one/warm  # a check

The model of configs/criteo_terabyte.py (dim 128, three cross layers of rank
512, bfloat16 dense part, Adagrad), batch 65,536, ids from a power law. A run is
named by lookups and plan: "multi" has MLPerf's 214 lookups a sample, "one" one
in each of the 26 tables; all rows are "warm", or "half" of them hot (the
planner chooses how their gradients meet), or the cuts are the "planner's".
Steps compile side by side, then run one after the other.

Printed are milliseconds a step (of steps in a row, and of one alone), and by
named scope and kernel from a trace of three steps; see step_profile.py.
"""

import argparse
import concurrent.futures
import json
import pathlib
import time
from typing import Any

import jax
import step_profile
from criteo_tables import MULTI_HOT, terabyte_config
from jax.sharding import Mesh
from synthetic_step import (
  Drawn,
  Run,
  Setting,
  draw,
  plan_of,
  problems_of,
  rank_rows,
  tiers_of,
  topology_here,
)

from recjax import files
from recjax.mesh import make_mesh

CUTS = ("warm", "half", "planner")


def setting_of(args: argparse.Namespace, lookups: str) -> Setting:
  """Returns MLPerf's model and tables, with "multi" or "one" lookups."""
  config = terabyte_config()
  return Setting(
    tuple(min(r, args.cap) for r in config.data.rows),
    args.exponent,
    config.embedding.dim,
    args.batch,
    2.0,
    optimizer=args.optimizer or config.embedding.optimizer,
    model=config.model,
    hotness=MULTI_HOT if lookups == "multi" else (),
  )


def prepare(setting: Setting, cuts: str, drawn: Drawn, mesh: Mesh) -> Run:
  """Plans with cuts of CUTS, and lowers the step."""
  rows = sum(setting.tables)
  given = {}
  if cuts != "planner":
    hot = rows // 2 if cuts == "half" else 0
    given = {"hot_rows": hot, "warm_rows": rows - hot}
  problems = problems_of(setting, drawn.profile, topology_here(), 1)
  return Run(setting, plan_of(setting, problems, 2.0, **given), mesh)


def about(run: Run) -> dict[str, Any]:
  """Says what a run's plan is, for the JSON file."""
  (group,) = run.plan.groups
  predicted = run.plan.prediction
  return {
    "tiers": {t.name: (t.rows, t.capacity) for t in group.tiers},
    "hot_sync": group.hot_sync,
    "predicted_ms": 1e3 * predicted.step_seconds,
    "predicted": dict(predicted.seconds),
    "lookups": sum(f.hotness for f in run.setting.features),
  }


def compile_timed(run: Run) -> float:
  """Compiles a run's step; returns how many seconds it took."""
  start = time.perf_counter()
  run.compile()
  return time.perf_counter() - start


def measure(run: Run, drawn: Drawn, trace: bool) -> dict[str, Any]:
  """Times and traces a run's step."""
  run.start(drawn)
  state, found = step_profile.timed(run.step, run.state, run.batches)
  found |= step_profile.static(run.compiled)
  if trace:
    state, more = step_profile.traced(
      run.step, run.compiled.as_text(), state, run.batches
    )
    found |= more
  run.stop()
  return found


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--batch", type=int, default=65_536)
  add("--batches", type=int, default=3, help="different ones, cycled")
  add("--cap", type=int, default=2_000_000, help="rows of a table at most")
  add("--exponent", type=float, default=1.05)
  add("--optimizer", default="", help="of the rows; else the config's")
  add("--runs", nargs="+",
      choices=[f"{h}/{c}" for h in ("multi", "one") for c in CUTS],
      default=["multi/warm", "one/warm", "multi/half", "one/half"])  # fmt: skip
  add("--trace", action=argparse.BooleanOptionalAction, default=True)
  add("--text", help="folder for the compiled text")
  add("--json", help="file to write")
  return parser.parse_args()


def main() -> None:
  args = parse()
  mesh = make_mesh(1)
  device = jax.devices()[0].device_kind
  print(f"{device}, jax {jax.__version__}, {vars(args)}", flush=True)
  begin = time.perf_counter()
  drawn: dict[str, Drawn] = {}
  runs: dict[str, Run] = {}
  for name in args.runs:
    lookups, cuts = name.split("/")
    setting = setting_of(args, lookups)
    if lookups not in drawn:
      drawn[lookups] = draw(setting, rank_rows(setting), mesh, args.batches)
    runs[name] = prepare(setting, cuts, drawn[lookups], mesh)
  print(f"prepared in {time.perf_counter() - begin:.1f} s", flush=True)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    seconds = dict(zip(runs, pool.map(compile_timed, runs.values()),
                       strict=True))  # fmt: skip
  print(f"compiled by {time.perf_counter() - begin:.1f} s", flush=True)
  results = {}
  for name, run in runs.items():
    (group,) = run.plan.groups
    capacities = (f"{t.name} {t.capacity:,}" for t in group.tiers)
    print(
      f"{name}: {tiers_of(run.plan)} ({group.hot_sync}), capacities "
      f"{', '.join(capacities)}, predicted "
      f"{1e3 * run.plan.prediction.step_seconds:.3f} ms"
    )
    found = measure(run, drawn[name.split("/")[0]], args.trace)
    found |= about(run) | {"compile_s": seconds[name]}
    found["samples_per_second"] = 1e3 * args.batch / found["ms"]
    results[name] = found
    step_profile.report(name, found, args.batch)
    if args.text:
      path = pathlib.Path(args.text) / f"dcnv2_{name.replace('/', '_')}.txt"
      files.write(path, run.compiled.as_text())
    if args.json:
      what = {"device": device, "jax": jax.__version__, "args": vars(args)}
      files.write(args.json, json.dumps(what | {"runs": results}, indent=1))


if __name__ == "__main__":
  main()
