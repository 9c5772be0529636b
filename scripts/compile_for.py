"""Compiles a run for accelerators that are not here, and checks what comes out.

  python scripts/compile_for.py --config configs/criteo_terabyte.py \
    --target h100 --devices 64
  python scripts/compile_for.py --config configs/criteo_terabyte.py \
    --target v5e:4x4 --config.train.batch_size=16384 --json

Needs `pip install recjax[compile]` (Linux, x86-64), and no accelerator. Plans
for the target, from data.rows and plan.exponent or from data that the config
names and --workdir holds, and compiles all that a run compiles: train step,
forward pass, first values, checksums, and what a restore writes blocks with.
Of each are printed a device's memory, beside what the plan predicts, the
kernels that it launches by named scope, and what its collectives send.

Ends with an error where a program does not fit a device, does not update a
table in place, copies an array of a table's shape, needs more than 64 MB of
temporary host memory, or needs temporary memory that grows with the tables: the
train step is compiled again with an eighth of the sharded rows (--nogrowth
leaves that out).

What it cannot show is time. XLA's libraries are not tried out (autotuned) as on
a GPU, and sorts are XLA's own in place of CUB's.
"""

import json
import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import compile_targets
from absl import app, flags
from compile_targets import Target

from recjax import cli
from recjax.errors import UserError

if TYPE_CHECKING:
  from compiled_programs import Setup

  from recjax.config import Config
  from recjax.plan.plan import Plan

MB = 1e6
_TARGET = flags.DEFINE_string(
  "target", None, f"What to compile for: {compile_targets.CHOICES}."
)
_DEVICES = flags.DEFINE_integer("devices", 0, "How many GPUs.")
_JSON = flags.DEFINE_boolean("json", False, "Print all as JSON.")
_GROWTH = flags.DEFINE_boolean("growth", True, "See what grows with tables.")


def compile_run(
  config: "Config", workdir: pathlib.Path, target: Target, growth: bool
) -> dict[str, Any]:
  """Plans and compiles a run.

  Returns:
    {"target", "jax", "plan": the text of `describe`, "predicted": bytes of a
    device by kind, "sent": predicted bytes by kind, "programs": the reports of
    compiled_programs.py, "broken": invariants, in words}.
  """
  import compiled_programs
  import jax

  from recjax.planner import describe, presets

  plan, setup = set_up(config, workdir, target)
  found = list(compiled_programs.reports(setup, growth))
  has = presets.get(config.plan.topology, target.devices).device_memory
  return {
    "target": target._asdict(),
    "jax": jax.__version__,
    "plan": describe.describe(plan),
    "predicted": dict(plan.prediction.memory),
    "sent": dict(plan.prediction.sent),
    "programs": found,
    "broken": [s for x in found for s in compiled_programs.broken(x, has)],
  }


def set_up(
  config: "Config", workdir: pathlib.Path, target: Target
) -> tuple["Plan", "Setup"]:
  """Plans for the target; returns the plan and what its programs are made of.

  Args:
    config: whose mesh is set to the target, and whose topology, where empty.
    workdir: of prepared data; without data.train nothing is read there.
    target: what it is for.
  """
  from compiled_programs import Setup

  from recjax import jobs, mesh
  from recjax.models import build as models
  from recjax.planner.write_plan import ASSUMED_DENSE
  from recjax.schema import Feature
  from recjax.training import build
  from recjax.training.dense_optimizer import dense_optimizer
  from recjax.training.state import StepSpec

  devices = compile_targets.devices(target)
  config.mesh.devices = target.devices
  config.plan.topology = config.plan.topology or target.preset
  assumed = config.data.rows and not config.data.train
  prepared = None if assumed else jobs.prepare(config, workdir, _quiet)
  with tempfile.TemporaryDirectory() as folder:
    plan, _ = jobs.plan(config, prepared, pathlib.Path(folder), _quiet)
  rows = jobs.table_rows(config, prepared)
  groups = build.table_groups(config, rows)
  if prepared is None:
    hotness = config.data.hotness or (1,) * len(rows)
    features = tuple(map(Feature, rows, rows, hotness))
    inputs = ASSUMED_DENSE
  else:
    features, inputs = prepared.schema.features, len(prepared.schema.dense)
  params, apply = models.build(
    config.model,
    inputs,
    build.model_inputs(features, groups),
    config.embedding.dim,
    config.seed,
  )
  spec = StepSpec(
    apply,
    build.configured_embedding(config, plan, features, groups),
    dense_optimizer(config, 0),
  )
  return plan, Setup(
    spec, mesh.mesh_of(devices, plan.node_devices), params, inputs
  )


def _quiet(line: str) -> None:
  del line


# ---- To print


def describe(found: dict[str, Any]) -> str:
  """Returns the text that is printed of `compile_run`."""
  target = found["target"]
  lines = [
    f"compiled for {target['devices']} x {target['name']}, jax {found['jax']}",
    found["plan"],
  ]
  for x in found["programs"]:
    lines += _program(x)
  step = found["programs"][0]
  tables, temp = step["tables"], step["memory"]["total"] - step["tables"]
  of = found["predicted"]
  known = of["replicas"] + of["tables"] + of["slot variables"]
  lines += [
    "memory of a device, MB: compiled train step, and as predicted",
    f"  tables {tables / MB:,.1f}, {known / MB:,.1f}",
    f"  all else {temp / MB:,.1f}, {(sum(of.values()) - known) / MB:,.1f}",
    f"sent by a device for its rows, MB: {_terms(found['sent'], MB)} predicted",
  ]
  return "\n".join(lines)


def _program(x: dict[str, Any]) -> list[str]:
  memory = {
    k: v
    for k, v in x["memory"].items()
    if v or k in ("arguments", "outputs", "aliased", "temp")
  }
  lines = [
    f"{x['program']}, compiled in {x['compile_seconds']:.1f} s",
    f"  memory (MB)  {_terms(memory, MB)}",
    f"  kernels      {sum(x['kernels'].values())}: {_terms(x['kernels'])}",
  ]
  if x["kernels_repeated"]:
    lines.append(f"  in loops     {_terms(x['kernels_repeated'])}")
  for c in x["collectives"]:
    if not c["repeated"]:
      lines.append(
        f"  sends        {c['sent'] / MB:,.3f} MB by {c['count']} "
        f"{c['kind']} in {c['scope']}"
      )
  if "growth" in x:
    lines.append(f"  grows (MB)   {_terms(x['growth'], MB)}")
  return lines


def _terms(of: dict[str, float], unit: float = 1) -> str:
  return ", ".join(
    f"{k} {v / unit:,.{0 if unit == 1 else 1}f}" for k, v in of.items()
  )


def main(_: list[str]) -> None:
  """Compiles what the flags say; exits with 1 after an error."""
  config = flags.FLAGS.config
  workdir = pathlib.Path(flags.FLAGS.workdir or "runs/compiled").absolute()
  try:
    if _TARGET.value is None:
      raise UserError(f"--target: none given; use {compile_targets.CHOICES}")
    target = compile_targets.parse(_TARGET.value, _DEVICES.value)
    compile_targets.prepare()
    found = compile_run(config, workdir, target, _GROWTH.value)
  except UserError as e:
    sys.exit(f"error: {e}")
  print(json.dumps(found, indent=1) if _JSON.value else describe(found))
  if found["broken"]:
    lines = "\n  ".join(found["broken"])
    sys.exit(f"error: {target.name}: {len(found['broken'])} broken:\n  {lines}")


if __name__ == "__main__":
  app.run(main, flags_parser=cli.parse)
