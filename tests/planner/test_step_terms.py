"""What passes through each part of a device in a step, counted by hand.

On a machine of which one rate is 1 a second and the others are as good as
endless, a step takes as many seconds as it passes bytes, keys or products.
"""

import dataclasses

import pytest
from helpers_planner import free_of_latencies, shape_of

from recjax.models.cost import DenseCost
from recjax.planner import presets, step_cost
from recjax.planner.traffic import Part, TableWise, Traffic

# 160 lookups a device. A row: 32 bytes, 36 with its slot variable, 64 as
# float32.
SHAPE = shape_of(8, 16, lookups=10, dim=16, row_bytes=32, slot_bytes=4,
                 wire_bytes=32, dense=DenseCost(7, 11, 5))  # fmt: skip
ALL = Traffic(hot=3.0, warm=80.0, cold=40.0, visitors=5.0)
GATHERED = dataclasses.replace(ALL, gathered=2.0)
TWO_STAGE = dataclasses.replace(ALL, inter_node_warm=16.0, inter_node_cold=8.0)
TABLE_WISE = TableWise(
  ids=24.0, vectors=32.0, owner_ids=200.0, owner_vectors=64.0, distinct=50.0,
  calls=(1, 2),
)  # fmt: skip
RATES = ("link", "ring", "network", "stream", "gather", "cached_gather",
         "cached_add", "sort", "matmul_float32", "matmul_bfloat16")  # fmt: skip


def passed(traffic, rate, **changes):
  """Seconds of a step where only this rate is not endless."""
  shape = dataclasses.replace(SHAPE, **changes)
  t = dataclasses.replace(
    free_of_latencies(presets.get("dgx_h200", 8)),
    launch=0.0,
    node_devices=shape.node_devices or 8,
    **dict.fromkeys(RATES, 1e30) | {rate: 1.0},
  )
  return sum(step_cost.device_seconds([Part(shape, traffic)], t).values())


DENSE = 2 * 16 * 4 * (3 * 5 + 2 * 160) + 13 * 4 * 7  # bytes


@pytest.mark.parametrize(
  ("rate", "want"),
  [
    ("sort", 160 + 120),
    ("cached_gather", 160 * 32 + 160 * 64),  # of replicas, of buffers
    ("cached_add", 160 * 64 + 120 * 64 + 160 * (64 + 4)),
    ("gather", 120 * 32 + 5 * 36 + 2 * 120 * 36),
    (
      "stream",
      2 * 5 * 36 + 120 * (64 + 72) + 3 * (3 * 4 * 17 + 2 * 36) + DENSE,
    ),
    ("ring", 2 * (4 * 7 + 3 * 4 * 17) * 7 / 8),
    ("link", 120 * (4 + 32 + 32) * 7 / 8),
    ("matmul_float32", 3 * 16 * 11),
    ("matmul_bfloat16", 0),
  ],
)
def test_a_step_of_all_tiers(rate, want):
  assert passed(ALL, rate) == pytest.approx(want)


@pytest.mark.parametrize(
  ("rate", "want"),
  [
    ("sort", 160 + 120 + 16),  # what all eight devices share
    ("cached_gather", 160 * 32 + 160 * 64 + 16 * 36),
    ("cached_add", 160 * 64 + 120 * 64 + 16 * 64 + 16 * 36),
    ("stream", 2 * 5 * 36 + 120 * 136 + 16 * 136 + DENSE),
    ("ring", 2 * (32 + 4) * 7 + 2 * 4 * 7 * 7 / 8),
  ],
)
def test_touched_replicas_are_shared(rate, want):
  assert passed(GATHERED, rate) == pytest.approx(want)


def test_one_device_has_no_peers_whose_rows_it_adds():
  alone = {"devices": 1, "batch_size": 16}
  assert passed(GATHERED, "sort", **alone) == pytest.approx(160)
  added = 160 * 64 + 2 * 36
  assert passed(GATHERED, "cached_add", **alone) == pytest.approx(added)


@pytest.mark.parametrize(
  ("rate", "want"),
  [
    ("sort", 160 + 24 + 120),  # of the owner's, and what the node unites
    ("cached_gather", 160 * 32 + 160 * 64 + 120 * 64),
    ("cached_add", 160 * 64 + (24 + 120) * 64 + 160 * 68),
    ("gather", 24 * 32 + 5 * 36 + 2 * 24 * 36),
    ("network", 24 * 68 / 2 + 2 * (4 * 7 + 3 * 4 * 17) / 4 / 2),
    ("link", 120 * 68 * 3 / 4),
  ],
)
def test_nodes_unite_their_requests(rate, want):
  assert passed(TWO_STAGE, rate, node_devices=4) == pytest.approx(want)


@pytest.mark.parametrize(
  ("rate", "want"),
  [
    ("sort", 160),
    ("cached_gather", 160 * 32 + 160 * 64),
    ("cached_add", 0),
    ("gather", 120 * 32),
    ("stream", 2 * 16 * 4 * (5 + 160) + 4 * 7),
    ("ring", 0),
    ("link", 120 * (4 + 32) * 7 / 8),
    ("matmul_bfloat16", 16 * 11),
  ],
)
def test_serving_reads_and_updates_nothing(rate, want):
  got = passed(ALL, rate, train=False, compute="bfloat16")
  assert got == pytest.approx(want)


@pytest.mark.parametrize(
  ("rate", "want"),
  [
    ("sort", 200),
    ("cached_add", 2 * 200 * 64),
    ("stream", 2 * (64 + 32) * 64 + 50 * 136),
    ("gather", 200 * 32 + 2 * 50 * 36),
    ("link", (200 * 4 + 2 * 64 * 32) * 7 / 8),
  ],
)
def test_table_wise_tables_cost_their_busiest_owner(rate, want):
  with_them = dataclasses.replace(ALL, table_wise=TABLE_WISE)
  more = passed(with_them, rate) - passed(ALL, rate)
  assert more == pytest.approx(want)


def test_latencies_are_those_of_calls_and_tiers():
  t = free_of_latencies(presets.get("dgx_h200", 8))
  t = dataclasses.replace(t, launch=0.0)
  traffic = dataclasses.replace(ALL, table_wise=TABLE_WISE)

  def more(**latency):
    of = lambda t: sum(
      step_cost.device_seconds([Part(SHAPE, traffic)], t).values()
    )
    return of(dataclasses.replace(t, **latency)) - of(t)

  assert more(tier_latency=1.0) == pytest.approx(3 * 2)
  # Ids of all tiers; rows and gradients of two; ids, vectors and gradients of
  # vectors, these in two calls.
  assert more(link_latency=1.0) == pytest.approx(1 + 2 * 2 + 1 + 2 + 2)
  assert more(ring_latency=1.0) == pytest.approx(1)
  assert more(launch=1.0) == pytest.approx(1)


def test_memory_of_table_wise_tables_and_of_visitors():
  got = step_cost.device_bytes(
    SHAPE, hot=3, warm_shard=50, buffers=20, visitors=5, table_wise=TABLE_WISE
  )
  assert got == {
    "table-wise": 200 * (2 * 4 + 20) + 50 * 64 + 64 * 2 * (64 + 2 * 32),
    "replicas": 3 * 36,
    "tables": 50 * 32,
    "slot variables": 50 * 4,
    "visitors": 5 * (3 * 36 + 4 * 4),
    "gradients": 3 * (64 + 4),
    "buffers": 20 * (2 * 4 + 2 * (32 + 64)),
    "activations": 160 * 24 + 16 * 4 * 5,
    "dense": 3 * 4 * 7,
  }
