"""What the readers of log formats share: rows by their columns' names.

A reader is a module with `read(path, wanted, options, damaged)`, which yields
Rows, and `names(path, options)`, which tells a file's columns. They know
nothing of labels, tables or bags.
"""

import difflib
import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recjax.data.text import shown
from recjax.errors import UserError

MOST_SHOWN = 20  # names in a message


class Rows(NamedTuple):
  """Consecutive rows of a file, by their columns' names."""

  table: pa.Table  # the wanted columns, in the order asked for
  at: np.ndarray  # [k] int64: the line (Parquet: the row) of each; from 1
  read: int  # bytes of the file read so far (Parquet: about)


def without(
  table: pa.Table, at: np.ndarray, bad: Collection[int]
) -> tuple[pa.Table, np.ndarray]:
  """Returns rows and their numbers without the bad ones, [k] each."""
  if not bad:
    return table, at
  keep = np.ones(len(at), bool)
  keep[list(bad)] = False
  return table.filter(pa.array(keep)), at[keep]


def check_wanted(
  path: str,
  wanted: Collection[str],
  there: Sequence[str],
  hint: str = "",
) -> None:
  """Raises UserError unless each wanted column is there, once.

  Args:
    path: of the file.
    wanted: names.
    there: the file's names.
    hint: what may be wrong with the file if they are not.
  """
  missing = [name for name in wanted if name not in set(there)]
  if missing:
    near = {
      m: difflib.get_close_matches(m, [str(t) for t in there], 1)
      for m in missing[:3]
    }
    said = ", ".join(
      shown(m) + (f" (nearest: {shown(near[m][0])})" if near[m] else "")
      for m in missing[:3]
    )
    if len(missing) > 3:
      said += f" and {len(missing) - 3:,} more"
    raise UserError(
      f"{path} has no column {said}; it has {listed(there)}"
      + (f". {hint}" if hint else "")
    )
  twice = [name for name in wanted if list(there).count(name) > 1]
  if twice:
    raise UserError(
      f"{path} has the column {shown(twice[0])}"
      f" {list(there).count(twice[0])} times: name them apart, in the file or"
      " by data.text.names"
    )


def listed(names: Sequence[str]) -> str:
  """Lists names, some of them if they are many."""
  said = ", ".join(shown(name) for name in names[:MOST_SHOWN])
  more = len(names) - MOST_SHOWN
  return said + (f" and {more:,} more" if more > 0 else "")


def type_of(cells: Sequence[str]) -> str:
  """Returns what the cells of a text column look like, in a word."""
  words = {_word(cell) for cell in cells if cell}
  if not words:
    return "empty"
  return max(words, key=("integer", "number", "text").index)


def _word(cell: str) -> str:
  """Returns what a cell looks like."""
  if cell.removeprefix("-").isdecimal() and cell.isascii():
    return "integer"
  return "number" if is_number(cell) else "text"


def is_number(cell: str) -> bool:
  """Returns whether a cell is a number as logs write them."""
  try:
    float(cell)
  except ValueError:
    return False
  return cell.isascii() and "_" not in cell


def check_file(path: str) -> None:
  """Raises UserError unless this is a file that holds anything."""
  if not os.path.exists(path):
    raise UserError(f"{path} does not exist")
  if os.path.isdir(path):
    raise UserError(f"{path} is a directory: name its files, as in {path}/*")
  if not os.path.getsize(path):
    raise UserError(f"{path} is empty")
