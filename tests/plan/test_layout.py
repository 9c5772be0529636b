"""Shards hold a tier's rows, padded by little; owners take turns while able."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.plan import layout


@given(st.integers(0, 1 << 40), st.integers(1, 1_024))
def test_shards_are_padded_by_little_to_round_numbers(rows, devices):
  each = -(-rows // devices)
  padded = layout.shard_rows(rows, devices)
  assert each <= padded <= each * (1 + 1 / 256)
  assert padded % (1 << max(0, int(padded).bit_length() - 10)) == 0
  of_array = layout.shard_rows(np.array([rows, 0]), devices)
  np.testing.assert_array_equal(of_array, [padded, 0])


@given(
  st.integers(0, 10**9),
  st.integers(0, 10**6),
  st.integers(0, 10**6),
  st.integers(1, 64),
)
def test_most_sharded_rows_are_the_most_that_fit(rows, hot, more, devices):
  hot, fit = min(hot, rows), min(hot, rows) + more
  most = int(layout.most_sharded(rows, hot, fit, devices))
  assert hot + layout.shard_rows(most, devices) <= fit
  if most < rows - hot:
    assert hot + layout.shard_rows(most + 1, devices) > fit


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_owners_take_turns_while_they_have_room(room, first):
  room = np.array(room)
  starts, members = layout.turns(room)
  assert starts[-1] == room.sum()
  whole = layout.take_turns(starts, members, 0, int(room.sum()))
  np.testing.assert_array_equal(np.bincount(whole, minlength=len(room)), room)
  first = min(first, len(whole))
  part = layout.take_turns(starts, members, first, len(whole) - first)
  np.testing.assert_array_equal(part, whole[first:])
  # Nobody gets a second row before all that have room have their first.
  seen = np.zeros(len(room), int)
  for owner in whole:
    seen[owner] += 1
    able = room > seen
    assert not able.any() or seen[able].min() >= seen[owner] - 1


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_rooms_are_the_positions_of_each_owner(devices):
  for warm in range(20):
    owners = np.arange(warm) % devices
    want = np.bincount(owners, minlength=devices)
    np.testing.assert_array_equal(layout.room(warm, devices), want)


def test_layers_of_columns():
  assert layout.layers([3, 1, 3]) == [(0, 1, (0, 1, 2)), (1, 3, (0, 2))]
  assert layout.layers([0, 0]) == []
