"""How much of the host's work on stored rows a step hides.

  python scripts/bench_overlap.py [--delays 0 20 40 60 80 100] [--svg FILE]

The host store is slowed by a known delay a step: half of it before a batch's
rows are fetched, half before the last ones are written back. While the host
waits, the device computes, so a step should take the longer of the two, not
their sum: the ratio to watch is that of a delay as long as the step itself.
Delays take turns in rounds, so that noise hits all alike; the time is that of
steps in a row, as in training.
"""

import argparse
import json
import time

import jax
import machine
import numpy as np
from synthetic_step import (
  LARGE,
  Run,
  Setting,
  draw,
  plan_of,
  problems_of,
  rank_rows,
  tiers_of,
  topology_here,
)

from recjax import files, malloc
from recjax.data.criteo import KAGGLE_ROWS
from recjax.mesh import make_mesh
from recjax.planner import svg

_WARM_UP, _STEPS = 3, 10


def seconds_of(run: Run, steps: int) -> float:
  """Returns the seconds of a step, of so many in a row."""
  for _ in range(_WARM_UP):
    run.state, _ = run.step(run.state, next(run.fed))
  jax.block_until_ready(run.state)
  start = time.perf_counter()
  for _ in range(steps):
    run.state, _ = run.step(run.state, next(run.fed))
  jax.block_until_ready(run.state)
  return (time.perf_counter() - start) / steps


def measure(args: argparse.Namespace) -> dict:
  """Times steps under every delay.

  Returns:
    {"own": ms of a step without delay, "delays": ms, "steps": ms of each,
    "at_own": of a delay as long as the step without}.
  """
  setting = Setting(
    KAGGLE_ROWS, args.exponent, args.dim, args.batch, args.share, model=LARGE
  )
  mesh, ranks = make_mesh(1), rank_rows(setting)
  problems = problems_of(setting, ranks.profile, topology_here(), 1)
  plan = plan_of(setting, problems, setting.share, table_wise=())
  print(f"{setting}\n{tiers_of(plan)}", flush=True)
  run, seconds = Run(setting, plan, mesh, routed=True).compile(), 0.0
  run.start(draw(setting, ranks, mesh, 8), lambda: time.sleep(seconds / 2))
  own = 1e3 * float(np.median([seconds_of(run, _STEPS) for _ in range(5)]))
  delays = [*args.delays, own]
  found = np.zeros((args.rounds, len(delays)))
  for i, j in np.ndindex(found.shape):
    seconds = 1e-3 * delays[j]
    found[i, j] = 1e3 * seconds_of(run, _STEPS)
  run.stop()
  median = np.median(found, axis=0)
  base = float(median[0]) if args.delays[0] == 0 else own
  return {
    "own": base,
    "delays": list(args.delays),
    "steps": median[:-1].tolist(),
    "at_own": {"delay": own, "step": float(median[-1])},
  }


def plot(found: dict) -> str:
  """Draws the step's time over the delay, beside the longer of the two."""
  left, top, width, height = 60.0, 20.0, 560.0, 260.0
  most = max(*found["delays"], *found["steps"]) * 1.08
  x = lambda ms: left + width * ms / most
  y = lambda ms: top + height * (1 - ms / most)
  own, end = found["own"], max(found["delays"])
  body = [
    svg.line((left, top + height), (left + width, top + height)),
    svg.line((left, top), (left, top + height)),
    svg.line((x(0), y(own)), (x(own), y(own)), svg.RED, "5 4"),
    svg.line((x(own), y(own)), (x(end), y(end)), svg.RED, "5 4"),
    svg.text(x(end), y(end) + 22, "the longer of the two", "end", svg.RED),
    svg.text(left + width, top + height + 36, "delay of the host, ms", "end"),
    svg.text(left + 8, top + 4, "a step, ms"),
  ]
  for tick in range(0, int(most) + 1, 20):
    body.append(svg.text(x(tick), top + height + 18, str(tick), "middle"))
    body.append(svg.text(left - 8, y(tick) + 4, str(tick), "end"))
  body += [
    svg.rectangle(x(a) - 4, y(b) - 4, 8, 8, 'fill="#2471a3"')
    for a, b in zip(found["delays"], found["steps"], strict=True)
  ]
  label = "A step's time over the delay of the host store"
  return svg.picture(top + height + 48, body, label) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--delays", type=float, nargs="+", default=[0, 20, 40, 60, 80, 100])
  add("--batch", type=int, default=2_048)
  add("--dim", type=int, default=16)
  add("--share", type=float, default=0.1, help="of the rows, on the device")
  add("--exponent", type=float, default=1.05)
  add("--rounds", type=int, default=7)
  add("--svg", help="file for the plot")
  add("--json", help="file for the figures")
  args = parser.parse_args()
  malloc.keep_freed_memory()
  print(machine.about(), flush=True)
  found = measure(args)
  for delay, step in zip(found["delays"], found["steps"], strict=True):
    longer = max(delay, found["own"])
    print(
      f"delay {delay:5.0f} ms: {step:6.1f} ms a step, {step / longer:.2f} x"
    )
  at = found["at_own"]
  print(
    f"delay of {at['delay']:.1f} ms, as long as the step: {at['step']:.1f} ms, "
    f"{at['step'] / max(at['delay'], found['own']):.3f} x"
  )
  if args.svg:
    files.write(args.svg, plot(found))
  if args.json:
    files.write(args.json, json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
