"""Cases of one group, by kind of features, and plans by their tiers."""

import dense_reference as dense
import helpers

from recjax.plan.plan import Plan
from recjax.schema import Feature

ROWS = 203
FEATURES = {
  "one_hot": (Feature("a", "a"), Feature("b", "b"), Feature("c", "c")),
  "multi_hot_mean": (
    Feature("a", "a"),
    Feature("bag", "b", hotness=4, pooling="mean"),
    Feature("list", "c", hotness=3, pooling="none"),
  ),
  "weighted": (
    Feature("a", "a", hotness=3, weighted=True),
    Feature("b", "b", hotness=4, pooling="mean", weighted=True),
  ),
  "shared_table": (
    Feature("a", "t", hotness=2),
    Feature("b", "t"),
    Feature("c", "t", hotness=3, pooling="mean"),
  ),
}
# hot and warm rows of a plan; the rest is cold
TIERS = {
  "hot": (ROWS, 0),
  "warm": (0, ROWS),
  "cold": (0, 0),
  "mixed": (10, 61),
  "hot_gathered": (ROWS, 0),
  "mixed_gathered": (10, 61),
}


def case_of(kind, optimizer="sgd", dtype="float32") -> dense.Case:
  """One group of all tables."""
  features = FEATURES[kind]
  names = tuple(dict.fromkeys(f.table for f in features))
  part = dense.Part("g", names, ROWS, 8, optimizer, dtype)
  return dense.Case((part,), features)


def plan_of(case, devices, tiers, capacity=0, *, visitors=None, **kw) -> Plan:
  """All groups of a case in the same tiers.

  Args:
    case: whose tables they are.
    devices: of the mesh.
    tiers: of TIERS.
    capacity: rows of each buffer for a peer; 0 = enough.
    visitors: rows of an owner's room to begin with, 0 = enough; None: capacity.
    **kw: of helpers.make_group.
  """
  hot, warm = TIERS[tiers]
  groups = tuple(
    helpers.make_group(
      devices,
      hot=hot,
      warm=warm,
      capacity=capacity,
      visitors=capacity if visitors is None else visitors,
      hot_sync="all_gather" if "gathered" in tiers else "all_reduce",
      **part._asdict(),
      **kw,
    )
    for part in case.parts
  )
  return Plan(devices, dense.BATCH, groups, kw.get("node_devices", 0))
