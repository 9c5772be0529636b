"""Every row is fetched once, in one round, from its owner, by who needs it."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from recjax.embedding import exchange
from recjax.embedding.exchange import NONE
from recjax.mesh import AXIS, batch_sharding, make_mesh
from recjax.plan.plan import Plan
from recjax.planner.cut_points import TRANSPORTS

ROWS, DIM = 97, 2
SAMPLES, COLUMNS = 4, 3  # of a device
LOOKUPS = SAMPLES * COLUMNS
FAST = {"xla_backend_optimization_level": 0}


def make_plan(
  devices, hot, warm_end, capacity_warm, capacity_cold, rows=ROWS, **nodes
):
  return Plan(
    devices=devices,
    batch_size=devices * SAMPLES,
    rows=rows,
    dim=DIM,
    dtype="float32",
    hot=hot,
    warm_end=warm_end,
    capacity_warm=capacity_warm,
    capacity_cold=capacity_cold,
    **nodes,
  )


def node_plan(g, way, far_warm, far_cold, *cuts_and_capacities) -> Plan:
  """8 devices in nodes of g; far: rows of the buffers between nodes."""
  copies = way.warm_copies == "node"
  staged = way.exchange == "two_stage"
  return make_plan(
    8,
    *cuts_and_capacities,
    node_devices=g,
    exchange=way.exchange,
    warm_copies=way.warm_copies,
    capacity_far_warm=far_warm if staged or copies else 0,
    capacity_far_cold=far_cold if staged else 0,
  )


def random_plan(seed) -> Plan:
  rng = np.random.default_rng(seed)
  hot, warm_end = sorted(rng.integers(0, ROWS + 1, 2).tolist())
  devices = int(rng.choice([3, 8]))
  draw = lambda: int(rng.integers(1, 6))
  return make_plan(
    devices,
    hot,
    warm_end,
    draw() if hot < warm_end else 0,
    draw() if warm_end < ROWS else 0,
  )


PLANS = {
  "one_row_buffers": make_plan(8, 5, 40, 1, 1),
  "tight_warm": make_plan(8, 0, 50, 2, LOOKUPS),
  "tight_cold": make_plan(8, 10, 30, LOOKUPS, 2),
  "all_warm": make_plan(8, 0, ROWS, 2, 0),
  "all_cold": make_plan(8, 0, 0, 0, 2),
  "enough": make_plan(8, 5, 40, LOOKUPS, LOOKUPS),
  "one_device": make_plan(1, 3, 20, 2, 3),
  **{f"random_{seed}": random_plan(seed) for seed in range(3)},
}
STAGES, COPIES, BOTH = TRANSPORTS[2], TRANSPORTS[1], TRANSPORTS[3]
ENOUGH = 4 * LOOKUPS
NODE_PLANS = {
  "two_stage_enough": node_plan(
    4, STAGES, ENOUGH, ENOUGH, 5, 40, LOOKUPS, LOOKUPS
  ),
  "two_stage_one_row": node_plan(2, STAGES, 1, 1, 5, 40, 1, 1),
  "two_stage_tight_between": node_plan(4, STAGES, 1, 2, 5, 40, 3, LOOKUPS),
  "two_stage_tight_within": node_plan(4, STAGES, 40, 4, 0, 40, 1, 1),
  "copies_one_row": node_plan(4, COPIES, 1, 0, 0, 60, 1, 2),
  "copies_tight_between": node_plan(2, COPIES, 2, 0, 5, ROWS, 3, 0),
  "copies_enough": node_plan(4, COPIES, 60, 0, 5, ROWS, LOOKUPS, 0),
  "copies_and_two_stage": node_plan(4, BOTH, 3, 1, 5, 40, 2, 2),
}


def draws(plan):
  """Batches of ids [B, S]: skewed, uniform, one row for all, none at all."""
  rng = np.random.default_rng(0)
  shape = plan.devices * SAMPLES, COLUMNS
  for _ in range(5):
    yield np.minimum(rng.zipf(1.2, shape) - 1, ROWS - 1)
    yield rng.integers(-1, ROWS, shape)
    yield rng.integers(plan.hot, ROWS + 1, shape) - 1
  yield np.full(shape, ROWS - 1)
  yield np.full(shape, -1)
  # Every row of one owner and tier: the longest queue that there can be.
  mine = np.arange(plan.hot, ROWS, plan.devices)
  yield np.resize(mine, shape)


# ---- Coalesce


@functools.cache
def coalesce(size):
  return jax.jit(exchange.coalesce)


@settings(max_examples=200, deadline=None)
@given(
  st.sampled_from([1, 2, 16, 33]),
  st.sampled_from([1, 5, 1_000, NONE - 1]),
  st.integers(0, 2**32),
)
def test_coalesce_is_unique(size, most, seed):
  rng = np.random.default_rng(seed)
  keys = rng.integers(0, most, size, np.int32, endpoint=True)
  keys[rng.random(size) < 0.3] = NONE
  distinct, index = map(np.asarray, coalesce(size)(keys))
  want, inverse = np.unique(keys, return_inverse=True)
  np.testing.assert_array_equal(distinct[: len(want)], want)
  assert np.all(distinct[len(want) :] == NONE)
  np.testing.assert_array_equal(index, inverse)
  assert (distinct.dtype, index.dtype) == (np.int32, np.int32)


# ---- The rounds, from outside


@functools.cache
def one_round(plan):
  """Compiled (ids, begin, first) -> what each device sees, stacked."""

  def f(ids, begin, first):
    route = exchange.route(ids.reshape(-1), plan)
    begin = jax.numpy.where(first, route.starts[:-1], begin.reshape(-1))
    now = exchange.next_round(route, begin, plan)
    requests = tuple(asked and asked.slots for asked in (now.warm, now.cold))
    positions = exchange.positions(route, now, plan)
    seen = (now.begin, now.end, now.more, requests, positions)
    return jax.tree.map(lambda x: x[None], seen)

  mesh = make_mesh(plan.devices, plan.node_devices)
  sharded = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=(PartitionSpec(AXIS), PartitionSpec(AXIS), PartitionSpec()),
    out_specs=PartitionSpec(AXIS),
    check_vma=False,
  )
  n = plan.devices
  ids = np.zeros((n * SAMPLES, COLUMNS), np.int32)
  begin = np.zeros((n, buckets(plan)), np.int32)
  args = jax.device_put((ids, begin), batch_sharding(mesh))
  compiled = jax.jit(sharded).lower(*args, np.bool(True)).compile(FAST)

  def run(ids, begin, first):
    args = jax.device_put((ids, begin), batch_sharding(mesh))
    return jax.device_get(compiled(*args, np.bool(first)))

  return run


def buckets(plan) -> int:
  return plan.warm_owners + plan.devices + 1


def rounds_of(plan, ids):
  """Each round's (requested ranks [owner, peer] -> list, positions)."""
  n = plan.devices
  ids = ids.astype(np.int32)
  begin, first, more = np.zeros((n, buckets(plan)), np.int32), True, True
  while more:
    begins, ends, mores, requests, positions = one_round(plan)(
      ids, begin, first
    )
    assert np.all(mores == mores[0])  # all devices agree
    if not first:
      np.testing.assert_array_equal(begins, begin)
    more, begin, first = bool(mores[0]), ends, False
    yield requests, positions


@pytest.mark.parametrize("name", PLANS)
def test_each_row_is_asked_of_its_owner_once_in_one_round(name):
  plan = PLANS[name]
  n = plan.devices
  tiers = (
    (plan.hot, plan.warm_end, plan.warm_slots, plan.capacity_warm),
    (plan.warm_end, plan.rows, plan.cold_slots, plan.capacity_cold),
  )
  end = n * (plan.capacity_warm + plan.capacity_cold)
  most = 0
  for ids in draws(plan):
    flat = ids.reshape(n, LOOKUPS)
    asked = [[] for _ in range(n)]  # of a peer: all ranks
    round_of = {}  # rank -> round
    delivered = np.zeros((n, LOOKUPS), int)
    rounds = 0
    for rounds, (requests, positions) in enumerate(rounds_of(plan, ids), 1):
      buffer = np.full((n, end), -1)  # ranks, as each peer gets them
      at = 0
      for slots, (first, stop, size, c) in zip(requests, tiers, strict=True):
        if first == stop:
          assert slots is None
          continue
        slots = slots.reshape(n, n, c)  # [owner, peer, C]
        for owner in range(n):
          for peer in range(n):
            mine = slots[owner, peer]
            real = mine[mine < size]
            assert np.all(mine[len(real) :] == size)  # padding comes last
            ranks = first + real * n + owner
            assert np.all(ranks < stop)
            asked[peer] += ranks.tolist()
            for rank in ranks.tolist():
              assert round_of.setdefault(rank, rounds) == rounds
            there = at + owner * c
            buffer[peer, there : there + len(ranks)] = ranks
        at += n * c
      inside = positions < end
      assert np.all(positions[~inside] == end)
      delivered += inside
      for peer in range(n):
        here = inside[peer]
        np.testing.assert_array_equal(
          buffer[peer, positions[peer, here]], flat[peer, here]
        )
    np.testing.assert_array_equal(delivered, flat >= plan.hot)
    queue = 1
    for peer in range(n):
      ranks = np.unique(flat[peer][flat[peer] >= plan.hot])
      assert sorted(asked[peer]) == ranks.tolist()
      for first, stop, _, c in tiers:
        mine = ranks[(ranks >= first) & (ranks < stop)]
        longest = np.bincount((mine - first) % n, minlength=n).max()
        queue = max(queue, -(-longest // c) if c else 0)
    assert rounds >= queue
    most = max(most, rounds)
    if queue == 1:
      assert rounds == 1  # no overflow, no second round
  assert (most == 1) == (name == "enough")


@pytest.mark.parametrize("name", NODE_PLANS)
def test_each_row_crosses_once_a_node_in_one_round(name):
  plan = NODE_PLANS[name]
  g, nodes = plan.node_devices, plan.nodes
  ways = exchange.ways(plan)
  firsts = {"warm": plan.hot, "cold": plan.warm_end}
  most = 0
  for ids in draws(plan):
    flat = ids.reshape(nodes, g * LOOKUPS)
    asked = {
      tier: [[] for _ in range(nodes)] for tier in ways if ways[tier].far
    }
    round_of = {}  # rank -> round
    delivered = np.zeros(ids.size, int)
    for rounds, (requests, positions) in enumerate(rounds_of(plan, ids), 1):
      most = max(most, rounds)
      inside = positions.ravel() < exchange.buffer_starts(plan)[-1]
      delivered += inside
      for rank in ids.ravel()[inside].tolist():
        assert round_of.setdefault(rank, rounds) == rounds
      for tier, slots in zip(("warm", "cold"), requests, strict=True):
        if tier not in asked:
          continue
        way = ways[tier]
        for device in range(plan.devices):
          owner = device % way.owners
          mine = slots[device].reshape(-1, way.far)  # of each node, or its own
          for k, there in enumerate(mine):
            node = k if len(mine) > 1 else device // g
            real = there[there < way.slots]
            assert np.all(there[len(real) :] == way.slots)
            ranks = firsts[tier] + real * way.owners + owner
            asked[tier][node] += ranks.tolist()
            for rank in ranks.tolist():
              assert round_of[rank] == rounds
    np.testing.assert_array_equal(delivered, ids.ravel() >= plan.hot)
    stops = {"warm": plan.warm_end, "cold": plan.rows}
    for tier, of_nodes in asked.items():
      for node, ranks in enumerate(of_nodes):
        there = np.unique(flat[node])
        there = there[(there >= firsts[tier]) & (there < stops[tier])]
        assert sorted(ranks) == there.tolist()  # each of them once
  assert (most == 1) == name.endswith("enough")


def test_without_a_chance_of_overflow_no_loop_is_compiled():
  """Also where a large tier's shards are padded."""
  rows = 8 * 1_001  # 1,004 slots a device
  enough = make_plan(8, 0, rows, 1_001, 0, rows)
  assert enough.warm_slots > 1_001
  assert exchange.one_round(enough, 5_000)
  assert not exchange.one_round(make_plan(8, 0, rows, 1_000, 0, rows), 5_000)
  assert exchange.one_round(make_plan(8, 0, rows, 10, 0, rows), 10)
  assert exchange.one_round(make_plan(8, 0, 80, 10, 7, rows), 7)
  assert not exchange.one_round(make_plan(8, 0, 80, 6, 7, rows), 7)
