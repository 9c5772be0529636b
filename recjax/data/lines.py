"""Text -> lines as Arrow strings, for formats without quoted line ends."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from recjax.data.text import DamagedLines, shown
from recjax.data.text_blocks import MARK, arrow_bytes, blocks, positions


def read(
  path: str, damaged: DamagedLines
) -> Iterator[tuple[pa.Array, np.ndarray, int]]:
  """Reads the lines of a file that are not blank.

  Args:
    path: of the file, plain or packed.
    damaged: takes the lines that are not UTF-8, which are left out.

  Yields:
    (lines [k] with their ends, number of each [k] int64, bytes of the file read
    so far).

  Raises:
    UserError: the file cannot be read; more damaged lines than are allowed.
  """
  for block in blocks(path):
    # A mark where a line begins is that of a file that was joined to another.
    data = block.data.removeprefix(MARK).replace(b"\n" + MARK, b"\n")
    ends = positions(data, b"\n") + 1
    lines, keep = _as_strings(data, ends), _not_blank(data, ends)
    try:
      lines.validate(full=True)
    except pa.ArrowInvalid:
      starts = np.concatenate([[0], ends[:-1]])
      high = np.flatnonzero(np.frombuffer(data, np.uint8) >= 0x80)
      for i in np.unique(np.searchsorted(ends, high, "right")).tolist():
        line = data[starts[i] : ends[i]]
        try:
          line.decode("utf-8")
        except UnicodeDecodeError as e:
          said = shown(line[max(0, e.start - 10) : e.end + 10])
          damaged.add(path, block.line + i, "", f"{said} is not UTF-8")
          keep[i] = False
    at = np.arange(block.line, block.line + len(ends))
    if not keep.all():
      lines, at = lines.filter(pa.array(keep)), at[keep]
    if len(at):
      yield lines, at, block.read


def _as_strings(data: bytes, ends: np.ndarray) -> pa.Array:
  """Returns the lines that end there; they are not checked."""
  offsets = np.concatenate([[0], ends]).astype(np.int32)
  buffers = [None, arrow_bytes(offsets.tobytes()), arrow_bytes(data)]
  return pa.StringArray.from_buffers(len(ends), buffers[1], buffers[2])


def _not_blank(data: bytes, ends: np.ndarray) -> np.ndarray:
  """Returns whether each line [k] holds more than its end."""
  length = np.diff(ends, prepend=0)
  begins = np.frombuffer(data, np.uint8)[ends - length]
  return ~((length == 1) | ((length == 2) & (begins == ord("\r"))))
