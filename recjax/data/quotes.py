"""Quotes of CSV: where rows end, which separators count, what fields say.

A quote opens where a field begins, as PyArrow reads it; anywhere else it is
text like any other. All is found from the places of the few bytes that matter,
as a loop over rows would take longer than parsing them.
"""

import re
from collections.abc import Callable

import numpy as np

from recjax.data.text_blocks import positions


class Quotes:
  """The quoted parts of text that begins with a row."""

  def __init__(self, data: bytes, quote: bytes, separator: bytes):
    """Finds them.

    Args:
      data: begins with a row; the last row may lack its end.
      quote: one byte, or none.
      separator: one byte.
    """
    self.edges = np.empty(0, np.int64)  # [2n] in turn: opens, closes
    if quote and quote in data:
      edges = positions(data, quote)
      if not _regular(data, edges, quote, separator):
        edges = _scanned(data, edges, quote, separator)
      self.edges = edges

  def outside(self, at: np.ndarray) -> np.ndarray:
    """Returns those of the ascending places that are in no quoted part."""
    if not len(self.edges):
      return at
    # Few places among many edges, or the other way round: both are sorted.
    if len(at) < len(self.edges):
      return at[np.searchsorted(self.edges, at) % 2 == 0]
    before = np.searchsorted(at, self.edges)  # places before each edge
    toggles = np.bincount(before, minlength=len(at) + 1)[: len(at)]
    return at[np.cumsum(toggles) % 2 == 0]


def _regular(data: bytes, edges: np.ndarray, quote: bytes, sep: bytes) -> bool:
  """Returns whether all quotes open, close, or belong to a doubled pair."""
  text = np.frombuffer(data, np.uint8)
  before, after = _neighbours(quote, sep)
  opens, closes = edges[::2], edges[1::2]
  good = before[text[opens - 1]]
  good[0] |= opens[0] == 0
  good[1:] |= opens[1:] - 1 == closes[: len(opens) - 1]
  if not good.all():
    return False
  if len(closes) and closes[-1] + 1 == len(text):
    closes = closes[:-1]
  return bool(after[text[closes + 1]].all())


def _neighbours(quote: bytes, sep: bytes) -> tuple[np.ndarray, np.ndarray]:
  """Returns whether each byte may be before a quote that opens, after one."""
  before, after = np.zeros(256, bool), np.zeros(256, bool)
  before[[ord(sep), ord("\n")]] = True
  after[[ord(sep), ord("\n"), ord("\r"), ord(quote)]] = True
  return before, after


def _strange(
  data: bytes, edges: np.ndarray, line: np.ndarray, quote: bytes, sep: bytes
) -> np.ndarray:
  """Returns whether each quote does not open, close or belong to a pair.

  Args:
    data: the text.
    edges: [n] where its quotes are.
    line: [n] quotes that open and close in turn start anew where this changes.
    quote: one byte.
    sep: one byte, the separator.
  """
  text = np.frombuffer(data, np.uint8)
  before, after = _neighbours(quote, sep)
  new = np.concatenate([[True], line[1:] != line[:-1]])
  first = np.maximum.accumulate(np.where(new, np.arange(len(edges)), 0))
  opens = (np.arange(len(edges)) - first) % 2 == 0
  good = before[text[edges - 1]]
  good[0] |= edges[0] == 0
  pair = np.concatenate([[False], edges[1:] == edges[:-1] + 1]) & ~new
  closed = after[text[np.minimum(edges + 1, len(text) - 1)]]
  if edges[-1] + 1 == len(text):
    closed[-1] = True
  return np.where(opens, ~(good | pair), ~closed)


def _scanned(
  data: bytes, edges: np.ndarray, quote: bytes, sep: bytes
) -> np.ndarray:
  """Finds the quoted parts where some quotes are text like any other.

  A line that begins outside quotes, and holds whole quoted parts alone, ends
  outside: rows are scanned byte by byte where a line is not like this.
  """
  newlines = positions(data, b"\n")
  line = np.searchsorted(newlines, edges)
  odd = np.bincount(line) % 2 == 1
  odd[line[_strange(data, edges, line, quote, sep)]] = True
  begins = np.concatenate([[0], newlines + 1])[np.flatnonzero(odd)]
  keep = np.ones(len(edges), bool)
  spans, done = [], 0
  scan = _row_scanner(data, quote, sep)
  for begin in begins.tolist():
    if begin >= done:
      found, done = scan(begin)
      spans += found
      a, b = np.searchsorted(edges, (begin, done))
      keep[a:b] = False
  return np.sort(np.append(edges[keep], np.array(spans, np.int64)))


def _row_scanner(
  data: bytes, quote: bytes, sep: bytes
) -> Callable[[int], tuple[list[int], int]]:
  """Returns what finds a row's edges and its end from where it begins."""
  compiled = lambda pattern: re.compile(
    pattern.replace(b"S", re.escape(sep)).replace(b"Q", re.escape(quote))
  )
  opening = compiled(rb"(?:\A|(?<=[S\n]))Q")
  part = compiled(rb"Q[^Q]*+(?:QQ[^Q]*+)*+(Q|\Z)")

  def scan(at: int) -> tuple[list[int], int]:
    found = []
    while True:
      end = data.find(b"\n", at)
      end = len(data) if end < 0 else end
      opens = opening.search(data, at, end)
      if not opens:
        return found, end + 1
      quoted = part.match(data, opens.start())
      at = quoted.end()
      found += [quoted.start(), quoted.start(1)]

  return scan


def unclosed(row: bytes, quote: bytes, separator: bytes) -> bool:
  """Returns whether a quote opens in a row and does not close."""
  if not quote or quote not in row:
    return False
  found, _ = _row_scanner(row, quote, separator)(0)
  return bool(found) and found[-1] == len(row)


def row_ends(data: bytes, quote: bytes, separator: bytes) -> np.ndarray | None:
  """Returns where rows end; None: after each line's end."""
  if not quote or quote not in data:
    return None
  ends = positions(data, b"\n")
  quotes = Quotes(data, quote, separator)
  return quotes.outside(ends) + 1


def fields(row: bytes, quote: bytes, separator: bytes) -> list[bytes]:
  """Splits a row, without its line's end, into what its fields say."""
  if not quote or quote not in row:
    return row.split(separator)
  one = re.compile(
    rb"(?:Q((?:[^Q]|QQ)*+)Q)?([^S]*)(S?)".replace(
      b"S", re.escape(separator)
    ).replace(b"Q", re.escape(quote)),
    re.DOTALL,
  )
  found, at = [], 0
  while True:
    m = one.match(row, at)
    if m is None:  # cannot be: every part may be empty
      return found
    found.append((m[1] or b"").replace(quote * 2, quote) + m[2])
    at = m.end()
    if not m[3]:
      return found
