"""Every placement, mesh and capacity equals one dense table on one device."""

import dataclasses
import itertools

import dense_reference as dense
import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_cases import FEATURES, ROWS, TIERS, case_of, plan_of

# ---- Four optimizers at once: a group each, with features of another kind

DIMS = (8, 4, 16, 8)
LEFT_OUT = {
  *((devices, "hot", "one_row") for devices in (1, 2, 8)),  # no row travels
  (2, "hot_gathered", "planned"),
  (2, "mixed_gathered", "one_row"),
  # Two devices are as eight, with buffers that overflow or do not.
  *((2, tiers, "planned") for tiers in ("warm", "cold")),
}
CASES = [
  case
  for case in itertools.product((1, 2, 8), TIERS, ("planned", "one_row"))
  if case not in LEFT_OUT
]
# The others: every mesh, tier and buffer is there, but not each with each.
FAST_LANE = {
  (1, "hot", "planned"),
  (1, "mixed_gathered", "one_row"),
  (2, "warm", "one_row"),
  (2, "mixed", "planned"),
  (8, "cold", "planned"),
  (8, "mixed", "one_row"),
  (8, "hot_gathered", "one_row"),
}


def kinds_of(devices, tiers, capacity) -> dict[str, str]:
  """The kind of features of each optimizer's group in a case.

  Together the cases of a tier pair each optimizer with each kind.
  """
  shift = {1: 0, 2: 1, 8: 3}[devices] + list(TIERS).index(tiers)
  shift += 2 * (capacity == "one_row")
  kinds = [*FEATURES, *FEATURES]
  return {o: kinds[(i + shift) % 4] for i, o in enumerate(dense.OPTIMIZERS)}


def case_of_four(kinds: dict[str, str]) -> dense.Case:
  """A group an optimizer; tables and features are named after it."""
  parts, features = [], []
  for dim, (optimizer, kind) in zip(DIMS, kinds.items(), strict=True):
    mine = [
      dataclasses.replace(
        f, name=f"{optimizer}_{f.name}", table=f"{optimizer}_{f.table}"
      )
      for f in FEATURES[kind]
    ]
    names = tuple(dict.fromkeys(f.table for f in mine))
    parts.append(dense.Part(optimizer, names, ROWS, dim, optimizer))
    features += mine
  # Columns of the groups take turns.
  features.sort(key=lambda f: f.name[::-1])
  return dense.Case(tuple(parts), tuple(features))


@pytest.mark.parametrize(
  ("devices", "tiers", "capacity"),
  [
    pytest.param(*c, marks=[] if c in FAST_LANE else [pytest.mark.slow])
    for c in CASES
  ],
)
def test_equals_dense_tables(devices, tiers, capacity):
  case = case_of_four(kinds_of(devices, tiers, capacity))
  one_row = capacity == "one_row"
  # A room of one row grows thrice, and each size is compiled: cold rows alone
  # show that, and test_visiting.py.
  visitors = int(one_row and tiers == "cold")
  plan = plan_of(case, devices, tiers, int(one_row), visitors=visitors)
  state = dense.check(case, plan, overflows=one_row)
  helpers.check_copies(state.tables)


def test_the_cases_pair_all_that_may_differ():
  """And each tier with each pair of an optimizer and a kind."""
  runs = [
    (*c, optimizer, kind)
    for c in CASES
    for optimizer, kind in kinds_of(*c).items()
  ]
  values = [sorted(set(x), key=str) for x in zip(*runs, strict=True)]
  assert [len(x) for x in values] == [3, 6, 2, 4, 4]
  for i, j in itertools.combinations(range(5), 2):
    seen = {(r[i], r[j]) for r in runs}
    wanted = set(itertools.product(values[i], values[j]))
    assert wanted - seen <= {("hot", "one_row")}
  for tiers in set(TIERS) - {"hot"}:
    assert len({r[3:] for r in runs if r[1] == tiers}) == 16


# One group: its columns and ids are the batch's, as they are.
ALONE = [
  (8, "mixed", "planned", "one_hot", "rowwise_adagrad"),
  (8, "mixed", "one_row", "multi_hot_mean", "adam"),
  (2, "warm", "one_row", "weighted", "adagrad"),
  (1, "cold", "planned", "shared_table", "sgd"),
]


@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "kind", "optimizer"), ALONE
)
def test_one_group_equals_one_dense_table(
  devices, tiers, capacity, kind, optimizer
):
  case, one_row = case_of(kind, optimizer), capacity == "one_row"
  plan = plan_of(case, devices, tiers, int(one_row))
  dense.check(case, plan, overflows=one_row)


@pytest.mark.slow
def test_compiled_as_users_do_it_equals_dense_tables():
  """The cases above are compiled without most optimizations."""
  case = case_of_four(kinds_of(8, "mixed", "one_row"))
  plan = plan_of(case, 8, "mixed", 1, visitors=0)
  dense.check(case, plan, overflows=True, options=helpers.OPTIMIZED)


# ---- Several nodes

# Devices of a node, transport, and the buffers' rows (0: enough for all).
COPIES, STAGES = {"copies": True}, {"two_stage": True}
BOTH = COPIES | STAGES
NODES = [
  (4, COPIES, "mixed", 0, "adam"),
  (4, STAGES, "mixed", 0, "adagrad"),
  (4, STAGES, "mixed", 1, "adam"),
  (4, BOTH, "mixed_gathered", 1, "rowwise_adagrad"),
  (2, COPIES, "warm", 1, "adam"),
  (2, BOTH, "mixed", 2, "adagrad"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("g", "way", "tiers", "capacity", "optimizer"), NODES)
def test_several_nodes_equal_one_dense_table(
  g, way, tiers, capacity, optimizer
):
  case = case_of("shared_table", optimizer)
  plan = plan_of(case, 8, tiers, capacity, node_devices=g, **way)
  state = dense.check(case, plan, overflows=capacity > 0)
  helpers.check_copies(state.tables)


# ---- Fewer bits


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [{}, {"node_devices": 2, **BOTH}])
def test_bfloat16_exchange_stays_close(nodes):
  case = case_of("one_hot")
  plan = plan_of(case, 8, "mixed", **nodes)
  _, run, _ = dense.train(case, plan, wire_dtype=jnp.bfloat16)
  rows = dense.wanted(case)[1][0]["g"][0]
  got = dense.by_rank(case, run)["g"].rows
  assert not np.array_equal(got, rows)
  np.testing.assert_allclose(got, rows, atol=2e-2)
  helpers.check_copies(run.state.tables)


@pytest.mark.slow
@pytest.mark.parametrize("tiers", ["hot", "warm", "cold", "copies"])
def test_bfloat16_rows_are_the_same_on_every_mesh_and_near_float32(tiers):
  got = []
  nodes = {"node_devices": 4, **BOTH} if tiers == "copies" else {}
  tiers = "warm" if tiers == "copies" else tiers
  case = case_of("one_hot", dtype="bfloat16")
  for devices in (1, 8):
    plan = plan_of(case, devices, tiers, **(nodes if devices > 1 else {}))
    _, run, _ = dense.train(case, plan)
    got.append(dense.by_rank(case, run)["g"].rows.astype(np.float32))
  # A rare sum on a rounding edge may fall to the other side.
  assert np.mean(got[0] != got[1]) < 0.01
  rows = dense.wanted(case_of("one_hot"))[1][0]["g"][0]
  np.testing.assert_allclose(got[0], rows, atol=3e-2)
