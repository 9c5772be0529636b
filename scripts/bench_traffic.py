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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench_plan
import jax.numpy as jnp
import numpy as np
import optax
from bench_contenders import MULTI_HOT

from recjax.embedding import optimizers
from recjax.mesh import make_mesh, simulate_devices
from recjax.plan.plan import Plan
from recjax.planner import (
  communication,
  compiled_collectives,
  cut_points,
  frequency_buckets,
  presets,
)
from recjax.planner import solve as solve_lib
from recjax.planner.frequency_buckets import Table
from recjax.schema import Feature
from recjax.training import step as step_lib

DEVICES, NODES, LOCAL = 8, 2, 8_192
FEATURES = tuple(Feature(f"C{i}", f"C{i}") for i in range(26))
MLPERF = (
  40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956,
  405282, 10, 2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000,
  590152, 12973, 108, 36,
)  # fmt: skip
WAYS = {
  "flat": cut_points.FLAT,
  "two_stage": cut_points.Transport("two_stage", "one"),
  "node": cut_points.Transport("flat", "node"),
}


def collectives_of(
  plan: Plan, features: tuple[Feature, ...], exchange_dtype: str
) -> list[compiled_collectives.Collective]:
  """Of the first round of a training step whose dense part has one weight."""
  mesh = make_mesh(plan.devices, plan.node_devices)
  model = step_lib.Model(
    apply=lambda params, dense, x: params["w"] * jnp.sum(x, (1, 2)),
    features=features,
    dense_optimizer=optax.sgd(0.1),
    sparse_optimizer=optimizers.adagrad(0.1),
    plan=plan,
    exchange_dtype=jnp.dtype(exchange_dtype),
    seed=0,
  )
  lowered, _ = step_lib.lower(model, mesh, {"w": jnp.zeros(())}, 1)
  text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
  found = compiled_collectives.of_step(text, plan.devices)
  return [c for c in found if not c.repeated]


def kaggle() -> None:
  n, b = DEVICES, LOCAL
  print("bytes a sample on 8 devices")
  print(f"{'dim':>4} {'s':>5} {'wire':>9} {'compiled':>9} {'planned':>9} "
        f"{'floor':>9} {'ratio':>6} {'table-wise':>11} {'row-wise':>9}"
        )  # fmt: skip
  for dim in (16, 128):
    for exponent in bench_plan.EXPONENTS:
      for wire in ("float32", "bfloat16"):
        problem = bench_plan.problem_of(
          bench_plan.KAGGLE,
          exponent,
          n,
          n * b,
          dim,
          exchange_dtype=wire,
          objective="bytes",
        )
        plan = solve_lib.solve(
          problem, hosts=1, device_bytes=1 << 40, host_bytes=1 << 40
        )
        found = collectives_of(plan, FEATURES, wire)
        sent = sum(c.sent(n) for c in found)
        planned = sum(v for k, v in plan.sent if k != "host")
        distinct = float(problem.distinct(0, plan.rows))
        floor = sum(
          communication.coalesced_bytes(distinct, problem.work.wire_bytes, n)
        )
        table = sum(sum(communication.pooled_bytes(1.0, b, 1, 4 * dim, n))
                    for _ in FEATURES)  # fmt: skip
        row = sum(communication.uncoalesced_bytes(len(FEATURES), b, 4 * dim, n))
        print(
          f"{dim:4} {exponent:5} {wire:>9} {sent / b:>9,.1f} "
          f"{planned / b:>9,.1f} {floor / b:>9,.1f} {sent / floor:>6.3f} "
          f"{table / sent:>10.1f}x {row / sent:>8.1f}x",
          flush=True,
        )


def nodes() -> None:
  n, b = NODES * DEVICES, LOCAL
  topology = presets.get("dgx_h200", n)
  print("bytes a sample to the other node, on two nodes of 8")
  print(f"{'dim':>4} {'s':>5} {'exchange':9} {'compiled':>9} {'planned':>9} "
        f"{'floor':>9} {'ratio':>6} {'of flat':>8} {'in all':>9} {'ms':>7}"
        )  # fmt: skip
  for dim in (16, 128):
    for exponent in bench_plan.EXPONENTS:
      problem = bench_plan.problem_of(
        bench_plan.KAGGLE, exponent, n, n * b, dim, topology=topology
      )
      touched = problem.spectrum.touched(DEVICES * b)
      floor = np.sum(
        communication.two_stage_bytes(touched, 4 * dim, NODES, DEVICES)
        * problem.spectrum.count
      )
      flat = 0.0
      for name, way in WAYS.items():
        plan = solve_lib.solve(
          problem,
          hosts=NODES,
          device_bytes=1 << 40,
          host_bytes=1 << 40,
          hot_rows=0,
          ways=(way,),
        )
        found = collectives_of(plan, FEATURES, "float32")
        # All-reduces: of the dense part, and the agreement on rounds.
        far = [c.sent(n, DEVICES) for c in found if c.kind != "all-reduce"]
        sent = sum(far)
        flat = flat or sent
        print(
          f"{dim:4} {exponent:5} {name:9} {sent / b:>9,.1f} "
          f"{plan.network_per_sample:>9,.1f} {floor / b:>9,.1f} "
          f"{sent / floor:>6.3f} {sent / flat:>8.3f} "
          f"{plan.bytes_per_sample:>9,.1f} {plan.step_seconds * 1e3:>7.3f}",
          flush=True,
        )


def multi_hot() -> None:
  n, b = DEVICES, LOCAL
  rows = tuple(
    Table(f"C{i}", *x)
    for i, x in enumerate(zip(MLPERF, MULTI_HOT, strict=True))
  )
  features = tuple(Feature(t.name, t.name, hotness=t.hotness) for t in rows)
  print("bytes a sample of MLPerf's multi-hot tables on 8 devices")
  print(f"{'dim':>4} {'s':>5} {'compiled':>9} {'planned':>9} {'expected':>9} "
        f"{'coalesced':>10} {'table-wise':>11} {'better':>8} "
        f"{'worst feature':>14} {'pooled':>7}")  # fmt: skip
  for dim in (16, 128):
    for exponent in bench_plan.EXPONENTS:
      s = frequency_buckets.power_law(rows, exponent)
      assert s.of_table is not None
      problem = solve_lib.make_problem(
        s,
        devices=n,
        batch_size=n * b,
        lookups=sum(MULTI_HOT),
        dim=dim,
        dtype="float32",
        slot_bytes=4,
        objective="bytes",
      )
      bare = dataclasses.replace(problem, overflow_probability=None)
      plan, expected, alone = (
        solve_lib.solve(
          p, hosts=1, device_bytes=1 << 37, host_bytes=1 << 40, pooled=pooled
        )
        for p, pooled in ((problem, None), (bare, None), (problem, ()))
      )
      # Here every row is warm, and every pooled row with its owner.
      assert expected.hot == expected.cold == 0
      w, owner = 4 * dim, dict(expected.pooled)
      assert expected.warm_slots >= max(MLPERF) or not owner
      coalesced = [
        sum(communication.coalesced_bytes(float(x @ problem.pi), w, n))
        for x in s.of_table
      ]
      pooled = [
        sum(communication.pooled_bytes(1.0, b, h, w, n)) for h in MULTI_HOT
      ]
      ours = [
        p if t.name in owner else c
        for t, c, p in zip(rows, coalesced, pooled, strict=True)
      ]
      best = list(map(min, coalesced, pooled))
      total = sum(v for k, v in expected.sent if k != "host")
      assert abs(sum(ours) / total - 1) < 1e-3  # nothing is left out
      worst = max(x / y for x, y in zip(ours, best, strict=True))
      planned, unpooled = (
        sum(v for k, v in x.sent if k != "host") for x in (plan, alone)
      )
      found = collectives_of(plan, features, "float32")
      sent = sum(c.sent(n) for c in found)
      print(
        f"{dim:4} {exponent:5} {sent / b:>9,.0f} {planned / b:>9,.0f} "
        f"{sum(ours) / b:>9,.0f} {unpooled / b:>10,.0f} "
        f"{sum(pooled) / b:>11,.0f} {sum(best) / b:>8,.0f} {worst:>14.4f} "
        f"{len(plan.pooled):>7}",
        flush=True,
      )


if __name__ == "__main__":
  simulate_devices(NODES * DEVICES)
  kaggle()
  nodes()
  multi_hot()
