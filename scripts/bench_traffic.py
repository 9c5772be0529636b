"""Bytes a sample that the compiled step sends, against floors and rivals.

  python scripts/bench_traffic.py

The 26 Criteo Kaggle tables on simulated devices, local batch 8,192, compiled
and not run: what a step sends is in its collectives, whose sizes are static.

1. On 8 devices: the plan's prediction; the floor, every touched row once to and
   from every device that uses it; table-wise (vectors pooled at the owner) and
   row-wise without coalescing, both in float32.
2. On two nodes of 8, no row replicated, bytes to the other node. "flat" asks
   all owners, "two_stage" a proxy in the node first, "node" keeps a copy of all
   rows in each node and exchanges gradients. The floor: every row that a node
   touches crosses the network once, of those that the other node owns.
3. MLPerf's multi-hot tables on 8 devices: each pooled at its owner or
   coalesced, whatever sends less, against all coalesced (buffers padded alike)
   and all pooled (table-wise). Of features expected bytes are compared, without
   padding: "better" is the sum of each feature's better way.
"""

import dataclasses

import bench_plan
import jax.numpy as jnp
import numpy as np
import optax
from criteo_tables import MULTI_HOT, names, terabyte_config
from synthetic_step import spec_of, summed

from recjax.data.criteo import KAGGLE_ROWS
from recjax.mesh import make_mesh, simulate_devices
from recjax.plan.plan import Plan
from recjax.planner import (
  communication,
  compiled_collectives,
  frequency_buckets,
  presets,
)
from recjax.planner import solve as solve_lib
from recjax.planner.compiled_collectives import Collective
from recjax.planner.frequency_buckets import Table
from recjax.planner.problem import Problem
from recjax.planner.transport import FLAT, Transport
from recjax.schema import Feature
from recjax.training import step as step_lib

DEVICES, NODES, LOCAL = 8, 2, 8_192
FEATURES = tuple(map(Feature, names(26), names(26)))
MOST_ROWS = 40_000_000  # of MLPerf's tables
TRANSPORTS = {
  "flat": FLAT,
  "two_stage": Transport("two_stage", "one"),
  "node": Transport("flat", "node"),
}


def solve(problem: Problem, hosts: int = 1, **options) -> Plan:
  """Plans where memory is no limit."""
  budgets = {"device_bytes": 1 << 40, "host_bytes": 1 << 40}
  groups = bench_plan.groups_of(problem)
  return solve_lib.solve([problem], groups, hosts=hosts, **(budgets | options))


def collectives_of(
  plan: Plan, features: tuple[Feature, ...], wire: str
) -> list[Collective]:
  """Returns those of the first round of a step with one dense weight."""
  mesh = make_mesh(plan.devices, plan.node_devices)
  spec = spec_of(plan, features, summed, optax.sgd(0.1), wire)
  lowered, _ = step_lib.lower(spec, mesh, {"scale": jnp.zeros(())}, 1)
  text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
  found = compiled_collectives.of_step(text, plan.devices)
  return [c for c in found if not c.repeated]


def sent(plan: Plan) -> float:
  """Returns the predicted bytes of a device between devices."""
  return sum(v for k, v in plan.prediction.sent if k != "host")


def kaggle() -> None:
  """Prints part 1."""
  n, b = DEVICES, LOCAL
  print("bytes a sample on 8 devices")
  print(f"{'dim':>4} {'s':>5} {'wire':>9} {'compiled':>9} {'planned':>9} "
        f"{'floor':>9} {'ratio':>6} {'table-wise':>11} {'row-wise':>9}"
        )  # fmt: skip
  for dim in (16, 128):
    for exponent in bench_plan.EXPONENTS:
      for wire in ("float32", "bfloat16"):
        problem = bench_plan.problem_of(
          bench_plan.power_law(KAGGLE_ROWS, exponent),
          n,
          n * b,
          dim,
          exchange_dtype=wire,
          objective="bytes",
        )
        plan = solve(problem)
        found = collectives_of(plan, FEATURES, wire)
        compiled = sum(c.sent(n) for c in found)
        distinct = float(problem.distinct(0, plan.rows))
        floor = sum(
          communication.coalesced_bytes(distinct, problem.shape.wire_bytes, n)
        )
        table = sum(sum(communication.table_wise_bytes(1.0, b, 1, 4 * dim, n))
                    for _ in FEATURES)  # fmt: skip
        row = sum(communication.uncoalesced_bytes(len(FEATURES), b, 4 * dim, n))
        print(
          f"{dim:4} {exponent:5} {wire:>9} {compiled / b:>9,.1f} "
          f"{sent(plan) / b:>9,.1f} {floor / b:>9,.1f} "
          f"{compiled / floor:>6.3f} {table / compiled:>10.1f}x "
          f"{row / compiled:>8.1f}x",
          flush=True,
        )


def nodes() -> None:
  """Prints part 2."""
  n, b = NODES * DEVICES, LOCAL
  topology = presets.get("dgx_h200", n)
  print("bytes a sample to the other node, on two nodes of 8")
  print(f"{'dim':>4} {'s':>5} {'exchange':9} {'compiled':>9} {'planned':>9} "
        f"{'floor':>9} {'ratio':>6} {'of flat':>8} {'in all':>9} {'ms':>7}"
        )  # fmt: skip
  for dim in (16, 128):
    for exponent in bench_plan.EXPONENTS:
      profile = bench_plan.power_law(KAGGLE_ROWS, exponent)
      problem = bench_plan.problem_of(profile, n, n * b, dim, topology=topology)
      touched = profile.touched(DEVICES * b)
      floor = np.sum(
        communication.two_stage_bytes(touched, 4 * dim, NODES, DEVICES)
        * profile.count
      )
      flat = 0.0
      for name, transport in TRANSPORTS.items():
        plan = solve(problem, hosts=NODES, hot_rows=0, transports=(transport,))
        found = collectives_of(plan, FEATURES, "float32")
        # All-reduces: of the dense part, and the agreement on rounds.
        compiled = sum(
          c.sent(n, DEVICES) for c in found if c.kind != "all-reduce"
        )
        flat = flat or compiled
        print(
          f"{dim:4} {exponent:5} {name:9} {compiled / b:>9,.1f} "
          f"{plan.network_bytes_per_sample:>9,.1f} {floor / b:>9,.1f} "
          f"{compiled / floor:>6.3f} {compiled / flat:>8.3f} "
          f"{plan.bytes_per_sample:>9,.1f} "
          f"{plan.prediction.step_seconds * 1e3:>7.3f}",
          flush=True,
        )


def multi_hot() -> None:
  """Prints part 3."""
  sizes = [min(r, MOST_ROWS) for r in terabyte_config().data.rows]
  tables = tuple(map(Table, names(26), sizes, MULTI_HOT))
  features = tuple(Feature(t.name, t.name, hotness=t.hotness) for t in tables)
  print("bytes a sample of MLPerf's multi-hot tables on 8 devices")
  print(f"{'dim':>4} {'s':>5} {'compiled':>9} {'planned':>9} {'expected':>9} "
        f"{'coalesced':>10} {'table-wise':>11} {'better':>8} "
        f"{'worst feature':>14} {'pooled':>7}")  # fmt: skip
  for dim in (16, 128):
    for exponent in bench_plan.EXPONENTS:
      problem = bench_plan.problem_of(
        frequency_buckets.power_law(tables, exponent),
        DEVICES,
        DEVICES * LOCAL,
        dim,
        lookups=sum(MULTI_HOT),
        slot_bytes=4,
        objective="bytes",
      )
      _multi_hot_line(problem, features, exponent)


def _multi_hot_line(
  problem: Problem, features: tuple[Feature, ...], exponent: float
) -> None:
  """Prints a line of part 3."""
  n, b, dim = DEVICES, LOCAL, problem.shape.dim
  bare = dataclasses.replace(problem, overflow_probability=None)
  plan, expected, alone = (
    solve(p, device_bytes=1 << 37, table_wise=table_wise)
    for p, table_wise in ((problem, None), (bare, None), (problem, ()))
  )
  (group,) = expected.groups
  owner = dict(group.table_wise)
  # Here every row is warm, and every table-wise one with its owner.
  (tier,) = group.tiers
  assert tier.axes and tier.memory == "device"
  tables = problem.profile.tables
  assert tier.shard_rows >= max(t.rows for t in tables) or not owner
  assert problem.profile.of_table is not None
  w = 4 * dim
  coalesced = [
    sum(communication.coalesced_bytes(float(x @ problem.of_device.pi), w, n))
    for x in problem.profile.of_table
  ]
  pooled = [
    sum(communication.table_wise_bytes(1.0, b, t.hotness, w, n)) for t in tables
  ]
  ours = [
    p if t.name in owner else c
    for t, c, p in zip(tables, coalesced, pooled, strict=True)
  ]
  best = list(map(min, coalesced, pooled))
  assert abs(sum(ours) / sent(expected) - 1) < 1e-3  # nothing is left out
  worst = max(x / y for x, y in zip(ours, best, strict=True))
  found = collectives_of(plan, features, "float32")
  compiled = sum(c.sent(n) for c in found)
  print(
    f"{dim:4} {exponent:5} {compiled / b:>9,.0f} {sent(plan) / b:>9,.0f} "
    f"{sum(ours) / b:>9,.0f} {sent(alone) / b:>10,.0f} "
    f"{sum(pooled) / b:>11,.0f} {sum(best) / b:>8,.0f} {worst:>14.4f} "
    f"{len(plan.groups[0].table_wise):>7}",
    flush=True,
  )


if __name__ == "__main__":
  simulate_devices(NODES * DEVICES)
  kaggle()
  nodes()
  multi_hot()
