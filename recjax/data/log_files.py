"""The files of a log: found, told apart, and known again."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Mapping

from recjax.config import Data
from recjax.errors import UserError
from recjax.progress import Progress


class MissingError(UserError):
  """There are no such files."""


def find(pattern: str, field: str) -> tuple[str, ...]:
  """Finds the files of a path or glob, in natural order: day_2, then day_10.

  Args:
    pattern: a path; or a glob, or several with commas between them. A comma of
      a name is `[,]`, as a bracket is `[[]`.
    field: of the config that gave it, for errors.

  Raises:
    MissingError: there are none.
    UserError: one is empty or not a file.
  """
  if not pattern:
    raise UserError(f"{field} is empty: give the path or glob of the log")
  paths = [pattern] if os.path.exists(pattern) else []
  globs = re.split(r"(?<!\[),|,(?!\])", pattern)
  for one in () if paths else globs:
    found = [one] if os.path.exists(one) else glob.glob(one)
    if not found:
      what = "matches no file" if glob.has_magic(one) else "does not exist"
      if re.match(r"\w+://", one):
        what = "is a URL: copy the log to a disk that this machine has, first"
      raise MissingError(f"{field}: {one} {what}")
    paths += found
  for path in paths:
    if not os.path.isfile(path):
      raise UserError(f"{field}: {path} is not a file")
    if not os.path.getsize(path):
      raise UserError(f"{field}: {path} is empty")

  def natural(path: str) -> tuple[list[int | str], str]:
    parts = re.split(r"(\d+)", path)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], path

  return tuple(sorted(paths, key=natural))


def sources(data: Data) -> dict[str, tuple[str, ...]]:
  """Finds the files, in time order, that each config field names.

  Raises:
    UserError: see `find`.
  """
  fields = {"data.train": data.train}
  if data.test:
    fields["data.test"] = data.test
  return {field: find(pattern, field) for field, pattern in fields.items()}


def escape(path: str) -> str:
  """Returns the pattern that finds the path of this name alone."""
  return glob.escape(path).replace(",", "[,]")


def check_apart(sources: Mapping[str, tuple[str, ...]]) -> None:
  """Raises UserError where a file is read twice: links, and packed ones, too.

  Args:
    sources: the files that each field of the config names.
  """
  seen: dict[object, tuple[str, str]] = {}
  for field, paths in sources.items():
    for path in paths:
      status = os.stat(path)
      plain = re.sub(r"\.(gz|bz2|zst)$", "", os.path.realpath(path))
      keys = (status.st_dev, status.st_ino), plain
      for key in keys:
        if key in seen:
          other, of = seen[key]
          both = field if field == of else f"{of} and {field}"
          raise UserError(
            f"{both}: {other} and {path} are the same file: a sample may come "
            "once. Name one of them; data.test is not part of data.train"
          )
      seen |= dict.fromkeys(keys, (path, field))


def fingerprints(
  sources: Mapping[str, tuple[str, ...]],
  known: Mapping[str, str],
  report: Callable[[str], None],
) -> tuple[dict[str, list[str]], dict[str, str]]:
  """Returns what tells the content of files from that of others.

  A file whose name, size and time of change are known is not read again.

  Args:
    sources: the files that each field of the config names.
    known: what was returned before.
    report: takes lines of progress.

  Returns:
    ({field: name, size and SHA-256 of each file},
     {name, size and time of change of a file: the same}).
  """
  sizes = {p: os.path.getsize(p) for paths in sources.values() for p in paths}
  progress = Progress("prepare: fingerprint", report, sum(sizes.values()), "B")
  found: dict[str, list[str]] = {}
  stamps: dict[str, str] = {}
  for field, paths in sources.items():
    found[field] = []
    for path in paths:
      of = f"{os.path.basename(path)} {sizes[path]}"
      stamp = f"{of} {os.stat(path).st_mtime_ns}"
      if stamp in known:
        stamps[stamp] = known[stamp]
      else:
        stamps[stamp] = f"{of} {_hash(path, progress)}"
      found[field].append(stamps[stamp])
  return found, stamps


def _hash(path: str, progress: Progress) -> str:
  """Returns the SHA-256 of a file, in hex."""
  digest = hashlib.sha256()
  with open(path, "rb") as f:
    while data := f.read(1 << 20):
      digest.update(data)
      progress.add(len(data))
  return digest.hexdigest()
