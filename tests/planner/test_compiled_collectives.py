"""The compiled step sends what its plan says, to the byte."""

import helpers
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.embedding import optimizers
from recjax.embedding.buckets import buckets_of
from recjax.embedding.embedding import make_embedding
from recjax.mesh import make_mesh
from recjax.planner import compiled_collectives, frequency_buckets, solve
from recjax.planner.compiled_collectives import Collective
from recjax.planner.frequency_buckets import Table
from recjax.planner.problem import make_problem
from recjax.schema import Feature, TableGroup
from recjax.training import step as step_lib
from recjax.training.state import StepSpec

LOCAL = 64
TABLES = (Table("a", 3_000), Table("b", 500), Table("c", 9_000))
FEATURES = tuple(Feature(t.name, t.name) for t in TABLES)
ONE = (TableGroup("all", ("a", "b", "c"), 8, "float32", "adagrad", 0.1),)
TWO = (
  TableGroup("narrow", ("b",), 4, "float32", "adagrad", 0.1),
  TableGroup("wide", ("a", "c"), 16, "float32", "adagrad", 0.1),
)


def planned(groups, devices, hot_sync, exchange_dtype):
  problems = []
  for group in groups:
    tables = tuple(t for t in TABLES if t.name in group.tables)
    problems.append(
      make_problem(
        frequency_buckets.power_law(tables, 1.1),
        devices=devices,
        batch_size=devices * LOCAL,
        lookups=len(tables),
        dim=group.dim,
        dtype="float32",
        slot_bytes=4 * group.dim,
        exchange_dtype=exchange_dtype,
      )
    )
  return solve.solve(
    problems,
    groups,
    hosts=1,
    device_bytes=1 << 20,
    host_bytes=1 << 30,
    hot_rows=50,
    warm_rows=2_000,
    hot_syncs=(hot_sync,),
  )


def compiled(plan, exchange_dtype) -> list[Collective]:
  """Of the step over tables that are never created."""
  mesh = make_mesh(plan.devices)
  embedding = make_embedding(
    plan,
    FEATURES,
    {g.name: optimizers.adagrad(0.1) for g in plan.groups},
    wire_dtype=jnp.dtype(exchange_dtype),
  )

  def apply(params, dense, activations, masks):
    x = [activations[f.name][:, 0] for f in FEATURES]
    return jnp.concatenate(x, axis=1) @ params["w"]

  spec = StepSpec(apply, embedding, optax.sgd(0.1))
  lowered, _ = step_lib.lower(spec, mesh, {"w": jnp.zeros(width(plan))}, 1)
  text = lowered.compile(helpers.FAST).as_text()
  return compiled_collectives.of_step(text, plan.devices)


def width(plan) -> int:
  """Activations of a sample, in numbers."""
  return sum(g.dim * len(g.tables) for g in plan.groups)


def check(devices, hot_sync="all_reduce", exchange_dtype="float32", groups=ONE):
  """Each kind of what a plan sends equals its collectives; nothing else is."""
  plan = planned(groups, devices, hot_sync, exchange_dtype)
  assert len(plan.groups[-1].tiers) == 3 and len(plan.groups[0].tiers) > 1
  n = devices
  kinds = dict.fromkeys(("ids", "rows", "gradients", "hot", "rest"), 0.0)
  ids = 0  # collectives that carry them
  for c in compiled(plan, exchange_dtype):
    if c.repeated:  # the rounds after an overflow
      continue
    if c.kind == "all-to-all":
      integer = c.shapes[0][0] == "s32"
      forward = "lookup" in c.scope
      kind = "ids" if integer else "rows" if forward else "gradients"
      ids += integer
    elif c.kind == "all-gather":
      kind = "hot"
    else:
      kind = "rest"
    kinds[kind] += c.sent(n)
  assert ids == (n > 1)  # those of all groups and tiers travel together
  sent = dict(plan.prediction.sent)
  # Loss, count of rows and dense gradients; the agreement on rounds.
  agreed = len(buckets_of(plan).capacity)
  rest = 2 * (n - 1) / n * 4 * (width(plan) + 2 + agreed)
  if hot_sync == "all_reduce":
    kinds["hot"], kinds["rest"] = kinds["rest"] - rest, rest
  got = {**kinds, "hot gradients": kinds.pop("hot")}
  assert got.pop("rest") == pytest.approx(rest)
  assert got.pop("hot gradients") == pytest.approx(sent["hot gradients"])
  size = np.dtype(jnp.dtype(exchange_dtype)).itemsize
  rows = {
    g.name: sum(t.owners * t.capacity for t in g.sharded) for g in plan.groups
  }
  of_rows = sum(rows[g.name] * g.dim * size for g in plan.groups)
  for kind, each in (
    ("ids", 4 * sum(rows.values())),
    ("rows", of_rows),
    ("gradients", of_rows),
  ):
    assert kinds[kind] == pytest.approx(each * (n - 1) / n, rel=1e-12)
    assert sent[kind] == pytest.approx(each * (n - 1) / n, rel=1e-12)


@pytest.mark.parametrize("hot_sync", ["all_reduce", "all_gather"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_step_sends_what_the_plan_says(devices, hot_sync):
  check(devices, hot_sync)


@pytest.mark.slow
@pytest.mark.parametrize("hot_sync", ["all_reduce", "all_gather"])
def test_two_groups_send_what_the_plan_says(hot_sync):
  check(8, hot_sync, groups=TWO)


def test_bfloat16_is_sent_as_two_bytes():
  check(8, "all_gather", "bfloat16")


@pytest.mark.slow
def test_on_64_devices():
  helpers.on_64_devices(
    __file__, "t.check(64); t.check(64, 'all_gather', groups=t.TWO)"
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


@pytest.mark.parametrize(
  ("result", "kind", "shapes"),
  [
    # As XLA writes them for GPUs (jax 0.10 and 0.12) and for TPUs.
    ("f32[7]{0}", "all-reduce", (("f32", (7,)),)),
    ("((f32[7]{0}), f32[7]{0})", "all-reduce", (("f32", (7,)),)),
    (
      "((f32[8,4,128]{2,1,0}), f32[8,4,128]{2,1,0})",
      "all-to-all",
      (("f32", (8, 4, 128)),),
    ),
    (
      "((s32[4]{0:T(128)}, f32[2]{0}), (s32[4]{0:T(128)}, f32[2]{0}), u32[])",
      "all-reduce",
      (("s32", (4,)), ("f32", (2,))),
    ),
    ("(f32[1,8]{1,0}, f32[4,8]{1,0})", "all-gather", (("f32", (4, 8)),)),
    (
      "(s32[8]{0:T(128)}, s32[8]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)})",
      "collective-permute",
      (("s32", (8,)),),
    ),
  ],
)
def test_asynchronous_collectives_give_their_results(result, kind, shapes):
  text = line(result, f"{kind}-start", "replica_groups={{0,1,2,3}}")
  done = line(result, f"{kind}-done", "")
  (c,) = compiled_collectives.of_step(f"{text}\n{done}", 4)
  assert (c.kind, c.shapes) == (kind, shapes)
