"""Bags pooled at their tables' owners give what one dense table gives."""

import dense_reference as dense
import helpers
import pytest
from helpers_step import big_group, check_in_place

from recjax.plan.plan import Plan
from recjax.schema import Feature

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


@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "owners", "optimizer", "padding"), CASES
)
def test_equals_one_dense_table(
  devices, tiers, capacity, owners, optimizer, padding
):
  case, one_row = case_of(optimizer), capacity == "one_row"
  plan = plan_of(case, devices, tiers, int(one_row), owners, padding)
  dense.check(case, plan, overflows=one_row)


@pytest.mark.parametrize("way", [{}, {"two_stage": True}])
@pytest.mark.parametrize("capacity", [0, 1])
def test_several_nodes_equal_one_dense_table(way, capacity):
  case = case_of("adagrad")
  plan = plan_of(case, 8, "mixed", capacity, "uneven", node_devices=4, **way)
  assert plan.nodes == 2
  dense.check(case, plan, overflows=capacity == 1)


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
