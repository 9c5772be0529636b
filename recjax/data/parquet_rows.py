"""Parquet -> rows, streamed: a file may be larger than memory."""

import os
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recjax import errors
from recjax.config import Text
from recjax.data.rows import Rows, check_file, check_wanted, without
from recjax.data.text import DamagedLines, shown
from recjax.data.text_blocks import CHUNK_BYTES
from recjax.errors import UserError

_ROWS = 1 << 17  # of a batch at most
_THRIFT_BYTES = 1 << 26  # of a string in a file's own description
_STRING_LIKE = (
  pa.types.is_string,
  pa.types.is_large_string,
  pa.types.is_string_view,
  pa.types.is_binary,
  pa.types.is_large_binary,
)
_ID = pa.dictionary(pa.int32(), pa.string())


def names(path: str, options: Text) -> dict[str, str]:
  """Returns the columns of a file and their types.

  Raises:
    UserError: the file cannot be read.
  """
  del options
  with _open(path) as file:
    return {
      name: str(type) for name, type in _leaves(_schema(path, file)).items()
    }


def _leaves(schema: pa.Schema | pa.StructType) -> dict[str, pa.DataType]:
  """Returns the types of columns, and of fields in structs: `user.id`."""
  found: dict[str, pa.DataType] = {}
  for field in schema:
    if pa.types.is_struct(field.type):
      for name, type in _leaves(field.type).items():
        found[f"{field.name}.{name}"] = type
    else:
      found[field.name] = field.type
  return found


def _open(path: str, ids: tuple[str, ...] = ()) -> pq.ParquetFile:
  """Opens a file.

  Args:
    path: of the file.
    ids: names of columns that are read as dictionary codes.

  Raises:
    UserError: there is none, or it is damaged or no Parquet.
  """
  check_file(path)
  with open(path, "rb") as f:
    begin = f.read(60)
    f.seek(max(0, os.path.getsize(path) - 4))
    end = f.read()
  if begin[:4] == b"PARE" or end == b"PARE":
    raise UserError(f"{path} is encrypted: decrypt it first")
  if begin[:4] != b"PAR1":
    text = all(byte >= 9 for byte in begin)
    raise UserError(
      f"{path} is no Parquet file: it begins with {shown(begin[:20])}"
      + ("; for text, set data.format to what it is" if text else "")
    )
  if end != b"PAR1":
    raise UserError(
      f"{path} is truncated or damaged at its end; fetch it again"
    )
  try:
    # A path is a name, never a URL: a file is opened here.
    return pq.ParquetFile(
      pa.OSFile(path, "rb"),
      read_dictionary=list(ids) or None,
      buffer_size=1 << 20,
      pre_buffer=False,
      thrift_string_size_limit=_THRIFT_BYTES,
      page_checksum_verification=True,
    )
  except (pa.ArrowException, OSError) as e:
    raise _damaged(path, e) from e


def _damaged(path: str, error: Exception) -> Exception:
  """Returns the error of a damaged file; the system's own as it is."""
  if errors.refusal(error):
    return error
  said = " ".join(str(error).split())[:200]
  return UserError(f"{path} is damaged ({said}); fetch or write it again")


def _schema(path: str, file: pq.ParquetFile) -> pa.Schema:
  """Returns the columns' types, or raises UserError: it may be damaged, too."""
  try:
    return file.schema_arrow
  except (pa.ArrowException, OSError) as e:
    raise _damaged(path, e) from e


def read(
  path: str, wanted: Mapping[str, str], options: Text, damaged: DamagedLines
) -> Iterator[Rows]:
  """Reads columns of a file, some tens of MB at a time.

  Args:
    path: of the file.
    wanted: the kinds of columns, by name; `user.id` is a field of a struct.
      Strings and binaries come as dictionary codes where they are 'id', and as
      strings where not; other columns as they are.
    options: nothing of it matters here.
    damaged: takes the rows whose strings are not UTF-8, which are left out.

  Yields:
    The next rows. Their numbers begin at 1.

  Raises:
    UserError: the file cannot be read; a column is not there; more damaged rows
      than are allowed.
  """
  del options
  with _open(path) as file:
    leaves = _leaves(_schema(path, file))
    top = file.schema_arrow.names
    check_wanted(path, wanted, [*leaves, *(n for n in top if n not in leaves)])
    check_wanted(path, [n for n in wanted if n in top], top)
    rows = _batch_rows(file)
    total = file.metadata.num_rows
  ids = tuple(n for n in wanted if wanted[n] == "id" and _is_text(leaves, n))
  size, done = os.path.getsize(path), 0
  with _open(path, ids) as file:
    batches = file.iter_batches(rows, columns=list(wanted))
    while True:
      try:
        batch = next(batches, None)
        if batch is None:
          return
        columns = {name: _column(batch, name, wanted) for name in wanted}
      except (pa.ArrowException, OSError) as e:
        raise _damaged(path, e) from e
      at = np.arange(done + 1, done + 1 + len(batch))
      done += len(batch)
      table, at = _checked(path, columns, at, damaged)
      if len(at):
        yield Rows(table, at, size * min(done, total) // max(total, 1))


def _is_text(leaves: Mapping[str, pa.DataType], name: str) -> bool:
  """Returns whether a column holds strings or bytes."""
  return name in leaves and any(is_(leaves[name]) for is_ in _STRING_LIKE)


def _batch_rows(file: pq.ParquetFile) -> int:
  """Returns how many rows to read at once: by what the fullest group holds."""
  widest = 1.0
  for i in range(file.num_row_groups):
    group = file.metadata.row_group(i)
    widest = max(widest, group.total_byte_size / max(group.num_rows, 1))
  return max(1, min(_ROWS, int(2 * CHUNK_BYTES / widest)))


def _column(
  batch: pa.RecordBatch, name: str, wanted: Mapping[str, str]
) -> pa.Array:
  """Returns a column, strings in the type of their kind."""
  if name in batch.schema.names:
    found = batch.column(name)
  else:
    found = _inside(batch, name)
  value = found.type
  if pa.types.is_dictionary(value):
    value = value.value_type
  if not any(is_(value) for is_ in _STRING_LIKE):
    return found
  # Not UTF-8 is found afterwards, row by row.
  if wanted[name] != "id":
    return pc.cast(found, pa.string(), safe=False)
  if pa.types.is_dictionary(found.type):
    return pa.DictionaryArray.from_arrays(
      found.indices.cast(pa.int32()),
      pc.cast(found.dictionary, pa.string(), safe=False),
    )
  return pc.cast(found, pa.string(), safe=False).dictionary_encode()


def _inside(batch: pa.RecordBatch, name: str) -> pa.Array:
  """Returns a field of structs; the names may hold dots themselves."""
  for top in batch.schema.names:
    if name.startswith(top + "."):
      found, rest = batch.column(top), name[len(top) + 1 :]
      while rest and pa.types.is_struct(found.type):
        fields = [f.name for f in found.type]
        key = next(
          (f for f in fields if rest == f or rest.startswith(f + ".")), None
        )
        if key is None:
          break
        found = pc.struct_field(found, fields.index(key))
        rest = rest[len(key) + 1 :]
      if not rest:
        return found
  raise pa.ArrowInvalid(f"no column {name}")


def _checked(
  path: str,
  columns: dict[str, pa.Array],
  at: np.ndarray,
  damaged: DamagedLines,
) -> tuple[pa.Table, np.ndarray]:
  """Leaves out the rows whose strings are not UTF-8, and reports them."""
  bad: dict[int, str] = {}
  for name, column in columns.items():
    if not _valid(column):
      if pa.types.is_dictionary(column.type):
        column = column.dictionary.take(column.indices)
      for i in _invalid(column, 0):
        bad.setdefault(i, name)
  for i in sorted(bad):
    damaged.add(path, int(at[i]), bad[i], "is not UTF-8")
  return without(pa.table(columns), at, bad)


def _valid(column: pa.Array) -> bool:
  """Returns whether a column holds what it should."""
  try:
    column.validate(full=True)
  except pa.ArrowInvalid:
    return False
  return True


def _invalid(column: pa.Array, start: int) -> Iterator[int]:
  """Yields the rows that are not valid, by bisection."""
  if _valid(column):
    return
  if len(column) == 1:
    yield start
    return
  half = len(column) // 2
  yield from _invalid(column.slice(0, half), start)
  yield from _invalid(column.slice(half), start + half)
