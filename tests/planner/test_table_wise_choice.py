"""Table-wise tables are those of least cost; no owner's rows overflow."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers_planner import HUGE, solved
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.frequency import Profile
from recjax.plan import positions
from recjax.plan.plan import COLD, HOT, WARM, Plan
from recjax.planner import (
  buffer_sizes,
  choose_tables,
  frequency_buckets,
  presets,
)
from recjax.planner.describe import describe
from recjax.planner.frequency_buckets import Table
from recjax.planner.problem import Cuts, make_problem
from recjax.planner.table_wise import Placement


def problem_of(s, devices=8, batch=512, **changes):
  arguments = {
    "devices": devices,
    "batch_size": devices * batch,
    "lookups": sum(t.hotness for t in s.tables),
    "dim": 16,
    "dtype": "float32",
    "slot_bytes": 4,
    "topology": presets.get("dgx_h200", devices),
  }
  return make_problem(s, **(arguments | changes))


def tables_of(plan) -> tuple[tuple[str, int], ...]:
  """The table-wise tables of the plan's only group, and their owners."""
  return plan.groups[0].table_wise


# ---- The choice


@st.composite
def instances(draw):
  """Few tables, some with long bags, under any memory and machine."""
  tables = tuple(
    Table(
      f"t{i}",
      draw(st.sampled_from([1, 10, 1_000, 50_000, 2_000_000])),
      draw(st.sampled_from([1, 2, 5, 30, 100])),
      draw(st.sampled_from([1, 1, 1, 0])),
    )
    for i in range(draw(st.integers(1, 5)))
  )
  s = frequency_buckets.power_law(
    tables, draw(st.sampled_from([0.8, 1.05, 1.45]))
  )
  n = draw(st.sampled_from([2, 8, 16]))
  machine = draw(st.sampled_from(["cpu", "dgx_h200", "dgx_a100"]))
  t = presets.get(machine, n)
  slow = draw(st.sampled_from([1.0, 1e-3]))  # a network that is worth sparing
  return problem_of(
    s,
    n,
    draw(st.sampled_from([16, 512, 8_192])),
    dim=draw(st.sampled_from([8, 128])),
    topology=dataclasses.replace(t, link=t.link * slow),
    objective=draw(st.sampled_from(["time", "bytes"])),
    overflow_probability=draw(st.sampled_from([None, 1e-6])),
  ), draw(st.sampled_from([0.0, 0.3, 4.0]))


@settings(max_examples=60, deadline=None)
@given(instances())
def test_no_other_set_of_tables_is_cheaper(instance):
  problem, extra = instance
  rows, n = problem.profile.rows, problem.shape.devices
  most = int(-(-rows // n) * (1 + extra))
  placement = Placement(problem, Cuts(0, rows), most)
  price = lambda tables: problem.evaluate(placement.choice(tables).traffic)
  able = choose_tables.candidates(problem)
  every = itertools.chain.from_iterable(
    itertools.combinations(able, k) for k in range(len(able) + 1)
  )
  least = min(map(price, every))
  choice = choose_tables.choose(placement)
  assert problem.evaluate(choice.traffic) <= least * (1 + 1e-9)
  assert set(choice.owner) <= set(able)


@pytest.mark.parametrize("objective", ["time", "bytes"])
def test_cuts_and_tables_fit_each_other(objective):
  """Never worse than without table-wise tables, or with any given ones."""
  tables = (Table("a", 50_000, 60), Table("b", 9_000, 20), Table("c", 400, 1))
  s = frequency_buckets.power_law(tables, 1.05)
  slow = dataclasses.replace(presets.get("dgx_h200", 8), link=1e8, ring=1e8)
  problem = problem_of(s, objective=objective, topology=slow, dim=128)
  chosen = solved(problem)
  assert tables_of(chosen)
  price = (
    (lambda p: p.prediction.step_seconds)
    if objective == "time"
    else (lambda p: p.bytes_per_sample)
  )
  for names in itertools.chain.from_iterable(
    itertools.combinations("ab", k) for k in range(3)
  ):
    p = solved(problem, table_wise=names)
    assert {name for name, _ in tables_of(p)} == set(names)
    assert price(chosen) <= price(p) * (1 + 1e-9)
  assert Plan.from_json(chosen.to_json()) == chosen
  for name, owner in tables_of(chosen):
    assert f"{name} on {owner}" in describe(chosen)


def test_one_device_and_one_hot_tables_have_none_table_wise():
  long = frequency_buckets.power_law((Table("a", 50_000, 60),), 1.05)
  assert tables_of(solved(problem_of(long, 1))) == ()
  short = frequency_buckets.power_law((Table("a", 50_000), Table("b", 9)), 1.05)
  assert tables_of(solved(problem_of(short, objective="bytes"))) == ()
  list_ = frequency_buckets.power_law((Table("a", 50_000, 60, bags=0),), 1.05)
  assert tables_of(solved(problem_of(list_, objective="bytes"))) == ()


def test_shards_grow_for_a_large_table_only_where_there_is_memory():
  tables = (Table("a", 50_000, 60), Table("b", 50_000))
  problem = problem_of(
    frequency_buckets.power_law(tables, 1.05), objective="bytes"
  )
  roomy = solved(problem)
  stored = problem.shape.stored_bytes
  assert tables_of(roomy)
  assert roomy.groups[0].tier(WARM).shard_rows >= 50_000
  assert roomy.rows == 100_000
  fit = 20_000
  tight = solved(problem, device_bytes=fit * stored)
  (group,) = tight.groups
  held = group.rows_of(HOT) + group.tier(WARM).shard_rows
  assert group.padding_rows > 0 and held <= fit
  least = 100_000 // 8 * stored
  none = solved(problem, device_bytes=least + 100)
  assert none.groups[0].rows_of(COLD) > 0
  assert none.groups[0].padding_rows == 0
  # What the owner cannot hold travels row by row.
  sent = [p.bytes_per_sample for p in (roomy, tight, none)]
  assert sent == sorted(sent) and sent[0] < sent[1]


# ---- Buffers


def counted(hotness, rows=4_000, samples=3_000, seed=0):
  """A profile whose tables come in runs where counts are equal."""
  rng = np.random.default_rng(seed)
  counts = np.maximum((samples / np.arange(1, rows + 1) ** 1.1).astype(int), 1)
  table = rng.integers(0, len(hotness), rows).astype(np.int16)
  ends = np.flatnonzero(np.diff(counts)) + 1
  for a, b in itertools.pairwise([0, *ends.tolist(), rows]):
    table[a:b].sort()
  names = tuple(f"t{i}" for i in range(len(hotness)))
  return Profile(samples, names, counts, table)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize(
  ("table_wise", "cut", "memory"),
  [
    (("t0",), (0, 4_000), HUGE),
    (("t0",), (0, 4_000), 700),
    (("t0", "t2"), (7, 2_900), HUGE),
    (("t0", "t1", "t2"), (3, 3_997), 900),
  ],
)
def test_capacities_bound_every_owners_rows(devices, table_wise, cut, memory):
  hotness = (9, 1, 4, 1)
  profile = counted(hotness)
  problem = problem_of(
    frequency_buckets.of_profile(profile, hotness), devices, 100,
    overflow_probability=1e-3,
  )  # fmt: skip
  fit = max(cut[0] + -(-(cut[1] - cut[0]) // devices) + 20, memory)
  plan = solved(
    problem,
    device_bytes=fit * problem.shape.stored_bytes,
    hot_rows=cut[0],
    warm_rows=cut[1] - cut[0],
    table_wise=table_wise,
  )
  (group,) = plan.groups
  where = positions.of_groups(plan, profile)[group.name]
  ranks = np.arange(cut[0], cut[1])
  owner = (where.positions_of(ranks) - cut[0]) % devices
  h = np.array(hotness)[profile.table[ranks]]
  p = buffer_sizes.touch_probability(
    profile.counts[ranks] / profile.samples / h, h
  )
  pi = buffer_sizes.touch_probability(p, 100)
  owner_of = {profile.tables.index(t): o for t, o in group.table_wise}
  home = np.array([owner_of.get(t, -1) for t in profile.table[ranks]])
  alone = owner != home
  distinct = plan.report(group.name, WARM).distinct
  assert distinct == pytest.approx(pi[alone].sum(), rel=1e-3)
  each, needed = 1e-3 / (2 * devices * devices), []
  for o in range(devices):
    mine = pi[alone & (owner == o)]
    bound = buffer_sizes.capacity(mine.sum(), each, (mine * (1 - mine)).sum())
    needed.append(min(bound, len(mine)))
  assert max(needed) <= group.tier(WARM).capacity <= 1.1 * max(needed) + 8
