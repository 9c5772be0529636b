"""What a data set is prepared from: settings and logs, compared by value."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from recjax.config import Data
from recjax.data import log_files, text
from recjax.data.columns import Columns
from recjax.data.log import Log
from recjax.data.staging import Reader
from recjax.errors import UserError


class MadeFrom(NamedTuple):
  """What a data set is prepared from."""

  settings: dict[str, Any]  # all that it depends on; logs by fingerprints
  logs: dict[str, str]  # see `log_files.fingerprints`


def settings_of(
  data: Data,
  reader: Reader,
  known: dict[str, str],
  report: Callable[[str], None],
) -> MadeFrom:
  """Returns all that the prepared data depends on, by value.

  Args:
    data: the config.
    reader: of the logs.
    known: fingerprints that were taken before.
    report: takes lines of progress.

  Raises:
    UserError: there are no such logs, or one is named twice.
  """
  settings, logs = _settings_but_logs(data, reader), {}
  if reads_files(data, reader):
    sources = reader.sources(data)
    log_files.check_apart(sources)
    of_logs, logs = log_files.fingerprints(sources, known, report)
    settings |= of_logs
  # As it reads back.
  return MadeFrom(json.loads(json.dumps(settings)), logs)


def _settings_but_logs(data: Data, reader: Reader) -> dict[str, Any]:
  names = ["format", "pooling", "min_count", "block_samples"]
  names += ["hotness", "weighted"]
  if not data.test:
    names += ["test_fraction", "split"]
    if data.split == "random":
      names += ["seed"]
  settings = {f"data.{name}": getattr(data, name) for name in names}
  if isinstance(reader, Log):
    settings |= _settings_of_log(data, reader)
  if isinstance(reader, Columns):
    reader.sources(data)  # or an error
    settings["columns"] = reader.fingerprint()
  elif data.format == "synthetic":
    settings["data.seed"] = data.seed
    for name, value in dataclasses.asdict(data.synthetic).items():
      settings[f"data.synthetic.{name}"] = value
  return settings


def reads_files(data: Data, reader: Reader) -> bool:
  """Returns whether the samples come from files that the config names."""
  return data.format != "synthetic" and not isinstance(reader, Columns)


def check_but_logs(
  old: dict[str, Any], data: Data, reader: Reader, directory: str
) -> None:
  """Raises UserError where settings differ, whatever the logs are.

  Args:
    old: settings of the data set.
    data: the config.
    reader: of the logs, which are not there any more.
    directory: of the data set.
  """
  now = json.loads(json.dumps(_settings_but_logs(data, reader)))
  logs = {k: x for k, x in old.items() if k in ("data.train", "data.test")}
  check_same(old, now | logs, directory)


def _settings_of_log(data: Data, log: Log) -> dict[str, Any]:
  """Returns what samples of named columns depend on besides."""
  columns = dataclasses.asdict(log.columns)
  del columns["keep"]  # of predictions
  features = zip(log.columns.features, columns["features"], strict=True)
  columns["features"] = [{"": type(f).__name__} | of for f, of in features]
  text = dataclasses.asdict(data.text)
  return {f"data.text.{k}": x for k, x in text.items()} | {
    f"schema.{k}": x for k, x in columns.items()
  }


def check_same(
  old: dict[str, Any], new: dict[str, Any], directory: str
) -> None:
  """Raises UserError where the settings of a data set differ."""
  differ = [
    f"{k} was {text.shown(old.get(k))}, is now {text.shown(new.get(k))}"
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k)
  ]
  if differ:
    raise UserError(
      f"{directory} was prepared from other logs or settings:"
      f" {'; '.join(differ)}. Set them back, use another --workdir, or delete"
      f" {directory}"
    )
