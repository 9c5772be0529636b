"""The bytes of a step, worked out by hand: 8 devices in 2 nodes of 4."""

import dataclasses

from helpers_planner import shape_of

from recjax.planner.traffic import (
  Part,
  TableWise,
  Traffic,
  network_bytes,
  sent_bytes,
)

SHAPE = shape_of(8, dim=16, row_bytes=64, slot_bytes=4, wire_bytes=64,
                 node_devices=4)  # fmt: skip
TABLE_WISE = TableWise(24.0, 32.0, 0.0, 0.0, 0.0, (1, 1))
TWO_STAGE = Traffic(
  hot=3.0,
  warm=80.0,
  cold=40.0,
  gathered=2.0,
  inter_node_warm=16.0,
  inter_node_cold=8.0,
  table_wise=TABLE_WISE,
  visitors=5.0,
)


def test_what_two_stages_send():
  """3 of 4 parts stay in the node, 1 of 2 goes to the other one."""
  assert sent_bytes([Part(SHAPE, TWO_STAGE)]) == {
    "ids": 4 * 120 * 3 / 4 + 4 * 24 / 2,
    "rows": 64 * 120 * 3 / 4 + 64 * 24 / 2,
    "gradients": 64 * 120 * 3 / 4 + 64 * 24 / 2,
    "hot gradients": 7 * 2 * (64 + 4),
    "host": 5 * (2 * 68 + 8),
    "table-wise ids": 24 * 4 * 7 / 8,
    "table-wise vectors": 32 * 64 * 7 / 8,
    "table-wise gradients": 32 * 64 * 7 / 8,
  }
  assert network_bytes([Part(SHAPE, TWO_STAGE)]) == {
    "ids": 4 * 24 / 2,
    "rows": 64 * 24 / 2,
    "gradients": 64 * 24 / 2,
    "hot gradients": 2 * (64 + 4),
    "table-wise ids": 24 * 4 / 2,
    "table-wise vectors": 32 * 64 / 2,
    "table-wise gradients": 32 * 64 / 2,
  }


def test_what_all_devices_send_all():
  flat = Traffic(hot=3.0, warm=80.0)
  summed = 3 * 4 * 17  # float32 gradients and a count
  assert sent_bytes([Part(SHAPE, flat)]) == {
    "ids": 4 * 80 * 7 / 8,
    "rows": 64 * 80 * 7 / 8,
    "gradients": 64 * 80 * 7 / 8,
    "hot gradients": 2 * summed * 7 / 8,
    "host": 0,
  }
  assert network_bytes([Part(SHAPE, flat)]) == {
    "ids": 4 * 80 / 2,
    "rows": 64 * 80 / 2,
    "gradients": 64 * 80 / 2,
    "hot gradients": 2 * summed / 2 / 4,
  }


def test_copies_send_gradients_alone_to_other_nodes():
  copies = Traffic(warm=80.0, inter_node_warm=16.0, copies=True)
  sent = sent_bytes([Part(SHAPE, copies)])
  far = network_bytes([Part(SHAPE, copies)])
  assert far == {
    "ids": 4 * 16 / 2,  # each with its local row
    "rows": 0,
    "gradients": 64 * 16 / 2,
    "hot gradients": 0,
  }
  for kind, row in (("ids", 4), ("rows", 64), ("gradients", 64)):
    assert sent[kind] == row * 80 * 3 / 4 + far[kind]


def test_serving_sends_no_gradients():
  shape = dataclasses.replace(SHAPE, train=False)
  trained = sent_bytes([Part(SHAPE, TWO_STAGE)])
  assert sent_bytes([Part(shape, TWO_STAGE)]) == trained | {
    "gradients": 0,
    "hot gradients": 0,
    "table-wise gradients": 0,
    "host": 5 * (68 + 8),
  }
