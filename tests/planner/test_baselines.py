"""The usual placements beside the plan: costs by hand, and what fits."""

import numpy as np
import pytest
from helpers_planner import solved

from recjax.planner import (
  baselines,
  frequency_buckets,
  presets,
  table_shards,
)
from recjax.planner.frequency_buckets import Table
from recjax.planner.problem import make_problem
from recjax.planner.table_shards import Shard


def placed_of(rows, devices, device_bytes, hotness=1, **changes):
  tables = tuple(Table(f"t{i}", r, hotness) for i, r in enumerate(rows))
  arguments = {
    "devices": devices,
    "batch_size": devices * 1_024,
    "lookups": hotness * len(rows),
    "dim": 16,
    "dtype": "float32",
    "slot_bytes": 0,
    "topology": presets.get("dgx_h200", devices),
  }
  problem = make_problem(
    frequency_buckets.power_law(tables, 1.15), **(arguments | changes)
  )
  host = 1 << 40
  plan = solved(problem, device_bytes=device_bytes, host_bytes=host)
  return {
    p.name.split()[0].rstrip(",:"): p
    for p in baselines.compare([problem], plan, device_bytes, host)
  }


@pytest.mark.parametrize("devices", [2, 8, 16])
def test_the_plan_is_the_best_of_the_table(devices):
  placed = placed_of((10**6, 10**5, 300, 7) * 4, devices, 1 << 30)
  ours = placed.pop("recjax")
  for p in placed.values():
    assert ours.seconds <= p.seconds * (1 + 1e-9), p.name


def test_what_does_not_fit_says_so():
  placed = placed_of((10**6, 10), 4, 20 << 20)
  assert np.isnan(placed["table-wise"].seconds)
  assert "does not fit" in placed["table-wise"].note
  # HugeCTR's rule splits the large table over devices instead.
  assert placed["HugeCTR's"].device_bytes <= 20 << 20
  assert placed["FAE"].host_bytes > 0
  assert "does not fit" not in baselines.describe((placed["recjax"],))


def test_greedy_fills_the_least_loaded():
  """Eight equal tables on four devices: two on each; bytes by hand."""
  placed = placed_of((1_000,) * 8, 4, 1 << 30)
  table = placed["table-wise"]
  assert table.device_bytes == 2 * 1_000 * 64
  assert table.bytes_per_sample == 8 * (4 + 2 * 64) * 3 / 4
  assert placed["row-wise"].bytes_per_sample == pytest.approx(
    8 * (4 + 2 * 64) * 3 / 4
  )


def problem_of_64(tables, devices, slot_bytes):
  """Batches of 64 samples, rows of 16 float32."""
  return make_problem(
    frequency_buckets.power_law(tables, 1.15),
    devices=devices,
    batch_size=64,
    lookups=sum(t.hotness for t in tables),
    dim=16,
    dtype="float32",
    slot_bytes=slot_bytes,
  )


def test_shards_are_pooled_by_their_owners():
  """A row-wise, a column-wise and a host table on four devices, by hand."""
  tables = (Table("rows", 400), Table("columns", 100), Table("host", 10))
  tables += (Table("small", 7),)
  problem = problem_of_64(tables, devices=4, slot_bytes=0)
  shards = [Shard(0, i, 100, splits=4) for i in range(4)]
  shards += [Shard(1, i, 100, columns=0.5) for i in range(2)]
  shards += [Shard(2, 3, 10, host=True)]
  placed = baselines.of_shards("mixed", [problem], shards, [(0, 3)])
  assert placed.device_bytes == (100 + 50 + 7) * 64
  assert placed.host_bytes == 10 * 64
  # Ids go to both halves of the columns; each half sends half a vector.
  hot = 2 * 7 * 4 * 17 * 3 / 4 / 16  # all-reduced by a device with 16 samples
  a_sample = (3 / 4) * (4 + 2 * 4 + 4 + 3 * 2 * 64)
  assert placed.bytes_per_sample == pytest.approx(a_sample + hot)
  on_devices = [s for s in shards if not s.host] + [Shard(2, 3, 10)]
  faster = baselines.of_shards("on devices", [problem], on_devices)
  assert faster.seconds < placed.seconds
  assert "busiest device" in placed.note
  # Where all rows are replicated there is no busiest one to tell of.
  every = [(0, i) for i in range(4)]
  assert baselines.of_shards("hot", [problem], [], every).note == ""


def test_replicas_on_one_device_are_read_and_updated():
  """HugeCTR's rule gives each device the small tables; they are not free."""
  tables = (Table("small", 100, 3), Table("b", 10))
  problem = problem_of_64(tables, devices=1, slot_bytes=4)
  t, cost = problem.topology, table_shards.cost
  both, none = cost([problem], [], [(0, 0), (0, 1)]), cost([problem], [])
  lookups, row = 64 * 4, 16 * 4
  read = lookups * row / t.cached_gather
  added = lookups * (row + 4) / t.cached_add
  whole = 110 * (3 * (row + 4) + 2 * (row + 4)) / t.stream
  launched = 2 * t.tier_latency  # of the tier, forward and backward
  assert both.seconds - none.seconds == pytest.approx(
    read + added + whole + launched, rel=1e-6
  )
  first = cost([problem], [], [(0, 0)])  # its own lookups alone
  second = cost([problem], [], [(0, 1)])
  assert first.seconds + second.seconds - none.seconds == pytest.approx(
    both.seconds + launched, rel=1e-6
  )
  assert none.device_bytes == 0 and both.device_bytes == 110 * 68
