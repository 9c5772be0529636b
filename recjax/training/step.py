"""The one jitted step, its state, and the forward pass for evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from recjax import mesh as mesh_lib
from recjax.embedding import lookup
from recjax.embedding import tables as tables_lib
from recjax.embedding.optimizers import Optimizer
from recjax.embedding.tables import Tables
from recjax.mesh import AXIS
from recjax.plan.plan import Plan
from recjax.schema import Feature


class TrainState(NamedTuple):
  """Donated to every step. Dense parts are replicated."""

  step: jax.Array  # [] int32
  params: Any
  opt_state: Any
  tables: Tables


class Model(NamedTuple):
  """All that is static in a compiled step."""

  apply: Callable  # (params, dense [b, D], activations [b, A, d]) -> logits [b]
  features: tuple[Feature, ...]
  dense_optimizer: optax.GradientTransformation
  sparse_optimizer: Optimizer
  plan: Plan
  exchange_dtype: Any
  seed: int


def state_specs(model: Model) -> TrainState:
  """PartitionSpec prefixes of the state."""
  everywhere = PartitionSpec()
  tables = tables_lib.specs(model.plan, model.sparse_optimizer)
  return TrainState(everywhere, everywhere, everywhere, tables)


def state_shardings(model: Model, mesh: Mesh) -> TrainState:
  everywhere = mesh_lib.replicated(mesh)
  tables = tables_lib.shardings(model.plan, model.sparse_optimizer, mesh)
  return TrainState(everywhere, everywhere, everywhere, tables)


def log_losses(logits, labels):  # [b], [b] -> [b]
  return jax.nn.softplus(logits) - labels * logits


def make_train_step(model: Model, mesh: Mesh):
  """(state, batch) -> (state, metrics), jitted, the state donated.

  batch: label [B] float32, dense [B, D] float32, ids [B, S] int32 and maybe
  weights [B, S] float32, sharded over the first axis. metrics: loss, rounds,
  distinct (warm and cold rows a device asked for, the mean over devices).
  """
  plan, features = model.plan, model.features

  def step(state: TrainState, batch):
    activations, trip = lookup.read(
      state.tables,
      batch["ids"],
      batch.get("weights"),
      features,
      plan,
      model.exchange_dtype,
    )

    def loss_of(params, activations):
      with jax.named_scope("dense"):
        logits = model.apply(params, batch["dense"], activations)
        return jnp.sum(log_losses(logits, batch["label"])) / plan.batch_size

    loss, (grads, row_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
      state.params, activations
    )
    with jax.named_scope("update"):
      tables, rounds = lookup.update(
        state.tables,
        trip,
        row_grads,
        features,
        plan,
        model.exchange_dtype,
        model.sparse_optimizer,
        state.step,
        jnp.uint32(model.seed),
      )
    distinct = trip.route.starts[-2].astype(jnp.float32)  # before the hot ones
    loss, grads, distinct = lax.psum((loss, grads, distinct), AXIS)
    updates, opt_state = model.dense_optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": loss,
      "rounds": rounds,
      "distinct_rows": distinct / plan.devices,
    }
    return TrainState(state.step + 1, params, opt_state, tables), metrics

  specs = state_specs(model)
  sharded = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(specs, PartitionSpec(AXIS)),
    out_specs=(specs, PartitionSpec()),
    check_vma=False,
  )
  out = (state_shardings(model, mesh), mesh_lib.replicated(mesh))
  return jax.jit(sharded, donate_argnums=0, out_shardings=out)


def lower(model: Model, mesh: Mesh, params, inputs: int):
  """The train step lowered for shapes alone: its tables need not exist.

  Args:
    params: of the dense part, arrays or shapes.
    inputs: D, dense inputs of a sample.

  Returns:
    (jax.stages.Lowered, the state's shapes with their shardings).
  """

  def initial(params):
    rows = tables_lib.init(model.plan, model.sparse_optimizer, mesh, 0.0, 0)
    opt_state = model.dense_optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, rows)

  def placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  state = jax.eval_shape(initial, params)
  shardings = jax.tree.broadcast(state_shardings(model, mesh), state)
  state = jax.tree.map(placed, state, shardings)
  columns = sum(f.hotness for f in model.features)
  shapes = {
    "label": ((), jnp.float32),
    "dense": ((inputs,), jnp.float32),
    "ids": ((columns,), jnp.int32),
  }
  if any(f.weighted for f in model.features):
    shapes["weights"] = ((columns,), jnp.float32)
  of_samples = mesh_lib.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(
      (model.plan.batch_size, *shape), dtype, sharding=of_samples
    )
    for name, (shape, dtype) in shapes.items()
  }
  return make_train_step(model, mesh).lower(state, batch), state


def make_forward(model: Model, mesh: Mesh):
  """(state, batch) -> (logits, labels, mask), [B] on every device, jitted."""

  def forward(state: TrainState, batch):
    activations, _ = lookup.read(
      state.tables,
      batch["ids"],
      batch.get("weights"),
      model.features,
      model.plan,
      model.exchange_dtype,
    )
    logits = model.apply(state.params, batch["dense"], activations)
    scored = logits, batch["label"], batch["mask"]
    return lax.all_gather(scored, AXIS, tiled=True)

  sharded = jax.shard_map(
    forward,
    mesh=mesh,
    in_specs=(state_specs(model), PartitionSpec(AXIS)),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, out_shardings=mesh_lib.replicated(mesh))
