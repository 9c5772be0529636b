"""The one assembly: config, data and plan -> a model on a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from recjax import config as config_lib
from recjax import log_schema
from recjax.config import Config
from recjax.data.prepared import Prepared
from recjax.embedding import host_store, optimizers
from recjax.embedding.embedding import Embedding, make_embedding
from recjax.errors import UserError
from recjax.mesh import make_mesh
from recjax.models import build as models
from recjax.plan import positions
from recjax.plan.plan import FROZEN, Plan
from recjax.schema import Feature, TableGroup, groups_of
from recjax.training import same_run, visiting
from recjax.training.dense_optimizer import dense_optimizer
from recjax.training.inputs import last_step
from recjax.training.state import (
  Identity,
  Run,
  StepSpec,
  TrainState,
  first_state,
)


def table_groups(
  config: Config, rows: Mapping[str, int]
) -> tuple[TableGroup, ...]:
  """Returns the configured groups of tables.

  Args:
    config: whose embedding it is.
    rows: of each table, by its name.
  """
  dims = log_schema.dims(config.schema)
  return groups_of(config_lib.table_specs(config.embedding, rows, dims))


def model_inputs(
  features: tuple[Feature, ...], groups: tuple[TableGroup, ...]
) -> dict[str, tuple[int, int]]:
  """Returns (h, d) of each feature's activations, in the order of columns."""
  dims = {table: g.dim for g in groups for table in g.tables}
  return {f.name: (f.activations, dims[f.table]) for f in features}


def build(
  config: Config,
  prepared: Prepared,
  plan: Plan,
  *,
  model: tuple[Any, Callable] | None = None,
  serving: bool = False,
) -> Run:
  """Assembles a model on the plan's mesh, with a fresh state.

  Args:
    config: the run's.
    prepared: the data set.
    plan: of this config and data.
    model: (params, apply) of a model of your own, as models/build.py makes
      them; None = the configured one.
    serving: keeps no slot variables; such a run cannot train.

  Raises:
    UserError: the plan was made for another config or data, the model does not
      fit the data, or the mesh the machine.
  """
  e, schema = config.embedding, prepared.schema
  groups = table_groups(config, prepared.profile.table_rows())
  _check_plan(plan, config, groups, prepared.profile.rows)
  mesh = make_mesh(plan.devices, plan.node_devices)
  params, apply = model or models.build(
    config.model,
    len(schema.dense),
    model_inputs(schema.features, groups),
    e.dim,
    config.seed,
  )
  steps = 0 if serving else last_step(config, prepared)
  spec = StepSpec(
    apply,
    configured_embedding(config, plan, schema.features, groups, serving),
    dense_optimizer(config, steps),
  )
  ranks = {
    name: of.ranks
    for name, of in positions.of_groups(plan, prepared.profile).items()
  }
  store = visiting.make_store(spec, mesh, config.plan.host_store_dir)
  if store:
    host_store.init(store, spec.embedding, e.init_scale)
  on_host = {"auto": None, "host": True, "device": False}[config.data.route]
  step = visiting.Step(spec, mesh, store, on_host=on_host)
  return Run(
    spec,
    mesh,
    first_state(spec, mesh, params, e.init_scale, ranks),
    refuse_used_states(step.train),
    step.forward,
    identity_of(config, prepared, params if model else None),
    step.prepare,
    step.place,
    store,
  )


def configured_embedding(
  config: Config,
  plan: Plan,
  features: tuple[Feature, ...],
  groups: tuple[TableGroup, ...],
  serving: bool = False,
) -> Embedding:
  """Makes the static part of all groups; without slot variables to serve."""
  of_rows = {}
  for g in groups:
    of_rows[g.name] = optimizers.OPTIMIZERS[g.optimizer](g.learning_rate)
    if serving:
      of_rows[g.name] = of_rows[g.name]._replace(slots={})
  return make_embedding(
    plan,
    features,
    of_rows,
    wire_dtype=config.embedding.exchange_dtype,
    seed=config.seed,
  )


def _check_plan(
  plan: Plan, config: Config, groups: tuple[TableGroup, ...], rows: int
) -> None:
  """Raises UserError where a plan was made for another config or data.

  groups, rows: the config's and the data's, where the plan has its own.
  """
  tables_of = lambda groups: "; ".join(
    f"{g.name} of {', '.join(g.tables)}" for g in groups
  )
  for what, planned, wanted in (
    ("train.batch_size", plan.batch_size, config.train.batch_size),
    ("mesh.devices", plan.devices, config.mesh.devices or plan.devices),
    ("embedding", tables_of(plan.groups), tables_of(groups)),
    ("rows of all tables", plan.rows, rows),
  ):
    if planned != wanted:
      raise UserError(
        f"{what}: the plan was made for {planned}, config and data have "
        f"{wanted}; make the plan anew with them"
      )
  frozen = any(g.rows_of(FROZEN) for g in plan.groups)
  if frozen and not config.plan.host_store_dir:
    raise UserError(
      "plan.host_store_dir: the plan has frozen rows, which lie in files; set "
      "a folder on an SSD of each host, or plan without plan.ssd_memory_mb"
    )


def refuse_used_states(step: Callable) -> Callable:
  """Makes a step raise where it gets a state that another step has used up.

  On several devices JAX ends the process instead (jax 0.10 to 0.12).
  """

  def checked(state: TrainState, batch):
    if state.step.is_deleted():
      raise ValueError(
        "this state was given to a step before, which has used it up: go on "
        "with the state that the step returned (run = "
        "run._replace(state=state))"
      )
    return step(state, batch)

  return checked


def identity_of(
  config: Config, prepared: Prepared, own_params: Any = None
) -> Identity:
  """Returns what a checkpoint must share with the run that restores it.

  Args:
    config: the run's.
    prepared: the data set.
    own_params: of a model that is not the configured one.
  """
  if own_params is None:
    model = dataclasses.asdict(config.model)
    del model["compute_dtype"]  # of the same parameters
  else:
    shapes = jax.tree_util.tree_leaves_with_path(own_params)
    model = {jax.tree_util.keystr(path): x.shape for path, x in shapes}
  groups = table_groups(config, prepared.profile.table_rows())
  tables = {
    f"table {table}": [g.dim, g.dtype, g.optimizer]
    for g in groups
    for table in g.tables
  }
  of = {f"model.{k}": v for k, v in model.items()} | {
    "embedding.dim": config.embedding.dim,
    "train.optimizer": config.train.optimizer,
    "features": [f.name for f in prepared.schema.features],
    **tables,
  }
  return Identity(
    same_run.as_json(of),
    prepared.vocabulary,
    prepared.profile.rows,
    same_run.settings_of(config, prepared),
  )
