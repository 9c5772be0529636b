"""Plans of small random profiles, and every error's way out."""

import dataclasses
import re

import numpy as np
import pytest
from helpers_planner import HUGE, planned, profile_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.plan.plan import COLD, HOT, TIERS, WARM, Plan
from recjax.planner import buffer_sizes, presets, transport
from recjax.planner.describe import describe
from recjax.planner.host_path import HIDDEN
from recjax.schema import AXES

MB = 1 << 20


def power_law(rows, samples=10_000) -> Profile:
  ranks = np.arange(1, rows + 1)
  return profile_of(samples * 0.5 / ranks**1.1, samples)


def make(profile, **changes) -> Plan:
  arguments = {
    "devices": 8,
    "hosts": 1,
    "batch_size": 64,
    "lookups": 3,
    "dim": 8,
    "dtype": "float32",
    "slot_bytes": 4,
    "device_bytes": HUGE,
    "host_bytes": HUGE,
  }
  return planned(profile, **(arguments | changes))


def error_of(profile, **changes) -> str:
  with pytest.raises(UserError) as e:
    make(profile, **changes)
  assert "\n" not in str(e.value)
  return str(e.value)


@st.composite
def cases(draw):
  """(profile, arguments) in which everything fits the hosts."""
  counts = draw(st.lists(st.integers(0, 1_000), min_size=1, max_size=300))
  profile = profile_of(counts, draw(st.integers(1, 1_000)))
  n = draw(st.sampled_from([1, 2, 3, 8]))
  dim = draw(st.sampled_from([1, 8, 16]))
  dtype = draw(st.sampled_from(["float32", "bfloat16"]))
  slots = draw(st.sampled_from([0, 4, 4 * dim, 8 * dim]))
  row_bytes = dim * (4 if dtype == "float32" else 2) + slots
  room = draw(st.integers(0, 400)) * row_bytes
  return profile, {
    "devices": n,
    "batch_size": n * draw(st.integers(1, 40)),
    "lookups": draw(st.integers(1, 5)),
    "dim": dim,
    "dtype": dtype,
    "slot_bytes": slots,
    "device_bytes": room + draw(st.integers(0, row_bytes - 1)),
    "capacity": draw(st.sampled_from([0, 0, 1, 7, 30])),
    "topology": nodes_of(n, draw(st.sampled_from([n, n, 1, 2, 4]))),
  }


def nodes_of(devices, node_devices):
  t = presets.cpu(devices)
  return dataclasses.replace(t, node_devices=node_devices)


def row_bytes_of(arguments) -> int:
  width = 4 if arguments["dtype"] == "float32" else 2
  return arguments["dim"] * width + arguments["slot_bytes"]


def rows_of(p) -> tuple[int, int, int]:
  """(hot, warm, cold) rows of the plan's only group; none are frozen."""
  return tuple(p.groups[0].rows_of(name) for name in (HOT, WARM, COLD))


def held_by_a_device(p) -> int:
  """Rows of a device's replicas and warm shard."""
  tiers = [t for t in p.groups[0].tiers if t.memory == "device"]
  return sum(t.shard_rows for t in tiers)


def shard_of(p, name) -> int:
  tier = p.groups[0].tier(name)
  return tier.shard_rows if tier else 0


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([1e-9, 1e-3, 0.5]))
def test_a_plan_is_consistent_and_fits(case, chance):
  profile, arguments = case
  p = make(profile, **arguments, overflow_probability=chance)
  n, local = p.devices, p.batch_size // p.devices
  row_bytes = row_bytes_of(arguments)
  fit = arguments["device_bytes"] // row_bytes
  (group,) = p.groups
  assert group.rows == p.rows == profile.rows
  firsts = np.cumsum([0, *(t.rows for t in group.tiers)])
  assert [t.first for t in group.tiers] == firsts[:-1].tolist()
  assert min(t.rows for t in group.tiers) > 0

  way = transport.of_group(group)
  # Shards hold their rows, padded by little, within the budget.
  assert [t.capacity for t in group.stored] == [0] * len(group.stored)
  for tier in (*group.sharded, *group.stored):
    each = -(-tier.rows // tier.owners)
    assert tier.owners == n or way.copies
    assert each <= tier.shard_rows <= each * (1 + 1 / 128)
  assert group.hot is None or group.hot.shard_rows == group.hot.rows
  assert held_by_a_device(p) <= fit
  assert p.nodes > 1 or way == transport.FLAT
  hot, warm, cold = rows_of(p)
  if cold and warm and not way.copies:  # what fits is used: no more would
    assert held_by_a_device(p) >= (fit - hot) * 127 // 128

  # A buffer never holds more than can be asked of it, and never nothing.
  for tier in group.sharded:
    most = min(-(-tier.rows // tier.owners), local * arguments["lookups"])
    assert 1 <= tier.capacity <= most
    united = way.two_stage or (way.copies and tier.name == WARM)
    least = int(united)
    assert least <= tier.node_capacity <= least * tier.capacity * n // p.nodes
    if arguments["capacity"]:
      assert tier.capacity == min(arguments["capacity"], most)

  reports = {r.tier: r for r in p.prediction.tiers}
  assert list(reports) == [t.name for t in group.tiers]
  assert [r.rows for r in reports.values()] == [t.rows for t in group.tiers]
  for tier in group.tiers:
    shards = n if tier.memory == "host" else 1
    assert reports[tier.name].bytes == tier.shard_rows * shards * row_bytes
  shares = sum(r.share for r in reports.values())
  assert shares == pytest.approx(1 if profile.accesses else 0)
  touched = buffer_sizes.touch_probability(profile.frequencies(), local)
  for tier in group.tiers:
    distinct = touched[tier.first : tier.stop].sum()
    assert reports[tier.name].distinct == pytest.approx(distinct)
  assert HOT not in reports or reports[HOT].buffer_bytes == 0

  assert Plan.from_json(p.to_json()) == p
  text = describe(p)
  for name in TIERS:
    (line,) = re.findall(rf"^{name} .*$", text, re.M)
    assert f" {p.groups[0].rows_of(name):,} " in line


@settings(max_examples=60, deadline=None)
@given(cases())
def test_as_many_visitors_as_any_owner_has(case):
  """Cyclic in rank: the owner of the first stored row has the most."""
  profile, arguments = case
  p = make(profile, **arguments, overflow_probability=1e-3)
  (group,) = p.groups
  if not group.stored:
    assert group.visitors is None
    return
  visitors, first = group.visitors, group.stored[0].first
  v, n = visitors.shard_rows, p.devices
  assert visitors.first == first and visitors.rows == n * v
  assert (visitors.owners, visitors.axes) == (n, AXES)
  assert 1 <= visitors.capacity <= v <= -(-(p.rows - first) // n)
  touched = buffer_sizes.touch_probability(
    profile.frequencies()[first:], p.batch_size
  )
  of_owner = touched[0::n]
  enough = buffer_sizes.capacity(
    of_owner.sum(), 1e-3 / n, (of_owner * (1 - of_owner)).sum()
  )
  most = min(len(of_owner), p.batch_size * arguments["lookups"])
  assert v >= min(enough, most)  # whatever a round's buffers hold
  assert p.with_visitors({group.name: v}) == p


@settings(max_examples=60, deadline=None)
@given(cases())
def test_more_device_memory_is_never_slower(case):
  profile, arguments = case
  now = make(profile, **arguments, overflow_probability=None)
  larger = arguments | {"device_bytes": 2 * arguments["device_bytes"]}
  later = make(profile, **larger, overflow_probability=None)
  if not arguments["capacity"]:
    # A tier of rows that are never used counts a 1e-9th row.
    before, after = (
      x.prediction.step_seconds
      + HIDDEN * sum(seconds for _, seconds in x.prediction.host_seconds)
      for x in (now, later)
    )
    assert after <= before * (1 + 1e-9) + 1e-8


def test_planned_capacities_bound_every_owners_mean():
  """Owner 0 has the hottest row of a tier, and so more than its n-th part."""
  profile = power_law(10_000)
  cuts = {"hot_rows": 0, "warm_rows": 4, "lookups": 1_000}
  p = make(profile, overflow_probability=1e-3, **cuts, batch_size=8_000)
  touched = buffer_sizes.touch_probability(profile.frequencies(), 1_000)
  each = 1e-3 / (2 * 8 * 8)  # a tier, device and peer
  capacity = lambda p: p.groups[0].visitors.capacity
  assert p.groups[0].tier(WARM).capacity == 1
  owners = [touched[4 + k :: 8] for k in range(8)]
  means = [x.sum() for x in owners]
  spreads = [(x * (1 - x)).sum() for x in owners]
  for mean, spread in zip(means, spreads, strict=True):
    assert capacity(p) >= buffer_sizes.capacity(mean, each, spread)
  most = buffer_sizes.capacity(max(means) + 1, each)
  assert capacity(p) <= most < 1_250
  assert max(means) > touched[4:].sum() / 8 + 0.2
  loose = make(profile, overflow_probability=0.9, **cuts, batch_size=8_000)
  assert capacity(loose) < capacity(p)


@pytest.mark.parametrize(
  ("hot", "warm", "want"),
  [
    (0, 0, (0, 0)),
    (7, 0, (7, 7)),
    (0, 50, (0, 50)),
    (7, 50, (7, 57)),
    (1_000, 5, (203, 203)),  # all rows
    (3, 1_000, (3, 203)),
  ],
)
def test_explicit_cuts_are_kept(hot, warm, want):
  p = make(power_law(203), hot_rows=hot, warm_rows=warm)
  assert tuple(np.cumsum(rows_of(p))[:2]) == want


def test_one_explicit_cut_leaves_the_other_planned():
  row = 8 * 4 + 4
  tight = {"device_bytes": 5 * row}
  p = make(power_law(203), warm_rows=8, **tight)
  hot, warm, _ = rows_of(p)
  assert warm == 8
  assert hot <= 4
  assert rows_of(make(power_law(203), hot_rows=3, **tight))[0] == 3


# ---- Errors: which budget, by how much, and a way out that works


@pytest.mark.parametrize(
  ("batch", "near"), [(63, 64), (1, 8), (12, 16), (13, 16), (65, 64)]
)
def test_batch_that_does_not_divide(batch, near):
  message = error_of(power_law(100), batch_size=batch)
  assert message.startswith(f"train.batch_size: {batch} samples")
  assert "8 devices" in message
  assert message.endswith(f"the nearest multiple is {near}")
  make(power_law(100), batch_size=near)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 199), st.sampled_from([2, 8]))
def test_too_many_hot_rows(fit, devices):
  profile = power_law(200)
  tight = {"devices": devices, "device_bytes": fit * 36 + 5}
  message = error_of(profile, hot_rows=fit + 1, **tight)
  assert message.startswith(f"plan.hot_rows: {fit + 1} replicated rows")
  assert "plan.device_memory_mb" in message
  most = int(re.search(r"at most (\d+) fit", message)[1])
  assert most == fit
  assert rows_of(make(profile, hot_rows=most, **tight))[0] == most


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(0, 20), st.sampled_from([1, 2, 8]))
def test_too_many_warm_rows(fit, hot, devices):
  profile = power_law(4_000)
  hot = min(hot, fit)
  tight = {
    "devices": devices,
    "device_bytes": fit * 36 + 5,
    "hot_rows": hot,
  }
  message = error_of(profile, warm_rows=4_000 - hot, **tight)
  assert message.startswith(f"plan.warm_rows: {4_000 - hot} rows")
  assert "plan.device_memory_mb" in message
  most = int(re.search(r"at most (\d+) fit", message)[1])
  p = make(profile, warm_rows=most, **tight)
  assert rows_of(p)[1] == most
  assert held_by_a_device(p) <= fit
  error_of(profile, warm_rows=most + 1, **tight)


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1_000, 60_000),
  st.sampled_from([1, 2, 3, 8, 16]),
  st.sampled_from([1, 2]),
  st.integers(0, 8),
  st.integers(0, 8),
  st.sampled_from([8, 4_096]),
  st.sampled_from([-1, 0, 100]),
)
def test_hosts_too_small(
  rows, devices, hosts, device_mb, host_mb, batch, warm_rows
):
  """Rows of 1 kB; each of the two ways out that the message names works."""
  profile = power_law(rows)
  warm_rows = warm_rows if device_mb else -1
  budgets = {
    "warm_rows": warm_rows,
    "devices": devices,
    "hosts": hosts,
    "batch_size": devices * batch,
    "dim": 128,
    "slot_bytes": 512,
    "host_bytes": host_mb * MB,
    "device_bytes": device_mb * MB,
  }
  try:
    p = make(profile, **budgets)
  except UserError as e:
    message = str(e)
  else:
    assert shard_of(p, COLD) * devices * 1_024 <= hosts * host_mb * MB
    return
  assert message.startswith("plan.host_memory_mb: ")
  assert "rows of 1024 bytes" in message
  assert f"the {hosts * host_mb} MB of {hosts} host(s)" in message
  needs, over = map(
    int, re.search(r"take (\d+) MB, (\d+) MB more", message).groups()
  )
  assert over - 1 <= needs - hosts * host_mb <= over
  enough = int(re.search(r"plan\.host_memory_mb=(\d+)", message)[1])
  make(profile, **(budgets | {"host_bytes": enough * MB}))
  assert enough > host_mb
  error_of(profile, **(budgets | {"host_bytes": (enough - 1) * MB}))
  enough = int(re.search(r"plan\.device_memory_mb=(\d+)", message)[1])
  assert "plan.warm_rows=-1" in message
  budgets |= {"warm_rows": -1}
  make(profile, **(budgets | {"device_bytes": enough * MB}))
  assert enough >= device_mb
  if enough > device_mb:
    error_of(profile, **(budgets | {"device_bytes": (enough - 1) * MB}))


def test_plan_is_a_value():
  p = make(power_law(203), hot_rows=5, warm_rows=40)
  assert hash(p) == hash(Plan.from_json(p.to_json()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    p.devices = 1
  other = dataclasses.replace(p, batch_size=p.batch_size + 1)
  assert Plan.from_json(other.to_json()) == other != p
