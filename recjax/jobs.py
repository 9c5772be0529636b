"""The jobs of the command line: each does what is not done yet.

A job is (config, workdir, report) -> its result. All that it makes is in the
workdir: data/, plan.json, plan.html, checkpoints/, metrics.jsonl.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from recjax import distributed, errors, folders, frequency, writer_lock
from recjax import mesh as mesh_lib
from recjax.config import Config
from recjax.data import old_vocabulary, other_log
from recjax.data import prepare as prepare_lib
from recjax.data import prepared as prepared_lib
from recjax.data.old_vocabulary import Before
from recjax.data.prepared import Prepared
from recjax.embedding import optimizers
from recjax.errors import UserError
from recjax.models import build as models
from recjax.plan.plan import Plan
from recjax.planner import write_plan
from recjax.training import build as build_lib
from recjax.training import checkpoint, inputs, predictions, score_log
from recjax.training import export_rows as export
from recjax.training import train as train_lib
from recjax.training.evaluate import evaluate as evaluate_run
from recjax.training.state import Run

Report = Callable[[str], None]


# ---- Steps


def _writing(workdir: pathlib.Path):
  """Locks a workdir for this job; see `writer_lock.writing`."""
  return writer_lock.writing(workdir, jax.process_index() == 0)


def prepare(
  config: Config, workdir: pathlib.Path, report: Report = print
) -> Prepared:
  """Turns logs into a prepared data set and its vocabulary, in workdir/data."""
  directory = str(workdir / "data")
  before = counted_before(config, workdir)  # on all: Orbax makes them meet

  def make() -> Prepared:
    with contextlib.ExitStack() as held:
      if not prepared_lib.exists(directory):
        held.enter_context(_writing(workdir))
      return prepare_lib.prepare(config, directory, report, before=before)

  with errors.of_the_system(f"preparing {directory}"):
    prepared = distributed.first_alone(make)
  if distributed.from_first(lambda: prepared.vocabulary) != prepared.vocabulary:
    raise UserError(
      f"{directory} holds another vocabulary than on process 0: let all "
      "processes share one --workdir, or copy process 0's there"
    )
  report(frequency.describe(prepared.profile))
  return prepared


def counted_before(config: Config, workdir: pathlib.Path) -> Before | None:
  """Returns the data of the run that this one starts from; None: from scratch.

  A workdir that holds checkpoints has started.

  Raises:
    UserError: there is no such run, or its vocabulary is not there.
  """
  if not config.train.start_from or checkpoint.newest(workdir / "checkpoints"):
    return None
  directory, _, meta = train_lib.trained_by(config.train.start_from)
  was = meta["identity"]
  path = old_vocabulary.find(
    directory.parent, was["vocabulary"], "train.start_from"
  )
  return Before(path, was["vocabulary"], was["settings"])


def plan(
  config: Config,
  prepared: Prepared | None,
  workdir: pathlib.Path,
  report: Report = print,
  *,
  serving: bool = False,
) -> tuple[Plan, Callable[[], None]]:
  """Plans for any number of devices; writes plan.json and plan.html.

  Args:
    config: see `plan`, `mesh` and `embedding`.
    prepared: counted data; None = data.rows and plan.exponent.
    workdir: where the plan is written.
    report: takes what is to be printed.
    serving: for the forward pass only, of rows without slot variables.

  Returns:
    The plan, the same on all processes, and what draws its page again, with
    what a run has measured by then.
  """
  rows = table_rows(config, prepared)
  groups = build_lib.table_groups(config, rows)
  slot_bytes = tuple(optimizers.slot_bytes(g.optimizer, g.dim) for g in groups)
  devices = config.mesh.devices or jax.device_count()
  hosts = distributed.machines()
  if devices > jax.device_count():
    hosts = -(-devices // config.mesh.devices_per_host)
  local = jax.local_devices()[0]
  limit = None
  if local.platform != "cpu":
    limit = (local.memory_stats() or {}).get("bytes_limit")
  made = []  # on the first process

  def make() -> str:
    with contextlib.nullcontext() if serving else _writing(workdir):
      made.append(
        write_plan.run(
          config,
          prepared,
          workdir,
          report,
          groups=groups,
          slot_bytes=slot_bytes,
          dense=models.cost(
            config.model, *_model_shape(config, prepared, groups)
          ),
          devices=devices,
          hosts=hosts,
          kind=local.device_kind,
          device_limit=limit,
          serving=serving,
        )
      )
    return made[0][0].to_json()

  # Machines differ a little in their memory: one plan for all.
  with errors.of_the_system(f"planning in {workdir}"):
    found = Plan.from_json(distributed.from_first(make))
  return found, made[0][1] if made else lambda: None


def table_rows(config: Config, prepared: Prepared | None) -> Mapping[str, int]:
  """Returns each table's rows: counted, or as data.rows has them."""
  if prepared is not None:
    return prepared.profile.table_rows()
  return {f"C{i + 1}": rows for i, rows in enumerate(config.data.rows)}


def _model_shape(config: Config, prepared: Prepared | None, groups):
  """Returns (dense inputs, {feature: (h, d)}, dim) of the configured model."""
  dim = config.embedding.dim
  if prepared is None:
    dims = {table: g.dim for g in groups for table in g.tables}
    one_each = {table: (1, d) for table, d in dims.items()}
    return write_plan.ASSUMED_DENSE, one_each, dim
  schema = prepared.schema
  inputs = build_lib.model_inputs(schema.features, groups)
  return len(schema.dense), inputs, dim


def _begin(config, workdir, report, serving=False):
  """Returns (prepared data, run, what draws the plan's page again)."""
  c = config.mesh
  mesh_lib.make_mesh(c.devices, c.node_devices)  # or an error, before all work
  prepared = prepare(config, workdir, report)
  found, draw = plan(config, prepared, workdir, report, serving=serving)
  run = build_lib.build(config, prepared, found, serving=serving)
  return prepared, run, draw


def _summary(step: int, result: dict, prepared: Prepared) -> str:
  lines = _shown(f"test metrics at step {step}:", result)
  if prepared.teacher:
    lines += (
      f"\nthe teacher that drew the labels: auc {prepared.teacher['auc']:.6f}, "
      f"log_loss {prepared.teacher['log_loss']:.6f}"
    )
  return lines


def _shown(title: str, result: Mapping[str, float]) -> str:
  """Returns metrics, a line each."""
  shown = lambda x: f"{x:,}" if isinstance(x, int) else f"{x:.6f}"
  lines = [f"  {name} {shown(value)}" for name, value in result.items()]
  return "\n".join([title, *lines])


# ---- Jobs


def train(
  config: Config, workdir: pathlib.Path, report: Report = print
) -> dict[str, float]:
  """Prepares, plans, trains and evaluates; returns the test split's metrics.

  Raises:
    UserError: bad config, data, budgets or checkpoint; the loss is not finite.
  """
  if config.plan.serving:
    raise UserError(
      "plan.serving: a plan for serving cannot train; use it with --mode=plan"
    )
  if config.train.start_from:
    folders.named(config.train.start_from, "train.start_from")
  with errors.of_the_system(f"training in {workdir}"), _writing(workdir):
    prepared, run, draw = _begin(config, workdir, report)
    run, result = train_lib.train(config, prepared, run, workdir, report)
    report(_summary(int(run.state.step), result, prepared))
    draw()  # with what was measured
  return result


def evaluate(
  config: Config, workdir: pathlib.Path, report: Report = print
) -> dict[str, float]:
  """Evaluates a checkpoint on this mesh, with a plan for serving.

  On the test split, or on the log that data.evaluate names. Reads the rows
  only, not the slot variables. Of a workdir that it may not write to nothing
  but the plan's page is missing.
  """
  with errors.of_the_system(f"evaluating {workdir}"):
    if config.data.evaluate:
      return _evaluate_log(config, workdir, report)
    prepared, run, step = _restored(config, workdir, report)
    test = inputs.scored_batches(run, prepared)
    result = evaluate_run(run, test, prepared.samples["test"], report)
    report(_summary(step, result, prepared))
  return result


def _evaluate_log(config, workdir, report) -> dict[str, float]:
  """Evaluates on the log that data.evaluate names."""
  log = other_log.open_log(config, "evaluate")
  prepared, run, step = _restored(config, workdir, report)
  parts = other_log.read(prepared, log, config.data, report)
  scored = score_log.score(run, prepared, parts, report)
  result = score_log.evaluate(scored, f"data.evaluate at step {step}")
  report(_shown(f"metrics of data.evaluate at step {step}:", result))
  return result


def predict(
  config: Config,
  workdir: pathlib.Path,
  report: Report = print,
  *,
  output: pathlib.Path,
) -> dict[str, float]:
  """Scores the log that data.predict names, into a file in its order.

  Returns:
    The metrics of its samples that have labels; {} where none has.

  Raises:
    UserError: bad config, log, checkpoint or output.
  """
  predictions.check(output, config.schema.keep)
  log = other_log.open_log(config, "predict")
  with errors.of_the_system(f"predicting into {output}"):
    prepared, run, step = _restored(config, workdir, report)
    of = {
      "checkpoint": [step, checkpoint.read_meta(workdir / "checkpoints", step)],
      "log": log.stamps(),
      "keep": list(config.schema.keep),
    }
    begun = lambda: str(predictions.begun(output, of))
    done = int(distributed.from_first(begun))
    if done:
      report(f"going on with {output} after {done:,} samples")
    parts = other_log.read(prepared, log, config.data, report)
    scored = score_log.score(run, prepared, parts, report, done=done)
    result = {}
    if jax.process_index() == 0:
      result = predictions.write(output, scored)
    else:
      for _ in scored:
        pass
    report(f"{output} holds predictions of step {step}")
    if result:
      report(_shown("metrics of the samples that have labels:", result))
  return result


def _restored(config, workdir, report) -> tuple[Prepared, Run, int]:
  """Returns the data set, a run with a checkpoint's state, and its step."""
  directory, step = workdir / "checkpoints", config.checkpoint.step
  if step < 0:
    step = checkpoint.newest(directory)  # before all work
    if step is None:
      raise UserError(
        f"--workdir: {directory} holds no checkpoint to evaluate; train first"
      )
  prepared, run, _ = _begin(config, workdir, report, serving=True)
  run, _ = train_lib.restore(run, prepared, directory, step, report)
  return prepared, run, step


def prepare_and_plan(
  config: Config, workdir: pathlib.Path, report: Report = print
) -> Plan:
  """Plans from counted data, or from data.rows where there is no log."""
  assumed = config.data.rows and not config.data.train
  prepared = None if assumed else prepare(config, workdir, report)
  serving = config.plan.serving
  return plan(config, prepared, workdir, report, serving=serving)[0]


def export_rows(
  config: Config,
  workdir: pathlib.Path,
  report: Report = print,
  *,
  output: pathlib.Path,
  tables: Sequence[str] = (),
) -> None:
  """Writes the rows of tables as files; see training/export_rows.py.

  Raises:
    UserError: as there; or there are several processes.
  """
  if jax.process_count() > 1:
    raise UserError(
      "--processes: --mode=export_rows reads files alone: use one process"
    )
  with errors.of_the_system(f"writing {output}"):
    export.export_rows(
      workdir, output, tables, step=config.checkpoint.step, report=report
    )


MODES = {
  "train": train,
  "prepare": prepare,
  "plan": prepare_and_plan,
  "evaluate": evaluate,
  "predict": predict,
  "export_rows": export_rows,
}
