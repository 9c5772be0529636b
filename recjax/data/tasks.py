"""Tasks that any workers do, in folders that all of them share.

A pass is tasks that need nothing of each other. Before it one worker joins what
the last pass has left, and says how many tasks there are. A task leaves a
folder that appears whole: two workers may do it at a time, and what is done is
not done again, so that a run goes on where the last one was killed.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import duckdb

from recjax import files
from recjax.config import Config, Data
from recjax.data import staging, vocabulary
from recjax.data.log import Log
from recjax.data.numbers import Fitted
from recjax.data.staging import Reader
from recjax.errors import UserError
from recjax.schema import Schema

FOUND = "found.json"  # what a task tells besides its other files
_ERROR = "error.txt"


class Job(NamedTuple):
  """What is prepared, and where."""

  folder: str  # that all workers share
  data: Data
  log: Log | None  # None = a module reads data.format
  sources: tuple[tuple[str, tuple[str, ...]], ...]  # field and files of a task
  numbers: tuple[Fitted, ...]  # normalisers; () = to be fitted
  range_bytes: int = 1 << 26  # of values and counts; summed in 0.7 GB

  @property
  def reader(self) -> Reader:
    """Returns what reads the logs."""
    return self.log or staging.reader_of(Config(data=self.data))

  @property
  def schema(self) -> Schema:
    """Returns the inputs of a sample."""
    return self.reader.schema(self.data)

  def at(self, name: str, i: int | str = "all") -> str:
    """Returns the folder that task i of a pass leaves, or all of it."""
    return os.path.join(
      self.folder, f"{name}-{i:06}" if isinstance(i, int) else f"{name}-{i}"
    )

  def every(self, name: str) -> list[str]:
    """Returns the folders that a pass over the files leaves."""
    return [self.at(name, i) for i in range(len(self.sources))]


class Pass(NamedTuple):
  """A pass over files, or parts of what they hold."""

  name: str
  tasks: Callable[[Job], int]  # joins what there is; returns how many follow
  task: Callable[[Job, int, str], None]  # does one, into a folder


def count(job: Job, step: Pass) -> int:
  """Joins what there is; counts the tasks of a pass: none after an error."""
  if error(job):
    return 0
  try:
    return step.tasks(job)
  except UserError as e:
    _fail(job, e)
    return 0


def do(job: Job, step: Pass, i: int) -> None:
  """Does task i of a pass, where it is not done."""
  try:
    once(job.at(step.name, i), lambda folder: step.task(job, i, folder))
  except UserError as e:  # any worker would find the same
    _fail(job, e)
  except duckdb.OutOfMemoryException as e:
    _fail(job, vocabulary.too_little(job.data.memory_mb, e))


def _fail(job: Job, e: UserError) -> None:
  """Ends the passes; who waits for them raises this error."""
  files.write(os.path.join(job.folder, _ERROR), str(e))


def error(job: Job) -> str:
  """Returns the message of the error that ended the passes, or ''."""
  path = os.path.join(job.folder, _ERROR)
  if not os.path.exists(path):
    return ""
  with open(path, encoding="utf-8") as f:
    return f.read()


def clear(job: Job) -> None:
  """Removes an error, and what killed workers have left undone."""
  for name in os.listdir(job.folder):
    path = os.path.join(job.folder, name)
    if name == _ERROR:
      os.remove(path)
    elif os.path.splitext(name)[1] and os.path.isdir(path):  # see `once`
      shutil.rmtree(path)


def once(target: str, write: Callable[[str], None]) -> None:
  """Makes a folder by `write`, where it is not there; others may do the same.

  Workers that were thought dead may be alive, so that each has its own.
  """
  if os.path.exists(target):
    return
  part = f"{target}.{uuid.uuid4().hex}"
  os.mkdir(part)  # not where the data set is complete, and has moved
  try:
    write(part)
    files.move_folder(part, target)
  except OSError:
    if not os.path.exists(target):  # else another was first, with the same
      raise
  finally:
    shutil.rmtree(part, ignore_errors=True)


def write_json(folder: str, content: Any) -> None:
  """Writes what a task, or what joins them, has found."""
  files.write(os.path.join(folder, FOUND), json.dumps(content))


def read_json(folder: str) -> Any:
  """Reads what a task, or what joined them, has found."""
  return files.read_json(os.path.join(folder, FOUND))
