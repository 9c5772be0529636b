"""What a data set is prepared from: settings and logs, compared by value."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recjax.config import Data
from recjax.data import log_files, old_vocabulary, text
from recjax.data.columns import Columns
from recjax.data.log import Log
from recjax.data.old_vocabulary import Before
from recjax.data.staging import Reader
from recjax.errors import UserError


class MadeFrom(NamedTuple):
  """What a data set is prepared from."""

  settings: dict[str, Any]  # all that it depends on; logs by fingerprints
  logs: dict[str, str]  # see `log_files.fingerprints`
  before: Before | None = None  # whose counts go in


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


def with_counts(
  made_from: MadeFrom,
  data: Data,
  before: Before | None,
  found: Mapping[str, Any],
) -> MadeFrom:
  """Adds on what other counts a data set depends; see `old_vocabulary`.

  Args:
    made_from: what it depends on else.
    data: the config.
    before: the data that another run has trained on.
    found: settings of the data set that is there; empty = none is.
  """
  own = made_from.settings
  of_logs = ("data.train", "columns")
  if data.format == "synthetic" and "columns" not in own:
    of_logs = ("data.seed", *(k for k in own if "synthetic" in k))
  more = old_vocabulary.settings_of(
    before,
    data.count_decay,
    own,
    {k: own[k] for k in of_logs if k in own},
    found,
  )
  return made_from._replace(settings=own | more, before=before)


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
  logs = "data.train", "data.test", old_vocabulary.BEFORE, old_vocabulary.DECAY
  check_same(old, now | {k: old[k] for k in logs if k in old}, directory)


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
