"""Preparation on Apache Beam: workers do the tasks of the passes of shards.py.

Beam says who does what, waits and retries. What passes through it are numbers
of tasks: it takes microseconds for each element, and its local runner holds all
of them in memory. The data stays in folders that the workers share.
"""

import importlib.machinery
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from recjax.config import Data
from recjax.data import (
  blocks,
  movielens,
  prepared,
  shards,
  staging,
  tasks,
  text,
  vocabulary,
)
from recjax.data.columns import Columns
from recjax.data.log import Log
from recjax.data.numbers import Fitted
from recjax.data.staging import Reader
from recjax.data.tasks import Job, Pass
from recjax.errors import UserError

# A local pipeline is run so many times; others retry tasks by themselves.
_ATTEMPTS = 3


class Found(NamedTuple):
  """What preparing has found, besides the files."""

  samples: dict[str, int]  # of 'train' and 'test'
  numbers: tuple[Fitted, ...]
  fingerprint: str  # of the vocabulary
  counted: int  # samples that its counts are of


def run(
  data: Data,
  reader: Reader,
  directory: str,
  report: Callable[[str], None],
  numbers: tuple[Fitted, ...] = (),
) -> Found:
  """Prepares logs in a directory that all workers share.

  What a run that ended early has left is used again.

  Args:
    data: the config; synthetic logs are those that data.train names.
    reader: of the logs.
    directory: of the data set; its folder `stage` is there.
    report: takes lines of progress.
    numbers: normalisers; () = they are fitted to the training split.

  Raises:
    UserError: as `prepare.prepare`; Beam is not there, or its workers could
      not read the logs.
    RuntimeError: of Beam, after all attempts.
  """
  if isinstance(reader, Columns):
    raise UserError(
      "data.engine is beam, but the samples come from Python: set it to duckdb,"
      " or write them to files"
    )
  log = reader if isinstance(reader, Log) else None
  if log:
    _check_importable(log, data.format)
  sources = []
  for field, paths in reader.sources(data).items():
    own = [os.path.abspath(path) for path in paths]
    whole = reader is movielens  # whose files are parts of one log
    sources += [(field, tuple(own))] if whole else [(field, (p,)) for p in own]
  folder = os.path.abspath(os.path.join(directory, staging.FOLDER))
  job = Job(folder, data, log, tuple(sources), numbers)
  tasks.clear(job)
  report(f"prepare: {len(sources):,} files, on Apache Beam")
  _run(job, data.beam_options, report)
  if message := tasks.error(job):
    raise UserError(message)
  _report(job, directory, report)
  return _finish(job, directory)


def _check_importable(log: Log, name: str) -> None:
  """Raises UserError where workers would not find a format's functions."""
  for function in filter(None, log.format):
    module = getattr(function, "__module__", "__main__").partition(".")[0]
    # Of __main__ the function itself is sent.
    there = module == "__main__" or importlib.machinery.PathFinder.find_spec(
      module
    )
    if not there:
      raise UserError(
        f"data.format: {name} is read by a function of {module}, which Beam's"
        " workers cannot import: put it into a module that is installed on"
        " them, or in a folder of PYTHONPATH"
      )


# ---- The pipeline


def _run(
  job: Job, options: tuple[str, ...], report: Callable[[str], None]
) -> None:
  """Runs all passes.

  Raises:
    UserError: Beam is not installed, or an option is wrong.
    RuntimeError: of Beam, after all attempts.
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options
    from apache_beam.runners.portability.fn_api_runner import fn_runner
  except ImportError as e:
    raise UserError(
      f"data.engine is beam, but Apache Beam is missing ({e}): install"
      " 'recjax[beam]', or set data.engine to duckdb"
    ) from e
  flags = ["--no_save_main_session", *options]
  local = not any(o.startswith("--runner") for o in flags)
  given = pipeline_options.PipelineOptions(flags)
  try:
    given.get_all_options()
  except SystemExit as e:  # argparse has said why
    raise UserError(
      f"data.beam_options: {tuple(options)} are not options of Beam's pipelines"
    ) from e
  for left in reversed(range(_ATTEMPTS if local else 1)):
    # The runner that Beam takes by default would download another.
    runner = fn_runner.FnApiRunner() if local else None
    try:
      pipeline = beam.Pipeline(runner=runner, options=given)
      _add_passes(pipeline, job)
      state = pipeline.run().wait_until_finish()
    except RuntimeError as e:
      if not left:
        raise
      last = str(e).strip().splitlines()[-1:]
      report(f"prepare: Beam failed ({' '.join(last)}), once more")
      continue
    if str(state) != "DONE":
      raise RuntimeError(f"Beam's pipeline ended as {state}")
    return


def _add_passes(pipeline, job: Job) -> None:
  """Gives a pipeline pass after pass; each waits for all of the one before.

  Grouped by their numbers tasks go to all workers, and grouped as one they are
  waited for. (Beam's Reshuffle and Count do the same in a dozen steps more.)
  """
  import apache_beam as beam

  done = pipeline | "start" >> beam.Create([(0, 0)])
  for step in shards.PASSES:
    done = (
      done
      | f"{step.name}: tasks" >> beam.FlatMap(_tasks, job, step)
      | f"{step.name}: to all workers" >> beam.GroupByKey()
      | step.name >> beam.Map(_do, job, step)
      | f"{step.name}: wait" >> beam.GroupByKey()
    )


_NOTHING = -1  # a task that there always is, or no pass would follow


def _tasks(_, job: Job, step: Pass) -> Iterator[tuple[int, int]]:
  yield _NOTHING, 0
  for i in range(tasks.count(job, step)):
    yield i, 0


def _do(
  task: tuple[int, Iterable[int]], job: Job, step: Pass
) -> tuple[int, int]:
  i, _ = task
  if i != _NOTHING:
    tasks.do(job, step, i)
  return 0, 0


# ---- After it


def _report(job: Job, directory: str, report: Callable[[str], None]) -> None:
  """Says which lines were skipped, and which bags cut."""
  found = tasks.read_json(job.at("stage"))
  damaged = text.DamagedLines(job.data.max_bad_rows)
  damaged.lines += [tuple(line) for line in found["damaged"]]
  cut = np.array(found["cut"], np.int64)
  rows = found["first"][-1]
  staging.tell(job.schema, directory, rows, cut, damaged, report=report)


def _finish(job: Job, directory: str) -> Found:
  """Moves what the tasks have left to where it is read."""
  ranked = job.at("rank", len(shards.of_ranges(job, "rank")))
  target = os.path.join(directory, vocabulary.FILE)
  _move(os.path.join(ranked, vocabulary.FILE), target)
  packed = tasks.read_json(job.at("pack"))
  target = os.path.join(directory, prepared.BLOCKS)
  os.makedirs(target, exist_ok=True)
  written: dict[str, list[tuple[int, int]]] = {k: [] for k in shards.SPLITS}
  for j, (name, _) in enumerate(packed["files"]):
    folder = job.at("block", j)
    written[name].append(tasks.read_json(folder))
    for file in os.listdir(folder):
      if file != tasks.FOUND:
        _move(os.path.join(folder, file), os.path.join(target, file))
  blocks.describe(job.schema, target, written)
  fitted = tasks.read_json(job.at("fit"))
  return Found(
    packed["samples"],
    tuple(Fitted.from_json(x) for x in fitted),
    tasks.read_json(ranked),
    packed["samples"]["train"],
  )


def _move(source: str, target: str) -> None:
  if os.path.exists(source):  # or a run that was killed here has moved it
    os.replace(source, target)
