"""Text files -> tables of parsed lines; damaged lines named one by one.

PyArrow parses: its CSV reader decodes straight into dictionary codes, at over
a million Criteo lines/s on two cores. What it refuses is narrowed down by
bisection to the damaged lines, so that the reason given is always that of the
parser that reads the data.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv

from recjax.data.text_blocks import MARK, arrow_bytes, blocks
from recjax.errors import UserError


@dataclasses.dataclass
class DamagedLines:
  """Damaged lines of all logs: skipped up to a limit, then an error."""

  limit: int
  lines: list[tuple[str, int, str, str]] = dataclasses.field(
    default_factory=list
  )  # file, line, field, reason

  def add(self, path: str, line: int, field: str, reason: str) -> None:
    """Takes a damaged line.

    Raises:
      UserError: it is one more than the limit.
    """
    self.lines.append((path, line, field, reason))
    if len(self.lines) > self.limit:
      where = f"{path}, line {line}" + (f", field {field}" if field else "")
      more = (
        f" ({len(self.lines)} damaged lines so far, more than"
        f" data.max_bad_rows={self.limit})"
        if self.limit
        else "; to skip damaged lines set data.max_bad_rows"
      )
      raise UserError(f"{where}: {reason}{more}")

  def report(self) -> str:
    """Lists the damaged lines as TSV with a header."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(("file", "line", "field", "reason"))
    writer.writerows(self.lines)
    return out.getvalue()


# ---- Parsing


@dataclasses.dataclass(frozen=True)
class Columns:
  """What the fields of a line are, and what becomes of them."""

  # Name -> 'int', 'id' (read as dictionary codes) or 'text' (as strings).
  kinds: dict[str, str]
  # Turns whole columns into what is wanted; raises pa.ArrowInvalid where a line
  # is damaged.
  convert: Callable[[pa.Table], Any]
  # Names the field and the reason for the fields of a single damaged line; None
  # where `convert` had no reason to refuse it.
  explain: Callable[[list[str]], tuple[str, str] | None]
  separator: bytes = b"\t"


_TYPES = {
  "int": pa.int64(),
  "id": pa.dictionary(pa.int32(), pa.string()),
  "text": pa.string(),
}


def _parse(block: bytes, columns: Columns) -> Any:
  """Parses and converts the lines; pa.ArrowInvalid where one is damaged."""
  # PyArrow drops a mark where the text that it is given begins.
  if block.startswith(MARK) or b"\n" + MARK in block:
    raise pa.ArrowInvalid("a byte order mark inside the file")
  lines = block.count(b"\n")
  if columns.separator != b"\t":
    block = block.replace(b"\t", b" ").replace(columns.separator, b"\t")
  table = pyarrow.csv.read_csv(
    arrow_bytes(block),
    read_options=pyarrow.csv.ReadOptions(
      column_names=list(columns.kinds), block_size=max(len(block), 1 << 20)
    ),
    parse_options=pyarrow.csv.ParseOptions(
      delimiter="\t",
      quote_char=False,
      escape_char=False,
      newlines_in_values=False,
      ignore_empty_lines=False,
    ),
    convert_options=pyarrow.csv.ConvertOptions(
      column_types={n: _TYPES[k] for n, k in columns.kinds.items()},
      null_values=[""],
      strings_can_be_null=True,
      quoted_strings_can_be_null=False,
    ),
  )
  if table.num_rows != lines:
    raise pa.ArrowInvalid("a carriage return inside a line")
  return columns.convert(table.unify_dictionaries().combine_chunks())


def parse(
  path: str, columns: Columns, damaged: DamagedLines
) -> Iterator[tuple[Any, int]]:
  """Parses a file, some tens of MB at a time.

  Args:
    path: of a plain or gzipped file.
    columns: what its lines hold.
    damaged: takes the damaged lines, which are left out.

  Yields:
    (columns.convert of the next lines, bytes of the file read so far).

  Raises:
    UserError: the file cannot be read; more damaged lines than are allowed.
  """
  for block in blocks(path):
    found = _parse_or_skip(path, block.line, block.data, columns, damaged)
    if found is not None:
      yield found, block.read


def _parse_or_skip(
  path: str,
  first: int,
  block: bytes,
  columns: Columns,
  damaged: DamagedLines,
) -> Any | None:
  """Parses the lines but the damaged ones; None if none is left.

  Args:
    path: of their file.
    first: number of the first line.
    block: the lines.
    columns: what they hold.
    damaged: takes those that are damaged.
  """
  try:
    return _parse(block, columns)
  except pa.ArrowInvalid:
    lines = [line + b"\n" for line in block.split(b"\n")[:-1]]
  good = list(_sift(path, first, lines, columns, damaged))
  return _parse(b"".join(good), columns) if good else None


def _sift(
  path: str,
  first: int,
  lines: list[bytes],
  columns: Columns,
  damaged: DamagedLines,
) -> Iterator[bytes]:
  """Yields the lines that parse, by bisection; reports the others in order."""
  try:
    _parse(b"".join(lines), columns)
  except pa.ArrowInvalid as e:
    if len(lines) == 1:
      damaged.add(path, first, *_explain(lines[0], columns, e))
      return
  else:
    yield from lines
    return
  half = len(lines) // 2
  yield from _sift(path, first, lines[:half], columns, damaged)
  yield from _sift(path, first + half, lines[half:], columns, damaged)


def _explain(
  line: bytes, columns: Columns, error: Exception
) -> tuple[str, str]:
  """Names the field of a damaged line, '' if it is none, and the reason."""
  names = list(columns.kinds)
  fields = line.rstrip(b"\r\n").split(columns.separator)
  if len(fields) != len(names):
    return "", f"{len(fields)} fields where {len(names)} are expected"
  if line.startswith(MARK):
    return names[0], f"{shown(fields[0])} begins with a byte order mark"
  for name, field in zip(names, fields, strict=True):
    if b"\r" in field:
      return name, f"{shown(field)} holds a carriage return"
    try:
      field.decode("utf-8")
    except UnicodeDecodeError:
      return name, f"{shown(field)} is not UTF-8"
  texts = [f.decode("utf-8") for f in fields]
  if found := columns.explain(texts):
    return found
  for name, text in zip(names, texts, strict=True):
    if columns.kinds[name] == "int" and text:
      if not re.fullmatch(r"[+-]?\d+", text):
        return name, f"{shown(text)} is not an integer"
      # Python refuses to read thousands of digits.
      if len(text) > 20 or abs(int(text)) >= 1 << 63 or text[0] == "+":
        return name, f"{shown(text)} is not a 64-bit integer"
  return "", str(error)


def shown(found: object) -> str:
  """Formats what was found, cut to 60 characters."""
  text = repr(found)
  return text if len(text) <= 60 else text[:57] + "..."
