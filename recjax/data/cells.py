"""Columns of a log, of whatever type -> numbers, ids and bags of ids.

The rules of log_schema.py: an id is its text, whole numbers lose their ".0",
what is missing is null, NaN or one of a few texts. So the same values give the
same samples from CSV, JSON and Parquet. Each function works on whole columns
and names those cells that it cannot take.
"""

import functools
import zlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.data.text import shown
from recjax.errors import UserError

_MISSING = pa.array(["", "nan", "NaN", "null", "NULL", "\\N"])
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_FRACTION_AND_UTC = r"(\.\d+)?\s?(Z|UTC|[+-]00:?00)?$"  # of a time
_JOINT = "\x1f"  # ASCII's unit separator, between the ids of a cross
_MOST = float(np.finfo(np.float32).max)


class Fault(NamedTuple):
  """Cells that a column may not hold."""

  column: str
  rows: np.ndarray  # of the columns given
  reasons: list[str]


def _fault(column: str, cells: pa.Array, bad: np.ndarray, why: str) -> Fault:
  rows = np.flatnonzero(bad)
  found = (cells[int(i)].as_py() for i in rows)
  return Fault(column, rows, [f"{shown(x)} {why}" for x in found])


def flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
  """Returns a column as one array; its dictionaries as one."""
  if not isinstance(column, pa.ChunkedArray):
    return column
  if pa.types.is_dictionary(column.type):
    column = column.unify_dictionaries()
  return column.combine_chunks()


# ---- Ids


def ids(name: str, cells: pa.Array) -> pa.DictionaryArray:
  """Returns ids as dictionary codes of their texts; null = missing.

  Raises:
    UserError: the column holds what has no text.
  """
  if not pa.types.is_dictionary(cells.type):
    cells = _encoded(name, cells)
  text = _texts(name, cells.dictionary)
  codes = cells.indices
  if text.null_count:
    codes = pc.if_else(pc.take(text.is_null(), codes), None, codes)
  return pa.DictionaryArray.from_arrays(codes.cast(pa.int32()), text)


def _encoded(name: str, cells: pa.Array) -> pa.DictionaryArray:
  if pa.types.is_nested(cells.type):
    raise UserError(
      f"schema: {name}: the column holds {cells.type}, not one id a row: a bag "
      "is Ids(...), and a field of a struct is named by its path, such as "
      f"{name}.id"
    )
  if pa.types.is_null(cells.type):
    cells = cells.cast(pa.string())
  return cells.dictionary_encode()


def _texts(name: str, values: pa.Array) -> pa.Array:
  """Returns the texts of values, as log_schema.py has it; null = missing."""
  if pa.types.is_floating(values.type):
    return _texts_of_floats(values)
  try:
    text = values.cast(pa.string())
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
    raise UserError(f"schema: {name}: {values.type} as ids: {e}") from e
  text = pc.if_else(pc.is_in(text, _MISSING), None, text)
  whole = pc.fill_null(pc.match_substring_regex(text, r"^-?\d+\.0+$"), False)
  if pc.any(whole).as_py():
    text = pc.if_else(
      whole, pc.replace_substring_regex(text, r"\.0+$", ""), text
    )
  return pc.if_else(pc.equal(text, "-0"), "0", text)


def _texts_of_floats(values: pa.Array) -> pa.Array:
  x = values.to_numpy(zero_copy_only=False).astype(np.float64)
  whole = (np.floor(x) == x) & (np.abs(x) < 2.0**63)
  as_int = pa.array(np.where(whole, x, 0).astype(np.int64)).cast(pa.string())
  text = pc.if_else(pa.array(whole), as_int, values.cast(pa.string()))
  return pc.if_else(pa.array(np.isnan(x)), None, text)


def hashed(coded: pa.DictionaryArray, rows: int) -> pa.DictionaryArray:
  """Returns ids that are the CRC-32 of their texts, modulo rows."""
  text = [
    None if x is None else str(zlib.crc32(x.encode()) % rows)
    for x in coded.dictionary.to_pylist()
  ]
  return pa.DictionaryArray.from_arrays(
    coded.indices, pa.array(text, pa.string())
  )


def crossed(parts: list[pa.DictionaryArray]) -> pa.DictionaryArray:
  """Returns ids that are the joined texts of several, a missing one as ""."""
  return functools.reduce(_paired, parts)


def _paired(a: pa.DictionaryArray, b: pa.DictionaryArray):
  first, second = ([*x.dictionary.to_pylist(), ""] for x in (a, b))
  code = a.indices.fill_null(len(first) - 1).to_numpy().astype(np.int64)
  code = code * len(second) + b.indices.fill_null(len(second) - 1).to_numpy()
  kinds, code = np.unique(code, return_inverse=True)
  pairs = zip(*np.divmod(kinds, len(second)), strict=True)
  text = [f"{first[i]}{_JOINT}{second[j]}" for i, j in pairs]
  return pa.DictionaryArray.from_arrays(
    pa.array(code.astype(np.int32)), pa.array(text, pa.string())
  )


# ---- Bags


class Bags(NamedTuple):
  """A column of bags of ids, and what is wrong with it."""

  ids: pa.ListArray  # of dictionary codes of texts, none missing
  weights: pa.ListArray | None  # as long, of float32
  faults: tuple[Fault, ...]


def bags(
  name: str,
  cells: pa.Array,
  separator: str,
  weights: tuple[str, pa.Array] | None = None,
  weight_separator: str = "",
) -> Bags:
  """Returns bags of ids; a missing bag is an empty one.

  Args:
    name: of the column.
    cells: lists, or text that a separator parts.
    separator: of text.
    weights: name and cells of the column of weights: lists, or text.
    weight_separator: what parts an id from its weight instead; without one an
      id weighs 1.

  Raises:
    UserError: the column holds what has no text.
  """
  lists, numbers = _lists(name, cells, separator), None
  of, column = weights or (name, cells)
  if weights is not None:
    given = _lists(of, column, separator)
    bad = lists.value_lengths().to_numpy() != given.value_lengths().to_numpy()
    if bad.any():
      why = f"has not as many numbers as {name} has ids"
      return Bags(lists, None, (_fault(of, column, bad, why),))
    numbers = given.values
  values = lists.values
  if weight_separator:
    values, numbers = _parted(name, values, weight_separator)
  coded = ids(name, values)
  kept, faults = coded.is_valid().to_numpy(zero_copy_only=False), ()
  if numbers is not None:
    value, wrong = _cast(of, numbers)
    wrong = (wrong | np.isnan(value)) & kept
    if wrong.any():
      row = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
      bad = np.bincount(row, wrong, len(lists)) > 0
      faults = (_fault(of, column, bad, "holds a weight that is no number"),)
    numbers = pa.array(value.astype(np.float32)).filter(pa.array(kept))
  # Offsets without what is missing.
  offsets = np.append(0, np.cumsum(kept))[lists.offsets.to_numpy()]
  listed = lambda x: pa.ListArray.from_arrays(
    pa.array(offsets.astype(np.int32)), x
  )
  return Bags(
    listed(coded.filter(pa.array(kept))),
    None if numbers is None else listed(numbers),
    faults,
  )


def _lists(name: str, cells: pa.Array, separator: str) -> pa.ListArray:
  """Returns lists, a missing one empty, whose values are theirs alone."""
  kind = cells.type
  if _is_list(kind):
    cells = cells.cast(pa.list_(kind.value_type))
  else:
    if not _is_text(kind):
      cells = ids(name, cells)
    text = cells.cast(pa.string())
    text = pc.if_else(pc.equal(text, ""), None, text)
    cells = pc.split_pattern(text, separator)
  lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy()
  offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
  return pa.ListArray.from_arrays(pa.array(offsets), cells.flatten())


def _is_list(kind: pa.DataType) -> bool:
  return any(
    is_kind(kind)
    for is_kind in (
      pa.types.is_list,
      pa.types.is_large_list,
      pa.types.is_fixed_size_list,
    )
  )


def _is_text(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parted(name: str, values: pa.Array, separator: str):
  """Parts ids from their weights, at the last separator: (ids, weights)."""
  if not _is_text(values.type):
    values = ids(name, values)
  text = pc.fill_null(values.cast(pa.string()), "")
  parts = pc.split_pattern(text, separator, max_splits=1, reverse=True)
  given = pc.greater(parts.value_lengths(), 1)
  weight = pc.list_element(pc.if_else(given, parts, pa.scalar(["", "1"])), 1)
  return pc.list_element(parts, 0), weight


# ---- Numbers


def numbers(name: str, cells: pa.Array) -> tuple[np.ndarray, tuple[Fault, ...]]:
  """Returns numbers, [k] float64, nan where one is missing.

  Raises:
    UserError: the column is of a type that has no numbers.
  """
  found, bad = _cast(name, cells)
  bad |= np.abs(found) > _MOST
  if bad.any():
    return found, (_fault(name, cells, bad, "is not a finite number"),)
  return found, ()


def sample_weights(
  name: str, cells: pa.Array
) -> tuple[np.ndarray, tuple[Fault, ...]]:
  """Returns weights, [k] float32, of 0 or more.

  Raises:
    UserError: the column is of a type that has no numbers.
  """
  found, bad = _cast(name, cells)
  bad |= ~((found >= 0) & (found <= _MOST))
  if bad.any():
    return found, (_fault(name, cells, bad, "is no weight of 0 or more"),)
  return found.astype(np.float32), ()


def _cast(name: str, cells: pa.Array) -> tuple[np.ndarray, np.ndarray]:
  """Returns (numbers, nan where one is missing; which cells are no numbers)."""
  kind = cells.type
  if pa.types.is_null(kind):
    return np.full(len(cells), np.nan), np.zeros(len(cells), bool)
  if _is_text(kind):
    return _cast_text(cells.cast(pa.string()))
  if pa.types.is_boolean(kind):
    cells = cells.cast(pa.int8())
  elif not (
    pa.types.is_integer(kind)
    or pa.types.is_floating(kind)
    or pa.types.is_decimal(kind)
  ):
    raise UserError(f"schema: {name}: the column holds {kind}, not numbers")
  # To NumPy, and not cast(): Arrow refuses integers that a float rounds.
  if pa.types.is_decimal(kind):
    cells = cells.cast(pa.float64())
  found = cells.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
  found[cells.is_null().to_numpy(zero_copy_only=False)] = np.nan
  return found, np.isinf(found)


def _cast_text(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
  text = pc.utf8_trim_whitespace(text)
  text = pc.if_else(pc.is_in(text, _MISSING), None, text)
  bad = np.zeros(len(text), bool)
  try:
    found = text.cast(pa.float64())
  except pa.ArrowInvalid:
    good = pc.fill_null(pc.match_substring_regex(text, _NUMBER), True)
    bad = ~good.to_numpy(zero_copy_only=False)
    found = pc.if_else(good, text, None).cast(pa.float64())
  out = found.to_numpy(zero_copy_only=False)
  return out, bad | np.isinf(out)


def times(name: str, cells: pa.Array) -> tuple[np.ndarray, tuple[Fault, ...]]:
  """Returns times, [k] float64: numbers as they are, dates in seconds.

  Raises:
    UserError: the column is of a type that has no times.
  """
  kind = cells.type
  if pa.types.is_temporal(kind):
    cells = cells.cast(pa.timestamp("us")).cast(pa.int64())
    found = cells.to_numpy(zero_copy_only=False) / 1e6
    bad = np.isnan(found)
  else:
    found, bad = _cast(name, cells)
    bad |= np.isnan(found)
    if bad.all() and _is_text(kind):
      text = pc.replace_substring(cells.cast(pa.string()), "T", " ")
      text = pc.replace_substring_regex(text, _FRACTION_AND_UTC, "")
      text = pc.replace_substring_regex(text, r"^([\d-]{10})$", r"\1 00:00:00")
      read = pc.strptime(text, "%Y-%m-%d %H:%M:%S", "s", error_is_null=True)
      bad = read.is_null().to_numpy(zero_copy_only=False)
      found = read.cast(pa.int64()).fill_null(0).to_numpy().astype(np.float64)
  if bad.any():
    why = "is no time: a number, or a date and time as 2026-11-27 03:10:00"
    return found, (_fault(name, cells, bad, why),)
  return found, ()


# ---- Labels


def labels(
  name: str, cells: pa.Array, threshold=None, *, may_be_missing: bool = False
) -> tuple[np.ndarray, tuple[Fault, ...]]:
  """Returns labels, [k] float32 from 0 to 1; -1 counts as 0.

  Text may be True or true, False or false.

  Args:
    name: of the column.
    cells: its numbers.
    threshold: makes 0 or 1 of numbers, where they are no labels yet.
    may_be_missing: then one is nan.

  Raises:
    UserError: the column is of a type that has no numbers.
  """
  if _is_text(cells.type):  # as pandas writes them into CSV
    cells = _truth_as_numbers(cells.cast(pa.string()))
  found, bad = _cast(name, cells)
  missing = np.isnan(found)
  if threshold is not None:
    found = np.where(missing, 0, threshold(found))
  found = np.where(found == -1, 0, found)
  bad |= ~((found >= 0) & (found <= 1)) | missing
  if may_be_missing:
    found, bad = np.where(missing, np.nan, found), bad & ~missing
  if bad.any():
    why = "is no label: 0, 1, -1, a probability, or a number and a threshold"
    return found.astype(np.float32), (_fault(name, cells, bad, why),)
  return found.astype(np.float32), ()


def _truth_as_numbers(text: pa.Array) -> pa.Array:
  """Returns text with true and false, however written, as 1 and 0."""
  small = pc.ascii_lower(text)
  text = pc.if_else(pc.equal(small, "true"), "1", text)
  return pc.if_else(pc.equal(small, "false"), "0", text)
