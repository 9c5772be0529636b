"""Logs -> vocabulary, frequency profile and packed blocks of ranks.

Four passes, each streaming with bounded memory:

1. stage: parse the logs into chunks whose categorical cells are codes into the
   chunk's own list of distinct values (data/criteo.py).
2. count: sum the counts of those lists over the training split; keep ids with
   `min_count`; sort by count. The result is the vocabulary (data/vocabulary.py).
3. remap: join the lists with the vocabulary: code -> rank, chunk by chunk.
4. pack: ranks in blocks of thousands of samples, in time order (data/blocks.py).
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable

import duckdb
import numpy as np
import pyarrow as pa

from recjax.config import Config
from recjax.data import blocks, staging, text, vocabulary
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.schema import Feature, Schema

VERSION = 1  # of the prepared data; other versions are not read
BLOCKS = "blocks"


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared data set: where it is, and what it holds."""

  directory: str
  schema: Schema
  profile: Profile
  samples: dict[str, int]  # of 'train' and 'test'
  vocabulary: str  # fingerprint: sha256 of the vocabulary's content
  settings: dict  # what it was made with
  teacher: dict | None = None  # synthetic: auc, log_loss of the test split


# Loading


def load(directory: str) -> Prepared:
  """The prepared data set in `directory`.

  Raises:
    UserError: there is none, it is unfinished or damaged.
  """
  path = os.path.join(directory, "prepared.json")
  try:
    with open(path, encoding="utf-8") as f:
      found = json.load(f)
    if found["version"] != VERSION:
      raise UserError(
        f"{path} has version {found['version']}, this recjax reads version"
        f" {VERSION}: delete {directory} and prepare again"
      )
    schema = Schema(
      tuple(found["schema"]["dense"]),
      tuple(Feature(**f) for f in found["schema"]["features"]),
    )
    samples = found["samples"]
    path = os.path.join(directory, vocabulary.FILE)
    return Prepared(
      directory,
      schema,
      vocabulary.read_profile(path, schema.tables, samples["train"]),
      samples,
      found["vocabulary"],
      found["settings"],
      found["teacher"],
    )
  except FileNotFoundError as e:
    raise UserError(
      f"{directory} holds no prepared data set ({e.filename} is missing):"
      " run with --mode=prepare"
    ) from e
  except (KeyError, TypeError, ValueError, pa.ArrowInvalid) as e:
    raise UserError(
      f"{directory} is damaged ({type(e).__name__}: {e}): delete it and"
      " prepare again"
    ) from e


def copy_vocabulary(prepared: Prepared, directory: str) -> str:
  """Copies the vocabulary file into `directory`; returns its path there."""
  os.makedirs(directory, exist_ok=True)
  target = os.path.join(directory, vocabulary.FILE)
  part = target + ".part"
  shutil.copyfile(os.path.join(prepared.directory, vocabulary.FILE), part)
  os.replace(part, target)
  return target


# Preparing


def prepare(
  config: Config,
  directory: str,
  report: Callable[[str], None] = print,
) -> Prepared:
  """Prepares the logs of `config.data`, or loads them where that is done.

  The data set appears by one rename when it is complete; until then all is in
  `<directory>.unfinished`. What a killed run left there is used again, pass by
  pass, when it is of the same logs and settings.

  Args:
    config: see `config.data`.
    directory: for this data set only.
    report: takes lines of progress.

  Raises:
    UserError: damaged or missing logs, settings that do not fit, a full disk,
      or a data set made from other logs or settings.
  """
  directory = directory.rstrip("/")
  schema = staging.format_of(config.data).schema(config.data)
  settings = _settings(config)
  if os.path.exists(os.path.join(directory, "prepared.json")):
    prepared = load(directory)
    _check_same(prepared.settings, settings, directory)
    _remove(os.path.join(directory, "stage"))
    return prepared
  if os.path.exists(directory) and os.listdir(directory):
    raise UserError(
      f"{directory} holds other files but no prepared data set: delete it or"
      " use another --workdir"
    )
  try:
    _prepare(config, schema, settings, f"{directory}.unfinished", report)
    os.replace(f"{directory}.unfinished", directory)
  except (OSError, duckdb.Error, RuntimeError) as e:
    if not _disk_full(e):
      if isinstance(e, duckdb.OutOfMemoryException):
        raise UserError(
          f"data.memory_mb={config.data.memory_mb} is too little to prepare"
          f" these logs ({e}): raise it"
        ) from e
      raise
    free = shutil.disk_usage(os.path.dirname(directory) or ".").free >> 20
    raise UserError(
      f"no space left on the disk of {directory} while preparing ({free:,}"
      f" MiB free; {e}): free some and run again, or use another --workdir"
    ) from e
  _remove(os.path.join(directory, "stage"))
  return load(directory)


def _disk_full(e: BaseException) -> bool:
  if isinstance(e, OSError) and e.errno:
    return e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  text = str(e).lower()
  return any(
    s in text
    for s in ("no space left", "file too large", "quota", "max_temp_directory")
  )


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)


def _write_json(path: str, content: dict) -> None:
  """Atomically: all of it or none, also after a power cut."""
  with open(path + ".part", "w", encoding="utf-8") as f:
    json.dump(content, f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + ".part", path)


def _read_json(path: str) -> dict | None:
  """None where there is no such file."""
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except FileNotFoundError:
    return None


# Settings


def _settings(config: Config) -> dict:
  """All that the prepared data depends on, by value; logs by a fingerprint.

  Raises:
    UserError: a value out of its range; no such logs.
  """
  data = config.data
  if not 0 < data.test_fraction < 1:
    raise UserError(
      f"data.test_fraction is {data.test_fraction}: give a share between 0 and"
      " 1"
    )
  for name, least in (
    ("block_samples", 1),
    ("min_count", 0),
    ("max_bad_rows", 0),
    ("seed", 0),
    ("memory_mb", 128),
  ):
    if getattr(data, name) < least:
      raise UserError(
        f"data.{name} is {getattr(data, name)}: give at least {least}"
      )
  names = ["format", "pooling", "min_count", "block_samples"]
  names += ["hotness", "weighted"]
  if not data.test:
    names += ["test_fraction", "split"]
    if data.split == "random":
      names += ["seed"]
  settings = {f"data.{name}": getattr(data, name) for name in names}
  if data.format == "synthetic":
    settings["data.seed"] = data.seed
    for name, value in dataclasses.asdict(data.synthetic).items():
      settings[f"data.synthetic.{name}"] = value
  else:
    for field, paths in staging.format_of(data).sources(data).items():
      settings[field] = [_fingerprint(path) for path in paths]
  return json.loads(json.dumps(settings))  # as it reads back


def _fingerprint(path: str) -> str:
  """Name, size and a hash of the first and last MiB: cheap for any size."""
  size = os.path.getsize(path)
  with open(path, "rb") as f:
    digest = hashlib.sha256(f.read(1 << 20))
    f.seek(max(0, size - (1 << 20)))
    digest.update(f.read())
  return f"{os.path.basename(path)} {size} {digest.hexdigest()[:32]}"


def _check_same(old: dict, new: dict, directory: str) -> None:
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


# The passes


def _prepare(config, schema, settings, directory, report) -> None:
  """All passes, in `directory`; those that are done there are not repeated."""
  data = config.data
  at = os.path.join(directory, "stage")
  key = settings | {"data.max_bad_rows": data.max_bad_rows}
  staged = _read_json(os.path.join(at, "staged.json"))
  if staged is None or staged["settings"] != key:
    _remove(directory)
    os.makedirs(at)
    staged = staging.write(data, schema, directory, report) | {"settings": key}
    _write_json(os.path.join(at, "staged.json"), staged)
  split = staging.Split(data, staged["train_rows"], staged["rows"])
  if not 0 < split.train < split.total:
    raise UserError(
      f"the logs hold {split.total:,} samples, of which {split.train:,} would"
      " train and the rest test: both need at least one"
    )

  tables = schema.tables
  of_feature = np.array(
    [tables.index(f.table) for f in schema.features], np.int16
  )
  path = os.path.join(directory, vocabulary.FILE)
  spill = os.path.join(at, "spill")

  def counts():
    progress = staging.Progress("count", report, split.total)
    for row, arrays, values in staging.read(at, staged, progress):
      codes = arrays["codes"]
      train = codes[split.mask(row, len(codes))]
      n = np.bincount(train[train >= 0], minlength=len(values))
      yield of_feature[arrays["feature"]], values, n

  def values():
    for i in range(len(staged["sizes"])):
      yield of_feature[staging.features(at, i)], staging.values(at, i)

  def samples(ranks):
    progress = staging.Progress("pack", report, split.total)
    for row, arrays, _ in staging.read(at, staged, progress):
      rank = np.append(next(ranks), np.int32(-1))  # which the code -1 finds
      arrays["ids"] = rank[arrays.pop("codes")]
      train = split.mask(row, len(arrays["label"]))
      for name, mask in (("train", train), ("test", ~train)):
        if mask.any():
          yield name, {a: x[mask] for a, x in arrays.items() if a != "feature"}

  with vocabulary.open_engine(data.memory_mb, spill) as engine:
    counted = _read_json(os.path.join(at, "counted.json"))
    if counted is None:
      fingerprint = vocabulary.count(
        engine, counts(), tables, data.min_count, path
      )
      counted = {"vocabulary": fingerprint}
      _write_json(os.path.join(at, "counted.json"), counted)
    _remove(os.path.join(directory, BLOCKS))
    written = blocks.write(
      samples(vocabulary.ranks(engine, values, tables, path)),
      schema,
      data.block_samples,
      os.path.join(directory, BLOCKS),
    )
  _remove(spill)
  _write_json(
    os.path.join(directory, "prepared.json"),
    {
      "version": VERSION,
      "schema": dataclasses.asdict(schema),
      "samples": written,
      "vocabulary": counted["vocabulary"],
      "settings": settings,
      "teacher": _read_json(os.path.join(directory, "logs", "teacher.json")),
    },
  )
