"""How a CSV file is written: separator, header, the names of its columns."""

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from recjax.config import Text
from recjax.data import quotes
from recjax.data.rows import check_wanted, is_number, listed
from recjax.data.text import shown
from recjax.data.text_blocks import head
from recjax.errors import UserError

SEPARATORS = ("\t", ",", ";", "|")  # in this order where several would do
_NAMED = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
_LOOKED_AT = 1_000  # rows


class Layout(NamedTuple):
  """How a CSV file is written."""

  names: tuple[str, ...]  # of all its columns
  separator: bytes
  quote: bytes
  header: bool  # whether the first row is one
  sample: list[list[str]]  # the first rows, without the header


def find(path: str, options: Text, wanted: Mapping[str, str] = {}) -> Layout:
  """Finds out how a file is written, from its first rows.

  Args:
    path: of the file.
    options: what is said about it.
    wanted: kinds of columns, by name: they must be there, each once.

  Raises:
    UserError: it is no text, or not written as `options` say; a column is not
      there.
  """
  for name, one in (("separator", options.separator), ("quote", options.quote)):
    if len(one.encode()) > 1 or one in ("\r", "\n"):
      raise UserError(f"data.text.{name} is {shown(one)}: give one character")
  data, quote = head(path), options.quote.encode()
  if options.separator:
    separator = options.separator
  else:
    separator = _separator(data, quote, options, wanted)
  rows = _sample(path, data, quote, separator.encode())
  if not rows:
    raise UserError(f"{path} has no row")
  names, hint = _names(path, rows, options, wanted)
  _check_first(path, rows, options, wanted, hint=hint)
  check_wanted(path, wanted, names, _hint(rows[0], separator, hint))
  start = int(options.header)
  return Layout(names, separator.encode(), quote, options.header, rows[start:])


def _sample(
  path: str, data: bytes, quote: bytes, separator: bytes
) -> list[list[str]]:
  """Returns the fields of the first rows, blank ones left out."""
  rows = [
    [f.decode("utf-8", "replace") for f in quotes.fields(r, quote, separator)]
    for r in _rows(data, quote, separator)[:_LOOKED_AT]
  ]
  if rows and "\ufffd" in "".join(rows[0]):
    raise UserError(
      f"{path}, line 1: {shown(','.join(rows[0]))} is not UTF-8: write the file"
      " as UTF-8 (iconv -t UTF-8)"
    )
  return rows


def _rows(data: bytes, quote: bytes, separator: bytes) -> list[bytes]:
  """Returns the first rows, blank ones left out, but for the last, cut one."""
  ends = quotes.row_ends(data, quote, separator)
  if ends is None:
    lines = data.split(b"\n")
  else:
    cuts = [0, *ends.tolist(), len(data)]
    lines = [data[a:b] for a, b in itertools.pairwise(cuts)]
  if len(lines) > 1:
    lines.pop()  # what follows the last end: nothing, or a row that is cut
  lines = [line.rstrip(b"\r\n") for line in lines]
  return [line for line in lines if line]


def _separator(
  data: bytes, quote: bytes, options: Text, wanted: Mapping[str, str]
) -> str:
  """Finds the separator: it gives rows the same number of fields, above one.

  Most of all it gives the columns that are wanted; commas if none does.
  """
  best, found = (0, 0.0), ","
  for one in SEPARATORS:
    rows = [
      quotes.fields(row, quote, one.encode())
      for row in _rows(data, quote, one.encode())[:20]
    ]
    if not rows:
      continue
    first = len(rows[0])
    if options.header:
      there = {f.decode("utf-8", "replace") for f in rows[0]}
      named = 0 if options.names else len(there & set(wanted))
    else:
      named = 0
    if options.names:
      named = int(len(options.names) == first > 1)
    ((count, times),) = Counter(map(len, rows)).most_common(1)
    # A header tells the number; bags may hold other separators.
    alike = times / len(rows) if count == first or not options.header else 0.0
    score = named, alike if count > 1 else 0.0
    if score > best:
      best, found = score, one
  return found


def _names(
  path: str, rows: list[list[str]], options: Text, wanted: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
  """Returns the names of the columns, and what may be wrong with them."""
  first = rows[0]
  if options.names:
    if len(first) != len(options.names):
      less = (
        "; is the label missing?"
        if len(first) + 1 == len(options.names)
        else ""
      )
      raise UserError(
        f"{path}, line 1: {len(first)} fields where data.text.names names"
        f" {len(options.names)} columns{less}"
      )
    return options.names, ""
  if not options.header:
    return tuple(map(str, range(1, len(first) + 1))), (
      "No header is expected (data.text.header=False), so its columns are"
      " numbered: name them by data.text.names"
    )
  numbers = [cell for cell in first if is_number(cell)]
  if numbers and not set(first) & set(wanted):
    return tuple(first), (
      f"Its first line holds numbers such as {shown(numbers[0])} and looks like"
      " data: where it names no columns, set data.text.header=False and"
      " data.text.names"
    )
  return tuple(first), ""


def _check_first(
  path: str,
  rows: list[list[str]],
  options: Text,
  wanted: Mapping[str, str],
  *,
  hint: str,
) -> None:
  """Raises UserError where the first row is a header unexpectedly, or data."""
  first = rows[0]
  if not options.header:
    known = set(options.names) | (set(wanted) if not options.names else set())
    if sum(cell in known for cell in first) > len(first) // 2 or (
      options.names and wanted and set(wanted) <= set(first)
    ):
      raise UserError(
        f"{path}, line 1 names the columns ({listed(first)}): set"
        " data.text.header=True"
      )
  elif options.names and any(
    kind == "number" and name in options.names
    and is_number(first[options.names.index(name)])
    for name, kind in wanted.items()
  ):  # fmt: skip
    raise UserError(
      f"{path}, line 1: {listed(first)} looks like data, and would be skipped"
      " as a header: set data.text.header=False"
    )


def _hint(first: list[str], separator: str, hint: str) -> str:
  """Returns what may be wrong where wanted columns are missing."""
  line = first[0]
  if line.lstrip().startswith(("{", '[{"')):
    return "It looks like JSON: set data.format='jsonl'"
  if len(first) > 1:
    return hint
  for one, name in _NAMED.items():
    if one != separator and one in line:
      return (
        f"With the separator {shown(separator)} it has one column, and line 1"
        f" holds {name}: set data.text.separator={shown(one)}"
      )
  return hint
