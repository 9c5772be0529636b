"""Files and folders that appear whole or not at all, also after a power cut.

What is written goes to a `.part` beside its place, is flushed to the disk, and
is renamed: readers see what was there before, or all of what is new. The
`.part` that a killed process leaves is overwritten by the next writer.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

Path = str | os.PathLike[str]


def read_json(path: Path) -> Any:
  """Returns what a JSON file holds, which anybody may have written.

  Raises:
    OSError: there is none, or it is not to be read.
    ValueError: it is no file, no JSON, or nested too deep.
  """
  check_regular(path)
  with open(path, "rb") as f:
    return parse_json(f.read())


def check_regular(path: Path) -> None:
  """Raises ValueError for a folder, a pipe, a device: they may never end."""
  if os.path.exists(path) and not os.path.isfile(path):
    raise ValueError(f"{path} is not a file")


def parse_json(text: str | bytes) -> Any:
  """Returns what JSON text says.

  Raises:
    ValueError: it is no JSON, or nested too deep.
  """
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError("nested too deep") from e


def hash_of_json(content: Any) -> str:
  """Returns the sha256 of what JSON says, whatever the order of its keys."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def hash_of(path: Path) -> str:
  """Returns the sha256 of a file's content."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def write(path: Path, content: str | bytes) -> None:
  """Replaces the file at `path` by this content; text is stored as UTF-8."""
  data = content.encode() if isinstance(content, str) else content
  with replacing(path) as part, open(part, "wb") as f:
    f.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
  """Gives the path of a new file that replaces `path` when the block ends.

  For writers that want a path or an open file of their own; they must have
  closed it by then. An exception removes the new file and keeps the old one.

    with files.replacing("a.parquet") as part:
      parquet.write_table(table, part)
  """
  part = f"{os.fspath(path)}.part"
  try:
    yield part
    _flush(part)
    os.replace(part, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(part)
    raise
  _flush(_parent(path))


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[str]:
  """Gives the path of a new folder that replaces `path` when the block ends.

  The folder is there, and empty. An exception removes it and keeps the old
  one. (Between the old folder's end and the new one's rename there is none.)
  """
  part = f"{os.fspath(path).rstrip(os.sep)}.part"
  shutil.rmtree(part, ignore_errors=True)
  os.makedirs(part)
  try:
    yield part
    shutil.rmtree(path, ignore_errors=True)
    move_folder(part, path)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def move_folder(source: Path, target: Path) -> None:
  """Renames a finished folder; what it holds is on the disk before that."""
  for folder, _, names in os.walk(source):
    for name in names:
      _flush(os.path.join(folder, name))
    _flush(folder)
  os.replace(source, target)
  _flush(_parent(target))


def _parent(path: Path) -> str:
  return os.path.dirname(os.path.abspath(path))


def _flush(path: Path) -> None:
  """Waits until the disk has the file's content or the folder's entries."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
