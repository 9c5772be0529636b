"""Shapes and dtypes at every seam of a step, without computing anything."""

import dense_reference as dense
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from recjax.embedding import exchange, lookup, tables, update
from recjax.embedding.buckets import buckets_of
from recjax.plan.plan import Plan
from recjax.schema import AXES, Feature

LOCAL, DEVICES = 4, 8
PARTS = (
  dense.Part("narrow", ("s",), 40, 4, "rowwise_adagrad"),
  dense.Part("wide", ("l",), 90, 16, "adam", "bfloat16"),
)
FEATURES = (
  Feature("a", "l", hotness=3, pooling="mean"),
  Feature("b", "s"),
  Feature("c", "l", hotness=2, pooling="none"),
  Feature("d", "s", hotness=2, weighted=True),
)
CASE = dense.Case(PARTS, FEATURES)
LOOKUPS = (3 * LOCAL, 5 * LOCAL)  # of the groups: b, d; a, c
NODES = {"flat": {}, "staged": {"node_devices": 4, "two_stage": True}}


def plan_of(nodes) -> Plan:
  groups = tuple(
    helpers.make_group(
      DEVICES,
      hot=5,
      warm=20,
      capacity=3,
      hot_sync="all_gather",
      **part._asdict(),
      **nodes,
    )
    for part in PARTS
  )
  size = LOCAL * DEVICES
  return Plan(DEVICES, size, groups, nodes.get("node_devices", 0))


def shape(x):
  return x.shape, jnp.dtype(x.dtype).name


def traced(f, plan):
  """What f(tables, batch) returns on a device, as shapes."""
  run = dense.build(CASE, plan)
  spec, mesh = run.spec, run.mesh
  batch = {
    "ids": jax.ShapeDtypeStruct((plan.batch_size, 8), jnp.int32),
    "weights": jax.ShapeDtypeStruct((plan.batch_size, 8), jnp.float32),
  }
  found = []

  def inside(tables, batch):
    found.append(jax.tree.map(shape, f(spec.embedding, tables, batch)))
    return jnp.zeros(())

  f_of_all = jax.shard_map(
    inside,
    mesh=mesh,
    in_specs=(
      tables.specs(spec.embedding, visitors=True),
      PartitionSpec(AXES),
    ),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  shapes = tables.shapes(spec.embedding, visitors=True)
  jax.eval_shape(f_of_all, shapes, batch)
  return found[0]


@pytest.mark.parametrize("nodes", NODES)
def test_the_lookup(nodes):
  plan = plan_of(NODES[nodes])
  activations, residuals = traced(lookup.forward, plan)
  assert activations == {
    "a": ((LOCAL, 1, 16), "float32"),
    "b": ((LOCAL, 1, 4), "float32"),
    "c": ((LOCAL, 2, 16), "float32"),
    "d": ((LOCAL, 1, 4), "float32"),
  }
  z, rows = len(buckets_of(plan).capacity), sum(LOOKUPS)
  assert residuals.route == exchange.Route(
    addresses=((rows + 1,), "int32"),
    starts=((z + 1,), "int32"),
    bucket=((rows,), "int32"),
    index=((rows,), "int32"),
  )
  now = residuals.round
  assert (now.begin, now.end) == (((z,), "int32"),) * 2
  assert now.more == ((), "bool")
  for t, asked in zip(buckets_of(plan).sharded, now.requests, strict=True):
    assert t.tier.capacity == 3
    if t.united:
      far = plan.nodes * t.tier.node_capacity
      assert asked.local == ((far,), "int32")
      assert asked.index == ((DEVICES * 3,), "int32")
    else:
      assert asked == (((DEVICES * 3,), "int32"), None)
  for of, lookups, columns in zip(
    residuals.groups, LOOKUPS, (3, 5), strict=True
  ):
    assert of.ids == ((lookups,), "int32")
    assert of.coefficients == ((LOCAL, columns), "float32")


@pytest.mark.parametrize("nodes", NODES)
def test_the_update_gives_tables_of_the_same_shapes(nodes):
  plan = plan_of(NODES[nodes])

  def f(embedding, shards, batch):
    activations, residuals = lookup.forward(embedding, shards, batch)
    step = jnp.zeros((), jnp.int32)
    new, rounds = update.backward(
      embedding, shards, residuals, activations, step
    )
    return new, rounds, shards

  new, rounds, old = traced(f, plan)
  assert new == old
  assert rounds == ((), "int32")
  for part, group in zip(PARTS, plan.groups, strict=True):
    for tier in group.on_device:
      arrays = new[part.name][tier.name]
      rows = (tier.shard_rows, 1) if tier.axes else (tier.rows,)
      assert arrays.rows == ((*rows, part.dim), part.dtype)
      wide = {"acc": rows} if part.name == "narrow" else dict.fromkeys(
        ("m", "v"), (*rows, part.dim)
      )  # fmt: skip
      assert arrays.slots == {k: (s, "float32") for k, s in wide.items()}


def test_masks_are_those_of_sequences():
  plan = plan_of({})
  spec = dense.build(CASE, plan).spec
  ids = np.full((2, 8), -1, np.int32)
  ids[0, 4] = 7  # c is columns 4 and 5
  masks = lookup.masks(spec.embedding, jnp.asarray(ids))
  assert set(masks) == {"c"}
  np.testing.assert_array_equal(masks["c"], [[True, False], [False, False]])
