"""Rates of a topology, refined by whole train steps; see calibrate.py."""

import dataclasses
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from synthetic_step import LARGE, Run, Setting, draw, problem_of, times_of

from recjax.planner import solve as solve_lib
from recjax.planner import step_cost, topology

# Whole steps that the rates are refined by: none that bench_choice.py runs.
_TABLES = (400_000, 90_000, 40_000, 9_000, 2_000, 500, 100, 20)
STEPS = (
  Setting((1_000,) * 8, 1.05, 16, 512, 1.0),  # mostly latencies
  Setting(_TABLES, 1.1, 16, 8_192, 1.0),
  Setting(_TABLES, 1.1, 64, 2_048, 1.0, "adagrad"),
  Setting(_TABLES, 1.25, 32, 4_096, 1.0, "sgd", layers=LARGE),
  Setting(_TABLES, 1.1, 32, 1_024, 1.0, hotness=(1, 1, 30, 2, 10, 1, 4, 1)),
)
# Hot rows, whether the others are warm, how hot gradients meet.
CUTS = (
  (0, True, "dense"),
  (0, False, "dense"),
  (400, True, "dense"),
  (400, False, "dense"),
  (6_000, True, "sparse"),
  (40_000, True, "dense"),
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
_TRUST = 0.02  # of a rate's own measurement against the steps'; see refined


def scaled(t: topology.Topology, field: str, factor: float):
  """t, where what the field stands for takes `factor` times as long."""
  value = getattr(t, field)
  slower = value * factor if field in LATENCIES else value / factor
  return dataclasses.replace(t, **{field: slower})


class Timed(NamedTuple):
  """A train step: what it asks for, and how long it took."""

  work: step_cost.Work
  load: step_cost.Load
  seconds: float


def timed_steps(mesh, t: topology.Topology) -> list[Timed]:
  """STEPS under all CUTS, medians of rounds over the plans of a setting."""
  n, times, found = mesh.devices.size, times_of(mesh), []
  for setting in STEPS:
    setting = setting.times(times)
    problem = problem_of(setting, t, n)
    rows, stored = problem.spectrum.rows, problem.work.stored
    runs, loads = [], []
    for hot, warm, sync in CUTS:
      plan = solve_lib.solve(
        problem,
        hosts=1,
        device_bytes=2 * rows * stored,
        host_bytes=2 * rows * stored,
        hot_rows=times * hot,
        warm_rows=rows if warm else 0,
        syncs=(sync,),
        pooled=(),
      )
      runs.append(Run(setting, plan, mesh))
      loads.append(problem.load_of_cuts(plan.hot, plan.warm_end, sync))
    drawn = draw(setting, mesh, 4)
    for run in runs:
      run.start(drawn)
    for _ in range(8):
      for run in runs:
        run.steps(3)
    for run, load in zip(runs, loads, strict=True):
      run.stop()
      found.append(Timed(problem.work, load, float(np.median(run.seconds))))
  return found


def refined(t: topology.Topology, steps: list[Timed]) -> topology.Topology:
  """Rates that whole train steps show, near those of single operations.

  The model of a step (planner/step_cost.py) is a sum of terms, each as long as
  one rate says. The factors f of the rates minimise the squares of the relative
  errors of measured steps, plus `_TRUST` (f - 1)^2 each: a step's operations
  run in another neighbourhood than alone.
  """

  def took(t, step):
    return float(sum(step_cost.step_seconds(step.work, t, step.load).values()))

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
