"""recjax from Python: prepare, plan, build, step, evaluate, read rows.

Each function does one step and returns a value for the next:

    config = recjax.Config()
    prepared = recjax.prepare_columns(columns, features, config, "runs/mine")
    plan = recjax.make_plan(config, prepared, "runs/mine")
    run = recjax.build(config, prepared, plan)
    for batch in recjax.batches(config, prepared, run):
      state, metrics = run.step(run.state, batch)
      run = run._replace(state=state)
    recjax.evaluate(run, prepared)
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from recjax import config_check, errors, folders, jobs
from recjax.config import Config
from recjax.data import prepare as prepare_lib
from recjax.data import vocabulary
from recjax.data.columns import from_columns
from recjax.data.prepared import Prepared
from recjax.errors import UserError
from recjax.mesh import batch_sharding
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.schema import Feature
from recjax.training import checkpoint, inputs, visiting
from recjax.training import evaluate as evaluate_lib
from recjax.training import export_rows as export
from recjax.training import train as train_lib
from recjax.training.build import build
from recjax.training.state import At, Run
from recjax.writer_lock import writing

__all__ = [
  "batches",
  "build",
  "evaluate",
  "export_rows",
  "make_plan",
  "predict",
  "prepare",
  "prepare_columns",
  "restore",
  "rows",
  "train",
]

Path = str | pathlib.Path
Report = Callable[[str], None]


# ---- Data and plan


def prepare(config: Config, workdir: Path, report: Report = print) -> Prepared:
  """Prepares the logs of `config.data` in workdir/data, or loads them.

  Raises:
    UserError: bad config, damaged or missing logs, a full disk.
  """
  config_check.check(config)
  return jobs.prepare(config, folders.named(workdir, "workdir"), report)


def prepare_columns(
  columns: Mapping[str, Any],
  features: tuple[Feature, ...],
  config: Config,
  workdir: Path,
  *,
  label: str = "label",
  dense: tuple[str, ...] = (),
  report: Report = print,
) -> Prepared:
  """Prepares samples that are in memory, in workdir/data, or loads them.

  Args:
    columns: name -> values of all samples, in time order: NumPy arrays, lists,
      pandas Series, or an Arrow table. Ids are integers or strings, None =
      missing; those of a feature with bags are lists.
    features: one a column of ids, by its name.
    config: `data.test_fraction`, `data.split`, `data.min_count`, ... say how;
      the log's files stay empty.
    workdir: holds all that a run makes.
    label: name of the 0/1 labels.
    dense: names of numeric inputs, taken as they are: scale them before.
    report: takes lines of progress.

  Raises:
    UserError: a column is missing or holds what it cannot.
  """
  config_check.check(config)
  log = from_columns(columns, label, dense, features)
  workdir = folders.named(workdir, "workdir")
  with errors.of_the_system(f"preparing {workdir}"), writing(workdir):
    before = jobs.counted_before(config, workdir)
    directory = str(workdir / "data")
    return prepare_lib.prepare(config, directory, report, log, before)


def make_plan(
  config: Config,
  prepared: Prepared,
  workdir: Path,
  report: Report = print,
  *,
  serving: bool = False,
) -> Plan:
  """Plans where the rows live; writes plan.json and plan.html into workdir.

  Raises:
    UserError: no budget that works.
  """
  workdir = folders.named(workdir, "workdir")
  return jobs.plan(config, prepared, workdir, report, serving=serving)[0]


# ---- Runs


def batches(
  config: Config, prepared: Prepared, run: Run
) -> Iterator[dict[str, jax.Array]]:
  """Iterates over the training batches of a run from its present step on.

  Of a run whose steps so far had batches of the same size.

  Yields:
    label [B] float32, dense [B, D] float32, ids [B, S] int32 and maybe weights
    [B, S], labels [B, K] and sample_weight [B] float32 and the ids' route, on
    the run's mesh: what `run.step` takes. A batch without its route works too.
  """
  steps, step = inputs.last_step(config, prepared), int(run.state.step)
  at = inputs.later(At(), step, config, prepared)
  data = inputs.training_batches(config, prepared, run, at.done)
  yield from inputs.fed(data, run, steps - step)


def train(
  config: Config,
  prepared: Prepared,
  run: Run,
  workdir: Path,
  report: Report = print,
) -> tuple[Run, dict[str, float]]:
  """Trains to the end of the run, with checkpoints and metrics in workdir.

  Goes on from the newest checkpoint there. Returns the run with its last state,
  and the test split's metrics.
  """
  workdir = folders.named(workdir, "workdir")
  here = jax.process_index() == 0
  with errors.of_the_system(f"training in {workdir}"), writing(workdir, here):
    return train_lib.train(config, prepared, run, workdir, report)


def evaluate(
  run: Run, prepared: Prepared, report: Report = print
) -> dict[str, float]:
  """Scores the test split with the run's present state.

  Returns:
    auc, log_loss, calibration, ...: see `training.metrics.Metrics.result`.

  Raises:
    UserError: a logit is not finite.
  """
  test = inputs.scored_batches(run, prepared)
  return evaluate_lib.evaluate(run, test, prepared.samples["test"], report)


def restore(
  run: Run, prepared: Prepared, workdir: Path, step: int | None = None
) -> Run:
  """Restores a checkpoint of workdir onto a run: any mesh, any plan.

  Args:
    run: of `build`; its state is donated.
    prepared: the data set.
    workdir: of the run that trained.
    step: None = the newest.

  Raises:
    UserError: there is none, it is damaged, or of something else.
  """
  directory = folders.named(workdir, "workdir") / "checkpoints"
  found = checkpoint.newest(directory) if step is None else step
  if found is None:
    raise UserError(f"{directory} holds no checkpoint; train first")
  return train_lib.restore(run, prepared, directory, found, lambda _: None)[0]


def predict(run: Run, batch: Mapping[str, jax.Array]) -> np.ndarray:
  """Returns the click probabilities of a batch, [B] float32.

  Args:
    run: whose present state predicts.
    batch: dense, ids and maybe weights, as `batches` yields them.
  """
  zeros = jnp.zeros(batch["ids"].shape[0], jnp.float32)
  zeros = jax.device_put(zeros, batch_sharding(run.mesh))
  keys = ("dense", "ids", "weights", "visit")
  wanted = {k: batch[k] for k in keys if k in batch}
  logits, *_ = run.forward(run.state, wanted | {"label": zeros, "mask": zeros})
  return np.asarray(jax.nn.sigmoid(logits))


def rows(
  run: Run, prepared: Prepared, table: str, ids: Sequence[str]
) -> np.ndarray:
  """Returns the rows of ids of a table, [k, d] float32, wherever they live.

  An id that is not in the vocabulary has the table's out-of-vocabulary row.

  Args:
    run: whose present rows they are.
    prepared: the data set.
    table: its name.
    ids: as the log spells them.

  Raises:
    UserError: there is no such table.
  """
  if table not in prepared.schema.tables:
    raise UserError(
      f"there is no table {table!r}; there are "
      f"{', '.join(prepared.schema.tables)}"
    )
  at = _positions(run, prepared, table, ids)
  group = next(g for g in run.spec.embedding.plan.groups if table in g.tables)
  return visiting.read_rows(run, group, at)


def export_rows(
  workdir: Path,
  output: Path,
  tables: Sequence[str] = (),
  *,
  step: int | None = None,
  report: Report = print,
) -> None:
  """Writes value, kind, count and vector of all rows of tables, from the disk.

  Args:
    workdir: of a run that has a checkpoint.
    output: NAME.parquet; or NAME.npy of vectors [rows, d] float32 in rank
      order, the rest in NAME.values.parquet; or, of any number of tables, a
      folder of TABLE.parquet. Nothing of that name may be there.
    tables: their names; none = all.
    step: of the checkpoint; None = the newest.
    report: takes lines of progress.

  Raises:
    UserError: there is no such checkpoint or table, the checkpoint is damaged,
      or something is at the output's place.
  """
  output = pathlib.Path(output).absolute()
  with errors.of_the_system(f"writing {output}"):
    export.export_rows(
      folders.named(workdir, "workdir"),
      output,
      tables,
      step=-1 if step is None else step,
      report=report,
    )


def _positions(run, prepared: Prepared, table: str, ids) -> np.ndarray:
  """Returns the positions of ids in their group, [k] int32."""
  path = pathlib.Path(prepared.directory) / vocabulary.FILE
  found = pq.read_table(
    path, columns=["kind", "value", "rank"], filters=[("table", "==", table)]
  ).to_pydict()
  kinds, ranks = found["kind"], found["rank"]
  rank_of = dict(zip(found["value"], ranks, strict=True))
  unknown = ranks[kinds.index("oov")]
  wanted = np.array([rank_of.get(str(i), unknown) for i in ids], np.int32)
  feature = (Feature("rows", table, len(wanted)),)
  where = positions.of_batches(
    run.spec.embedding.plan, prepared.profile, feature
  )
  return where.of_batch(wanted[None])[0] if where else wanted
