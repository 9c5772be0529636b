"""Text files -> tables of parsed lines; damaged lines named one by one.

PyArrow parses: its CSV reader decodes straight into dictionary codes, at over
a million Criteo rows/s on two cores. What it refuses is narrowed down by
bisection to the damaged lines, so that the reason given is always that of the
parser that reads the data.
"""

import csv
import dataclasses
import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.csv

from recjax.errors import UserError

CHUNK_BYTES = 1 << 25  # of text; a longer line is an error


@dataclasses.dataclass
class BadRows:
  """Damaged lines: skipped up to a limit, then an error."""

  limit: int
  rows: list[tuple[str, int, str, str]] = dataclasses.field(
    default_factory=list
  )  # file, line, field, reason

  def add(self, path: str, line: int, field: str, reason: str) -> None:
    self.rows.append((path, line, field, reason))
    if len(self.rows) > self.limit:
      where = f"{path}, line {line}" + (f", field {field}" if field else "")
      more = (
        f" ({len(self.rows)} damaged lines so far, more than"
        f" data.max_bad_rows={self.limit})"
        if self.limit
        else "; to skip damaged lines set data.max_bad_rows"
      )
      raise UserError(f"{where}: {reason}{more}")

  def report(self) -> str:
    """The skipped lines as TSV with a header."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(("file", "line", "field", "reason"))
    writer.writerows(self.rows)
    return out.getvalue()


def find(pattern: str, field: str) -> tuple[str, ...]:
  """The files of a path or glob, in natural order (day_2 before day_10).

  Raises:
    UserError: there are none, or one is empty or not a file.
  """
  if not pattern:
    raise UserError(f"{field} is empty: give the path or glob of the log")
  paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
  if not paths:
    what = "matches no file" if glob.has_magic(pattern) else "does not exist"
    raise UserError(f"{field}: {pattern} {what}")
  for path in paths:
    if not os.path.isfile(path):
      raise UserError(f"{field}: {path} is not a file")
    if not os.path.getsize(path):
      raise UserError(f"{field}: {path} is empty")

  def natural(path):
    parts = re.split(r"(\d+)", path)
    return [int(p) if p.isdigit() else p for p in parts], path

  return tuple(sorted(paths, key=natural))


def _blocks(path: str) -> Iterator[tuple[int, bytes, int]]:
  """(number of the first line, whole lines, bytes of the file read so far)."""
  line, rest = 1, b""
  try:
    with open(path, "rb") as raw:
      zipped = raw.peek(2)[:2] == b"\x1f\x8b"
      f = gzip.GzipFile(fileobj=raw) if zipped else raw
      while data := f.read(CHUNK_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end and len(data) > CHUNK_BYTES:
          raise UserError(
            f"{path}, line {line}: longer than {CHUNK_BYTES:,} bytes;"
            " is this a log in text form?"
          )
        block, rest = data[:end], data[end:]
        if block:
          yield line, block, raw.tell()
          line += block.count(b"\n")
      if rest:
        yield line, rest + b"\n", raw.tell()
      elif line == 1:
        raise UserError(f"{path} is empty")
  except (EOFError, gzip.BadGzipFile, zlib.error) as e:
    raise UserError(
      f"{path}: the .gz is truncated or damaged after line"
      f" {line - 1:,} ({e}); fetch it again"
    ) from e


# Parsing


@dataclasses.dataclass(frozen=True)
class Columns:
  """What the fields of a line are: name -> 'int', 'id' or 'text'.

  'id' is read as codes, 'text' as strings. `convert` turns whole columns into
  what is wanted or raises pa.ArrowInvalid; `explain` then names field and
  reason for a single line.
  """

  kinds: dict[str, str]
  convert: Callable[[pa.Table], object]
  explain: Callable[[list[str]], tuple[str, str] | None]
  separator: bytes = b"\t"


_TYPES = {
  "int": pa.int64(),
  "id": pa.dictionary(pa.int32(), pa.string()),
  "text": pa.string(),
}


def _parse(block: bytes, columns: Columns):
  """columns.convert of the lines; pa.ArrowInvalid where one is damaged."""
  lines = block.count(b"\n")
  if columns.separator != b"\t":
    block = block.replace(b"\t", b" ").replace(columns.separator, b"\t")
  table = pyarrow.csv.read_csv(
    pa.py_buffer(block),
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


def parse(path: str, columns: Columns, bad: BadRows) -> Iterator[tuple]:
  """(columns.convert of the next lines, bytes of the file read so far).

  Raises:
    UserError: the file cannot be read; more damaged lines than `bad` allows.
  """
  for first, block, read in _blocks(path):
    found = _parse_or_skip(path, first, block, columns, bad)
    if found is not None:
      yield found, read


def _parse_or_skip(path: str, first: int, block: bytes, columns: Columns, bad):
  """_parse without the damaged lines, which go to `bad`; None if none is left.

  Raises:
    UserError: more damaged lines than `bad` allows.
  """
  try:
    return _parse(block, columns)
  except pa.ArrowInvalid:
    lines = [line + b"\n" for line in block.split(b"\n")[:-1]]
  good: list[bytes] = []
  _sift(path, first, lines, columns, bad, good)
  return _parse(b"".join(good), columns) if good else None


def _sift(path, first, lines, columns, bad, good) -> None:
  """Appends the lines that parse to `good`; reports the others, in order."""
  try:
    _parse(b"".join(lines), columns)
    good.extend(lines)
    return
  except pa.ArrowInvalid as e:
    if len(lines) == 1:
      bad.add(path, first, *_explain(lines[0], columns, e))
      return
  half = len(lines) // 2
  _sift(path, first, lines[:half], columns, bad, good)
  _sift(path, first + half, lines[half:], columns, bad, good)


def _explain(line: bytes, columns: Columns, error) -> tuple[str, str]:
  """(field, reason) for a line that does not parse."""
  names = list(columns.kinds)
  fields = line.rstrip(b"\r\n").split(columns.separator)
  if len(fields) != len(names):
    return "", f"{len(fields)} fields where {len(names)} are expected"
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
      if abs(int(text)) >= 1 << 63 or text[0] == "+":
        return name, f"{shown(text)} is not a 64-bit integer"
  return "", str(error)


def shown(found: object) -> str:
  """As found, but short."""
  text = repr(found)
  return text if len(text) <= 60 else text[:57] + "..."
