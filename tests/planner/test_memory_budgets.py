"""Budgets of three memories: what an error says lacks, and what would do."""

import re

import pytest
from helpers_planner import HUGE, planned, profile_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.errors import UserError
from recjax.planner import presets

MB = 1 << 20


def make(rows, **changes):
  """A plan of rows of 1 kB whose use falls as a power law."""
  arguments = {
    "devices": 8,
    "hosts": 1,
    "batch_size": 64,
    "lookups": 3,
    "dim": 128,
    "dtype": "float32",
    "slot_bytes": 512,
    "device_bytes": HUGE,
    "host_bytes": HUGE,
  }
  profile = profile_of([5_000 / (1 + r) ** 1.1 for r in range(rows)], 10_000)
  return planned(profile, **(arguments | changes))


def error_of(rows, **changes) -> str:
  with pytest.raises(UserError) as e:
    make(rows, **changes)
  assert "\n" not in str(e.value)
  return str(e.value)


def bytes_of(plan, name) -> int:
  tier = plan.groups[0].tier(name)
  return tier.shard_rows * tier.owners * 1_024 if tier else 0


@settings(max_examples=40, deadline=None)
@given(
  st.integers(1_000, 30_000),
  st.sampled_from([1, 2, 3, 8]),
  st.sampled_from([1, 2]),
  st.integers(0, 4),
  st.integers(0, 6),
  st.integers(0, 6),
  st.booleans(),
)
def test_each_way_out_works(
  rows, devices, hosts, device_mb, host_mb, ssd_mb, all_fit
):
  budgets = {
    "devices": devices,
    "hosts": hosts,
    "batch_size": devices * 8,
    "device_bytes": device_mb * MB,
    "host_bytes": host_mb * MB,
    "ssd_bytes": (100 if all_fit else ssd_mb) * MB,
  }
  try:
    plan = make(rows, **budgets)
  except UserError as e:
    message = str(e)
  else:
    cold, frozen = bytes_of(plan, "cold"), bytes_of(plan, "frozen")
    assert cold <= hosts * budgets["host_bytes"]
    assert frozen <= hosts * budgets["ssd_bytes"]
    if frozen:  # the hosts' memory is full, but for what pads shards
      assert cold >= hosts * budgets["host_bytes"] * 0.98 - devices * 1_024
    return
  assert message.startswith("plan.host_memory_mb: ")
  assert ("of their SSDs" in message) == (budgets["ssd_bytes"] > 0)
  for field, argument, extra in (
    ("host_memory_mb", "host_bytes", {}),
    ("ssd_memory_mb", "ssd_bytes", {}),
    ("device_memory_mb", "device_bytes", {"warm_rows": -1}),
  ):
    enough = int(re.search(rf"plan\.{field}=(\d+)", message)[1])
    assert enough * MB > budgets[argument]
    make(rows, **(budgets | extra | {argument: enough * MB}))
    if (enough - 1) * MB > budgets[argument]:
      error_of(rows, **(budgets | extra | {argument: (enough - 1) * MB}))


def test_no_row_is_frozen_while_the_hosts_have_room():
  plan = make(5_000, device_bytes=MB // 2, ssd_bytes=HUGE)
  assert plan.groups[0].tier("frozen") is None
  assert plan.groups[0].tier("cold").rows > 0


def test_cold_rows_are_kept():
  tight = {"device_bytes": 0, "ssd_bytes": 100 * MB}
  plan = make(5_000, **tight, cold_rows=1_003)
  (group,) = plan.groups
  cold, frozen = group.stored
  assert (cold.rows, frozen.rows) == (1_000, 4_000)  # a multiple of 8 devices
  assert (frozen.first, frozen.memory) == (cold.stop, "ssd")
  assert (
    make(5_000, **tight, cold_rows=5_000).groups[0].rows_of("cold") == 5_000
  )
  all_frozen = make(5_000, **tight, cold_rows=0, host_bytes=0)
  assert [t.name for t in all_frozen.groups[0].stored] == ["frozen"]
  assert all_frozen.groups[0].visitors.first == 0

  message = error_of(5_000, **tight, cold_rows=4_000, host_bytes=2 * MB)
  assert message.startswith("plan.cold_rows: 4000 rows of 1024 bytes take 4 MB")
  most = int(re.search(r"at most (\d+) fit", message)[1])
  make(5_000, **tight, cold_rows=most, host_bytes=2 * MB)
  error_of(5_000, **tight, cold_rows=most + 8, host_bytes=2 * MB)

  message = error_of(5_000, **(tight | {"ssd_bytes": 0}), cold_rows=1_003)
  assert message.startswith("plan.cold_rows: 1003 cold rows leave 4000 frozen")
  enough = int(re.search(r"plan\.ssd_memory_mb=(\d+)", message)[1])
  make(5_000, device_bytes=0, ssd_bytes=enough * MB, cold_rows=1_003)
  error_of(5_000, device_bytes=0, ssd_bytes=(enough - 1) * MB, cold_rows=1_003)


def test_what_is_frozen_is_read_from_the_ssd():
  t = presets.get("dgx_h200", 8)
  budget = {"device_bytes": 0, "ssd_bytes": HUGE, "topology": t}
  plans = [make(20_000, **budget, cold_rows=c) for c in (20_000, 19_000, 1_000)]
  beside = [dict(p.prediction.host_seconds) for p in plans]
  assert beside[0]["SSD"] == 0 < beside[1]["SSD"] < beside[2]["SSD"]
  for term in ("host memory", "host link"):
    assert len({x[term] for x in beside}) == 1
  reports = [{r.tier: r for r in p.prediction.tiers} for p in plans]
  assert (
    reports[2]["frozen"].buffer_bytes == 0 < reports[2]["cold"].buffer_bytes
  )
  whole = reports[0]["cold"].distinct
  for report in reports[1:]:
    assert report["cold"].distinct + report["frozen"].distinct == pytest.approx(
      whole
    )
