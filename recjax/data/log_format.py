"""The format of a log, found from its names and first bytes."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from recjax.config import Text
from recjax.data import criteo, csv_layout, libsvm_rows
from recjax.data.rows import is_number
from recjax.data.text_blocks import head

_LOOKED_AT = 20  # lines
# What names a column, and not a cell of it.
_MISSING = {"na", "n/a", "nan", "null", "none", "nil"}
_NAME = re.compile(r"[A-Za-z_][\w .:/-]*")


class Found(NamedTuple):
  """A format, and how text of it is written."""

  format: str
  text: Text


def is_movielens(path: str) -> bool:
  """Returns whether this is MovieLens' folder, or its file of ratings."""
  folder = path if os.path.isdir(path) else os.path.dirname(path)
  there = lambda name: os.path.isfile(os.path.join(folder, name))
  name = os.path.basename(path)
  ratings = os.path.isdir(path) or name.startswith("ratings.")
  return ratings and there("users.dat") and there("movies.dat")


def find(path: str, text: Text) -> Found:
  """Finds out which format a file has.

  Args:
    path: of the file.
    text: what is said about it.

  Raises:
    UserError: it is neither Parquet nor text, is empty or not there.
  """
  with open(path, "rb") as f:
    if f.read(4) == b"PAR1":
      return Found("parquet", text)
  data = head(path)
  cut = data.rpartition(b"\n")[0] or data
  lines = [x for x in cut.split(b"\n")[: 4 * _LOOKED_AT] if x.strip()]
  lines = lines[:_LOOKED_AT]
  # An array of objects, or one over many lines, is for the reader to refuse.
  if any(map(_is_object, lines)) or re.match(rb"\s*(\[\s*)?\{\s*[\"\n]", cut):
    return Found("jsonl", text)
  if _is_libsvm(lines):
    return Found("libsvm", text)
  if lines and all(map(_is_criteo, lines)):
    return Found("criteo", text)
  return Found("csv", text_of(path, text))


def _is_object(line: bytes) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def _is_libsvm(lines: Sequence[bytes]) -> bool:
  """Returns whether most lines are a label and index:value, without commas."""
  tokens = [t for line in lines if (t := line.split(b"#")[0].split())]
  good = [
    libsvm_rows.plausible(t) and len(t) > 1 and b"," not in t[1] for t in tokens
  ]
  return 2 * sum(good) > len(lines)


def _is_criteo(line: bytes) -> bool:
  """Returns whether a line is a label, 13 integers and 26 ids."""
  fields = line.rstrip(b"\r").decode("utf-8", "replace").split("\t")
  return (
    len(fields) == 40
    and fields[0] in ("0", "1")
    and all(re.fullmatch(r"(-?\d+)?", x) for x in fields[1:14])
  )


def criteo_text() -> Text:
  """Returns how a Criteo log is written."""
  names = ("label", *criteo.DENSE, *criteo.CATEGORIES)
  return Text(separator="\t", header=False, names=names, quote="")


def text_of(path: str, text: Text) -> Text:
  """Returns how a CSV file is written: whether a header names its columns.

  Columns without names are called c1, c2 and so on.

  Args:
    path: of the file.
    text: what is said about it; names, or no header, are believed.

  Raises:
    UserError: it is no text.
  """
  if text.names:
    return text
  if not text.separator and _by_spaces(path, text):
    text = Text(" ", text.header, (), text.quote)
  if text.header:
    first, *rows = csv_layout.find(path, _without_header(text)).sample
    if _names_columns(first, rows):
      return text
  else:
    first, *_ = csv_layout.find(path, text).sample
  return Text(
    text.separator,
    False,
    tuple(f"c{i + 1}" for i in range(len(first))),
    text.quote,
  )


def _by_spaces(path: str, text: Text) -> bool:
  """Returns whether the rows of a file are parted by spaces alone."""
  rows = csv_layout.find(path, _without_header(text)).sample[:_LOOKED_AT]
  fields = {len(row[0].split(" ")) for row in rows}
  return all(len(r) == 1 for r in rows) and len(fields) == 1 < max(fields)


def _without_header(text: Text) -> Text:
  return Text(text.separator, False, (), text.quote)


def _names_columns(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
  """Returns whether the first row of a file names its columns.

  Below a word of it stand numbers; or it holds words alone, each once, and what
  stands below is never the same. pandas gives 0, 1, 2 and so on, too.
  """
  if list(first) == [str(i) for i in range(len(first))] and rows:
    return len(first) > 1 and list(rows[0]) != list(first)
  names = [cell for cell in first if cell]
  columns = list(itertools.zip_longest(*rows, fillvalue=""))[: len(first)]
  for name, column in zip(first, columns, strict=False):
    there = [cell for cell in column if cell]
    word = _NAME.fullmatch(name) and name.lower() not in _MISSING
    if word and not is_number(name) and there and all(map(is_number, there)):
      return True
  if any(map(is_number, first)):
    return False
  return (
    len(set(names)) == len(names) > 0
    and all(_NAME.fullmatch(cell) for cell in names)
    and not any(a in b for a, b in zip(first, columns, strict=False))
  )
