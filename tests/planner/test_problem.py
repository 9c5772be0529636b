"""What a problem is made of, and the rows of its buffers."""

import dataclasses

import pytest
from helpers_planner import buckets_of, shape_of

from recjax.models.cost import DenseCost
from recjax.planner import presets
from recjax.planner.problem import Cuts, Problem, make_problem
from recjax.planner.transport import Transport

ALL_USED = buckets_of([1.0] * 400)  # every buffer is as large as it may be


def made(devices=16, **arguments) -> Problem:
  return make_problem(
    ALL_USED,
    **{"devices": devices, "batch_size": 64 * devices, "lookups": 100}
    | {"dim": 8, "dtype": "bfloat16", "slot_bytes": 4}
    | arguments,
  )


def test_a_problem_is_what_was_said():
  dense = DenseCost(flops=7.0)
  t = dataclasses.replace(presets.get("dgx_h200", 16), node_devices=8)
  p = made(topology=t, dense=dense, compute_dtype="bfloat16")
  assert p.shape == shape_of(
    16,
    64,
    row_bytes=16,
    dense=dense,
    compute="bfloat16",
    node_devices=8,
  )
  assert p.topology == t and p.shape.nodes == 2
  assert made(train=False).shape.slot_bytes == 0
  # Nodes that are not alike are no stage of their own.
  assert made(12, topology=t).shape.nodes == 1


def rarely_used(devices, chance) -> Problem:
  t = dataclasses.replace(presets.get("dgx_h200", devices), node_devices=1)
  p = made(devices, topology=t, overflow_probability=chance)
  return dataclasses.replace(p, profile=buckets_of([0.01] * 4_000))


def test_buffers_are_those_of_all_devices_in_one_stage():
  p = rarely_used(16, 1e-3)
  assert p.buffers(0, 4_000) == p.buffers(0, 4_000, 16, False)
  assert p.buffers(0, 4_000) < p.buffers(0, 4_000, 16, True)
  assert p.buffers(0, 4_000) != p.buffers(0, 4_000, 1, False)


def test_each_device_has_its_share_of_the_chance_that_any_overflows():
  one, many = rarely_used(1, 1e-4), rarely_used(16, 16e-4)
  got = many.gathered(4_000, "all_gather")
  assert got == one.gathered(4_000, "all_gather")
  assert one.of_device.mean(4_000) < got < 4_000


@pytest.mark.parametrize("copies", ["one", "node"])
def test_a_given_capacity_is_that_of_every_buffer(copies):
  """C rows for each of the owners, and between nodes C for each node."""
  t = dataclasses.replace(presets.get("dgx_h200", 16), node_devices=4)
  p = made(topology=t, overflow_probability=None)
  cuts = Cuts(0, 200, transport=Transport("two_stage", copies))
  owners = {"one": 16, "node": 4}[copies]
  found = p.traffic(cuts, capacity=3)
  assert found.warm == 3 * owners
  assert found.inter_node_warm == 3 * 4
  assert found.inter_node_cold == 3 * 4
