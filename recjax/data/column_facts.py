"""What columns hold: distinct values, missing ones, skew, numbers, lists.

Of a sample of rows, in which all is exact, by the rules of cells.py for what an
id is and what is missing.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recjax.data import cells
from recjax.errors import UserError

_FEW = 1_000  # values that are tried before all are read as numbers
_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class Numbers(NamedTuple):
  """What the numbers of a column are; missing ones left out."""

  low: float
  high: float
  mean: float
  median: float
  whole: bool  # whether all are integers
  rising: bool  # whether none is below the one before it


@dataclasses.dataclass(frozen=True)
class Column:
  """What a column holds."""

  name: str
  type: str  # in words
  rows: int  # that were looked at
  cells: int  # values that are there, those in lists one by one
  values: pa.Array  # [V] distinct ones as texts, most frequent first
  counts: np.ndarray  # [V] int64
  half: int  # distinct values of the first half of the cells
  lengths: np.ndarray | None = None  # [rows] of lists
  missing: float = 0.0  # share of rows: null, or an empty list
  numbers: Numbers | None = None  # where every value is a number
  codes: pa.DictionaryArray | None = None  # [rows]; None of lists
  unread: str = ""  # why this column can be no input

  @property
  def distinct(self) -> int:
    """How many distinct values there are in the sample."""
    return len(self.values)

  @property
  def skew(self) -> float:
    """Share of the cells that the most frequent 1% of values take."""
    top = -(-self.distinct // 100)
    return float(self.counts[:top].sum() / max(self.cells, 1))

  @property
  def longest(self) -> int:
    """The most values that a row holds."""
    return 1 if self.lengths is None else int(self.lengths.max(initial=0))

  def distinct_of(self, rows: int) -> int:
    """Estimates the distinct values of so many rows.

    By Heaps' law: values grow as a power of the cells, which is that by which
    they grow from the first half of the sample to all of it: so it holds of
    rows that are sorted by the column, too.
    """
    if rows <= self.rows or not self.half:
      return self.distinct
    power = np.clip(np.log2(self.distinct / self.half), 0, 1)
    return int(self.distinct * (rows / self.rows) ** power)


def column(name: str, type: str, parts: Sequence[pa.ChunkedArray]) -> Column:
  """Looks at a column.

  Args:
    name: of the column.
    type: in words.
    parts: its cells, part by part of the log, of whatever types.
  """
  arrays = [cells.flat(part) for part in parts]
  try:
    if any(is_list(x.type) for x in arrays):
      return _of_lists(
        name, type, [cells.bags(name, x, "|").ids for x in arrays]
      )
    return _of_cells(name, type, [cells.ids(name, x) for x in arrays])
  except UserError as e:
    nothing = pa.array([], pa.string())
    none = np.empty(0, np.int64)
    said = str(e).removeprefix(f"schema: {name}: ")
    rows = sum(map(len, arrays))
    return Column(name, type, rows, 0, nothing, none, 0, unread=said)


def is_list(kind: pa.DataType) -> bool:
  """Returns whether a column of this type holds lists."""
  return any(is_(kind) for is_ in _LIST)


def _of_cells(
  name: str, type: str, parts: Sequence[pa.DictionaryArray]
) -> Column:
  coded = cells.flat(pa.chunked_array(parts))
  found = _counted(name, type, coded, len(coded))
  missing = coded.indices.null_count / max(len(coded), 1)
  return dataclasses.replace(found, codes=coded, missing=missing)


def _of_lists(name: str, type: str, parts: Sequence[pa.ListArray]) -> Column:
  lengths = np.concatenate([x.value_lengths().to_numpy() for x in parts])
  coded = cells.flat(pa.chunked_array([x.flatten() for x in parts]))
  found = _counted(name, type, coded, len(lengths))
  missing = float((lengths == 0).mean()) if len(lengths) else 0.0
  return dataclasses.replace(found, lengths=lengths, missing=missing)


def _counted(name: str, type: str, coded: pa.DictionaryArray, rows: int):
  """Returns a column of these cells, one by one."""
  code = coded.indices.drop_null().to_numpy()
  counts = np.bincount(code, minlength=len(coded.dictionary))
  half = int(np.count_nonzero(np.bincount(code[: len(code) // 2])))
  order = np.argsort(-counts, kind="stable")
  order = order[: np.count_nonzero(counts)]
  values = coded.dictionary.take(pa.array(order))
  found = Column(name, type, rows, len(code), values, counts[order], half)
  x = as_numbers(values)
  if x is None:
    return found
  of_code = np.zeros(len(counts))
  of_code[order] = x
  return dataclasses.replace(
    found, numbers=_numbers(x, found.counts, of_code[code])
  )


def as_numbers(values: pa.Array) -> np.ndarray | None:
  """Returns values as numbers, [V] float64; None where one is none."""
  if not len(values):
    return None
  for some in (values[:_FEW], values):
    found, faults = cells.numbers("", some)
    if faults:
      return None
  return found


def _numbers(x: np.ndarray, counts: np.ndarray, cells: np.ndarray) -> Numbers:
  """Summarises numbers.

  Args:
    x: [V] distinct values.
    counts: [V] of each.
    cells: [k] in the order of the rows.
  """
  order = np.argsort(x)
  half = np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)
  return Numbers(
    low=float(x.min()),
    high=float(x.max()),
    mean=float(np.average(x, weights=counts)),
    median=float(x[order[half]]),
    whole=bool((np.floor(x) == x).all()),
    rising=bool((np.diff(cells) >= 0).all()),
  )


def as_bag(of: Column, separator: str, weight_separator: str = "") -> Column:
  """Returns a column of text as bags, whose ids a separator parts.

  Args:
    of: the column.
    separator: of ids.
    weight_separator: between an id and its weight; "" = there are none.
  """
  text = of.codes.dictionary.take(of.codes.indices)
  bags = cells.bags(
    of.name, text, separator, weight_separator=weight_separator
  ).ids
  return _of_lists(of.name, of.type, [bags])


# RecBole's headers: user_id:token, genres:token_seq, price:float.
_TYPED = re.compile(r"(.+):(token|token_seq|float|float_seq)")


def plain(name: str) -> str:
  """Returns a column's name without a type that a RecBole header gives it."""
  found = _TYPED.fullmatch(name)
  return found[1] if found else name


def typed(name: str) -> str:
  """Returns the type that a RecBole header gives a column; '' if none."""
  found = _TYPED.fullmatch(name)
  return found[2] if found else ""


def words(name: str) -> frozenset[str]:
  """Returns the words of a column's name, in small letters.

  Those of itemId, item_id and ITEM-ID are item and id; of C14 they are c and
  14. The type that a RecBole header has after a colon is none of them.
  """
  name = plain(name)
  out, word = [], ""
  for before, c in zip(" " + name, name, strict=False):
    upper = c.isupper() and not before.isupper()
    if not c.isalnum() or upper or c.isdigit() != before.isdigit():
      out.append(word)
      word = ""
    word += c.lower() if c.isalnum() else ""
  return frozenset(w for w in [*out, word] if w)
