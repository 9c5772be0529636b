"""Raw click logs -> chunks: columns of numbers and codes, in time order.

A chunk is some tens of thousands of consecutive samples. Every categorical
cell is a code: an index into the chunk's list of that feature's distinct
values. So a value's text is handled once a chunk, and everything after this
file works on numbers and on lists of distinct values.

PyArrow parses: its CSV reader decodes straight into such codes, at over a
million Criteo rows/s on two cores. What it refuses is narrowed down by
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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from recjax.config import Data
from recjax.errors import UserError
from recjax.specs import Feature, Schema

CHUNK_BYTES = 1 << 25  # of text; a longer line is an error

DENSE = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Consecutive samples. Feature by feature, `values` holds distinct values.

  Each feature's last value is null and stands for a missing one.
  """

  label: np.ndarray  # [k] float32, 0 or 1
  dense: np.ndarray  # [k, D] float32
  codes: np.ndarray  # [k, S] int32, into values; -1 = empty position of a bag
  weights: np.ndarray | None  # [k, S] float32
  values: pa.Array  # [V] strings
  feature: np.ndarray  # [V] int16, whose value it is
  read: float  # share of the logs' bytes that was read so far


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


# Schemas


def schema(data: Data) -> Schema:
  """The inputs of a Criteo-format sample.

  Raises:
    UserError: the hotnesses do not fit the features.
  """
  synthetic = data.format == "synthetic"
  field = "data.synthetic.hotness" if synthetic else "data.hotness"
  hotness = data.synthetic.hotness if synthetic else data.hotness
  hotness = hotness or (1,) * len(CATEGORIES)
  if len(hotness) != len(CATEGORIES) or min(hotness) < 1:
    raise UserError(
      f"{field} is {hotness}: give {len(CATEGORIES)} numbers of at least 1,"
      " the longest bag of each feature, or () for one lookup each"
    )
  return Schema(
    DENSE,
    tuple(
      Feature(n, n, h, data.pooling if h > 1 else "sum", data.weighted)
      for n, h in zip(CATEGORIES, hotness, strict=True)
    ),
  )


# Files


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


# Criteo


def sources(data: Data) -> dict[str, tuple[str, ...]]:
  """Config field -> the files it names, in time order.

  Raises:
    UserError: see `find`.
  """
  fields = {"data.train": data.train}
  if data.test:
    fields["data.test"] = data.test
  return {field: find(pattern, field) for field, pattern in fields.items()}


def chunks(
  data: Data, inputs: Schema, paths: tuple[str, ...], bad: BadRows
) -> Iterator[Chunk]:
  """The samples of Criteo-format TSV files, in the order of the lines.

  A line: label (0 or 1), 13 integers, 26 categories. An empty field is a
  missing value. A dense input is log(max(x, -1) + 2), a missing one as x = 0.
  A cell of a feature with hotness > 1 holds ids separated by ','; those past
  the hotness are dropped. With `data.weighted` an id may end in ':weight'.

  Raises:
    UserError: a file that cannot be read; more damaged lines than allowed.
  """
  kinds = {"label": "int"} | dict.fromkeys(DENSE, "int")
  for f in inputs.features:
    kinds[f.name] = "text" if f.hotness > 1 or f.weighted else "id"

  def convert(table: pa.Table) -> Chunk:
    label = table["label"]
    if (
      label.null_count or not pc.all(pc.is_in(label, pa.array([0, 1]))).as_py()
    ):
      raise pa.ArrowInvalid("label")
    ints = [pc.fill_null(table[n], 0).to_numpy() for n in inputs.dense]
    dense = np.stack(ints, axis=1, dtype=np.float32, casting="unsafe")
    dense = np.log(np.maximum(dense, -1) + 2)
    return {
      "label": label.to_numpy().astype(np.float32),
      "dense": dense,
    } | encode(inputs, table)

  def explain(fields):
    if fields[0] not in ("0", "1"):
      return "label", f"{shown(fields[0])} is not 0 or 1"
    return None

  columns = Columns(kinds, convert, explain)
  sizes = [os.path.getsize(path) for path in paths]
  for i, path in enumerate(paths):
    for found, read in parse(path, columns, bad):
      yield Chunk(**found, read=(sum(sizes[:i]) + read) / sum(sizes))


def encode(inputs: Schema, table: pa.Table) -> dict:
  """The categorical columns of a Chunk, from 'id', 'text' or list columns."""
  shape = table.num_rows, inputs.columns
  codes = np.full(shape, -1, np.int32)
  weights = np.zeros(shape, np.float32) if inputs.weighted else None
  values, column, start = [], 0, 0
  for f in inputs.features:
    cells = table[f.name].combine_chunks()
    if f.hotness > 1 or f.weighted:
      row, position, ids = _bags(cells, f.hotness)
      if weights is not None:
        ids, weight = _weigh(ids)
        weights[row, column + position] = weight
      code, value = _codes(ids)
      codes[row, column + position] = code + start
    else:
      code, value = _codes(cells)
      codes[:, column] = code + start
    values.append(value)
    column += f.hotness
    start += len(value)
  return {
    "codes": codes,
    "weights": weights,
    "values": pa.concat_arrays(values),
    "feature": np.repeat(
      np.arange(len(values), dtype=np.int16), [len(v) for v in values]
    ),
  }


def _bags(cells: pa.Array, hotness: int):
  """(row, position in the bag, id): the first `hotness` ids of each cell."""
  if not pa.types.is_list(cells.type):
    cells = pc.split_pattern(pc.fill_null(cells, ""), ",")
  lengths = cells.value_lengths().to_numpy()
  row = np.repeat(np.arange(len(lengths)), lengths)
  position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
  keep = position < hotness
  ids = cells.flatten().filter(pa.array(keep))
  return row[keep], position[keep], pc.if_else(pc.equal(ids, ""), None, ids)


def _weigh(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
  """'id:weight' -> (id, weight); 1 where there is none."""
  parts = pc.split_pattern(pc.fill_null(ids, ""), ":", max_splits=1)
  given = pc.greater(parts.value_lengths(), 1)
  text = pc.list_element(pc.if_else(given, parts, pa.scalar(["", "1"])), 1)
  weight = text.cast(pa.float32()).to_numpy()
  if not np.isfinite(weight).all():
    raise pa.ArrowInvalid("a weight is not finite")
  ids = pc.list_element(parts, 0)
  return pc.if_else(pc.equal(ids, ""), None, ids), weight


def _codes(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
  """([k] int32, values): nulls get the last code, whose value is null."""
  if not pa.types.is_dictionary(column.type):
    column = column.dictionary_encode()
  values = pa.concat_arrays([column.dictionary, pa.nulls(1, pa.string())])
  codes = pc.fill_null(column.indices, len(values) - 1)
  return codes.to_numpy(zero_copy_only=False), values
