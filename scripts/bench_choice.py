"""Is the plan the fastest, and is its predicted time right? A measured sweep.

  python scripts/bench_choice.py [--topology my_cluster.json] [--only 0 3]

Without a topology file this mesh is calibrated first (scripts/calibrate.py).
Then, for each setting (tables, batch, budget, optimizer, model), the planner's
choice and a sweep of other plans within the same budgets train on the same
batches, drawn from the power laws that were planned for. The sweep varies the
cut points and how hot gradients meet; where samples have many lookups, which
tables their owners pool; and on two or four nodes, simulated ones whose network
is as fast as their links, how rows travel. Every plan is timed in rounds, one
plan after the other, so that noise hits all alike; its time is the median.
Printed are measured and predicted milliseconds of every plan, and how the
choice compares with the best of them: with the least median of all, which of
ten noisy plans is more often lucky than best, and, without that bias, with the
plan that was best in the odd rounds, both timed in the even ones.
"""

import argparse
import time
from typing import Any

import calibrate
import jax
import numpy as np
from synthetic_step import (
  LARGE,
  Ranks,
  Run,
  Setting,
  draw,
  plan_of,
  problems_of,
  rank_rows,
  tiers_of,
  times_of,
)

from recjax import malloc
from recjax.frequency import Profile
from recjax.mesh import make_mesh, simulate_devices
from recjax.plan import layout
from recjax.plan.plan import HOT, WARM, Plan
from recjax.planner import presets
from recjax.planner import transport as transport_lib
from recjax.planner.problem import HOT_SYNCS, Problem
from recjax.planner.topology import Topology
from recjax.planner.transport import FLAT

KAGGLE = (
  *(1_460, 583, 250_000, 60_000, 305, 24, 12_517, 633, 3, 30_000, 5_683),
  *(220_000, 3_194, 27, 14_992, 140_000, 10, 5_652, 2_173, 4, 180_000, 18),
  *(15, 60_000, 105, 30_000),
)  # Criteo Kaggle's, the large ones a thirtieth
FEW = (1_000_000, 200_000, 50_000, 5_000, 500, 50)
BAGS = (1, 1, 20, 1, 50, 5)  # lookups of a sample in FEW
_TIMED = 3  # steps of a plan in a round
_ROUNDS = 10  # at least

SETTINGS = (
  Setting(KAGGLE, 1.15, 16, 8_192, 0.05),
  Setting(KAGGLE, 1.05, 16, 2_048, 0.05, "sgd", model=LARGE),
  Setting(KAGGLE, 1.05, 16, 16_384, 0.20, "adagrad"),
  Setting(KAGGLE, 1.45, 16, 8_192, 1.00),
  Setting(KAGGLE, 1.15, 64, 4_096, 0.05, "adagrad"),
  Setting(KAGGLE, 1.05, 64, 1_024, 0.20, model=LARGE),
  Setting(KAGGLE, 1.15, 64, 8_192, 0.02, wire="bfloat16"),
  Setting(KAGGLE, 1.45, 16, 8_192, 0.02, "sgd", model=LARGE),
  Setting(FEW, 1.15, 64, 4_096, 0.20, "sgd"),
  Setting(FEW, 1.45, 64, 16_384, 0.01, "adagrad"),
  Setting(FEW, 1.05, 16, 1_024, 1.00, "adagrad"),
  Setting(FEW, 1.15, 16, 4_096, 0.02, "adam", "bfloat16"),
  Setting(FEW, 1.05, 16, 2_048, 1.00, hotness=BAGS),
  Setting(FEW, 1.15, 64, 1_024, 0.20, "sgd", hotness=BAGS),
  Setting(KAGGLE, 1.15, 16, 8_192, 0.20, node_devices=4),
  Setting(FEW, 1.05, 64, 4_096, 0.05, "sgd", node_devices=2),
)


# ---- What is run


def options(setting: Setting, problem: Problem) -> list[dict[str, Any]]:
  """What a plan may choose beside the cuts: arguments of `plan_of`."""
  if setting.node_devices:
    found = transport_lib.available(problem.shape)
    return [{"transports": (transport,)} for transport in found]
  if setting.hotness:
    longest = sorted(setting.features, key=lambda f: -f.hotness)
    names = [f.name for f in longest]
    return [{"table_wise": tuple(names[:count])} for count in (0, 1, 3)]
  return [{"hot_syncs": (hot_sync,)} for hot_sync in HOT_SYNCS]


def sweep(
  setting: Setting, profile: Profile, t: Topology, devices: int
) -> list[Plan]:
  """Returns the planner's choice, then others that fit, none twice."""
  problems = problems_of(setting, profile, t, devices)
  (problem,) = problems
  rows = problem.profile.rows
  fit = int(setting.share * rows)
  chosen = plan_of(setting, problems, setting.share)
  plans = {key(chosen): chosen}
  choices = options(setting, problem)
  for hot in (0, chosen.groups[0].rows_of(HOT), fit // 4, fit // 64):
    for choice in choices:
      transport = choice.get("transports", (FLAT,))[0]
      owners = transport.warm_owners(problem.shape)
      most = int(layout.most_sharded(rows, hot, fit, owners))
      for warm in (most, 0) if hot and choice is choices[0] else (most,):
        plan = plan_of(
          setting,
          problems,
          setting.share,
          hot_rows=hot,
          warm_rows=warm,
          **choice,
        )
        plans.setdefault(key(plan), plan)
  return list(plans.values())


def key(plan: Plan) -> tuple:
  """Returns what tells plans apart."""
  (group,) = plan.groups
  hot, warm = group.rows_of(HOT), group.rows_of(WARM)
  hot_sync = group.hot_sync if hot else ""
  transport = transport_lib.of_group(group)
  return hot, hot + warm, hot_sync, transport, group.table_wise


# ---- Settings, one after the other


def compile_all(
  setting: Setting, profile: Profile, t: Topology, devices: int
) -> list[Run]:
  """Compiles the step of every plan of the sweep."""
  mesh = make_mesh(devices, setting.node_devices)
  plans = sweep(setting, profile, t, devices)
  return [Run(setting, plan, mesh).compile() for plan in plans]


def time_all(
  setting: Setting, ranks: Ranks, runs: list[Run], seconds: float
) -> None:
  """Times the runs in rounds, for at least so long."""
  drawn = draw(setting, ranks, runs[0].mesh, 8)
  for run in runs:
    run.start(drawn)
  end = time.perf_counter() + seconds
  rounds = 0
  while rounds < _ROUNDS or time.perf_counter() < end:
    for run in runs:
      run.steps(_TIMED)
    rounds += 1
  for run in runs:
    run.stop()


def show(setting: Setting, run: Run, seconds: float, terms: bool) -> None:
  """Prints a plan's line, without the word for the chosen one."""
  (group,) = run.plan.groups
  predicted = run.plan.prediction
  more = f" {len(group.table_wise)} table-wise" if group.table_wise else ""
  if setting.node_devices:
    transport = transport_lib.of_group(group)
    more = f" {transport.exchange}, {transport.warm_copies}"
  hot_sync = f" ({group.hot_sync})" if group.rows_of(HOT) else ""
  print(
    f"{tiers_of(run.plan)}{hot_sync}{more}: {1e3 * seconds:7.2f} ms, predicted "
    f"{1e3 * predicted.step_seconds:7.2f} "
    f"({predicted.step_seconds / seconds:.2f} x)"
    + (f", {run.rounds} rounds" if run.rounds > 1 else "")
  )
  if terms:
    found = (f"{k} {1e3 * x:.2f}" for k, x in predicted.seconds)
    print(f"         {', '.join(found)}")


def compare(setting: Setting, ranks: Ranks, runs: list[Run], args):
  """Times a setting's plans and prints how the choice does.

  Returns:
    (predicted / measured of the choice, choice / best, the same unbiased).
  """
  time_all(setting, ranks, runs, args.seconds)
  times = [float(np.median(run.seconds)) for run in runs]
  ratios = [
    run.plan.prediction.step_seconds / x
    for run, x in zip(runs, times, strict=True)
  ]
  for i in np.argsort(times):
    print(f"  {'chosen' if i == 0 else '':6} ", end="")
    show(setting, runs[i], times[i], args.terms)
  loss = times[0] / min(times)
  halves = [np.array(run.seconds).reshape(-1, _TIMED) for run in runs]
  best = int(np.argmin([np.median(x[1::2]) for x in halves]))
  fair = float(np.median(halves[0][::2]) / np.median(halves[best][::2]))
  print(
    f"  predicted / measured {ratios[0]:.2f} ({min(ratios):.2f} to "
    f"{max(ratios):.2f} of all plans), chosen / best {loss:.3f}, best of the "
    f"odd rounds in the even ones {fair:.3f}",
    flush=True,
  )
  return ratios[0], loss, fair


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", help="a preset or file; else calibrated")
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--seconds", type=float, default=25, help="a setting")
  parser.add_argument("--only", type=int, nargs="+", help="numbers of settings")
  parser.add_argument("--terms", action="store_true", help="of predictions")
  args = parser.parse_args()
  malloc.keep_freed_memory()
  simulate_devices(args.devices)
  mesh = make_mesh(args.devices)
  begin = time.perf_counter()
  if args.topology:
    t = presets.get(args.topology, args.devices)
  else:
    t = calibrate.calibrated(mesh, "calibrated")
  print(f"jax {jax.__version__}, {t.name}: {t.source}", flush=True)
  found = []
  fit = [i for i, x in enumerate(SETTINGS) if x.node_devices < args.devices]
  for i in args.only or fit:
    setting = SETTINGS[i].times(times_of(mesh))
    ranks = rank_rows(setting)
    runs = compile_all(setting, ranks.profile, t, args.devices)
    print(f"[{time.perf_counter() - begin:.0f} s] {i}: {setting}")
    found.append(compare(setting, ranks, runs, args))
    del runs  # XLA:CPU maps memory for each program, and there is a limit
  ratios, *losses = map(np.array, zip(*found, strict=True))
  near = int(np.sum(abs(ratios - 1) <= 0.25))
  print(
    f"{len(ratios)} settings: predicted / measured of the choice "
    f"{min(ratios):.2f} to {max(ratios):.2f}, within 25% in {near}"
  )
  for name, loss in zip(("chosen / best", "the same unbiased"), losses,
                        strict=True):  # fmt: skip
    best = int(np.sum(loss <= 1.05))
    print(f"{name}: at most {max(loss):.3f}, within 5% in {best}")


if __name__ == "__main__":
  main()
