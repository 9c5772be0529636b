"""The compiled step sends what its plan says, to the byte."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest

from recjax.embedding import optimizers
from recjax.mesh import make_mesh
from recjax.planner import compiled_collectives, frequency_buckets
from recjax.planner import solve as solve_lib
from recjax.planner.compiled_collectives import Collective
from recjax.planner.frequency_buckets import Table
from recjax.schema import Feature
from recjax.training import step as train_step_lib

DIM, LOCAL = 8, 64
TABLES = (Table("a", 3_000), Table("b", 500), Table("c", 9_000))
FEATURES = tuple(Feature(t.name, t.name) for t in TABLES)


def planned(devices, hot_sync, exchange_dtype):
  return solve_lib.plan(
    frequency_buckets.power_law(TABLES, 1.1),
    devices=devices,
    batch_size=devices * LOCAL,
    lookups=len(TABLES),
    dim=DIM,
    dtype="float32",
    slot_bytes=4 * DIM,
    exchange_dtype=exchange_dtype,
    hosts=1,
    device_bytes=1 << 20,
    host_bytes=1 << 30,
    hot_rows=50,
    warm_rows=2_000,
    syncs=(hot_sync,),
  )


def compiled(plan, exchange_dtype) -> list[Collective]:
  """Of the step over tables that are never created."""
  mesh = make_mesh(plan.devices)
  model = train_step_lib.Model(
    apply=lambda params, dense, x: jnp.einsum("bad,d->b", x, params["w"]),
    features=FEATURES,
    dense_optimizer=optax.sgd(0.1),
    sparse_optimizer=optimizers.adagrad(0.1),
    plan=plan,
    exchange_dtype=jnp.dtype(exchange_dtype),
    seed=0,
  )
  params = {"w": jnp.zeros(DIM)}
  lowered, _ = train_step_lib.lower(model, mesh, params, 1)
  text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
  return compiled_collectives.of_step(text, plan.devices)


def check(devices, hot_sync="dense", exchange_dtype="float32"):
  """Each kind of Plan.sent equals its collectives; nothing else is sent."""
  plan = planned(devices, hot_sync, exchange_dtype)
  assert min(plan.hot, plan.warm, plan.cold) > 0
  n = devices
  kinds = dict.fromkeys(("ids", "rows", "gradients", "hot", "rest"), 0.0)
  for c in compiled(plan, exchange_dtype):
    if c.repeated:  # the rounds after an overflow
      continue
    if c.kind == "all-to-all":
      integer = c.shapes[0][0] == "s32"
      forward = "lookup" in c.scope
      kind = "ids" if integer else "rows" if forward else "gradients"
    elif c.kind == "all-gather":
      kind = "hot"
    else:
      kind = "rest"
    kinds[kind] += c.sent(n)
  sent = dict(plan.sent)
  # Loss, count of rows and dense gradients; the agreement on rounds.
  rest = 2 * (n - 1) / n * 4 * (DIM + 2 + 2 * n + 1)
  if hot_sync == "dense":
    kinds["hot"], kinds["rest"] = kinds["rest"] - rest, rest
  got = {**kinds, "hot gradients": kinds.pop("hot")}
  assert got.pop("rest") == pytest.approx(rest)
  assert got.pop("hot gradients") == pytest.approx(sent["hot gradients"])
  buffers = n * (plan.capacity_warm + plan.capacity_cold)
  width = DIM * jnp.dtype(exchange_dtype).itemsize
  for kind, each in (("ids", 4), ("rows", width), ("gradients", width)):
    assert kinds[kind] == sent[kind] == buffers * each * (n - 1) / n


@pytest.mark.parametrize("hot_sync", ["dense", "sparse"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_step_sends_what_the_plan_says(devices, hot_sync):
  check(devices, hot_sync)


def test_bfloat16_is_sent_as_two_bytes():
  check(8, "sparse", "bfloat16")


def on_64_devices(code):
  """Runs code in a process of its own: this one has eight devices."""
  root = pathlib.Path(__file__).parents[2]
  code = f"import jax; jax.config.update('jax_num_cpu_devices', 64); {code}"
  folders = [
    ".",
    *(f"tests/{room}" for room in ("planner", "training", "embedding")),
  ]
  paths = os.pathsep.join(str(root / folder) for folder in folders)
  env = os.environ | {"PYTHONPATH": paths}
  run = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr[-2_000:]


def test_on_64_devices():
  on_64_devices(
    "import test_compiled_collectives as t; t.check(64); t.check(64, 'sparse')"
  )


# ---- Of the text


def line(result, kind, attributes):
  return f"%x.1 = {result} {kind}(%a), channel_id=1, {attributes}"


@pytest.mark.parametrize(
  ("attributes", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ("replica_groups={}", ((0, 1, 2, 3),)),
  ],
)
def test_groups(attributes, groups):
  (c,) = compiled_collectives.of_step(
    line("f32[4]{0}", "all-to-all", attributes), 4
  )
  assert c.groups == groups


def test_bytes_by_hand():
  of = lambda *x: compiled_collectives.of_step(line(*x), 4)[0]
  pairs = "replica_groups={{0,1},{2,3}}"
  c = of("(f32[1,8]{1,0}, f32[1,8]{1,0})", "all-to-all", pairs)
  assert (c.operand_bytes, c.sent(4), c.sent(4, 2)) == (64, 32, 0)
  c = of("u16[4,8]{1,0}", "all-to-all", "replica_groups={{0,1,2,3}}")
  assert (c.operand_bytes, c.sent(4), c.sent(4, 2)) == (64, 48, 32)
  c = of("f32[16]{0}", "all-gather", pairs)
  assert (c.operand_bytes, c.sent(4), c.sent(4, 2)) == (32, 32, 0)
  c = of("f32[16]{0}", "all-gather", "replica_groups={{0,1,2,3}}")
  assert (c.operand_bytes, c.sent(4)) == (16, 48)
  assert c.sent(4, 2) == 48 * 2 / 4  # of four links of the ring, two are far
  c = of("f32[16]{0}", "all-reduce", pairs)
  assert (c.operand_bytes, c.sent(4)) == (64, 64)
  c = of("f32[16]{0}", "reduce-scatter", pairs)
  assert (c.operand_bytes, c.sent(4)) == (128, 64)
  c = of("s32[8]{0}", "collective-permute", "source_target_pairs={{0,1},{2,1}}")
  assert c.groups == ((0, 1), (2, 1))
  assert (c.sent(4), c.sent(4, 2)) == (16, 8)


def test_asynchronous_collectives_are_refused():
  with pytest.raises(ValueError, match="asynchronous"):
    compiled_collectives.of_step(line("f32[4]", "all-gather-start", ""), 4)
