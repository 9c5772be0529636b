"""Plans read back equal from JSON; what they derive follows from the tiers."""

import json

import helpers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.plan.layout import shard_rows
from recjax.plan.plan import (
  COLD,
  HOT,
  TIERS,
  WARM,
  Group,
  Plan,
  Prediction,
  TierReport,
)
from recjax.schema import AXES, DEVICE

counts = st.integers(0, 2**31)
numbers = st.floats(0, 1e18) | counts
names = st.text(max_size=8)
terms = st.lists(st.tuples(names, numbers), max_size=3).map(tuple)
reports = st.builds(
  TierReport,
  names,
  st.sampled_from(TIERS),
  counts,
  counts,
  st.floats(0, 1),
  st.floats(0, 1e9),
  counts,
)


@st.composite
def groups(draw, name, devices, node_devices):
  rows = draw(st.integers(1, 10**6))
  hot = draw(st.integers(0, rows))
  warm = draw(st.integers(0, rows - hot))
  tables = draw(st.lists(names, min_size=1, max_size=4, unique=True))
  chosen = draw(st.lists(st.sampled_from(tables), max_size=4, unique=True))
  if not warm:
    chosen = []
  capacity = st.tuples(st.integers(1, 99), st.integers(1, 99))
  return helpers.make_group(
    devices,
    rows,
    hot,
    warm,
    name=name,
    tables=tuple(tables),
    dim=draw(st.integers(1, 512)),
    dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    optimizer=draw(st.sampled_from(["sgd", "adam", "rowwise_adagrad"])),
    capacity=draw(capacity),
    hot_sync=draw(st.sampled_from(["all_reduce", "all_gather"])),
    node_devices=node_devices,
    two_stage=bool(node_devices) and draw(st.booleans()),
    copies=bool(node_devices) and draw(st.booleans()),
    node_capacity=draw(capacity),
    table_wise=tuple((t, draw(st.integers(0, devices - 1))) for t in chosen),
    padding_rows=draw(st.integers(0, 99)) if chosen else 0,
  )


@st.composite
def plans(draw):
  node_devices = draw(st.sampled_from([0, 1, 2, 4]))
  devices = max(node_devices, 1) * draw(st.integers(1, 5))
  titles = draw(st.lists(names, min_size=1, max_size=3, unique=True))
  return Plan(
    devices,
    devices * draw(st.integers(1, 10**5)),
    tuple(draw(groups(name, devices, node_devices)) for name in titles),
    node_devices,
    Prediction(
      draw(names),
      draw(st.lists(reports, max_size=4).map(tuple)),
      *(draw(terms) for _ in range(4)),
    ),
  )


@settings(max_examples=200, deadline=None)
@given(plans())
def test_a_plan_reads_back_from_json(plan):
  text = plan.to_json()
  back = Plan.from_json(text)
  assert back == plan
  assert hash(back) == hash(plan)  # of a static argument
  assert back.to_json() == text
  assert text.endswith("}\n")


@settings(max_examples=200, deadline=None)
@given(plans())
def test_tiers_cover_a_group_in_rank_order(plan):
  assert plan.nodes * (plan.node_devices or plan.devices) == plan.devices
  assert plan.rows == sum(g.rows - g.padding_rows for g in plan.groups)
  for group in plan.groups:
    assert plan.group(group.name) is group
    at = 0
    for tier in group.tiers:
      assert tier.first == at
      assert tier.rows > 0
      at = tier.stop
      assert tier.owners * tier.shard_rows >= tier.rows
      assert group.tier(tier.name) is tier
      assert group.rows_of(tier.name) == tier.rows
    assert at == group.rows
    order = [TIERS.index(t.name) for t in group.tiers]
    assert order == sorted(set(order))
    for name in set(TIERS) - {t.name for t in group.tiers}:
      assert group.tier(name) is None
      assert group.rows_of(name) == 0
    assert group.hot == group.tier(HOT)
    assert group.stored == tuple(t for t in group.tiers if t.memory != "device")
    there = [t for t in group.on_device if t is not group.visitors]
    assert there == [t for t in group.tiers if t not in group.stored]
    assert group.sharded == tuple(t for t in group.on_device if t.name != HOT)
    wise = group.tier(WARM) if group.table_wise else None
    assert group.table_wise_tier == wise
    for tier in group.tiers:  # padding rows come last among the warm ones
      before = group.padding_rows if tier.name == COLD else 0
      assert group.first_rank(tier) == tier.first - before


@settings(max_examples=50, deadline=None)
@given(plans())
def test_what_is_predicted_adds_up(plan):
  p, n = plan.prediction, plan.devices
  assert p.step_seconds == pytest.approx(sum(x for _, x in p.seconds))
  travelling = [t.distinct for t in p.tiers if t.tier != HOT]
  assert p.distinct_rows == pytest.approx(sum(travelling))
  for terms, got in (
    (p.sent, plan.bytes_per_sample),
    (p.network, plan.network_bytes_per_sample),
  ):
    total = sum(x for _, x in terms)
    assert got == pytest.approx(total * n / plan.batch_size)
  for t in p.tiers:
    first = next(x for x in p.tiers if (x.group, x.tier) == (t.group, t.tier))
    assert plan.report(t.group, t.tier) is first
  assert plan.report("\0 no group", HOT) is None


def test_tiers_by_hand():
  group = helpers.make_group(
    8,
    1_000,
    10,
    300,
    capacity=(5, 7),
    node_devices=4,
    two_stage=True,
    copies=True,
    node_capacity=(9, 11),
  )
  hot, warm, cold = group.tiers
  assert (hot.axes, hot.owners, hot.shard_rows) == ((), 1, 10)
  assert (warm.axes, warm.owners) == ((DEVICE,), 4)
  assert (cold.axes, cold.owners) == (AXES, 8)
  assert warm.shard_rows == shard_rows(300, 4) == 75
  assert (warm.first, warm.stop, cold.first, cold.stop) == (10, 310, 310, 1_000)
  assert (hot.memory, warm.memory, cold.memory) == ("device", "device", "host")
  visitors = group.visitors
  assert group.on_device == (hot, warm, visitors)
  assert (visitors.first, visitors.owners, visitors.axes) == (310, 8, AXES)
  assert visitors.shard_rows == cold.shard_rows  # all of them may visit
  assert (hot.capacity, warm.capacity, visitors.capacity) == (0, 5, 7)
  assert [t.node_capacity for t in group.on_device] == [0, 9, 11]


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (lambda d: d.pop("groups"), KeyError),
    (lambda d: d.pop("prediction"), KeyError),
    (lambda d: d.pop("devices"), TypeError),
    (lambda d: d.update(rows=9), TypeError),
    (lambda d: d["groups"][0].pop("tiers"), KeyError),
    (lambda d: d["groups"][0].update(hot=9), TypeError),
    (lambda d: d["groups"][0]["tiers"][0].pop("shard_rows"), TypeError),
    (lambda d: d["groups"][0]["tiers"][0].pop("axes"), KeyError),
  ],
)
def test_other_json_is_an_error(change, error):
  found = json.loads(helpers.make_plan(2, 9, 1, 7).to_json())
  change(found)
  with pytest.raises(error):
    Plan.from_json(json.dumps(found))


def test_a_group_of_no_tier_has_no_rows():
  group = Group("g", ("t",), 8, "float32", "sgd", ())
  assert (group.rows, group.hot, group.sharded) == (0, None, ())
