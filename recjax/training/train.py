"""The train loop, read downward: resume, step, log, save, evaluate."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from recjax import distributed, folders, signals
from recjax.config import Config
from recjax.data import old_vocabulary, vocabulary
from recjax.data.prepared import Prepared, copy_vocabulary
from recjax.errors import UserError
from recjax.plan.plan import Plan
from recjax.training import (
  checkpoint,
  checksums,
  inputs,
  row_sources,
  same_run,
  saves,
  step_log,
)
from recjax.training.checkpoint import About
from recjax.training.evaluate import evaluate
from recjax.training.row_sources import Carried
from recjax.training.state import At, Run

Report = Callable[[str], None]


def train(
  config: Config,
  prepared: Prepared,
  run: Run,
  workdir: pathlib.Path,
  report: Report = print,
) -> tuple[Run, dict[str, float]]:
  """Trains from the newest checkpoint of `workdir` to the end of the run.

  Args:
    config: see `train` and `checkpoint`.
    prepared: the data set.
    run: of `build`; its state is donated.
    workdir: holds checkpoints/ and metrics.jsonl.
    report: takes lines of progress.

  Returns:
    The run with its last state, and the test split's metrics.

  Raises:
    UserError: a checkpoint of something else; the loss is not finite.
    signals.Ended: where the command line listens, and the run is saved.
  """
  # ---- Newest checkpoint, data
  run, at = _resume(config, prepared, run, workdir, report)
  steps = inputs.last_step(config, prepared, at)
  _check_end(at.step, steps, workdir)
  data = inputs.training_batches(config, prepared, run, at.done)
  directory = workdir / "checkpoints"

  # ---- Loop
  plan, state = run.spec.embedding.plan, run.state
  checks_of = checksums.make_checksums(run.spec.embedding, run.mesh)
  with (
    checkpoint.manager(directory, config.checkpoint.keep) as saver,
    step_log.writer(workdir, at.step, report) as write,
  ):

    def save(step, batch):
      now, every = run._replace(state=state), config.checkpoint.full_every
      checks = jax.device_get((checks_of(state.tables), _logits(now, batch)))
      here = inputs.later(at, step - at.step, config, prepared)
      about = About(run.identity, here, *checks, prepared.profile)
      checkpoint.save(saver, step, now, about, every)

    log = step_log.StepLog(
      config.train,
      steps,
      at.step,
      plan.prediction.distinct_rows,
      write=write,
      report=report,
      saver=saver,
      directory=directory,
    )
    feed = inputs.fed(data, run, steps - at.step)
    when = saves.Saves(config.checkpoint, steps, saver)
    with signals.saving(when.said) as may_save:
      for step, batch in enumerate(feed, at.step + 1):
        state, out = run.step(state, batch)
        may_save()
        log.add(step, out)
        if when.due(step):
          log.flush()  # a run whose loss is not finite ends, and is not saved
          save(step, batch)
          when.done()
        if when.ended_by:
          break
      saver.wait_until_finished()
      when.end()

    # ---- Evaluate
    run = run._replace(state=state)
    result = _evaluate(prepared, run, at.step == steps, report)
    write(steps, "test", result)
  return run, result


def _logits(run: Run, batch) -> jax.Array:  # [B]
  """Scores a batch of `inputs.fed` once more."""
  mask = jnp.ones_like(batch["label"])
  return run.forward(run.state, batch | {"mask": mask})[0]


def _evaluate(
  prepared: Prepared, run: Run, before: bool, report: Report
) -> dict[str, float]:
  """Evaluates a run that is done, maybe before this one began."""
  if before:
    described = same_run.described(run.identity.settings)
    step = int(run.state.step)
    report(f"finished before, at step {step:,} of {step:,}: {described}")
  test = inputs.scored_batches(run, prepared)
  return evaluate(run, test, prepared.samples["test"], report)


def _check_end(step: int, steps: int, workdir: pathlib.Path) -> None:
  """Raises UserError where a run has done more than it is asked for."""
  if step > steps:
    raise UserError(
      f"train.steps, train.epochs: {workdir} holds a run that has done "
      f"{step:,} steps, and this config ends at {steps:,}: ask for as many at "
      "least, evaluate what there is with --mode=evaluate, or use another "
      "--workdir"
    )


def _resume(
  config: Config,
  prepared: Prepared,
  run: Run,
  workdir: pathlib.Path,
  report: Report,
) -> tuple[Run, At]:
  """Goes on from the newest checkpoint, where there is one.

  Returns:
    The run, and where it stands.
  """
  directory, at = workdir / "checkpoints", At()
  directory.mkdir(parents=True, exist_ok=True)  # on all, or none looks
  step = checkpoint.newest(directory)
  if step is not None:
    if config.checkpoint.fall_back:
      step = _fall_back(directory, run, report)
    with _naming_whole_ones(directory, step, run):
      meta = checkpoint.read_meta(directory, step)
    was = meta["identity"]["settings"]
    same_run.check(workdir, step, was, run.identity.settings)
    run, meta = restore(run, prepared, directory, step, report)
    at = checkpoint.at_of(step, meta)
  elif config.train.start_from:
    run, at = _begin_from(config, prepared, run, report)
  if jax.process_index() == 0:
    copy_vocabulary(prepared, str(directory))
  return run, at


def _begin_from(
  config: Config, prepared: Prepared, run: Run, report: Report
) -> tuple[Run, At]:
  """Begins a run with what another one has trained, maybe on other data.

  Its steps are counted on, as optimizers do; schedules and data begin anew.
  """
  directory, step, meta = trained_by(config.train.start_from)
  if meta["identity"]["vocabulary"] == prepared.vocabulary:
    run, _ = restore(run, prepared, directory, step, report)
  else:
    report(f"restoring step {step} of {directory} for other data")
    with _naming_whole_ones(directory, step, run):
      carried = _carried(config, prepared, run, (directory, step, meta))
      new = int((carried.ranks < 0).sum())
      state = checkpoint.restore(
        directory, step, meta, run, prepared.profile, carried=carried
      )
    run = run._replace(state=state)
    report(
      f"of {len(carried.ranks):,} rows {new:,} are new; "
      f"{carried.profile.rows - len(carried.ranks) + new:,} do not go on"
    )
  if run.store:
    run.store.full = None  # the other run's saves are not this one's
  scheduled = optax.ScaleByScheduleState
  anew = lambda x: jax.tree.map(lambda n: n * 0, x)
  opt_state = jax.tree.map(
    lambda x: anew(x) if isinstance(x, scheduled) else x,
    run.state.opt_state,
    is_leaf=lambda x: isinstance(x, scheduled),
  )
  state = run.state._replace(opt_state=opt_state)
  return run._replace(state=state), At(step, began=step)


def trained_by(workdir: str) -> tuple[pathlib.Path, int, dict]:
  """Finds what train.start_from names.

  Returns:
    The folder of checkpoints, the newest step there, and its `meta`.

  Raises:
    UserError: there is none, or it is damaged.
  """
  directory = folders.named(workdir, "train.start_from") / "checkpoints"
  step = checkpoint.newest(directory)
  if step is None:
    raise UserError(f"train.start_from: {directory} holds no checkpoint")
  return directory, step, checkpoint.read_meta(directory, step)


def _carried(config: Config, prepared: Prepared, run: Run, trained) -> Carried:
  """Joins the rows of a checkpoint with those of a run, by table and value.

  trained: of `trained_by`.
  """
  directory, step, meta = trained
  was = same_run.check_model(
    directory, step, meta, run.identity, new_tables=True
  )
  row_sources.check_groups(
    Plan.from_json(meta["plan"]), run.spec.embedding.plan
  )
  old = old_vocabulary.find(
    directory.parent, was.vocabulary, "train.start_from"
  )
  new = os.path.join(prepared.directory, vocabulary.FILE)
  with (
    tempfile.TemporaryDirectory(dir=prepared.directory) as spill,
    vocabulary.open_engine(config.data.memory_mb, spill) as engine,
  ):
    ranks = old_vocabulary.ranks_in(engine, old, new, prepared.profile.rows)
  return Carried(
    old_vocabulary.profile_of(old), ranks, config.embedding.init_scale
  )


def restore(
  run: Run,
  prepared: Prepared,
  directory: pathlib.Path,
  step: int,
  report: Report = print,
) -> tuple[Run, dict]:
  """Restores a checkpoint onto a run; its state is donated.

  Args:
    run: of `build`, on any mesh and plan of the same groups.
    prepared: the data set.
    directory: of the checkpoints.
    step: to restore.
    report: takes lines of progress.

  Returns:
    The run with the restored state, and the checkpoint's `meta`.

  Raises:
    UserError: there is none, it is damaged, or of something else.
  """
  with _naming_whole_ones(directory, step, run):
    meta = checkpoint.read_meta(directory, step)
    same_run.check_identity(directory, step, meta, run.identity)
    report(f"restoring step {step} of {directory}")
    state = checkpoint.restore(directory, step, meta, run, prepared.profile)
  return run._replace(state=state), meta


# ---- Damaged checkpoints


def _newest_whole(directory: pathlib.Path, steps: list[int], run: Run):
  """Returns the newest of these steps that is whole; None where none is."""
  for step in sorted(steps, reverse=True):
    with contextlib.suppress(UserError):
      checkpoint.check_whole(directory, step, run)
      return step
  return None


@contextlib.contextmanager
def _naming_whole_ones(directory: pathlib.Path, step: int, run: Run):
  """Adds to the error of a damaged checkpoint which other one is whole."""
  try:
    yield
  except checkpoint.DamagedError as e:
    others = [s for s in checkpoint.steps(directory) if s != step]
    whole = _newest_whole(directory, others, run)
    way = "no other one there is whole: train anew with another --workdir"
    if whole is not None:
      way = (
        f"checkpoint {whole} is whole: train on from it with "
        "--config.checkpoint.fall_back=True, or evaluate it with "
        f"--config.checkpoint.step={whole}"
      )
    raise UserError(f"{e}; {way}") from e


def _fall_back(directory: pathlib.Path, run: Run, report: Report) -> int:
  """Returns the newest step that is whole; puts those after it aside.

  Raises:
    UserError: none is whole; then all stay where they are.
  """

  def choose() -> str:
    steps = checkpoint.steps(directory)
    whole = _newest_whole(directory, steps, run)
    for step in steps:
      if whole is not None and step > whole:
        aside = checkpoint.set_aside(directory, step)
        report(f"checkpoint {step} is damaged: it is {aside} from now on")
    return "" if whole is None else str(whole)

  found = distributed.from_first(choose)
  if not found:
    raise UserError(
      f"checkpoint.fall_back: no checkpoint in {directory} is whole; train "
      "anew with another --workdir"
    )
  return int(found)
