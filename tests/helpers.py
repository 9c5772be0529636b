"""What tests of several rooms share: plans by hand, tables in rank order."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from recjax.embedding.tables import Tables
from recjax.plan.layout import shard_rows
from recjax.plan.plan import COLD, HOT, WARM, Group, Plan, Tier
from recjax.schema import AXES, DEVICE

# As users compile, whatever conftest.py says.
OPTIMIZED: dict[str, Any] = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}


def _known(options: dict[str, Any]) -> dict[str, Any]:
  """The options that this version of XLA has."""
  known = {}
  for name, value in options.items():
    lowered = jax.jit(lambda x: x).lower(np.float32(0))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      lowered.compile({name: value})
      known[name] = value
  return known


# Compiled fast rather than well: a third of the time of OPTIMIZED.
FAST = _known(
  {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
  }
)


def quiet(line):
  del line


def lines(workdir, split):
  """The lines of a run's metrics.jsonl of one split."""
  with open(workdir / "metrics.jsonl", encoding="utf-8") as f:
    found = [json.loads(line) for line in f]
  return [line for line in found if line["split"] == split]


def make_group(
  devices,
  rows,
  hot,
  warm,
  *,
  name="g",
  tables=("t",),
  dim=8,
  dtype="float32",
  optimizer="sgd",
  capacity=0,  # of every buffer; (warm, cold) or one for both; 0: all rows
  hot_sync="all_reduce",
  node_devices=0,
  two_stage=False,
  copies=False,
  node_capacity=0,  # likewise
  table_wise=(),
  padding_rows=0,
) -> Group:
  """A group of `rows` rows of which so many are hot and warm, else cold.

  `padding_rows` come on top, in the warm tier.
  """
  pair = lambda x: x if isinstance(x, tuple) else (x, x)
  c_warm, c_cold = (c or rows + padding_rows for c in pair(capacity))
  far_warm, far_cold = (
    c or rows * devices for c in pair(node_capacity or capacity)
  )
  owners = node_devices if copies else devices
  held, tiers = warm + padding_rows, []
  if hot:
    shared = c_warm if hot_sync == "all_gather" else 0
    tiers.append(Tier(HOT, 0, hot, 1, (), hot, capacity=shared))
  if held:
    tiers.append(
      Tier(
        WARM,
        hot,
        held,
        owners,
        (DEVICE,) if copies else AXES,
        shard_rows(held, owners),
        capacity=c_warm,
        node_capacity=far_warm if copies or two_stage else 0,
      )
    )
  if hot + warm < rows:
    cold = rows - hot - warm
    tiers.append(
      Tier(
        COLD,
        hot + held,
        cold,
        devices,
        AXES,
        shard_rows(cold, devices),
        "host",
        c_cold,
        far_cold if two_stage else 0,
      )
    )
  return Group(
    name,
    tables,
    dim,
    dtype,
    optimizer,
    tuple(tiers),
    hot_sync,
    table_wise,
    padding_rows,
  )


def make_plan(devices, rows, hot, warm, *, batch_size=0, **group) -> Plan:
  """A plan of one group; see make_group."""
  return Plan(
    devices,
    batch_size or devices,
    (make_group(devices, rows, hot, warm, **group),),
    group.get("node_devices", 0),
  )


def in_rank_order(tables: Tables, plan: Plan):
  """{group: TierArrays of numpy}: rows and slot variables, by position."""
  return {g.name: _joined(tables[g.name], g) for g in plan.groups}


def _joined(tiers, group: Group):
  parts = []
  assert set(tiers) == {t.name for t in group.tiers}
  for t in group.tiers:
    flat = lambda x, t=t: np.asarray(
      x.reshape(-1, *x.shape[2:]) if t.axes else x
    )[: t.rows]
    parts.append(jax.tree.map(flat, tiers[t.name]))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def check_copies(tables: Tables):
  """Asserts that all replicas of an array are the same, bit by bit."""
  for x in jax.tree.leaves(tables):
    by_part = {}
    for shard in x.addressable_shards:
      by_part.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    for first, *others in by_part.values():
      for other in others:
        np.testing.assert_array_equal(first, other)


def assert_close(got, want):
  """To 1e-5, and to 1e-5 of an array's largest magnitude."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), b, rtol=1e-5, atol=1e-5 * np.abs(b).max()
    ),
    got,
    want,
  )


def on_64_devices(file, code):
  """Runs code in a process of its own, with a test file as `t`.

  This process has eight devices.
  """
  path = pathlib.Path(file)
  tests = pathlib.Path(__file__).parent
  code = (
    "import jax; jax.config.update('jax_num_cpu_devices', 64); "
    f"import {path.stem} as t; {code}"
  )
  folders = (tests.parent, tests, path.parent)
  env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
  run = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr[-2_000:]
