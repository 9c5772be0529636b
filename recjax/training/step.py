"""The one jitted step, and the forward pass for evaluation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recjax import mesh as mesh_lib
from recjax.embedding import exchange, lookup, update
from recjax.embedding import tables as tables_lib
from recjax.embedding.buckets import buckets_of
from recjax.embedding.coalesce import NONE
from recjax.embedding.embedding import Embedding
from recjax.embedding.tables import Tables
from recjax.embedding.visits import Beside
from recjax.plan.plan import VISITORS
from recjax.schema import AXES
from recjax.training.state import (
  StepSpec,
  TrainState,
  state_shardings,
  state_specs,
)


def log_losses(logits, labels):  # [b], [b] -> [b]
  """Returns -log of the predicted probability of each label, in nats."""
  return jax.nn.softplus(logits) - labels * logits


def losses_of(logits, batch):  # [b] -> [b]
  """Returns the log losses of samples, each times its weight."""
  losses = log_losses(logits, batch["label"])
  return losses * batch.get("sample_weight", 1.0)


def make_train_step(spec: StepSpec, mesh: Mesh, options: dict | None = None):
  """Makes (state, batch, fetched, beside) -> (state, metrics, updated), jitted.

  The state and the fetched visitors are donated.

  Args:
    spec: the step; with the room that its visitors take.
    mesh: of the plan.
    options: the compiler's.

  The step takes
    batch: label [B] float32, dense [B, D] float32, ids [B, S] int32 and maybe
      weights [B, S], sample_weight [B] float32 and the ids' route
      (host_route.py; else the step makes it), sharded over the first axis.
    fetched, beside: the visitors by group (look_ahead.py); {} where no rows are
      stored.

  and returns the metrics loss, rounds, distinct_rows (those that a device
  asked owners for, the mean over devices), and the visitors, updated.
  """
  embedding, plan = spec.embedding, spec.embedding.plan

  def step(state: TrainState, batch, fetched, beside):
    tables, batch = _arrive(embedding, state.tables, batch, fetched, beside)
    activations, residuals = lookup.forward(embedding, tables, batch)
    masks = lookup.masks(embedding, batch["ids"])

    def loss_of(params, activations):
      with jax.named_scope("dense"):
        logits = spec.apply(params, batch["dense"], activations, masks)
        return jnp.sum(losses_of(logits, batch)) / plan.batch_size

    loss, (grads, row_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
      state.params, activations
    )
    with jax.named_scope("update"):
      tables, rounds = update.backward(
        embedding, tables, residuals, row_grads, state.step
      )
    distinct = jnp.zeros(())
    if residuals.route is not None:
      asked = exchange.asked_rows(residuals.route, plan)
      distinct = asked.astype(jnp.float32)
    loss, grads, distinct = _summed((loss, grads, distinct), plan.devices)
    # Optax's Adam and schedules mix integers and floats.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = spec.dense_optimizer.update(
        grads, state.opt_state, state.params
      )
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": loss,
      "rounds": rounds,
      "distinct_rows": distinct / plan.devices,
    }
    updated = {g.name: tables[g.name].pop(VISITORS) for g in embedding.visited}
    state = TrainState(state.step + 1, params, opt_state, tables)
    return state, metrics, updated

  specs = state_specs(embedding)
  batched, owned = PartitionSpec(AXES), PartitionSpec(None, AXES)
  sharded = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(specs, batched, owned, owned),
    out_specs=(specs, PartitionSpec(), owned),
    check_vma=False,
  )
  out = (
    state_shardings(embedding, mesh),
    mesh_lib.replicated(mesh),
    NamedSharding(mesh, owned),
  )
  return jax.jit(
    sharded,
    donate_argnums=(0, 2),
    out_shardings=out,
    compiler_options=options,
  )


def _arrive(embedding: Embedding, tables: Tables, batch, fetched, beside):
  """Returns the tables with their visitors, and the batch with their rows.

  Rows that the step before has updated are taken from there.
  """
  tables = {name: dict(tiers) for name, tiers in tables.items()}
  for name, arrays in fetched.items():
    of = beside[name]
    at = of.forwarded[:, 0]
    index = jnp.stack([at, jnp.zeros_like(at)], axis=1)

    def newest(new, old, at=at, index=index):  # [V, 1, ...], [V', 1, ...]
      mask = (at != NONE).reshape(-1, *(1,) * (new.ndim - 1))
      return jnp.where(mask, tables_lib.gather(old, index)[:, None], new)

    with jax.named_scope("arrive"):
      tables[name][VISITORS] = jax.tree.map(newest, arrays, of.before)
  if beside:
    batch = batch | {"stored": {k: x.stored for k, x in beside.items()}}
  return tables, batch


def _summed(tree, devices: int):
  """Returns the sums over devices of arrays, in one all-reduce a dtype.

  As one vector: XLA would join the arrays anyhow, and then copy each out of the
  sum in a kernel of its own, where now what uses one reads its part.
  """
  if devices == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  for dtype in dict.fromkeys(x.dtype for x in leaves):
    mine = [i for i, x in enumerate(leaves) if x.dtype == dtype]
    flat = jnp.concatenate([leaves[i].reshape(-1) for i in mine])
    ends = np.cumsum([leaves[i].size for i in mine])
    parts = jnp.split(lax.psum(flat, AXES), ends[:-1])
    for i, part in zip(mine, parts, strict=True):
      leaves[i] = part.reshape(leaves[i].shape)
  return jax.tree.unflatten(structure, leaves)


def make_forward(spec: StepSpec, mesh: Mesh):
  """Makes (state, batch, fetched) -> (logits, labels, mask), jitted.

  Each is [B], on every device. fetched: the visitors by group, {} where no
  rows are stored.
  """
  embedding = spec.embedding

  def forward(state: TrainState, batch, fetched):
    tables = {
      name: tiers | ({VISITORS: fetched[name]} if name in fetched else {})
      for name, tiers in state.tables.items()
    }
    activations, _ = lookup.forward(embedding, tables, batch)
    masks = lookup.masks(embedding, batch["ids"])
    logits = spec.apply(state.params, batch["dense"], activations, masks)
    scored = logits, batch["label"], batch["mask"]
    return lax.all_gather(scored, AXES, tiled=True)

  sharded = jax.shard_map(
    forward,
    mesh=mesh,
    in_specs=(
      state_specs(embedding),
      PartitionSpec(AXES),
      PartitionSpec(None, AXES),
    ),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, out_shardings=mesh_lib.replicated(mesh))


# ---- Shapes alone


def lower(
  spec: StepSpec, mesh: Mesh, params, inputs: int, *, routed: bool = False
):
  """Lowers the train step for shapes alone: its tables need not exist.

  Args:
    spec: the step.
    mesh: where it would run.
    params: of the dense part, arrays or shapes.
    inputs: D, dense inputs of a sample.
    routed: whether batches bring their routes.

  Returns:
    (jax.stages.Lowered, the state's shapes with their shardings).
  """
  state = state_shapes(spec, mesh, params)
  batch = batch_shapes(spec, mesh, inputs, routed=routed)
  visitors = visitor_shapes(spec, mesh)
  return make_train_step(spec, mesh).lower(state, batch, *visitors), state


def state_shapes(spec: StepSpec, mesh: Mesh, params) -> TrainState:
  """Returns the state's shapes, with their shardings."""
  shapes = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32),
    params,
    jax.eval_shape(spec.dense_optimizer.init, params),
    tables_lib.shapes(spec.embedding),
  )
  shardings = jax.tree.broadcast(state_shardings(spec.embedding, mesh), shapes)
  placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(placed, shapes, shardings)


def visitor_shapes(spec: StepSpec, mesh: Mesh):
  """Returns the shapes of the visitors, fetched and beside, by group."""
  place = NamedSharding(mesh, PartitionSpec(None, AXES))
  fetched, beside = {}, {}
  for g in spec.embedding.visited:
    tier = g.group.visitors
    shapes = tables_lib.tier_shapes(g, tier)
    fetched[g.name] = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )
    of_row = jax.ShapeDtypeStruct(
      (tier.shard_rows, tier.owners), jnp.int32, sharding=place
    )
    beside[g.name] = Beside(of_row, of_row, fetched[g.name])
  return fetched, beside


def batch_shapes(
  spec: StepSpec,
  mesh: Mesh,
  inputs: int,
  scored: bool = False,
  *,
  routed: bool = False,
):
  """Returns a global batch's shapes, for D dense inputs of a sample.

  Scored batches have a mask of those samples that are not padding, routed ones
  bring their routes.
  """
  embedding = spec.embedding
  columns = embedding.columns
  shapes = {
    "label": ((), jnp.float32),
    "dense": ((inputs,), jnp.float32),
    "ids": ((columns,), jnp.int32),
  }
  if scored:
    shapes["mask"] = ((), jnp.float32)
  if embedding.weighted:
    shapes["weights"] = ((columns,), jnp.float32)
  place, size = mesh_lib.batch_sharding(mesh), embedding.plan.batch_size
  batch: dict[str, Any] = {
    name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)
    for name, (shape, dtype) in shapes.items()
  }
  if routed:
    n, buckets = embedding.plan.devices, buckets_of(embedding.plan)
    lookups = size // n * columns
    sizes = (lookups + 1, len(buckets.bases), lookups, lookups)
    batch["route"] = exchange.Route(
      *(jax.ShapeDtypeStruct((n, x), jnp.int32, sharding=place) for x in sizes)
    )
  return batch
