"""Plans of small random profiles, and every error's way out."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.plan.plan import Plan, describe
from recjax.planner import formulas, presets
from recjax.planner import solve as solve_lib

MB = 1 << 20
HUGE = 1 << 50


def profile_of(counts, samples=None) -> Profile:
  counts = np.sort(np.asarray(counts, np.int64))[::-1]
  samples = int(counts.max()) if samples is None else samples
  table = np.zeros(len(counts), np.int16)
  return Profile(max(samples, 1), ("t",), counts, table)


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
  return solve_lib.plan(profile, **(arguments | changes))


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


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([1e-9, 1e-3, 0.5]))
def test_a_plan_is_consistent_and_fits(case, chance):
  profile, arguments = case
  p = make(profile, **arguments, overflow_probability=chance)
  n, local = p.devices, p.batch_size // p.devices
  row_bytes = row_bytes_of(arguments)
  fit = arguments["device_bytes"] // row_bytes
  assert 0 <= p.hot <= p.warm_end <= p.rows == profile.rows
  assert p.hot + p.warm + p.cold == p.rows

  # Shards hold their rows, padded by little, within the budget.
  tiers = (
    (p.warm, p.warm_slots, p.warm_owners, p.capacity_warm, p.capacity_far_warm),
    (p.cold, p.cold_slots, n, p.capacity_cold, p.capacity_far_cold),
  )
  for rows, slots, owners, *_ in tiers:
    each = -(-rows // owners)
    assert each <= slots <= each * (1 + 1 / 128)
  assert p.hot + p.warm_slots <= fit
  staged, copies = p.exchange == "two_stage", p.warm_copies == "node"
  assert p.nodes > 1 or not (staged or copies)
  if p.cold and p.warm and not copies:  # what fits is used: one more would not
    assert p.hot + p.warm_slots >= (fit - p.hot) * 127 // 128

  # A buffer never holds more than can be asked of it, and never nothing.
  for (rows, _, owners, c, far), united in zip(
    tiers, (staged or copies, staged), strict=True
  ):
    most = min(-(-rows // owners), local * arguments["lookups"])
    assert min(rows, 1) <= c <= most
    assert united * min(rows, 1) <= far <= united * c * n // p.nodes
    if arguments["capacity"]:
      assert c == min(arguments["capacity"], most)

  reports = dict(zip(("hot", "warm", "cold"), p.reports, strict=True))
  assert [r.rows for r in p.reports] == [p.hot, p.warm, p.cold]
  assert reports["hot"].bytes == p.hot * row_bytes
  assert reports["warm"].bytes == p.warm_slots * row_bytes
  assert reports["cold"].bytes == p.cold_slots * n * row_bytes
  shares = sum(r.share for r in p.reports)
  assert shares == pytest.approx(1 if profile.accesses else 0)
  touched = formulas.touch_probability(profile.frequencies(), local)
  cuts = [0, p.hot, p.warm_end, p.rows]
  for r, a, b in zip(p.reports, cuts, cuts[1:], strict=False):
    assert r.distinct == pytest.approx(touched[a:b].sum())
  assert reports["hot"].buffer_bytes == 0

  assert Plan.from_json(p.to_json()) == p
  text = describe(p)
  for name, r in reports.items():
    (line,) = re.findall(rf"^{name} .*$", text, re.M)
    assert f" {r.rows:,} " in line


@settings(max_examples=60, deadline=None)
@given(cases())
def test_more_device_memory_is_never_slower(case):
  profile, arguments = case
  now = make(profile, **arguments, overflow_probability=None)
  larger = arguments | {"device_bytes": 2 * arguments["device_bytes"]}
  later = make(profile, **larger, overflow_probability=None)
  if not arguments["capacity"]:
    # A tier of rows that are never used counts a 1e-9th row.
    assert later.step_seconds <= now.step_seconds * (1 + 1e-9) + 1e-8


def test_planned_capacities_bound_every_owners_mean():
  """Owner 0 has the hottest row of a tier, and so more than its n-th part."""
  profile = power_law(10_000)
  cuts = {"hot_rows": 0, "warm_rows": 4, "lookups": 1_000}
  p = make(profile, overflow_probability=1e-3, **cuts, batch_size=8_000)
  touched = formulas.touch_probability(profile.frequencies(), 1_000)
  each = 1e-3 / (2 * 8 * 8)  # a tier, device and peer
  assert p.capacity_warm == 1
  owners = [touched[4 + k :: 8] for k in range(8)]
  means = [x.sum() for x in owners]
  spreads = [(x * (1 - x)).sum() for x in owners]
  for mean, spread in zip(means, spreads, strict=True):
    assert p.capacity_cold >= formulas.capacity(mean, each, spread)
  assert p.capacity_cold <= formulas.capacity(max(means) + 1, each) < 1_250
  assert max(means) > touched[4:].sum() / 8 + 0.2
  loose = make(profile, overflow_probability=0.9, **cuts, batch_size=8_000)
  assert loose.capacity_cold < p.capacity_cold


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
  assert (p.hot, p.warm_end) == want


def test_one_explicit_cut_leaves_the_other_planned():
  row = 8 * 4 + 4
  tight = {"device_bytes": 5 * row}
  p = make(power_law(203), warm_rows=8, **tight)
  assert p.warm == 8
  assert p.hot <= 4
  assert make(power_law(203), hot_rows=3, **tight).hot == 3


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
  assert make(profile, hot_rows=most, **tight).hot == most


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
  assert p.warm == most
  assert p.hot + p.warm_slots <= fit
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
    assert p.cold_slots * devices * 1_024 <= hosts * host_mb * MB
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
    p.hot = 1
  other = dataclasses.replace(p, warm_end=p.warm_end + 1)
  assert Plan.from_json(other.to_json()) == other != p
