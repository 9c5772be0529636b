"""Bytes between two nodes of 8, read from the compiled step, by transport.

  python scripts/bench_nodes.py

The 26 Criteo Kaggle tables on 16 simulated devices, local batch 8,192, no row
replicated: the step is compiled for tables that are never created, and the
bytes that a device sends in its first round are those of the operands of its
all-to-all and all-gather instructions, each by the share of its replica group
that sits elsewhere. Beside them what the plan predicts, and the floor: every
row that a node touches crosses the network once, of those that the other node
owns. "flat" asks all owners, "two_stage" a proxy in the node first, and "node"
keeps a copy of all rows in each node and exchanges gradients.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_plan import EXPONENTS, KAGGLE, problem_of

from recjax import (
  cost,
  cuts,
  planner,
  presets,
  sparse_optim,
  tables,
  train_step,
)
from recjax.mesh import batch_sharding, make_mesh, replicated, simulate_devices
from recjax.specs import Feature

NODES, EACH, LOCAL = 2, 8, 8_192
WAYS = {
  "flat": cuts.FLAT,
  "two_stage": cuts.Transport("two_stage", "one"),
  "node": cuts.Transport("flat", "node"),
}
_BYTES = {"pred": 1, "u8": 1, "u16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def _group(text: str) -> list[int]:
  """The replica group of device 0, in any of XLA's three notations."""
  if found := re.match(r"mesh\[(.*?)\] \{(.*?)\}", text):  # of named axes
    sizes = [int(x) for x in re.findall(r"=(\d+)", found[1])]
    names = re.findall(r"'(\w+)'=", found[1])
    index = tuple(slice(None) if f"'{a}'" in found[2] else 0 for a in names)
    return np.arange(math.prod(sizes)).reshape(sizes)[index].ravel().tolist()
  if found := re.match(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", text):  # an iota
    shape, dims, order = (
      [int(x) for x in (part or "").split(",") if x] for part in found.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order or range(len(dims))).reshape(shape)
    return next(group.tolist() for group in ids if 0 in group)
  groups = re.findall(r"\{([\d,]+)\}", text)
  ids = [[int(x) for x in group.split(",")] for group in groups]
  return next(group for group in ids if 0 in group)


def collectives(text: str) -> list[tuple[str, int, list[int]]]:
  """(kind, bytes of a device's operands, its peers) of a compiled step.

  Of the entry computation: what only further rounds run is in a loop's body.
  """
  entry = text[text.index("\nENTRY ") :]
  entry = entry[: entry.index("\n}")]
  found = []
  for line in entry.splitlines():
    call = re.search(r"= (.*) (all-to-all|all-gather|all-reduce)\(", line)
    if not call:
      continue
    groups = line[line.index("replica_groups=") + len("replica_groups=") :]
    peers = _group(groups)
    size = 0
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", call[1]):
      shape = [int(x) for x in shape.split(",") if x]
      size += _BYTES[dtype] * math.prod(shape)
    if call[2] == "all-gather":  # its result is what all have
      size //= len(peers)
    found.append((call[2], size, peers))
  return found


def between_nodes(text: str, node_devices: int) -> float:
  """Bytes that device 0 sends to other nodes for rows, in one round."""
  total = 0.0
  for kind, size, peers in collectives(text):
    far = sum(p >= node_devices for p in peers)
    if kind == "all-to-all":
      total += size * far / len(peers)
    elif kind == "all-gather":
      total += size * far
  return total


def compiled(plan, features) -> str:
  """The compiled step of a model that is nearly nothing but lookups."""
  mesh = make_mesh(plan.devices, plan.node_devices)
  model = train_step.Model(
    apply=lambda params, dense, x: params * jnp.sum(x, axis=(1, 2)),
    features=features,
    dense_optimizer=optax.sgd(0.1),
    sparse_optimizer=sparse_optim.adagrad(0.1),
    plan=plan,
    exchange_dtype=jnp.float32,
    seed=0,
  )

  def like(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  t = jax.eval_shape(
    lambda: tables.init(plan, model.sparse_optimizer, mesh, 0.1, 0)
  )
  place = tables.shardings(plan, model.sparse_optimizer, mesh)
  t = jax.tree.map(like, t, place)
  whole = replicated(mesh)
  state = train_step.TrainState(
    like(np.int32(0), whole),
    like(np.float32(0), whole),
    model.dense_optimizer.init(np.float32(0)),
    t,
  )
  split, size = batch_sharding(mesh), plan.batch_size
  batch = {
    "label": like(np.zeros(size, np.float32), split),
    "dense": like(np.zeros((size, 1), np.float32), split),
    "ids": like(np.zeros((size, len(features)), np.int32), split),
  }
  step = train_step.make_train_step(model, mesh).lower(state, batch)
  fast = {"xla_backend_optimization_level": 0}
  return step.compile(fast).as_text()


def main() -> None:
  n = NODES * EACH
  simulate_devices(n)
  features = tuple(Feature(f"C{i}", f"C{i}") for i in range(len(KAGGLE)))
  print("bytes a sample that a device sends to the other node")
  print(f"{'dim':>4} {'s':>5} {'transport':9} {'compiled':>10} {'plan':>10} "
        f"{'floor':>10} {'over floor':>10} {'of flat':>8} {'in all':>10} "
        f"{'ms':>7}")  # fmt: skip
  for dim in (16, 128):
    for exponent in EXPONENTS:
      topology = presets.get("dgx_h200", n)
      problem = problem_of(
        KAGGLE, exponent, n, n * LOCAL, dim, topology=topology
      )
      touched = problem.spectrum.touched(EACH * LOCAL)
      floor = np.sum(
        cost.two_stage_bytes(touched, 4 * dim, NODES, EACH)
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
        sent = between_nodes(compiled(plan, features), EACH) / LOCAL
        flat = flat or sent
        print(
          f"{dim:4} {exponent:5} {name:9} {sent:>10,.1f} "
          f"{plan.network_per_sample:>10,.1f} {floor / LOCAL:>10,.1f} "
          f"{sent / (floor / LOCAL):>10.3f} {sent / flat:>8.3f} "
          f"{plan.bytes_per_sample:>10,.1f} {plan.step_seconds * 1e3:>7.3f}",
          flush=True,
        )


if __name__ == "__main__":
  main()
