"""The embedding step alone, at FBGEMM's published setting.

  python scripts/bench_embedding.py [--optimizer sgd adam] [--json out.json]
  python scripts/bench_embedding.py --rows 1000 --batch 64   # a check on a CPU

10 tables x 1.68 M rows x 128 float32, 104,857 samples of one lookup in each
(1,048,570 ids), power law 1.05: FBGEMM takes 0.96 ms a train step on one H100
(SGD; Adam 1.35 ms; NVIDIA/recsys-examples, dynamicemb benchmark results). The
dense part is a dot product of the activations with the batch's own numbers, as
many as activations, so that the rows' gradients are read from memory as a
model's would be; its time is in the scope "dense".

--capacity: "loop" has the planned buffers, and thus a second round that is
compiled and hardly ever run; "flat" has buffers for every batch, and one round;
"tight" has the planned buffers and no second round, which is right for these
batches, not for all: it shows what compiling the round costs.

Printed are milliseconds a step (of steps in a row, and of one alone), and by
named scope and kernel from a trace of three steps; see step_profile.py.
"""

import argparse
import contextlib
import json
import pathlib
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_profile
from jax.sharding import Mesh
from synthetic_step import (
  INIT_SCALE,
  Drawn,
  Setting,
  draw,
  plan_of,
  problems_of,
  rank_rows,
  spec_of,
  topology_here,
)

from recjax import files
from recjax.embedding import exchange
from recjax.frequency import Profile
from recjax.mesh import batch_sharding, make_mesh
from recjax.plan.plan import Plan
from recjax.training.state import first_state
from recjax.training.step import lower


def setting_of(args: argparse.Namespace, optimizer: str) -> Setting:
  """Returns the tables; their model is `dot`."""
  tables = (args.rows,) * args.tables
  return Setting(
    tables, args.exponent, args.dim, args.batch, 2.0, optimizer=optimizer
  )


def plan_for(setting: Setting, profile: Profile, capacity: str) -> Plan:
  """Plans with all rows warm, and with room for any batch if "flat"."""
  problems = problems_of(setting, profile, topology_here(), 1)
  rows = sum(setting.tables)
  lookups = setting.batch * len(setting.tables)
  return plan_of(
    setting,
    problems,
    setting.share,
    hot_rows=0,
    warm_rows=rows,
    capacity=min(rows, lookups) if capacity == "flat" else 0,
  )


def batches_of(setting: Setting, mesh: Mesh, count: int) -> Drawn:
  """Draws batches with as many dense numbers as activations."""
  drawn = draw(setting, rank_rows(setting), mesh, count)
  shape = setting.batch, len(setting.tables) * setting.dim
  for i, batch in enumerate(drawn.batches):
    dense = jax.random.normal(jax.random.key(i), shape)
    batch["dense"] = jax.device_put(dense, batch_sharding(mesh))
  return drawn


def dot(params, dense, activations, masks):
  """Multiplies the activations with dense [b, F d]."""
  del masks
  x = jnp.concatenate(list(activations.values()), axis=1)  # [b, F, d]
  return params["scale"] * jnp.sum(x.reshape(dense.shape) * dense, axis=1)


def measure(
  args: argparse.Namespace, mesh: Mesh, drawn: Drawn, optimizer: str, name: str
) -> dict[str, Any]:
  """Measures a step; the name is of --capacity."""
  setting = setting_of(args, optimizer)
  plan = plan_for(setting, drawn.profile, name)
  spec = spec_of(plan, setting.features, dot, optax.sgd(1e-3))
  params = {"scale": np.float32(1)}
  width = len(setting.tables) * setting.dim
  start = time.perf_counter()
  with contextlib.ExitStack() as stack:
    if name == "tight":
      always = mock.patch.object(exchange, "_fit", lambda *_: (True, True))
      stack.enter_context(always)
    compiled = lower(spec, mesh, params, width)[0].compile()
  compile_s = time.perf_counter() - start
  state = first_state(spec, mesh, params, INIT_SCALE)
  step = lambda state, batch: compiled(state, batch, {}, {})[:2]
  state, found = step_profile.timed(step, state, drawn.batches, steps=20)
  found |= step_profile.static(compiled) | {"compile_s": compile_s}
  found["capacity"] = plan.groups[0].tiers[0].capacity
  if args.text:
    path = pathlib.Path(args.text) / f"embedding_{optimizer}_{name}.txt"
    files.write(path, compiled.as_text())
  if args.trace:
    _, more = step_profile.traced(
      step, compiled.as_text(), state, drawn.batches
    )
    found |= more
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--tables", type=int, default=10)
  add("--rows", type=int, default=1_680_000, help="of each table")
  add("--dim", type=int, default=128)
  add("--batch", type=int, default=104_857)
  add("--batches", type=int, default=4, help="different ones, cycled")
  add("--exponent", type=float, default=1.05)
  add("--optimizer", nargs="+", default=["sgd"])
  add("--capacity", nargs="+", default=["loop", "flat"],
      choices=["loop", "flat", "tight"])  # fmt: skip
  add("--trace", action=argparse.BooleanOptionalAction, default=True)
  add("--text", help="folder for the compiled text")
  add("--json", help="file to write")
  args = parser.parse_args()
  mesh = make_mesh(1)
  device = jax.devices()[0].device_kind
  print(f"{device}, jax {jax.__version__}, {vars(args)}", flush=True)
  drawn = batches_of(setting_of(args, "sgd"), mesh, args.batches)
  runs = {}
  for optimizer in args.optimizer:
    for capacity in args.capacity:
      name = f"{optimizer} {capacity}"
      runs[name] = measure(args, mesh, drawn, optimizer, capacity)
      step_profile.report(name, runs[name], args.batch)
      if args.json:
        about = {"device": device, "jax": jax.__version__, "args": vars(args)}
        files.write(args.json, json.dumps(about | {"runs": runs}, indent=1))


if __name__ == "__main__":
  main()
