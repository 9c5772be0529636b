"""Text files, plain or packed -> blocks of whole rows, in bounded memory."""

import bz2
import gzip
import itertools
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recjax.errors import UserError

CHUNK_BYTES = 1 << 25  # of text; a longer row is an error
LINES = 1 << 18  # of a block at most
PIECE_BYTES = 1 << 20  # unpacked at a time
MARK = b"\xef\xbb\xbf"  # byte order mark: a file may begin with one
# What a file begins with -> (what it is, what to do).
_TOLD = "unpack it first"
_BEGIN = {
  b"PAR1": ("a Parquet file", "set data.format='parquet'"),
  b"PK\x03\x04": ("a zip archive", _TOLD),
  b"\x1f\x8b": ("packed by gzip", _TOLD),
  b"BZh": ("packed by bzip2", _TOLD),
  b"\x28\xb5\x2f\xfd": ("packed by zstd", _TOLD),
  b"\xfd7zXZ\x00": ("packed by xz", _TOLD),
  b"7z\xbc\xaf": ("a 7z archive", _TOLD),
  b"ARROW1": ("an Arrow file", "write it as Parquet"),
  b"Obj\x01": ("an Avro file", "write it as Parquet"),
  b"ORC": ("an ORC file", "write it as Parquet"),
  b"\x93NUMPY": ("a NumPy file", "write it as Parquet"),
  b"\x89HDF": ("an HDF5 file", "write it as Parquet"),
  b"SQLite format 3": ("an SQLite database", "write the table as Parquet"),
  b"\x7fELF": ("a program", "name the log"),
  b"%PDF": ("a PDF", "name the log"),
  b"\xff\xfe": ("UTF-16 text", "write it as UTF-8"),
  b"\xfe\xff": ("UTF-16 text", "write it as UTF-8"),
}
_TEXT_TOO = ("BZh", "ORC", "PAR1", "ARROW1")  # a text may begin so
# But for Hive's separators.
_CONTROL = re.compile(rb"[\x00\x04-\x08\x0e-\x1a\x1c-\x1f]")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class Block(NamedTuple):
  """Whole rows of a file."""

  line: int  # number of the first
  data: bytes
  ends: np.ndarray | None  # after each row; None: after each line's end
  read: int  # bytes of the file read so far


class _Packed(NamedTuple):
  """How a file is packed."""

  name: str  # '' = it is not
  file: object


def _unpacked(raw) -> _Packed:
  """Returns what reads the text of an open file, by its first bytes."""
  begin = raw.peek(10)[:10]
  if begin.startswith(b"\x1f\x8b"):
    return _Packed(".gz", gzip.GzipFile(fileobj=raw))
  if begin.startswith(b"BZh") and begin[4:10] == b"1AY&SY":
    return _Packed(".bz2", bz2.BZ2File(raw))
  if begin.startswith(b"\x28\xb5\x2f\xfd"):
    stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return _Packed(".zst", stream)
  return _Packed("", raw)


def blocks(
  path: str, row_ends: Callable[[bytes], np.ndarray | None] = lambda data: None
) -> Iterator[Block]:
  """Reads a file, plain or packed by gzip, bzip2 or zstd, in whole rows.

  Args:
    path: of the file.
    row_ends: finds where rows end in text that begins with one, where that is
      not after each line's end.

  Yields:
    CHUNK_BYTES and LINES rows at most. The last row may lack its line's end:
    it is added. If it is one line and has no end either, as a quote is open,
    it comes alone and has no `ends`.

  Raises:
    UserError: an empty, truncated or damaged file; an endless row.
  """
  line, rest, broken = 1, b"", None
  with open(path, "rb") as raw:
    packed = _unpacked(raw)
    while not broken:
      data, broken = _filled(packed)
      if not data:
        break
      data = rest + data
      if line == 1:
        data = data.removeprefix(MARK)
      ends = row_ends(data)
      if ends is None:
        end = data.rfind(b"\n") + 1
      else:
        end = int(ends[-1]) if len(ends) else 0
      if not end and len(data) > CHUNK_BYTES:
        quoted = ends is not None and b"\n" in data
        raise UserError(
          f"{path}, line {line}: "
          + (
            f"a quote opens and does not close in {CHUNK_BYTES:,} bytes;"
            " where quotes are text like any other, set data.text.quote=''"
            if quoted
            else f"longer than {CHUNK_BYTES:,} bytes; is this a log in text"
            " form?"
          )
        )
      rest = data[end:]
      for block, inside in _few_rows(data[:end], ends):
        yield Block(line, block, inside, raw.tell())
        line += block.count(b"\n")
    if broken:
      raise UserError(
        f"{path}: the {packed.name} is truncated or damaged after line"
        f" {line - 1:,} ({broken}); fetch it again"
      ) from broken
    if rest:
      data = rest + b"\n"
      ends = row_ends(data)
      if ends is not None and not len(ends) and b"\n" in rest:
        raise UserError(
          f"{path}, line {line}: a quote opens and does not close until the"
          " end of the file; where quotes are text like any other, set"
          " data.text.quote=''"
        )
      yield Block(line, data, ends, raw.tell())
    elif line == 1:
      raise UserError(f"{path} is empty")


def _filled(packed: _Packed) -> tuple[bytes, Exception | None]:
  """Reads CHUNK_BYTES of a file, fewer at its end.

  Returns:
    (the bytes, what is wrong with the packed file after them).
  """
  f, parts, missing = packed.file, [], CHUNK_BYTES
  read = f.read if packed.name == ".zst" else f.read1
  try:
    while missing and (part := read(min(missing, PIECE_BYTES))):
      parts.append(part)
      missing -= len(part)
  except _DAMAGED as e:
    return b"".join(parts), e
  except OSError as e:
    # Both bz2 and PyArrow's codec raise this; the system's have a number.
    if packed.name in ("", ".gz") or e.errno:
      raise
    return b"".join(parts), e
  return b"".join(parts), None


def _few_rows(
  data: bytes, ends: np.ndarray | None
) -> Iterator[tuple[bytes, np.ndarray | None]]:
  """Cuts whole rows into blocks of LINES at most: a line may be one byte."""
  if not data:
    return
  if (data.count(b"\n") if ends is None else len(ends)) <= LINES:
    yield data, ends
    return
  at = positions(data, b"\n") + 1 if ends is None else ends
  cuts = [0, *at[LINES - 1 : -1 : LINES].tolist(), len(data)]
  for i, (a, b) in enumerate(itertools.pairwise(cuts)):
    inside = None if ends is None else ends[i * LINES : (i + 1) * LINES] - a
    yield data[a:b], inside


def positions(data: bytes, byte: bytes) -> np.ndarray:
  """Returns where a byte is, ascending."""
  return np.flatnonzero(np.frombuffer(data, np.uint8) == ord(byte))


def arrow_bytes(data: bytes) -> pa.Buffer:
  """Copies bytes to memory of PyArrow's own.

  Its threads may hold the last reference to what it reads, after it has
  returned: releasing an object of Python, they abort a process that is exiting.
  """
  copied = pa.BufferOutputStream()
  copied.write(data)
  return copied.getvalue()


def head(path: str, size: int = PIECE_BYTES) -> bytes:
  """Returns the first rows of a text file, without a byte order mark.

  At least one whole line where that is in CHUNK_BYTES; else about `size`.

  Raises:
    UserError: there is no such file, it is empty, damaged, or no text.
  """
  if not os.path.exists(path):
    raise UserError(f"{path} does not exist")
  if os.path.isdir(path):
    raise UserError(f"{path} is a directory: name its files, as in {path}/*")
  with open(path, "rb") as raw:
    packed, data = _unpacked(raw), b""
    read = packed.file.read if packed.name == ".zst" else packed.file.read1
    try:
      while part := read(size):
        data += part
        if len(data) >= size and (b"\n" in data or len(data) > CHUNK_BYTES):
          break
    except (*_DAMAGED, OSError) as e:
      if isinstance(e, OSError) and e.errno:
        raise
      if not data:
        raise UserError(
          f"{path}: the {packed.name} is truncated or damaged ({e}); fetch it"
          " again"
        ) from e
  _refuse_binary(path, packed.name, data)
  if not data:
    raise UserError(f"{path} is empty")
  return data.removeprefix(MARK)


def _refuse_binary(path: str, packed: str, data: bytes) -> None:
  """Raises UserError where the first bytes of a file are no text."""
  holds = f"{path} holds" if packed else f"{path} is"
  sample = data[:4096]
  controls = len(_CONTROL.findall(sample))
  for begin, (what, todo) in _BEGIN.items():
    sure = begin.decode("latin-1") not in _TEXT_TOO or controls
    if data.startswith(begin) and sure:
      raise UserError(f"{holds} {what}, not text: {todo}")
  if sample[257:262] == b"ustar":
    raise UserError(f"{holds} a tar archive, not text: {_TOLD}")
  if controls > 8 and controls > len(sample) // 20:
    raise UserError(
      f"{holds} binary, not text ({controls:,} of its first"
      f" {len(sample):,} bytes are no characters): name a log in text form, or"
      " set data.format to what it is"
    )
