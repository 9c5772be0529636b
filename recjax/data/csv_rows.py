"""CSV and TSV -> rows.

PyArrow parses, straight into dictionary codes. Where it refuses a block, the
damaged rows are found from the places of line ends, separators and quotes, all
at once, and the others are parsed again.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.csv

from recjax.config import Text
from recjax.data import quotes
from recjax.data.csv_layout import Layout, find
from recjax.data.rows import Rows, type_of
from recjax.data.text import DamagedLines, shown
from recjax.data.text_blocks import (
  MARK,
  Block,
  arrow_bytes,
  blocks,
  positions,
)

# Parsed by one thread: a dictionary of as many rows fits its core's cache.
_PART_BYTES = 1 << 22
_ID = pa.dictionary(pa.int32(), pa.string())


def names(path: str, options: Text) -> dict[str, str]:
  """Returns the columns of a file and what they look like, in a word.

  Raises:
    UserError: the file cannot be read.
  """
  layout = find(path, options)
  columns = {}
  for i, name in enumerate(layout.names):
    cells = [row[i] for row in layout.sample if i < len(row)]
    columns[name] = type_of(cells)
  return columns


def read(
  path: str, wanted: Mapping[str, str], options: Text, damaged: DamagedLines
) -> Iterator[Rows]:
  """Reads columns of a file, some tens of MB at a time.

  Args:
    path: of the file, plain or packed by gzip, bzip2 or zstd.
    wanted: the kinds of columns, by name: 'id' (gives dictionary codes),
      'number' or 'text' (strings, both). An empty field is null.
    options: how it is written.
    damaged: takes the damaged rows, which are left out.

  Yields:
    The next rows.

  Raises:
    UserError: the file cannot be read; a column is not there; more damaged rows
      than are allowed.
  """
  layout = find(path, options, wanted)
  first = layout.header
  ends = lambda data: quotes.row_ends(data, layout.quote, layout.separator)
  for block in blocks(path, ends):
    if block.ends is not None and not len(block.ends):
      damaged.add(path, block.line, "", "a quote opens and does not close")
      continue
    if first:
      block = _without_first(block)
      first = False
    if block.data:
      table, at = _parse_or_skip(path, block, layout, wanted, damaged)
      if len(at):
        yield Rows(table, at, block.read)


def _without_first(block: Block) -> Block:
  """Leaves the first row out, and blank lines before it."""
  data, begin, n = block.data, 0, 0
  blank = True
  while blank and begin < len(data):
    end = data.index(b"\n", begin) + 1 if block.ends is None else block.ends[n]
    blank = not data[begin:end].rstrip(b"\r\n")
    begin, n = int(end), n + 1
  inside = None if block.ends is None else block.ends[n:] - begin
  line = block.line + data[:begin].count(b"\n")
  return Block(line, data[begin:], inside, block.read)


def _parse(data: bytes, layout: Layout, wanted: Mapping[str, str]) -> pa.Table:
  """Parses whole rows; pa.ArrowInvalid where one is damaged."""
  try:
    return _parse_by(_PART_BYTES, data, layout, wanted)
  except pa.ArrowInvalid as e:
    if "straddling" not in str(e):
      raise
  # A row is longer than a part.
  return _parse_by(len(data), data, layout, wanted)


def _parse_by(
  size: int, data: bytes, layout: Layout, wanted: Mapping[str, str]
) -> pa.Table:
  """Parses whole rows, parts of this many bytes at once."""
  columns = [str(layout.names.index(name)) for name in wanted]
  table = pyarrow.csv.read_csv(
    arrow_bytes(data),
    read_options=pyarrow.csv.ReadOptions(
      # By number, as names that nobody wants may come twice.
      column_names=[str(i) for i in range(len(layout.names))],
      block_size=size,
    ),
    parse_options=pyarrow.csv.ParseOptions(
      delimiter=layout.separator.decode(),
      quote_char=layout.quote.decode() or False,
      double_quote=True,
      escape_char=False,
      newlines_in_values=bool(layout.quote) and layout.quote in data,
      # In a file of one column a blank line is a missing value.
      ignore_empty_lines=len(layout.names) > 1,
    ),
    convert_options=pyarrow.csv.ConvertOptions(
      include_columns=columns,
      column_types={
        c: _ID if kind == "id" else pa.string()
        for c, kind in zip(columns, wanted.values(), strict=True)
      },
      null_values=[""],
      strings_can_be_null=True,
      quoted_strings_can_be_null=True,
    ),
  )
  table = table.unify_dictionaries().combine_chunks()
  return table.rename_columns(list(wanted))


def _parse_or_skip(
  path: str,
  block: Block,
  layout: Layout,
  wanted: Mapping[str, str],
  damaged: DamagedLines,
) -> tuple[pa.Table | None, np.ndarray]:
  """Parses the rows of a block but the damaged ones.

  Returns:
    (the rows, None if none is left; the number of each one's line).
  """
  data, returns = block.data, block.data.count(b"\r")
  odd = (
    b"\0" in data
    or data.startswith(MARK)
    or b"\n" + MARK in data
    or (returns and returns != data.count(b"\r\n"))
  )
  if not odd:
    try:
      table = _parse(data, layout, wanted)
    except pa.ArrowInvalid:
      pass
    else:
      if table.num_rows == data.count(b"\n"):
        return table, np.arange(block.line, block.line + table.num_rows)
      at = _Lines(block, layout).at
      if table.num_rows == len(at):
        return table, at
  lines = _Lines(block, layout)
  lines.drop(path, _shape(lines), damaged)
  while len(lines.starts):
    data = lines.joined()
    try:
      table = _parse(data, layout, wanted)
      if table.num_rows == len(lines.at):
        return table, lines.at
    except pa.ArrowInvalid as e:
      error = str(e)
    else:
      error = f"read as {table.num_rows} rows, not {len(lines.at)}"
    bad = _not_utf8(lines, wanted) or _refused(lines, wanted, error)
    lines.drop(path, bad, damaged)
  return None, np.empty(0, np.int64)


class _Lines:
  """The rows of a block, by their places; blank ones left out."""

  def __init__(self, block: Block, layout: Layout):
    """Finds them."""
    self.layout, self.data = layout, block.data
    self.text = np.frombuffer(block.data, np.uint8)
    newlines = positions(block.data, b"\n")
    ends = newlines + 1 if block.ends is None else block.ends
    starts = np.concatenate([[0], ends[:-1]])
    # A mark where a row begins is that of a file that was joined to another.
    marked = np.flatnonzero(self.text[starts] == MARK[0])
    for i in marked.tolist():
      if block.data.startswith(MARK, starts[i]):
        starts[i] += len(MARK)
    if len(layout.names) > 1:
      length = ends - starts
      begins = self.text[starts]
      blank = (length == 1) | ((length == 2) & (begins == ord("\r")))
      starts, ends = starts[~blank], ends[~blank]
    self.starts, self.ends = starts, ends  # [k]
    self.at = block.line + np.searchsorted(newlines, starts)  # [k]

  def row(self, i: int) -> bytes:
    """The text of a row, without its end."""
    row = self.data[self.starts[i] : self.ends[i]]
    return row.removesuffix(b"\n").removesuffix(b"\r")

  def fields(self, i: int) -> list[bytes]:
    """The fields of a row."""
    layout = self.layout
    return quotes.fields(self.row(i), layout.quote, layout.separator)

  def joined(self) -> bytes:
    """The text of all rows."""
    apart = np.flatnonzero(self.starts[1:] != self.ends[:-1])
    begins = self.starts[np.concatenate([[0], apart + 1])].tolist()
    stops = self.ends[np.append(apart, len(self.ends) - 1)].tolist()
    data = memoryview(self.data)
    return b"".join(data[a:b] for a, b in zip(begins, stops, strict=True))

  def drop(
    self, path: str, bad: dict[int, tuple[str, str]], damaged: DamagedLines
  ) -> None:
    """Leaves out rows, {row: (column, reason)}, and reports them."""
    for i in sorted(bad):
      damaged.add(path, int(self.at[i]), *bad[i])
    keep = np.ones(len(self.starts), bool)
    keep[list(bad)] = False
    self.starts, self.ends = self.starts[keep], self.ends[keep]
    self.at = self.at[keep]


def _shape(lines: _Lines) -> dict[int, tuple[str, str]]:
  """Finds the rows of another number of fields, NULs and carriage returns."""
  layout, data = lines.layout, lines.data
  parts = quotes.Quotes(data, layout.quote, layout.separator)
  of = lambda places: np.searchsorted(lines.ends, places, "right")
  separators = parts.outside(positions(data, layout.separator))
  count = np.bincount(of(separators), minlength=len(lines.ends) + 1)[:-1] + 1
  bad = {}
  returns = parts.outside(positions(data, b"\r"))
  after = lines.text[np.minimum(returns + 1, len(lines.text) - 1)]
  for places, what in (
    (returns[after != ord("\n")], "a carriage return"),
    (positions(data, b"\0"), "a NUL"),
  ):
    for i in np.unique(of(places)).tolist():
      if i < len(lines.ends):
        byte = b"\r" if what.endswith("return") else b"\0"
        bad[i] = _holds(lines, i, byte, what)
  for i in np.flatnonzero(count != len(layout.names)).tolist():
    reason = f"{count[i]} fields where {len(layout.names)} are expected"
    if quotes.unclosed(lines.row(i), layout.quote, layout.separator):
      reason += ": a quote opens and does not close"
    bad[i] = "", reason
  return bad


def _holds(lines: _Lines, i: int, byte: bytes, what: str) -> tuple[str, str]:
  """Names the field of a row that holds a byte, and says so."""
  for name, field in zip(lines.layout.names, lines.fields(i), strict=False):
    if byte in field:
      return name, f"{shown(field)} holds {what}"
  return "", f"holds {what}"


def _not_utf8(
  lines: _Lines, wanted: Mapping[str, str]
) -> dict[int, tuple[str, str]]:
  """Finds the rows of which a wanted field is not UTF-8."""
  bad = {}
  columns = [(n, lines.layout.names.index(n)) for n in wanted]
  high = np.flatnonzero(lines.text >= 0x80)
  at = np.searchsorted(lines.ends, high, "right")
  at = at[at < len(lines.ends)]
  for i in np.unique(at).tolist():
    try:
      lines.row(i).decode("utf-8")
    except UnicodeDecodeError:
      fields = lines.fields(i)
    else:
      continue
    for name, column in columns:
      try:
        fields[column].decode("utf-8")
      except UnicodeDecodeError:
        bad[i] = name, f"{shown(fields[column])} is not UTF-8"
        break
  return bad


def _refused(
  lines: _Lines, wanted: Mapping[str, str], error: str
) -> dict[int, tuple[str, str]]:
  """Finds a row that PyArrow refuses for another reason, by bisection."""
  low, high = 0, len(lines.starts)
  while high - low > 1:
    half = (low + high) // 2
    part = _part(lines, low, half)
    try:
      good = _parse(part, lines.layout, wanted).num_rows == half - low
    except pa.ArrowInvalid:
      good = False
    low, high = (half, high) if good else (low, half)
  return {low: ("", error)}


def _part(lines: _Lines, low: int, high: int) -> bytes:
  """The text of some rows."""
  return b"".join(
    lines.data[a:b]
    for a, b in zip(
      lines.starts[low:high].tolist(),
      lines.ends[low:high].tolist(),
      strict=True,
    )
  )
