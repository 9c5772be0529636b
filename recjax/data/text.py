"""Text files -> tables of parsed lines; damaged lines named one by one.

PyArrow parses: its CSV reader decodes straight into dictionary codes, at over
a million Criteo lines/s on two cores. What it refuses is narrowed down by
bisection to the damaged lines, so that the reason given is always that of the
parser that reads the data.
"""

import csv
import dataclasses
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from recjax.errors import UserError

CHUNK_BYTES = 1 << 25  # of text; a longer line is an error
LINES = 1 << 18  # parsed together at most
_PIECE_BYTES = 1 << 20  # unpacked at a time
_MARK = b"\xef\xbb\xbf"  # byte order mark: a file may begin with one


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


def _blocks(path: str) -> Iterator[tuple[int, bytes, int]]:
  """Reads a plain or gzipped file in pieces that end with a line.

  Yields:
    (number of the first line, whole lines, bytes of the file read so far).

  Raises:
    UserError: an empty, truncated or damaged file; an endless line.
  """
  line, rest, broken = 1, b"", None
  with open(path, "rb") as raw:
    zipped = raw.peek(2)[:2] == b"\x1f\x8b"
    f = gzip.GzipFile(fileobj=raw) if zipped else raw
    while not broken:
      data, broken = _filled(f)
      if not data:
        break
      data = rest + data
      if line == 1:
        data = data.removeprefix(_MARK)
      end = data.rfind(b"\n") + 1
      if not end and len(data) > CHUNK_BYTES:
        raise UserError(
          f"{path}, line {line}: longer than {CHUNK_BYTES:,} bytes;"
          " is this a log in text form?"
        )
      rest = data[end:]
      for block in _few_lines(data[:end]):
        yield line, block, raw.tell()
        line += block.count(b"\n")
    if broken:
      raise UserError(
        f"{path}: the .gz is truncated or damaged after line"
        f" {line - 1:,} ({broken}); fetch it again"
      ) from broken
    if rest:
      yield line, rest + b"\n", raw.tell()
    elif line == 1:
      raise UserError(f"{path} is empty")


def _filled(f) -> tuple[bytes, Exception | None]:
  """Reads CHUNK_BYTES of a plain or gzipped file, fewer at its end.

  Returns:
    (the bytes, what is wrong with the .gz after them).
  """
  parts, missing = [], CHUNK_BYTES
  try:
    while missing and (part := f.read1(min(missing, _PIECE_BYTES))):
      parts.append(part)
      missing -= len(part)
  except (EOFError, gzip.BadGzipFile, zlib.error) as e:
    return b"".join(parts), e
  return b"".join(parts), None


def _few_lines(block: bytes) -> Iterator[bytes]:
  """Cuts whole lines into blocks of LINES at most: a line may be one byte."""
  if block.count(b"\n") > LINES:
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    cuts = [0, *ends[LINES - 1 : -1 : LINES].tolist(), len(block)]
    yield from (block[a:b] for a, b in itertools.pairwise(cuts))
  elif block:
    yield block


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
  if block.startswith(_MARK) or b"\n" + _MARK in block:
    raise pa.ArrowInvalid("a byte order mark inside the file")
  lines = block.count(b"\n")
  if columns.separator != b"\t":
    block = block.replace(b"\t", b" ").replace(columns.separator, b"\t")
  table = pyarrow.csv.read_csv(
    _arrow_bytes(block),
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


def _arrow_bytes(block: bytes) -> pa.Buffer:
  """Copies bytes to memory of PyArrow's own.

  Its threads may hold the last reference to what it reads, after it has
  returned: releasing an object of Python, they abort a process that is exiting.
  """
  copied = pa.BufferOutputStream()
  copied.write(block)
  return copied.getvalue()


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
  for first, block, read in _blocks(path):
    found = _parse_or_skip(path, first, block, columns, damaged)
    if found is not None:
      yield found, read


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
  if line.startswith(_MARK):
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
