"""A prepared data set: what it holds, and how it is loaded.

In its folder are the vocabulary in rank order (vocabulary.py), blocks of
samples (blocks.py) and prepared.json, which says what they were made from,
and is the manifest: the size of every file, the hash of the vocabulary, and a
hash of itself. Blocks have hashes of their own inside (ArrayRecord's chunks),
which are compared where a block is read.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from recjax import files
from recjax.data import vocabulary
from recjax.data.blocks import Blocks
from recjax.data.numbers import Fitted
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.schema import Feature, Schema

VERSION = 4  # of the prepared data; other versions are not read
BLOCKS = "blocks"
_FILE = "prepared.json"


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared data set: where it is, and what it holds."""

  directory: str
  schema: Schema
  profile: Profile
  samples: dict[str, int]  # of 'train' and 'test'
  vocabulary: str  # fingerprint: sha256 of the vocabulary's content
  settings: dict[str, Any]  # what it was made with
  logs: dict[str, str]  # those that were read; see `log_files.fingerprints`
  numbers: tuple[Fitted, ...] = ()  # of a log with a schema of its own
  vocabulary_hash: str = ""  # sha256 of the file
  teacher: dict[str, Any] | None = None  # synthetic: auc, log_loss of the test

  def blocks(self, split: str) -> Blocks:
    """Opens the blocks of 'train' or 'test'.

    Raises:
      UserError: they are missing or damaged.
    """
    return Blocks(
      os.path.join(self.directory, BLOCKS),
      self.schema,
      split,
      samples=self.samples[split],
      block_samples=self.settings["data.block_samples"],
    )


def exists(directory: str) -> bool:
  """Whether a data set was prepared there."""
  return os.path.exists(os.path.join(directory, _FILE))


def save(
  directory: str,
  schema: Schema,
  samples: dict[str, int],
  *,
  numbers: tuple[Fitted, ...],
  fingerprint: str,
  counted: int,
  settings: dict[str, Any],
  logs: dict[str, str],
  teacher: dict[str, Any] | None,
) -> None:
  """Writes prepared.json, which completes the data set in `directory`.

  The arguments are what `load` gives as Prepared; the fingerprint is that of
  the vocabulary, whose counts are of so many samples.
  """
  content = {
    "version": VERSION,
    "schema": dataclasses.asdict(schema),
    "samples": samples,
    "numbers": [x._asdict() for x in numbers],
    "vocabulary": fingerprint,
    "counted": counted,
    "settings": settings,
    "logs": logs,
    "teacher": teacher,
    "sizes": {name: os.path.getsize(p) for name, p in _files(directory)},
    "vocabulary_hash": files.hash_of(os.path.join(directory, vocabulary.FILE)),
  }
  content["hash"] = files.hash_of_json(content)
  files.write(os.path.join(directory, _FILE), json.dumps(content, indent=1))


def _files(directory: str) -> Iterator[tuple[str, str]]:
  """Yields (name, path) of the files that a run reads, but prepared.json."""
  yield vocabulary.FILE, os.path.join(directory, vocabulary.FILE)
  folder = os.path.join(directory, BLOCKS)
  for name in sorted(os.listdir(folder)):
    if not name.endswith(".json"):  # for tensorflow-datasets
      yield f"{BLOCKS}/{name}", os.path.join(folder, name)


def _check(found: dict[str, Any], directory: str) -> None:
  """Raises ValueError where something is not what was written."""
  said = found.pop("hash", None)
  if said != files.hash_of_json(found):
    raise ValueError(f"{_FILE} is not what was written")
  for _, path in _files(directory):
    files.check_regular(path)
  for name in ("samples", "settings", "logs", "sizes"):
    if not isinstance(found[name], dict):
      raise ValueError(f"{name} is {str(found[name])[:60]}")
  for name, size in found["sizes"].items():
    there = os.path.getsize(os.path.join(directory, name))
    if there != size:
      raise ValueError(f"{name} has {there:,} bytes, {size:,} were written")
  _check_vocabulary(
    os.path.join(directory, vocabulary.FILE), found["vocabulary_hash"]
  )


def _check_vocabulary(path: str, wanted: str) -> None:
  if files.hash_of(path) != wanted:
    raise ValueError(f"{vocabulary.FILE} is not what was written")


def load(directory: str) -> Prepared:
  """Loads the prepared data set in `directory`.

  Raises:
    UserError: there is none, it is unfinished or damaged.
  """
  path = os.path.join(directory, _FILE)
  try:
    found = files.read_json(path)
    if found["version"] != VERSION:
      raise UserError(
        f"{path} has version {found['version']}, this recjax reads version"
        f" {VERSION}: delete {directory} and prepare again"
      )
    _check(found, directory)
    schema = Schema(
      tuple(found["schema"]["dense"]),
      tuple(Feature(**f) for f in found["schema"]["features"]),
      tuple(found["schema"]["labels"]),
      found["schema"]["sample_weighted"],
    )
    samples = found["samples"]
    path = os.path.join(directory, vocabulary.FILE)
    return Prepared(
      directory,
      schema,
      vocabulary.read_profile(
        path, schema.tables, found.get("counted", samples["train"])
      ),
      samples,
      found["vocabulary"],
      found["settings"],
      found["logs"],
      tuple(Fitted.from_json(x) for x in found["numbers"]),
      found["vocabulary_hash"],
      found["teacher"],
    )
  except FileNotFoundError as e:
    raise UserError(
      f"{directory} holds no prepared data set ({e.filename} is missing):"
      " run with --mode=prepare"
    ) from e
  except (KeyError, TypeError, ValueError, pa.ArrowInvalid) as e:
    raise _damaged(directory, e) from e


def _damaged(directory: str, e: Exception) -> UserError:
  what = str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
  return UserError(
    f"{directory} is damaged ({what}): delete it and prepare again"
  )


def copy_vocabulary(prepared: Prepared, directory: str) -> str:
  """Copies the vocabulary file into `directory`; returns its path there.

  Raises:
    UserError: the file is not the one that was prepared.
  """
  os.makedirs(directory, exist_ok=True)
  target = os.path.join(directory, vocabulary.FILE)
  with files.replacing(target) as part:
    shutil.copyfile(os.path.join(prepared.directory, vocabulary.FILE), part)
    try:
      _check_vocabulary(part, prepared.vocabulary_hash)
    except ValueError as e:
      raise _damaged(prepared.directory, e) from e
  return target
