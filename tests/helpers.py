"""What tests of several rooms share: plans by hand, tables in rank order."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from recjax.embedding.host_store import HostStore
from recjax.embedding.tables import Tables
from recjax.plan.layout import shard_rows
from recjax.plan.plan import (
  COLD,
  FROZEN,
  HOT,
  VISITORS,
  WARM,
  Group,
  Plan,
  Tier,
)
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


@contextlib.contextmanager
def limited_memory(more: int):
  """Lets this process map so many bytes more than it has now."""
  with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
  visitors=0,  # of an owner; 0: all its rows
  frozen=0,  # of the cold rows, on the SSD
) -> Group:
  """A group of `rows` rows of which so many are hot and warm, else stored.

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
  first, stored, guests = hot + held, rows - hot - warm, None
  if stored:
    # Where frozen rows follow, all owners have as many cold ones.
    cold = (
      stored - frozen if not frozen else (stored - frozen) // devices * devices
    )
    for name_, at, count, memory in (
      (COLD, first, cold, "host"),
      (FROZEN, first + cold, stored - cold, "ssd"),
    ):
      if count:
        local = shard_rows(count, devices)
        tiers.append(Tier(name_, at, count, devices, AXES, local, memory))
    v = visitors or shard_rows(stored, devices)
    far = far_cold if two_stage else 0
    guests = Tier(
      VISITORS, first, v * devices, devices, AXES, v, "device", c_cold, far
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
    guests,
  )


def make_plan(devices, rows, hot, warm, *, batch_size=0, **group) -> Plan:
  """A plan of one group; see make_group."""
  return Plan(
    devices,
    batch_size or devices,
    (make_group(devices, rows, hot, warm, **group),),
    group.get("node_devices", 0),
  )


def as_seen(plan: Plan) -> Plan:
  """The plan as a step sees it where all stored rows visit: one more tier."""
  groups = []
  for g in plan.groups:
    rows = sum(t.rows for t in g.stored)
    tiers = [dataclasses.replace(t, rows=rows) if t == g.visitors else t
             for t in g.on_device]  # fmt: skip
    groups.append(dataclasses.replace(g, tiers=tuple(tiers), visitors=None))
  return dataclasses.replace(plan, groups=tuple(groups))


def in_rank_order(tables: Tables, plan: Plan, store: HostStore | None = None):
  """{group: TierArrays of numpy}: rows and slot variables, by position."""
  if store:
    store.flush()
  stored = store.groups if store else {}
  return {
    g.name: _joined(tables[g.name], g, stored.get(g.name)) for g in plan.groups
  }


def _joined(tiers, group: Group, stored):
  parts = []
  assert set(tiers) == {t.name for t in group.resident}
  assert bool(group.stored) == (stored is not None)
  for t in group.resident:
    flat = lambda x, t=t: np.asarray(
      x.reshape(-1, *x.shape[2:]) if t.axes else x
    )[: t.rows]
    parts.append(jax.tree.map(flat, tiers[t.name]))
  if stored is not None:
    rows = sum(t.rows for t in group.stored)
    assert list(stored.owners) == list(range(stored.devices))
    parts.append(stored.block(0, rows))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else None


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
