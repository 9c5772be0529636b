"""Addresses number the rows that travel, bucket after bucket, all groups."""

import itertools

import helpers
import numpy as np
import pytest
from helpers_exchange import NODE_PLANS, PLANS

from recjax.embedding.buckets import buckets_of
from recjax.errors import UserError
from recjax.plan.plan import HOT, VISITORS, WARM, Plan

ALL = PLANS | NODE_PLANS


@pytest.mark.parametrize("name", ALL)
def test_addresses_and_buffers_have_no_gap_and_no_overlap(name):
  plan = ALL[name]
  known = buckets_of(plan)
  base = bucket = 0
  for g, group in enumerate(plan.groups):
    buffer = 0
    for t in known.of_group(g):
      assert (t.first, t.base, t.buffer) == (bucket, base, buffer)
      assert t.count == t.tier.owners
      mine = slice(bucket, bucket + t.count)
      owner = np.arange(t.count)
      starts = base + owner * t.tier.shard_rows
      np.testing.assert_array_equal(known.bases[mine], starts)
      assert np.all(known.capacity[mine] == t.tier.capacity)
      starts = buffer + owner * t.tier.capacity
      np.testing.assert_array_equal(known.buffer[mine], starts)
      bucket += t.count
      base += t.count * t.tier.shard_rows
      buffer += t.rows
    assert known.sizes[g] == buffer
    assert [t.tier for t in known.of_group(g) if t.tier.axes] == [
      *group.sharded
    ]
  assert len(known.capacity) == len(known.buffer) == bucket
  assert (len(known.bases), known.bases[-1]) == (bucket + 1, base)
  for x in (known.bases, known.capacity, known.buffer):
    assert x.dtype == np.int32


def test_replicas_have_a_bucket_where_touched_gradients_are_gathered():
  make = lambda sync, name: helpers.make_group(
    4, 50, 10, 20, name=name, hot_sync=sync, capacity=3
  )
  plan = Plan(4, 4, (make("all_reduce", "a"), make("all_gather", "b")))
  known = buckets_of(plan)
  names = [(t.group, t.tier.name) for t in known.tiers]
  assert names == [(0, WARM), (0, VISITORS), (1, WARM), (1, VISITORS), (1, HOT)]
  assert len(known.capacity) == 4 * 4 + 1
  assert known.gathered(0) is None
  hot = known.gathered(1)
  assert (hot.count, hot.rows, hot.united) == (1, 3, False)
  assert [t.tier.name for t in known.sharded] == [WARM, VISITORS] * 2


def test_who_is_asked_and_whether_peers_unite():
  of = lambda name: buckets_of(ALL[name])
  assert not any(t.united for t in of("enough").tiers)
  plan = ALL["copies_and_two_stage"]
  warm, cold = of("copies_and_two_stage").tiers
  assert warm.united and cold.united
  assert warm.asked_nodes(plan) == 1  # each node has a copy
  assert cold.asked_nodes(plan) == plan.nodes == 2


def test_a_plan_of_replicas_has_no_bucket():
  known = buckets_of(helpers.make_plan(8, 20, 20, 0))
  assert (known.tiers, known.sharded, known.sizes) == ((), (), (0,))
  assert known.bases.tolist() == [0]
  assert known.capacity.size == known.buffer.size == 0


def test_more_rows_than_addresses_are_refused():
  with pytest.raises(UserError, match="2,147,483,648 rows with the padding"):
    buckets_of(helpers.make_plan(8, 2**31 - 5, 0, 2**31 - 5))
  groups = [helpers.make_group(8, 2**30, 0, 99, name=name) for name in "ab"]
  with pytest.raises(UserError, match=r"can address 2,147,483,647"):
    buckets_of(Plan(8, 8, tuple(groups)))
  most = helpers.make_plan(8, 2**31 - 2**23, 0, 2**30, capacity=8)
  assert buckets_of(most).bases[-1] == 2**31 - 2**23


def test_equal_plans_share_their_buckets():
  """A plan is hashable, and what is derived from it is derived once."""
  make = lambda: helpers.make_plan(8, 97, 5, 40, capacity=3)
  assert buckets_of(make()) is buckets_of(make())
  for a, b in itertools.combinations(PLANS.values(), 2):
    assert (buckets_of(a) is buckets_of(b)) == (a == b)
