"""The job: prepare, plan, train with checkpoints, evaluate; read downward."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax import distributed, frequency
from recjax import mesh as mesh_lib
from recjax.config import Config
from recjax.data import batches
from recjax.data import prepare as prepare_lib
from recjax.data.prepare import Prepared
from recjax.embedding import optimizers, tables
from recjax.errors import UserError
from recjax.models import dlrm
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.planner import write_plan
from recjax.training import checkpoint, evaluate, step_log
from recjax.training import step as step_lib
from recjax.training.step import Model, TrainState

Report = Callable[[str], None]


def prepare(config: Config, workdir: pathlib.Path, report: Report) -> Prepared:
  """Logs -> prepared data set, vocabulary and profile, in workdir/data."""
  directory = str(workdir / "data")
  prepared = distributed.first_alone(
    lambda: prepare_lib.prepare(config, directory, report)
  )
  if distributed.from_first(lambda: prepared.vocabulary) != prepared.vocabulary:
    raise UserError(
      f"{directory} holds another vocabulary than on process 0: let all "
      "processes share one --workdir, or copy process 0's there"
    )
  report(frequency.describe(prepared.profile))
  return prepared


def plan(
  config: Config,
  prepared: Prepared | None,
  workdir: pathlib.Path,
  report: Report,
  serving: bool = False,
) -> Plan:
  """Profile, budgets and topology -> plan.json; for any number of devices.

  Without a prepared data set, from the table sizes in data.rows. A plan for
  serving is for the forward pass only, of rows without slots.
  """
  return _plan(config, prepared, workdir, report, serving)[0]


def _plan(config, prepared, workdir, report, serving=False):
  """(Plan, what draws its page again); see write_plan.run."""
  draw = lambda: None  # on all processes but the first
  devices = config.mesh.devices or jax.device_count()
  hosts = distributed.machines()
  if devices > jax.device_count():
    hosts = -(-devices // config.mesh.devices_per_host)
  local = jax.local_devices()[0]
  limit = None
  if local.platform != "cpu":
    limit = (local.memory_stats() or {}).get("bytes_limit")

  def make():
    nonlocal draw
    result, draw = write_plan.run(
      config,
      prepared,
      workdir,
      report,
      devices=devices,
      hosts=hosts,
      kind=local.device_kind,
      device_limit=limit,
      slot_bytes=optimizers.slot_bytes(
        config.embedding.optimizer, config.embedding.dim
      ),
      serving=serving,
    )
    return result.to_json()

  # Machines differ a little in their memory: one plan for all.
  found = distributed.from_first(make)  # before draw is looked at
  return Plan.from_json(found), draw


def _begin(config, workdir, report, serving=False):
  """(prepared data, plan, mesh, what draws the plan's page again)."""
  c = config.mesh
  mesh_lib.make_mesh(c.devices, c.node_devices)  # or an error, before all work
  prepared = prepare(config, workdir, report)
  plan_, draw = _plan(config, prepared, workdir, report, serving)
  mesh = mesh_lib.make_mesh(plan_.devices, plan_.node_devices)
  return prepared, plan_, mesh, draw


# ---- Model and state


def _dense_optimizer(
  config: Config, steps: int
) -> optax.GradientTransformation:
  c = config.train
  rate = optax.constant_schedule(c.learning_rate)
  pieces, bounds = [rate], []
  if c.warmup_steps:
    pieces.insert(
      0, optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)
    )
    bounds.append(c.warmup_steps)
  if c.decay_steps:
    pieces.append(optax.linear_schedule(c.learning_rate, 0.0, c.decay_steps))
    bounds.append(max(steps - c.decay_steps, c.warmup_steps))
  schedule = optax.join_schedules(pieces, bounds)
  return {
    "sgd": lambda: optax.sgd(schedule),
    "adagrad": lambda: optax.adagrad(
      schedule, initial_accumulator_value=0.0, eps=1e-8
    ),
    "adam": lambda: optax.adam(schedule),
  }[c.optimizer]()


def _build(
  config, prepared, plan_, mesh, steps, serving=False
) -> tuple[Model, TrainState]:
  """The static model and a fresh state, placed as the plan says."""
  schema, e = prepared.schema, config.embedding
  activations = sum(f.activations for f in schema.features)
  params, apply = dlrm.build(
    config.model, len(schema.dense), activations, e.dim, config.seed
  )
  sparse_optimizer = optimizers.OPTIMIZERS[e.optimizer](e.learning_rate)
  if serving:
    sparse_optimizer = sparse_optimizer._replace(slots={})
  model = Model(
    apply=apply,
    features=schema.features,
    dense_optimizer=_dense_optimizer(config, steps),
    sparse_optimizer=sparse_optimizer,
    plan=plan_,
    exchange_dtype=jnp.dtype(e.exchange_dtype),
    seed=config.seed,
  )
  dense = (params, model.dense_optimizer.init(params), np.int32(0))
  params, opt_state, step = jax.device_put(dense, mesh_lib.replicated(mesh))
  ranks = positions.warm_ranks(plan_, prepared.profile)
  rows = tables.init(
    plan_, model.sparse_optimizer, mesh, e.init_scale, config.seed, ranks
  )
  return model, TrainState(step, params, opt_state, rows)


def _identity(config: Config, prepared: Prepared) -> checkpoint.Identity:
  m, e = config.model, config.embedding
  model = {
    "model.name": m.name,
    "model.bottom": list(m.bottom),
    "model.top": list(m.top),
    "embedding.dim": e.dim,
    "embedding.dtype": e.dtype,
    "embedding.optimizer": e.optimizer,
    "train.optimizer": config.train.optimizer,
    "features": [f.name for f in prepared.schema.features],
  }
  if m.name == "dcnv2":
    model |= {
      "model.cross_layers": m.cross_layers,
      "model.cross_rank": m.cross_rank,
    }
  return checkpoint.Identity(model, prepared.vocabulary, prepared.profile.rows)


def _restore(config, prepared, directory, step, state, model, mesh, report):
  meta = checkpoint.read_meta(directory, step)
  checkpoint.check_identity(directory, step, meta, _identity(config, prepared))
  report(f"restoring step {step} of {directory}")
  state = checkpoint.restore(
    directory, step, meta, state, model, mesh, prepared.profile
  )
  return state, meta


# ---- Evaluate


def _evaluate(config, prepared, model, state, mesh, report) -> dict:
  local = config.train.batch_size // jax.process_count()
  test = batches.dataset(
    prepared,
    "test",
    local,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    positions_of=positions.from_ranks(model.plan, prepared.profile),
  )
  forward = step_lib.make_forward(model, mesh)
  return evaluate.run(
    state, forward, test, mesh, report, prepared.samples["test"]
  )


def _summary(step: int, result: dict, prepared: Prepared) -> str:
  lines = [f"test metrics at step {step}:"]
  lines += [f"  {name} {value:.6f}" for name, value in result.items()]
  if prepared.teacher:
    lines.append(
      f"the teacher that drew the labels: auc {prepared.teacher['auc']:.6f}, "
      f"log_loss {prepared.teacher['log_loss']:.6f}"
    )
  return "\n".join(lines)


def evaluate_checkpoint(
  config: Config, workdir: pathlib.Path, report: Report
) -> dict:
  """Restores a checkpoint onto this mesh and a plan for serving; its metrics.

  The rows only: slots are not read.
  """
  prepared, plan_, mesh, _ = _begin(config, workdir, report, serving=True)
  directory = workdir / "checkpoints"
  step = config.checkpoint.step
  if step < 0:
    step = checkpoint.newest(directory)
    if step is None:
      raise UserError(
        f"--workdir: {directory} holds no checkpoint to evaluate; train first"
      )
  model, state = _build(config, prepared, plan_, mesh, 0, serving=True)
  state, _ = _restore(
    config, prepared, directory, step, state, model, mesh, report
  )
  result = _evaluate(config, prepared, model, state, mesh, report)
  report(_summary(step, result, prepared))
  return result


# ---- Train


def train(config: Config, workdir: pathlib.Path, report: Report) -> dict:
  """Does what is not done yet; returns the test split's metrics.

  Raises:
    UserError: bad config, data, budgets or checkpoint; the loss is not finite.
  """
  # ---- Data, plan, mesh
  if config.plan.serving:
    raise UserError(
      "plan.serving: a plan for serving cannot train; use it with --mode=plan"
    )
  prepared, plan_, mesh, draw_plan = _begin(config, workdir, report)
  processes = jax.process_count()
  local = config.train.batch_size // processes
  per_epoch = batches.steps_per_epoch(prepared, "train", local, processes)
  steps = config.train.steps or per_epoch * config.train.epochs
  epochs = -(-steps // per_epoch)

  # ---- Model, state, checkpoint
  model, state = _build(config, prepared, plan_, mesh, steps)
  identity = _identity(config, prepared)
  directory = workdir / "checkpoints"
  data = batches.dataset(
    prepared,
    "train",
    local,
    seed=config.seed,
    epochs=epochs,
    shuffle_blocks=config.data.shuffle_blocks,
    process_index=jax.process_index(),
    process_count=processes,
    positions_of=positions.from_ranks(plan_, prepared.profile),
  )
  directory.mkdir(parents=True, exist_ok=True)  # on all, or none looks
  first = checkpoint.newest(directory) or 0
  if first:
    state, meta = _restore(
      config, prepared, directory, first, state, model, mesh, report
    )
    data.set_state(meta["position"])
  if jax.process_index() == 0:
    prepare_lib.copy_vocabulary(prepared, str(directory))

  # ---- Step
  step_fn = step_lib.make_train_step(model, mesh)
  checksums = checkpoint.make_checksums(model, mesh)

  # ---- Loop
  with (
    checkpoint.manager(directory, config.checkpoint.keep) as saver,
    step_log.writer(workdir, first) as write,
  ):

    def save(step):
      checkpoint.save(
        saver,
        step,
        state,
        plan_,
        identity,
        data.get_state(),
        config.seed,
        jax.device_get(checksums(state.tables)),
      )

    expected = sum(r.distinct for r in plan_.reports[1:])
    log = step_log.StepLog(
      config.train, steps, first, expected, write, report, saver, directory
    )
    for step in range(first + 1, steps + 1):
      batch = next(data)
      batch.pop("mask")
      state, out = step_fn(state, evaluate.to_devices(batch, mesh))
      log.add(step, out)
      every = config.checkpoint.every_steps
      if step == steps or (every and step % every == 0):
        log.flush()  # a state whose loss is not finite is never saved
        save(step)
    saver.wait_until_finished()

    # ---- Evaluate
    step = max(steps, first)
    result = _evaluate(config, prepared, model, state, mesh, report)
    write(step, "test", result)
  report(_summary(step, result, prepared))
  draw_plan()  # with what was measured
  return result


def prepare_and_plan(config, workdir, report) -> Plan:
  assumed = config.data.rows and not config.data.train
  prepared = None if assumed else prepare(config, workdir, report)
  return plan(config, prepared, workdir, report, config.plan.serving)


MODES = {
  "train": train,
  "prepare": prepare,
  "plan": prepare_and_plan,
  "evaluate": evaluate_checkpoint,
}
