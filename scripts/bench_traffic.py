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
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench_plan
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax import (
  collectives,
  cost,
  cuts,
  planner,
  presets,
  sparse_optim,
  tables,
  train_step,
)
from recjax.mesh import batch_sharding, make_mesh, replicated, simulate_devices
from recjax.plan import Plan
from recjax.specs import Feature

DEVICES, NODES, LOCAL = 8, 2, 8_192
FEATURES = tuple(Feature(f"C{i}", f"C{i}") for i in range(26))
WAYS = {
  "flat": cuts.FLAT,
  "two_stage": cuts.Transport("two_stage", "one"),
  "node": cuts.Transport("flat", "node"),
}


def collectives_of(
  plan: Plan, features: tuple[Feature, ...], exchange_dtype: str
) -> list[collectives.Collective]:
  """Of the first round of a training step whose dense part has one weight."""
  mesh = make_mesh(plan.devices, plan.node_devices)
  model = train_step.Model(
    apply=lambda params, dense, x: params["w"] * jnp.sum(x, (1, 2)),
    features=features,
    dense_optimizer=optax.sgd(0.1),
    sparse_optimizer=sparse_optim.adagrad(0.1),
    plan=plan,
    exchange_dtype=jnp.dtype(exchange_dtype),
    seed=0,
  )
  params = {"w": jnp.zeros(())}
  dense = (params, model.dense_optimizer.init(params), np.int32(0))
  placed = lambda tree, shardings: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s),
    tree,
    shardings,
  )
  everywhere = jax.tree.map(lambda _: replicated(mesh), dense)
  params, opt_state, step = placed(dense, everywhere)
  rows = placed(
    jax.eval_shape(
      lambda: tables.init(plan, model.sparse_optimizer, mesh, 0.1, 0)
    ),
    tables.shardings(plan, model.sparse_optimizer, mesh),
  )
  state = train_step.TrainState(step, params, opt_state, rows)
  columns = sum(f.hotness for f in features)
  of_batch = lambda shape, dtype: jax.ShapeDtypeStruct(
    (plan.batch_size, *shape), dtype, sharding=batch_sharding(mesh)
  )
  batch = {
    "label": of_batch((), np.float32),
    "dense": of_batch((1,), np.float32),
    "ids": of_batch((columns,), np.int32),
  }
  lowered = train_step.make_train_step(model, mesh).lower(state, batch)
  text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
  found = collectives.of_step(text, plan.devices)
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
        plan = planner.solve(
          problem, hosts=1, device_bytes=1 << 40, host_bytes=1 << 40
        )
        found = collectives_of(plan, FEATURES, wire)
        sent = sum(c.sent(n) for c in found)
        planned = sum(v for k, v in plan.sent if k != "host")
        distinct = float(problem.distinct(0, plan.rows))
        floor = sum(cost.coalesced_bytes(distinct, problem.work.wire_bytes, n))
        table = sum(sum(cost.pooled_bytes(1.0, b, 1, 4 * dim, n))
                    for _ in FEATURES)  # fmt: skip
        row = sum(cost.uncoalesced_bytes(len(FEATURES), b, 4 * dim, n))
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
        cost.two_stage_bytes(touched, 4 * dim, NODES, DEVICES)
        * problem.spectrum.count
      )
      flat = 0.0
      for name, way in WAYS.items():
        plan = planner.solve(
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


if __name__ == "__main__":
  simulate_devices(NODES * DEVICES)
  kaggle()
  nodes()
