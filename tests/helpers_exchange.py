"""Plans for the exchange, batches of ids, and its rounds seen from outside."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from recjax.embedding import exchange
from recjax.embedding.buckets import buckets_of
from recjax.mesh import batch_sharding, make_mesh
from recjax.plan.plan import Plan
from recjax.schema import AXES

ROWS, DIM = 97, 2  # of a group
SAMPLES, COLUMNS = 4, 3  # of a device, of a group
LOOKUPS = SAMPLES * COLUMNS
COPIES, STAGES = {"copies": True}, {"two_stage": True}
BOTH = COPIES | STAGES


def make_group(devices, hot, warm_end, warm, cold, **kw):
  """A group with cuts at hot and warm_end, and the buffers of both tiers."""
  kw = {"rows": ROWS, "dim": DIM} | kw
  return helpers.make_group(
    devices, hot=hot, warm=warm_end - hot, capacity=(warm, cold), **kw
  )


def make_plan(devices, *cuts_and_buffers, **kw) -> Plan:
  """A plan of one group; see make_group."""
  group = make_group(devices, *cuts_and_buffers, **kw)
  nodes = kw.get("node_devices", 0)
  return Plan(devices, devices * SAMPLES, (group,), nodes)


def node_plan(g, way, between, *cuts_and_buffers) -> Plan:
  """8 devices in nodes of g; between: rows of the buffers between nodes."""
  return make_plan(
    8, *cuts_and_buffers, node_devices=g, node_capacity=between, **way
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


def groups_plan(devices, *groups, g=0, **way) -> Plan:
  """A plan of groups "t", "u", ..., by their cuts and buffers.

  Their dims are 2, 3, ...
  """
  made = tuple(
    make_group(
      devices,
      *cuts,
      name=name,
      tables=(name,),
      dim=DIM + i,
      node_devices=g,
      **way,
      **(more[0] if more else {}),
    )
    for i, (name, (cuts, *more)) in enumerate(zip("tuv", groups, strict=False))
  )
  return Plan(devices, devices * SAMPLES, made, g)


PLANS = {
  "one_row_buffers": make_plan(8, 5, 40, 1, 1),
  "tight_warm": make_plan(8, 0, 50, 2, LOOKUPS),
  "tight_cold": make_plan(8, 10, 30, LOOKUPS, 2),
  "all_warm": make_plan(8, 0, ROWS, 2, 0),
  "all_cold": make_plan(8, 0, 0, 0, 2),
  "enough": make_plan(8, 5, 40, LOOKUPS, LOOKUPS),
  "one_device": make_plan(1, 3, 20, 2, 3),
  **{f"random_{seed}": random_plan(seed) for seed in range(3)},
  "two_groups": groups_plan(8, [(5, 40, 1, 2)], [(0, 60, 3, 1)]),
  "two_groups_enough": groups_plan(
    8, [(5, 40, LOOKUPS, LOOKUPS)], [(0, 60, LOOKUPS, LOOKUPS)]
  ),
  "three_groups_apart": groups_plan(
    2,
    [(ROWS, ROWS, 0, 0)],
    [(0, 0, 0, 2), {"rows": 60}],
    [(0, 50, 3, 0), {"rows": 50}],
  ),
  "gathered": groups_plan(
    8, [(9, 40, 2, 1), {"hot_sync": "all_gather"}], [(0, 60, 3, 1)]
  ),
}
ENOUGH = 4 * LOOKUPS
NODE_PLANS = {
  "two_stage_enough": node_plan(
    4, STAGES, (ENOUGH, ENOUGH), 5, 40, LOOKUPS, LOOKUPS
  ),
  "two_stage_one_row": node_plan(2, STAGES, (1, 1), 5, 40, 1, 1),
  "two_stage_tight_between": node_plan(4, STAGES, (1, 2), 5, 40, 3, LOOKUPS),
  "two_stage_tight_within": node_plan(4, STAGES, (40, 4), 0, 40, 1, 1),
  "copies_one_row": node_plan(4, COPIES, (1, 0), 0, 60, 1, 2),
  "copies_tight_between": node_plan(2, COPIES, (2, 0), 5, ROWS, 3, 0),
  "copies_enough": node_plan(4, COPIES, (60, 0), 5, ROWS, LOOKUPS, 0),
  "copies_and_two_stage": node_plan(4, BOTH, (3, 1), 5, 40, 2, 2),
  "two_groups_two_stage": groups_plan(
    8, [(5, 40, 2, 2)], [(0, 60, 1, 3)], g=4, node_capacity=(2, 3), **STAGES
  ),
  # Of one group the copies' owners, of the other all devices are asked.
  "two_groups_apart": groups_plan(
    8,
    [(5, 40, 2, 2), COPIES | {"node_capacity": (3, 0)}],
    [(0, 60, 1, 3), STAGES | {"node_capacity": (2, 4)}],
    g=2,
  ),
}


def draws(plan):
  """Ids of each group [B, S]: skewed, uniform, one row for all, none at all."""
  rng = np.random.default_rng(0)
  shape = plan.devices * SAMPLES, COLUMNS
  each = lambda f: tuple(f(g.rows, g.rows_of("hot")) for g in plan.groups)
  for _ in range(5):
    yield each(lambda rows, hot: np.minimum(rng.zipf(1.2, shape), rows) - 1)
    yield each(lambda rows, hot: rng.integers(-1, rows, shape))
    yield each(lambda rows, hot: rng.integers(hot, rows + 1, shape) - 1)
  yield each(lambda rows, hot: np.full(shape, rows - 1))
  yield each(lambda rows, hot: np.full(shape, -1))
  # Every row of one owner and tier: the longest queue that there can be.
  stride = lambda rows, hot: np.arange(min(hot, rows - 1), rows, plan.devices)
  yield each(lambda rows, hot: np.resize(stride(rows, hot), shape))


@functools.cache
def one_round(plan):
  """Compiled (ids, begin, first) -> what each device sees, stacked."""
  known = buckets_of(plan)
  lookups = (LOOKUPS,) * len(plan.groups)

  def f(ids, begin, first):
    route = exchange.route([x.reshape(-1) for x in ids], plan)
    begin = jnp.where(first, route.starts[:-1], begin.reshape(-1))
    now = exchange.plan_round(route, begin, plan, lookups)
    local = [asked.local for asked in now.requests]
    places = exchange.buffer_places(route, now, plan, lookups)
    gathered = [
      exchange.gathered_rows(route, now, t)
      for t in known.tiers
      if not t.tier.axes
    ]
    asked = exchange.asked_rows(route, plan)
    seen = (now.begin, now.end, now.more, local, places, gathered, asked)
    return jax.tree.map(lambda x: x[None], seen)

  mesh = make_mesh(plan.devices, plan.node_devices)
  sharded = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=(PartitionSpec(AXES), PartitionSpec(AXES), PartitionSpec()),
    out_specs=PartitionSpec(AXES),
    check_vma=False,
  )
  n = plan.devices
  ids = [np.zeros((n * SAMPLES, COLUMNS), np.int32)] * len(plan.groups)
  begin = np.zeros((n, len(known.capacity)), np.int32)
  args = jax.device_put((ids, begin), batch_sharding(mesh))
  compiled = jax.jit(sharded).lower(*args, np.bool(True)).compile(helpers.FAST)

  def run(ids, begin, first):
    ids = [x.astype(np.int32) for x in ids]
    args = jax.device_put((ids, begin), batch_sharding(mesh))
    return jax.device_get(compiled(*args, np.bool(first)))

  return run


def rounds_of(plan, ids):
  """Yields what a round asks of the owners, and where rows arrive.

  Each is (requests of each sharded tier [n, ...], places of each group
  [n, LOOKUPS], local rows of each gathered tier [n, C], distinct rows asked
  for in all rounds [n]).
  """
  begin = np.zeros((plan.devices, len(buckets_of(plan).capacity)), np.int32)
  first, more = True, True
  while more:
    begins, ends, mores, *seen = one_round(plan)(ids, begin, first)
    assert np.all(mores == mores[0])  # all devices agree
    if not first:
      np.testing.assert_array_equal(begins, begin)
    more, begin, first = bool(mores[0]), ends, False
    yield seen
