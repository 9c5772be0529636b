"""Every row is fetched once, in one round, from its owner, by who needs it."""

import re

import dense_reference as dense
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_exchange import (
  LOOKUPS,
  NODE_PLANS,
  PLANS,
  draws,
  make_plan,
  rounds_of,
)
from jax.sharding import PartitionSpec

from recjax.embedding import exchange
from recjax.embedding.buckets import buckets_of
from recjax.embedding.coalesce import NONE
from recjax.mesh import make_mesh
from recjax.plan.plan import Plan
from recjax.schema import AXES, Feature
from recjax.training import step as step_lib


def travelling(group):
  """(tiers of a group whose rows travel, those with owners first)."""
  gathered = [group.hot] if group.hot_sync == "all_gather" else []
  return [*group.sharded, *filter(None, gathered)]


# ---- The rounds, from outside


def buffers_of(plan, requests, gathered, note):
  """[n, rows] ranks, as each peer gets them, of each group; -1 = none.

  `note(group, peer, ranks)` is told what a peer asks an owner for.
  """
  n, requests, gathered = plan.devices, iter(requests), iter(gathered)
  for g, group in enumerate(plan.groups):
    tiers = travelling(group)
    size = sum(t.owners * t.capacity for t in tiers)
    buffer, at = np.full((n, size), -1), 0
    for t in tiers:
      if not t.axes:
        for peer, mine in enumerate(next(gathered)):
          real = mine[mine < t.rows]
          assert np.all(mine[len(real) :] == t.rows)
          buffer[peer, at : at + len(real)] = real
        continue
      asked = next(requests).reshape(n, n, t.capacity)  # [owner, peer, C]
      for owner in range(n):
        for peer in range(n):
          mine = asked[owner, peer]
          real = mine[mine < t.shard_rows]
          assert np.all(mine[len(real) :] == t.shard_rows)  # padding is last
          ranks = t.first + real * n + owner
          assert np.all(ranks < t.stop)
          note(g, peer, ranks.tolist())
          there = at + owner * t.capacity
          buffer[peer, there : there + len(ranks)] = ranks
      at += n * t.capacity
    yield buffer


def travels(group, ids):
  """Which lookups are of rows that travel."""
  first = min((t.first for t in travelling(group)), default=group.rows)
  return ids >= first


def longest_queue(plan, flat):
  """The rounds that the fullest buffer needs at least."""
  queue = 1
  for group, ids in zip(plan.groups, flat, strict=True):
    for t in travelling(group):
      for mine in ids:
        mine = np.unique(mine[(mine >= t.first) & (mine < t.stop)])
        longest = np.bincount((mine - t.first) % t.owners, minlength=1).max()
        queue = max(queue, -(-longest // t.capacity))
  return queue


@pytest.mark.parametrize("name", PLANS)
def test_each_row_is_asked_of_its_owner_once_in_one_round(name):
  plan = PLANS[name]
  n, most = plan.devices, 0
  for ids in draws(plan):
    flat = [x.reshape(n, LOOKUPS) for x in ids]
    asked = [[[] for _ in range(n)] for _ in plan.groups]  # of a peer: ranks
    round_of = {}  # (group, rank) -> round
    delivered = [np.zeros((n, LOOKUPS), int) for _ in plan.groups]
    rounds = 0
    for rounds, seen in enumerate(rounds_of(plan, ids), 1):
      requests, places, gathered, distinct = seen

      def note(g, peer, ranks, now=rounds, asked=asked, round_of=round_of):
        asked[g][peer] += ranks
        for rank in ranks:
          assert round_of.setdefault((g, rank), now) == now

      buffers = buffers_of(plan, requests, gathered, note)
      for g, buffer in enumerate(buffers):
        end, at = buffer.shape[1], places[g]
        inside = at < end
        assert np.all(at[~inside] == end)
        delivered[g] += inside
        for peer in range(n):
          here = inside[peer]
          np.testing.assert_array_equal(
            buffer[peer, at[peer, here]], flat[g][peer, here]
          )
    for g, group in enumerate(plan.groups):
      np.testing.assert_array_equal(delivered[g], travels(group, flat[g]))
      owned = min((t.first for t in group.sharded), default=group.rows)
      for peer in range(n):
        ranks = np.unique(flat[g][peer][flat[g][peer] >= owned])
        assert sorted(asked[g][peer]) == ranks.tolist()
    # What a step reports as its distinct rows.
    of_peer = [sum(len(of[peer]) for of in asked) for peer in range(n)]
    np.testing.assert_array_equal(distinct, of_peer)
    queue = longest_queue(plan, flat)
    assert rounds >= queue
    most = max(most, rounds)
    if queue == 1:
      assert rounds == 1  # no overflow, no second round
  assert (most == 1) == name.endswith("enough")


@pytest.mark.parametrize("name", NODE_PLANS)
def test_each_row_crosses_once_a_node_in_one_round(name):
  plan = NODE_PLANS[name]
  g, nodes = plan.node_devices, plan.nodes
  tiers = [(i, t) for i, x in enumerate(plan.groups) for t in x.sharded]
  most = 0
  for ids in draws(plan):
    asked = {t: [[] for _ in range(nodes)] for t in tiers if t[1].node_capacity}
    round_of = {}  # (group, rank) -> round
    delivered = [np.zeros(x.size, int) for x in ids]
    for rounds, seen in enumerate(rounds_of(plan, ids), 1):
      requests, places, *_ = seen
      most = max(most, rounds)
      for i, mine in enumerate(ids):
        end = sum(t.owners * t.capacity for t in plan.groups[i].sharded)
        inside = places[i].ravel() < end
        delivered[i] += inside
        for rank in mine.ravel()[inside].tolist():
          assert round_of.setdefault((i, rank), rounds) == rounds
      for (i, t), local in zip(tiers, requests, strict=True):
        if (i, t) not in asked:
          continue
        for device in range(plan.devices):
          owner = device % t.owners
          # Of each node, or of the owner's own.
          mine = local[device].reshape(-1, t.node_capacity)
          for k, there in enumerate(mine):
            node = k if len(mine) > 1 else device // g
            real = there[there < t.shard_rows]
            assert np.all(there[len(real) :] == t.shard_rows)
            ranks = t.first + real * t.owners + owner
            asked[i, t][node] += ranks.tolist()
            for rank in ranks.tolist():
              assert round_of[i, rank] == rounds
    for i, group in enumerate(plan.groups):
      np.testing.assert_array_equal(
        delivered[i], travels(group, ids[i].ravel())
      )
    for (i, t), of_nodes in asked.items():
      flat = ids[i].reshape(nodes, g * LOOKUPS)
      for node, ranks in enumerate(of_nodes):
        there = np.unique(flat[node])
        there = there[(there >= t.first) & (there < t.stop)]
        assert sorted(ranks) == there.tolist()  # each of them once
  assert (most == 1) == name.endswith("enough")


def test_without_a_chance_of_overflow_no_loop_is_compiled():
  """Also where a large tier's shards are padded."""
  rows = 8 * 1_001  # 1,004 local rows an owner
  enough = make_plan(8, 0, rows, 1_001, 0, rows=rows)
  assert enough.groups[0].sharded[0].shard_rows > 1_001
  assert exchange.one_round(enough, [5_000])
  tight = make_plan(8, 0, rows, 1_000, 0, rows=rows)
  assert not exchange.one_round(tight, [5_000])
  assert exchange.one_round(make_plan(8, 0, rows, 10, 0, rows=rows), [10])
  assert exchange.one_round(make_plan(8, 0, 80, 10, 7, rows=rows), [7])
  assert not exchange.one_round(make_plan(8, 0, 80, 6, 7, rows=rows), [7])
  # Each group's buffers hold that group's lookups.
  groups = tuple(
    helpers.make_group(8, rows, 0, rows, name=name, capacity=c)
    for name, c in (("a", 10), ("b", 20))
  )
  both = Plan(8, 8, groups)
  assert exchange.one_round(both, [10, 20])
  assert not exchange.one_round(both, [11, 20])
  assert not exchange.one_round(both, [10, 21])


# ---- The worked example of the module's docstring


def test_the_example_of_the_docstring():
  plan = helpers.make_plan(2, 8, 0, 8, capacity=1, dim=1)
  (tier,) = plan.groups[0].tiers
  ids = np.full((2, 6), -1, np.int32)
  ids[0] = [5, 2, 5, 7, 0, 2]
  mesh = make_mesh(2)

  def f(ids):
    route = exchange.route([ids[0]], plan)
    now = exchange.plan_round(route, route.starts[:-1], plan, (6,))
    owner = jax.lax.axis_index(AXES).astype(jnp.int32)
    ranks = now.requests[0].local * tier.owners + owner
    (t,) = buckets_of(plan).sharded
    rows = exchange.fetch_rows(ranks[:, None], now.requests[0], t, plan)
    (places,) = exchange.buffer_places(route, now, plan, (6,))
    after = exchange.plan_round(route, now.end, plan, (6,))
    seen = route, now, after, places, rows[:, 0]
    return jax.tree.map(lambda x: x[None], seen)

  sharded = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=PartitionSpec(AXES),
    out_specs=PartitionSpec(AXES),
    check_vma=False,
  )
  seen = jax.device_get(jax.jit(sharded)(ids))
  route, now, after, places, rows = jax.tree.map(lambda x: x[0], seen)

  address = route.addresses[route.index]
  assert address.tolist() == [6, 1, 6, 7, 0, 1]
  assert route.addresses.tolist() == [0, 1, 6, 7, *[NONE] * 3]
  assert route.index.tolist() == [2, 1, 2, 3, 0, 1]
  assert route.bucket.tolist() == [1, 0, 1, 1, 0, 0]
  assert route.starts.tolist() == [0, 2, 4]
  asked = lambda of: [
    route.addresses[a:b].tolist() for a, b in zip(of.begin, of.end, strict=True)
  ]
  base = buckets_of(plan).bases
  assert [x - base[i] for i, (x,) in enumerate(asked(now))] == [0, 2]
  assert [x - base[i] for i, (x,) in enumerate(asked(after))] == [1, 3]
  assert (bool(now.more), bool(after.more)) == (True, False)
  assert rows.tolist() == [0, 5]
  end = len(rows)  # "-" of the docstring
  assert places.tolist() == [1, end, 1, end, 0, end]


# ---- What is compiled


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [0, 1])
def test_ids_of_all_groups_and_tiers_travel_in_one_all_to_all(capacity):
  """One in the first round, and one in each loop of those after it."""
  parts = (
    dense.Part("narrow", ("small",), 61, 4, "sgd"),
    dense.Part("wide", ("large",), 151, 16, "sgd"),
  )
  features = (Feature("a", "small", 2), Feature("b", "large", 3))
  groups = tuple(
    helpers.make_group(
      8, p.rows, 5, 20, name=p.name, tables=p.tables, dim=p.dim,
      capacity=capacity,
    )
    for p in parts
  )  # fmt: skip
  case, plan = dense.Case(parts, features), Plan(8, dense.BATCH, groups)
  run = dense.build(case, plan)
  params = run.state.params
  lowered, _ = step_lib.lower(run.spec, run.mesh, params, dense.DENSE)
  text = lowered.compile(helpers.FAST).as_text()
  found = re.findall(r"= \(?s32\[.*? all-to-all\(.*", text)
  loops = [line for line in found if "/while/" in line]
  assert len(found) - len(loops) == 1
  assert len(loops) == (2 if capacity else 0)  # of the lookup and the update
