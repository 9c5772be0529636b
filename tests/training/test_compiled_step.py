"""What the compiled step holds, aliases and sends."""

import re

import dense_reference as dense
import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers_step import big_group, check_in_place, compiled_step

from recjax.plan.plan import Plan
from recjax.planner import compiled_collectives, traffic
from recjax.schema import DEVICE, Feature

DIM = 8
COPIES, STAGES = {"copies": True}, {"two_stage": True}
BOTH = COPIES | STAGES


def case_of(optimizer) -> dense.Case:
  """One group, of three tables."""
  part = dense.Part("g", ("a", "b", "c"), 203, DIM, optimizer)
  return dense.Case((part,), tuple(Feature(x, x) for x in "abc"))


# Of other dims and optimizers: 3 and 2 arrays a tier.
TWO = dense.Case(
  (
    dense.Part("wide", ("a", "b"), 203, 16, "adam"),
    dense.Part("row", ("c",), 151, 4, "rowwise_adagrad"),
  ),
  (Feature("a", "a", 2), Feature("c", "c", 3, "mean"), Feature("b", "b")),
)


def big_plan(case, rows, tiers, g=0, **kw) -> Plan:
  """A plan of groups of so many rows for 8 devices, in nodes of g."""
  groups = tuple(
    big_group(8, rows, tiers, part, node_devices=g, **kw) for part in case.parts
  )
  return Plan(8, dense.BATCH, groups, g)


@pytest.mark.parametrize(
  ("tiers", "optimizer", "nodes"),
  [
    pytest.param("mixed", "rowwise_adagrad", {}, marks=pytest.mark.slow),
    pytest.param("mixed", "adagrad", {}, marks=pytest.mark.slow),
    ("mixed", "adam", {}),
    pytest.param("cold", "adam", {}, marks=pytest.mark.slow),
    pytest.param("mixed", "adam", {"g": 4, **BOTH}, marks=pytest.mark.slow),
  ],
)
def test_tables_are_updated_in_place(tiers, optimizer, nodes):
  case = case_of(optimizer)
  plans = [big_plan(case, n, tiers, **nodes) for n in (1_000_000, 64_000_000)]
  check_in_place(case, plans)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("tiers", "nodes"), [("mixed", {}), ("mixed", {"g": 4, **BOTH})]
)
def test_tables_of_two_groups_are_updated_in_place(tiers, nodes):
  plans = [big_plan(TWO, n, tiers, **nodes) for n in (1_000_000, 64_000_000)]
  check_in_place(TWO, plans)


@pytest.mark.slow
@pytest.mark.xfail(
  jax.__version_info__ < (0, 11),
  strict=True,
  reason="XLA:CPU scattered bfloat16 through a float32 copy of the shard",
)
def test_bfloat16_tables_are_updated_in_place():
  part = TWO.parts[1]._replace(dtype="bfloat16")
  case = dense.Case((part,), TWO.features[1:2])
  plans = [big_plan(case, n, "mixed") for n in (1_000_000, 2_000_000)]
  check_in_place(case, plans)


@pytest.mark.slow
def test_replicas_gathered_are_updated_in_place():
  """Hot rows alone, as many as a device has: no copy of them is made."""
  part = dense.Part("g", ("a", "b", "c"), 203, DIM, "adam")
  plans = [
    Plan(
      8,
      dense.BATCH,
      (
        helpers.make_group(
          8,
          hot=rows,
          warm=0,
          capacity=8,
          hot_sync="all_gather",
          **part._asdict() | {"rows": rows},
        ),
      ),
    )
    for rows in (1_000_000, 8_000_000)
  ]
  check_in_place(case_of("adam"), plans)


# ---- What the compiled step sends


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [{}, {"g": 4, **BOTH}])
def test_bfloat16_exchange_sends_two_bytes(nodes):
  case = case_of("sgd")
  plan = big_plan(
    case, 203, "mixed", capacity=0, hot_sync="all_gather", **nodes
  )
  step, _ = compiled_step(case, plan, wire_dtype=jnp.bfloat16)
  of = re.findall(r"= \(?(\w+)\[.*? (all-to-all|all-gather)\(", step.as_text())
  assert {("u16", "all-to-all"), ("u16", "all-gather")} <= set(of)
  assert not {dtype for dtype, _ in of} & {"f32", "bf16"}


def wanted_exchanges(plan):
  """(kind, bytes, who takes part) of the exchanges of a round."""
  g = plan.node_devices or 8
  everyone, within, across = (
    tuple(x) for x in (range(8), range(g), range(0, 8, g))
  )
  want, ids = [], {}
  for group in plan.groups:
    row = 4 * group.dim
    for t in group.sharded:
      far, nodes = t.node_capacity, 8 // g
      peers, rows = within if far else everyone, t.owners * t.capacity
      ids[peers] = ids.get(peers, 0) + rows
      want += [("all-to-all", rows * row, peers)] * 2  # there and back
      if far and t.axes != (DEVICE,):
        ids[across] = ids.get(across, 0) + nodes * far
        want += [("all-to-all", nodes * far * row, across)] * 2
      elif far:
        want += [("all-gather", far * x, across) for x in (4, row)]
  # The ids of all groups and tiers go together.
  return want + [("all-to-all", 4 * rows, peers) for peers, rows in ids.items()]


WAYS = [(0, {}), (4, COPIES), (4, STAGES), (2, BOTH)]
BUFFERS = {"capacity": (7, 5), "node_capacity": (9, 11)}


@pytest.mark.slow
@pytest.mark.parametrize(("g", "way"), WAYS)
@pytest.mark.parametrize("case", [case_of("sgd"), TWO], ids=["one", "two"])
def test_buffers_on_the_wire_are_those_of_the_plan(case, g, way):
  """Every exchange of a step, its operands, who takes part, and between nodes
  the bytes of requests, rows and gradients."""
  plan = big_plan(case, 1_000_000, "mixed", g, **BUFFERS, **way)
  step, _ = compiled_step(case, plan, options=helpers.FAST)
  found = [
    c
    for c in compiled_collectives.of_step(step.as_text(), 8)
    if c.kind != "all-reduce" and not c.repeated
  ]
  sizes = [(c.kind, c.operand_bytes, c.groups[0]) for c in found]
  assert sorted(sizes) == sorted(wanted_exchanges(plan))
  if g:
    sent = traffic.network_bytes([part_of(x, plan) for x in plan.groups])
    sent.pop("hot gradients")  # all-reduced
    crossing = sum(c.sent(8, g) for c in found)
    assert crossing == pytest.approx(sum(sent.values()))


def part_of(group, plan) -> traffic.Part:
  """What the planner is told of a group's buffers."""
  row = 4 * group.dim
  shape = traffic.StepShape(
    8,
    plan.batch_size,
    3,
    group.dim,
    row,
    row,
    row,
    node_devices=plan.node_devices,
  )
  warm, cold = group.sharded
  between = lambda t: t.node_capacity * plan.nodes or None
  return traffic.Part(
    shape,
    traffic.Traffic(
      hot=0.0,
      warm=warm.owners * warm.capacity,
      cold=cold.owners * cold.capacity,
      inter_node_warm=between(warm),
      inter_node_cold=between(cold),
      copies=warm.axes == (DEVICE,),
    ),
  )
