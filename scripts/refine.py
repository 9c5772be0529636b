"""Rates of a topology, refined by whole train steps; see calibrate.py."""

import concurrent.futures
import dataclasses
import os
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from synthetic_step import (
  LARGE,
  Run,
  Setting,
  draw,
  plan_of,
  problems_of,
  rank_rows,
  tiers_of,
  times_of,
)

from recjax.plan.plan import HOT, WARM
from recjax.planner import step_cost
from recjax.planner.problem import Cuts, Problem
from recjax.planner.topology import Topology
from recjax.planner.traffic import Part

# Whole steps that the rates are refined by: none that bench_choice.py runs.
_TABLES = (400_000, 90_000, 40_000, 9_000, 2_000, 500, 100, 20)
STEPS = (
  Setting((1_000,) * 8, 1.05, 16, 512, 1.0),  # mostly latencies
  Setting(_TABLES, 1.1, 16, 8_192, 1.0),
  Setting(_TABLES, 1.1, 64, 2_048, 1.0, "adagrad"),
  Setting(_TABLES, 1.25, 32, 4_096, 1.0, "sgd", model=LARGE),
  Setting(_TABLES, 1.1, 32, 1_024, 1.0, hotness=(1, 1, 30, 2, 10, 1, 4, 1)),
)
# Hot rows, whether the others are warm, how hot gradients meet.
CUTS = (
  (0, True, "all_reduce"),
  (0, False, "all_reduce"),
  (400, True, "all_reduce"),
  (400, False, "all_reduce"),
  (6_000, True, "all_gather"),
  (40_000, True, "all_reduce"),
)
# What steps are made of.
LATENCIES = (
  *("launch", "tier_latency"),
  *("link_latency", "ring_latency", "host_latency"),
)
RATES = (
  *("stream", "gather", "cached_gather", "cached_add", "sort"),
  *("matmul_float32", "link", "ring", "host_gather", "host_link"),
)
FITTED = LATENCIES + RATES
_COMPILE = max(1, min(6, (os.cpu_count() or 1) // 2))  # steps at once
_TRUST = 0.02  # of a rate's own measurement against the steps'; see refined


def scaled(t: Topology, field: str, factor: float) -> Topology:
  """Returns t where what the field stands for takes `factor` times as long."""
  value = getattr(t, field)
  slower = value * factor if field in LATENCIES else value / factor
  return dataclasses.replace(t, **{field: slower})


class Timed(NamedTuple):
  """A train step: what it asks for, and how long it took."""

  part: Part
  seconds: float


def timed_steps(mesh: Mesh, t: Topology, cold: bool = True) -> list[Timed]:
  """Times STEPS under all CUTS; without `cold` those that have no cold rows.

  Returns:
    Medians of rounds over the plans of a setting.
  """
  found = []
  for setting in STEPS:
    setting = setting.times(times_of(mesh))
    ranks = rank_rows(setting)
    problems = problems_of(setting, ranks.profile, t, mesh.devices.size)
    runs, parts = _runs(setting, problems, mesh, cold)
    drawn = draw(setting, ranks, mesh, 4)
    for run in runs:
      run.start(drawn)
    for _ in range(8):
      for run in runs:
        run.steps(3)
    for run, part in zip(runs, parts, strict=True):
      run.stop()
      found.append(Timed(part, float(np.median(run.seconds))))
      (group,) = run.plan.groups
      print(
        f"{setting}: {tiers_of(run.plan)} ({group.hot_sync}): "
        f"{1e3 * found[-1].seconds:.3f} ms",
        flush=True,
      )
  return found


def _runs(
  setting: Setting, problems: list[Problem], mesh: Mesh, cold: bool
) -> tuple[list[Run], list[Part]]:
  """Compiles a setting's steps; returns them and what they ask for."""
  (problem,) = problems
  runs, parts = [], []
  for hot, warm, hot_sync in CUTS:
    if not (warm or cold):
      continue
    plan = plan_of(
      setting,
      problems,
      2.0,
      hot_rows=times_of(mesh) * hot,
      warm_rows=problem.profile.rows if warm else 0,
      hot_syncs=(hot_sync,),
      table_wise=(),
    )
    (group,) = plan.groups
    cuts = Cuts(
      group.rows_of(HOT), group.rows_of(HOT) + group.rows_of(WARM), hot_sync
    )
    runs.append(Run(setting, plan, mesh))
    parts.append(Part(problem.shape, problem.traffic(cuts)))
  with concurrent.futures.ThreadPoolExecutor(_COMPILE) as pool:
    return list(pool.map(Run.compile, runs)), parts


def refined(t: Topology, steps: list[Timed]) -> Topology:
  """Returns rates that whole train steps show, near those of operations.

  The model of a step (planner/step_cost.py) is a sum of terms, each as long as
  one rate says. The factors f of the rates minimise the squares of the relative
  errors of measured steps, plus `_TRUST` (f - 1)^2 each: a step's operations
  run in another neighbourhood than alone.
  """

  def took(t: Topology, step: Timed) -> float:
    return float(sum(step_cost.step_seconds([step.part], t).values()))

  slower = [scaled(t, f, 2.0) for f in FITTED]
  terms = [[took(x, step) - took(t, step) for x in slower] for step in steps]
  shares = np.array(terms) / np.array([[step.seconds] for step in steps])
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
