"""Several groups of tables equal as many dense tables on one device."""

import itertools

import dense_reference as dense
import helpers
import jax
import numpy as np
import pytest

from recjax.plan.plan import Plan
from recjax.schema import Feature

FEATURES = {
  "one_hot": (
    Feature("a", "small"),
    Feature("b", "large"),
    Feature("c", "small"),
    Feature("d", "middle"),
    Feature("e", "large"),
  ),
  "bags": (
    Feature("a", "large", hotness=4, pooling="mean"),
    Feature("b", "small", hotness=2, weighted=True),
    Feature("list", "large", hotness=3, pooling="none"),
    Feature("d", "middle", hotness=3),
    Feature("c", "small"),
  ),
}
PARTS = (
  dense.Part("narrow", ("small",), 37, 4, "adagrad"),
  dense.Part("wide", ("large",), 151, 16, "adam"),
  dense.Part("row", ("middle",), 60, 8, "rowwise_adagrad"),
)
TWO = (
  dense.Part("narrow", ("small", "middle"), 61, 4, "rowwise_adagrad"),
  dense.Part("wide", ("large",), 151, 16, "adagrad"),
)
# Of each group (hot, warm) rows, and how the hot ones' gradients meet.
TIERS = {
  "mixed": (((5, 20), (9, 70), (0, 25)), "all_reduce"),
  "gathered": (((5, 20), (9, 70), (7, 25)), "all_gather"),
  # A group of replicas, one on the host, one in the devices' memory.
  "apart": (((37, 0), (0, 0), (0, 60)), "all_reduce"),
}


def plan_of(case, devices, tiers, capacity=0, **nodes) -> Plan:
  cuts, sync = TIERS[tiers]
  groups = []
  for part, (hot, warm) in zip(case.parts, cuts, strict=False):
    hot = min(hot, part.rows)
    groups.append(
      helpers.make_group(
        devices,
        part.rows,
        hot,
        min(warm, part.rows - hot),
        name=part.name,
        tables=part.tables,
        dim=part.dim,
        dtype=part.dtype,
        optimizer=part.optimizer,
        hot_sync=sync,
        capacity=capacity,
        **nodes,
      )
    )
  nodes = nodes.get("node_devices", 0)
  return Plan(devices, dense.BATCH, tuple(groups), nodes)


def pairwise():
  """Nine cases in which every pair of what may differ occurs."""
  for (i, devices), (j, tiers) in itertools.product(
    enumerate((1, 2, 8)), enumerate(TIERS)
  ):
    kind = [*FEATURES][(i + j) % 2]
    yield devices, tiers, int((i - j) % 3 == 1), kind


def test_the_cases_pair_all_that_may_differ():
  columns = [*zip(*pairwise(), strict=True)]
  for a, b in itertools.combinations(columns, 2):
    wanted = itertools.product(set(a), set(b))
    assert set(zip(a, b, strict=True)) == set(wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "tiers", "capacity", "kind"), [*pairwise()]
)
def test_three_groups_equal_three_dense_tables(devices, tiers, capacity, kind):
  case = dense.Case(PARTS, FEATURES[kind])
  plan = plan_of(case, devices, tiers, capacity)
  dense.check(case, plan, overflows=capacity > 0)


@pytest.mark.parametrize(
  ("devices", "kind"), [(1, "bags"), (8, "one_hot"), (8, "bags")]
)
def test_two_groups_equal_two_dense_tables(devices, kind):
  case = dense.Case(TWO, FEATURES[kind])
  dense.check(case, plan_of(case, devices, "mixed"), overflows=False)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("nodes", "capacity"),
  [
    ({"node_devices": 4, "two_stage": True}, 0),
    ({"node_devices": 2, "copies": True}, 1),
    ({"node_devices": 4, "two_stage": True, "copies": True}, 2),
  ],
)
def test_groups_on_several_nodes_equal_dense_tables(nodes, capacity):
  case = dense.Case(PARTS, FEATURES["bags"])
  plan = plan_of(case, 8, "gathered", capacity, **nodes)
  state = dense.check(case, plan, overflows=capacity > 0)
  helpers.check_copies(state.tables)


def test_a_group_of_bfloat16_rows_beside_one_of_float32():
  """Rounded rows stay near the reference; the others' dtypes are theirs."""
  features = FEATURES["one_hot"]
  coarse = dense.Part("wide", ("large",), 151, 16, "sgd", "bfloat16")
  case = dense.Case((TWO[0], coarse), features)
  run = dense.train(case, plan_of(case, 8, "mixed"))[1]
  got = dense.by_rank(case, run)
  assert got["wide"].rows.dtype == "bfloat16"
  assert got["narrow"].rows.dtype == "float32"
  exact = case._replace(parts=(TWO[0], coarse._replace(dtype="float32")))
  for name, (rows, _) in dense.wanted(exact)[1][0].items():
    np.testing.assert_allclose(
      got[name].rows.astype(np.float32), rows, atol=3e-2
    )


def test_a_step_moves_nothing_from_the_host():
  """What is not on the devices already is refused, as in all these tests."""
  case = dense.Case(TWO, FEATURES["one_hot"])
  run = dense.build(case, plan_of(case, 2, "mixed"))
  batch = next(dense.batches(case))
  with (
    jax.transfer_guard("disallow"),
    pytest.raises(Exception, match=r"Disallowed host-to-device transfer"),
  ):
    run.step(run.state, batch)


def test_groups_begin_with_other_rows():
  """Rows of equal rank in two groups of one dim are not alike."""
  parts = tuple(p._replace(dim=8) for p in TWO)
  case = dense.Case(parts, FEATURES["one_hot"])
  first, _ = dense.wanted(case)
  narrow, wide = (first[p.name][:61] for p in parts)
  assert np.abs(np.corrcoef(narrow.ravel(), wide.ravel())[0, 1]) < 0.2
  assert not np.any(narrow == wide)
