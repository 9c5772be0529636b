"""The train loop, read downward: resume, step, log, save, evaluate."""

import pathlib
from collections.abc import Callable

import jax

from recjax.config import Config
from recjax.data.prepared import Prepared, copy_vocabulary
from recjax.training import checkpoint, checksums, inputs, step_log
from recjax.training.checkpoint import About
from recjax.training.evaluate import evaluate
from recjax.training.state import Run

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
  """
  # ---- Data, newest checkpoint
  steps, _ = inputs.run_length(config, prepared)
  data = inputs.training_batches(config, prepared, run)
  directory = workdir / "checkpoints"
  run, first = _resume(run, prepared, directory, data, report)

  # ---- Loop
  plan, state = run.spec.embedding.plan, run.state
  sums_of = checksums.make_checksums(run.spec.embedding, run.mesh)
  with (
    checkpoint.manager(directory, config.checkpoint.keep) as saver,
    step_log.writer(workdir, first) as write,
  ):

    def save(step, position):
      sums = jax.device_get(sums_of(state.tables))
      about = About(run.identity, position, config.seed, sums)
      checkpoint.save(saver, step, run._replace(state=state), about)

    expected = plan.prediction.distinct_rows
    log = step_log.StepLog(
      config.train,
      steps,
      first,
      expected,
      write=write,
      report=report,
      saver=saver,
      directory=directory,
    )
    feed = inputs.fed(data, run, steps - first)
    for step, (batch, position) in enumerate(feed, first + 1):
      state, out = run.step(state, batch)
      log.add(step, out)
      every = config.checkpoint.every_steps
      if step == steps or (every and step % every == 0):
        log.flush()  # a state whose loss is not finite is never saved
        save(step, position)
    saver.wait_until_finished()

    # ---- Evaluate
    run = run._replace(state=state)
    test = inputs.scored_batches(run, prepared)
    result = evaluate(run, test, prepared.samples["test"], report)
    write(max(steps, first), "test", result)
  return run, result


def _resume(run: Run, prepared: Prepared, directory, data, report):
  """Goes on from the newest checkpoint, where there is one.

  Returns:
    (run, the step that it has done), with `data` at the next batch.
  """
  directory.mkdir(parents=True, exist_ok=True)  # on all, or none looks
  first = checkpoint.newest(directory) or 0
  if first:
    run, meta = restore(run, prepared, directory, first, report)
    data.set_state(meta["position"])
  if jax.process_index() == 0:
    copy_vocabulary(prepared, str(directory))
  return run, first


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
  meta = checkpoint.read_meta(directory, step)
  checkpoint.check_identity(directory, step, meta, run.identity)
  report(f"restoring step {step} of {directory}")
  state = checkpoint.restore(directory, step, meta, run, prepared.profile)
  return run._replace(state=state), meta
