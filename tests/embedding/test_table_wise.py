"""Bags pooled at their tables' owners give what one dense table gives."""

import dataclasses

import dense_reference as dense
import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_step import big_group, check_in_place, compiled_step

from recjax.plan.plan import Plan
from recjax.planner import compiled_collectives, frequency_buckets, solve
from recjax.planner.problem import make_problem
from recjax.schema import Feature, TableGroup

ROWS = 203
FEATURES = (
  Feature("one", "a"),
  Feature("sum", "b", hotness=5),
  Feature("mean", "c", hotness=3, pooling="mean"),
  Feature("again", "b", hotness=2, pooling="mean"),
  Feature("list", "d", hotness=2, pooling="none"),
  Feature("alone", "e"),
)
# tables and their owners, for 8 devices; fewer take them modulo
OWNERS = {
  "one": (("b", 3),),
  "one_owner": (("b", 1), ("c", 1)),
  "uneven": (("b", 0), ("c", 5), ("e", 5)),
}
# hot and warm rows of a plan; the rest is cold
TIERS = {"warm": (0, ROWS), "mixed": (10, 61), "mixed_gathered": (10, 61)}


def case_of(optimizer) -> dense.Case:
  """One group of five tables."""
  part = dense.Part("g", tuple("abcde"), ROWS, 8, optimizer)
  return dense.Case((part,), FEATURES)


def plan_of(case, devices, tiers, capacity, owners, padding=0, **kw) -> Plan:
  """All groups in the same tiers; those that have the tables own them."""
  hot, warm = TIERS[tiers]
  groups = []
  for part in case.parts:
    mine = tuple(
      (name, owner % devices)
      for name, owner in OWNERS[owners]
      if name in part.tables
    )
    groups.append(
      helpers.make_group(
        devices,
        hot=hot,
        warm=warm,
        capacity=capacity,
        hot_sync="all_gather" if "gathered" in tiers else "all_reduce",
        table_wise=mine,
        padding_rows=padding if mine else 0,
        **part._asdict(),
        **kw,
      )
    )
  return Plan(devices, dense.BATCH, tuple(groups), kw.get("node_devices", 0))


CASES = [
  (1, "mixed", "planned", "uneven", "adagrad", 0),
  (2, "mixed_gathered", "one_row", "one_owner", "adagrad", 0),
  (8, "warm", "planned", "one", "adagrad", 0),
  (8, "mixed", "planned", "uneven", "adagrad", 0),
  (8, "mixed", "one_row", "uneven", "adagrad", 14),
  *((2, "warm", "planned", "uneven", name, 14) for name in dense.OPTIMIZERS),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "owners", "optimizer", "padding"), CASES
)
def test_equals_one_dense_table(
  devices, tiers, capacity, owners, optimizer, padding
):
  case, one_row = case_of(optimizer), capacity == "one_row"
  plan = plan_of(case, devices, tiers, int(one_row), owners, padding)
  dense.check(case, plan, overflows=one_row)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"two_stage": True}])
@pytest.mark.parametrize("capacity", [0, 1])
def test_several_nodes_equal_one_dense_table(way, capacity):
  case = case_of("adagrad")
  plan = plan_of(case, 8, "mixed", capacity, "uneven", node_devices=4, **way)
  assert plan.nodes == 2
  dense.check(case, plan, overflows=capacity == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "owners", "padding"),
  [
    (2, "mixed", 1, "uneven", 14),
    (8, "mixed_gathered", 0, "uneven", 0),
    (8, "warm", 0, "one", 9),
  ],
)
def test_groups_with_tables_of_their_own_equal_dense_tables(
  devices, tiers, capacity, owners, padding
):
  """Both groups have table-wise tables, or one of them has."""
  case = dense.Case(
    (
      dense.Part("narrow", ("a", "b"), ROWS, 4, "adagrad"),
      dense.Part("wide", ("c", "d", "e"), ROWS, 16, "adam"),
    ),
    FEATURES,
  )
  plan = plan_of(case, devices, tiers, capacity, owners, padding)
  assert [bool(g.table_wise) for g in plan.groups] == [True, owners != "one"]
  dense.check(case, plan, overflows=capacity == 1)


# ---- What travels


def planned(devices, dtype) -> Plan:
  """A plan of counted rows, some hot, and one round for any batch."""
  profile = dense.profile_of(case_of("adagrad"))
  counts = np.maximum(2_000 // np.arange(1, ROWS + 1), 1)
  profile = dataclasses.replace(profile, samples=1_000, counts=counts)
  problem = make_problem(
    frequency_buckets.of_profile(profile, (1, 7, 3, 2, 1), (1, 2, 1, 0, 1)),
    devices=devices,
    batch_size=max(dense.BATCH, devices),
    lookups=14,
    dim=8,
    dtype="float32",
    slot_bytes=4 * 8,
    exchange_dtype=dtype,
  )
  group = TableGroup("g", tuple("abcde"), 8, "float32", "adagrad", 0.1)
  return solve.solve(
    [problem],
    [group],
    hosts=1,
    device_bytes=1 << 30,
    host_bytes=1 << 30,
    hot_rows=6,
    warm_rows=100,
    capacity=ROWS,
    table_wise=("b", "c"),
  )


def check_sent(devices, dtype):
  """What a plan sends of rows and vectors equals the collectives' bytes."""
  plan = planned(devices, dtype)
  assert [name for name, _ in plan.groups[0].table_wise] == ["b", "c"]
  step, _ = compiled_step(
    case_of("adagrad"),
    plan,
    options=helpers.FAST,
    wire_dtype=jnp.dtype(dtype),
  )
  sent = dict(plan.prediction.sent)
  want = sum(sent[k] for k in sent if k not in ("host", "hot gradients"))
  assert sent["table-wise ids"] > 0
  found = compiled_collectives.of_step(step.as_text(), devices)
  kinds = ("all-to-all", "collective-permute")
  got = sum(c.sent(devices) for c in found if c.kind in kinds)
  assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "dtype"), [(2, "float32"), (8, "bfloat16")]
)
def test_the_compiled_step_sends_what_the_plan_says(devices, dtype):
  check_sent(devices, dtype)


@pytest.mark.slow
def test_on_64_devices():
  helpers.on_64_devices(__file__, "t.check_sent(64, 'float32')")


# ---- What it costs


@pytest.mark.slow
def test_tables_are_updated_in_place():
  case = case_of("adam")
  plans = [
    Plan(
      8,
      dense.BATCH,
      (
        big_group(
          8,
          rows,
          "warm",
          case.parts[0],
          table_wise=OWNERS["uneven"],
          capacity=1,
        ),
      ),
    )
    for rows in (1_000_000, 16_000_000)
  ]
  check_in_place(case, plans)
