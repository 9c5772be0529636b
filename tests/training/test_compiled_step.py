"""What the compiled step holds, aliases and sends."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import (
  BATCH,
  BOTH,
  COPIES,
  DENSE,
  DIM,
  FEATURES,
  OPTIMIZERS,
  STAGES,
  batches,
  build,
  make_plan,
)

from recjax.mesh import batch_sharding
from recjax.planner import compiled_collectives, step_cost
from recjax.planner.cut_points import FLAT
from recjax.planner.step_cost import Load, Work
from recjax.training import step as step_lib


def big_plan(rows, tiers, devices=8, nodes=(0, FLAT)):
  small = make_plan(devices, "mixed", 8, nodes=nodes)
  cut = {"warm": (0, rows), "cold": (0, 0), "mixed": (64, rows // 2)}
  hot, warm_end = cut[tiers]
  return dataclasses.replace(
    small,
    rows=rows,
    hot=hot,
    warm_end=warm_end,
    capacity_warm=8 if warm_end > hot else 0,
    capacity_cold=8 if warm_end < rows else 0,
  )


def compiled_step(plan, optimizer):
  """(the step over tables that are never created, their bytes a device)."""
  small = make_plan(8, "hot", 1, nodes=(plan.node_devices, FLAT))
  small, mesh, state = build(FEATURES["one_hot"], small, optimizer)
  model = small._replace(plan=plan)
  lowered, shapes = step_lib.lower(model, mesh, state.params, DENSE)
  step, t = lowered.compile(), shapes.tables
  shard = lambda x: np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return step, sum(map(shard, jax.tree.leaves(t)))


@pytest.mark.parametrize(
  ("tiers", "optimizer", "nodes"),
  [("mixed", name, (0, FLAT)) for name in OPTIMIZERS]
  + [("warm", "adam", (0, FLAT)), ("cold", "adam", (0, FLAT))]
  + [("mixed", "adam", (4, BOTH))],
)
def test_tables_are_updated_in_place(tiers, optimizer, nodes):
  plans = [big_plan(n, tiers, nodes=nodes) for n in (1_000_000, 64_000_000)]
  steps = [compiled_step(plan, optimizer) for plan in plans]
  small, large = (step.memory_analysis() for step, _ in steps)
  size = steps[1][1]
  aliased = large.alias_size_in_bytes + large.host_alias_size_in_bytes
  assert aliased >= size
  assert large.temp_size_in_bytes == small.temp_size_in_bytes
  assert large.temp_size_in_bytes < 1 << 20


# ---- What the compiled step sends


@pytest.mark.parametrize("nodes", [(0, FLAT), (4, BOTH)])
def test_bfloat16_exchange_sends_two_bytes(nodes):
  plan = make_plan(8, "mixed_sparse", 0, nodes=nodes)
  model, mesh, state = build(
    FEATURES["one_hot"], plan, "sgd", exchange_dtype=jnp.bfloat16
  )
  batch = jax.device_put(
    next(batches(FEATURES["one_hot"])), batch_sharding(mesh)
  )
  step = step_lib.make_train_step(model, mesh)
  text = step.lower(state, batch).compile().as_text()
  of = re.findall(r"= \(?(\w+)\[.*? (all-to-all|all-gather)\(", text)
  assert {("u16", "all-to-all"), ("u16", "all-gather")} <= set(of)
  assert not {dtype for dtype, _ in of} & {"f32", "bf16"}


@pytest.mark.parametrize(
  ("g", "way"), [(0, FLAT), (4, COPIES), (4, STAGES), (2, BOTH)]
)
def test_buffers_on_the_wire_are_those_of_the_plan(g, way):
  """Every exchange of a step, its operands and who takes part."""
  plan = big_plan(1_000_000, "mixed", nodes=(g, way))
  sizes = {"capacity_warm": 7, "capacity_cold": 5}
  staged = way.exchange == "two_stage"
  if staged or way.warm_copies == "node":
    sizes["capacity_far_warm"] = 9
  if staged:
    sizes["capacity_far_cold"] = 11
  plan = dataclasses.replace(plan, **sizes)
  step = compiled_step(plan, "sgd")[0].as_text()
  exchanged = [
    c
    for c in compiled_collectives.of_step(step, 8)
    if c.kind != "all-reduce" and not c.repeated
  ]
  found = [(c.kind, c.operand_bytes, c.groups[0]) for c in exchanged]
  everyone, g = tuple(range(8)), g or 8
  within, across = tuple(range(g)), tuple(range(0, 8, g))
  want = []

  def trips(rows, peers, kinds=(4, 4 * DIM, 4 * DIM)):
    want.extend(("all-to-all", rows * size, peers) for size in kinds)

  for owners, c, far in (
    (plan.warm_owners, 7, plan.capacity_far_warm),
    (8, 5, plan.capacity_far_cold),
  ):
    trips(owners * c, within if far else everyone)
    if far and owners == 8:
      trips(8 // g * far, across)
    elif far:
      want.extend(("all-gather", far * x, across) for x in (4, 4 * DIM))
  assert sorted(found) == sorted(want)
  if g < 8:
    work = Work(8, BATCH, 3, DIM, 0, 0, 4 * DIM, node_devices=g)
    load = Load(
      0.0,
      plan.warm_owners * 7,
      8 * 5,
      0.0,
      plan.capacity_far_warm * plan.nodes or None,
      plan.capacity_far_cold * plan.nodes or None,
      way.warm_copies == "node",
    )
    sent = step_cost.network_bytes(work, load)
    far = sum(c.sent(8, g) for c in exchanged)
    assert far == pytest.approx(sum(sent.values()))
