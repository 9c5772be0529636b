"""Which columns of a log are its labels, by their names and values."""

import re
from collections.abc import Sequence

from recjax.data.column_facts import Column, words

_GENERAL = {"label", "labels", "target", "y", "ctr", "cvr"}
_CLICK = {"click", "clicked", "clicks", "clk"}
_DEEDS = (
  _CLICK
  | {"conversion", "converted", "buy", "bought", "purchase", "purchased"}
  | {"order", "ordered", "pay", "paid", "cart", "fav", "favorite", "favourite"}
  | {"like", "liked", "follow", "comment", "forward", "share", "install"}
  | {"installed", "download", "watched", "finish", "long", "view", "viewed"}
  | {"response", "reward", "outcome", "churn", "positive"}
)
_AROUND = {"is", "has", "was", "flag", "user"} | _GENERAL
_RATINGS = {"rating", "ratings", "stars", "star", "overall", "score"}
_SHARE_OF = {"watch", "play", "view", "read", "finish", "completion", "listen"}
_TRUTH = {"true", "false"}


def find(columns: Sequence[Column]) -> tuple[str, ...]:
  """Returns what is written as a schema's labels; () where none looks like one.

  In this order: columns of two values with the name of a label, all of them;
  ratings and shares of what was watched, compared with a number; the only
  column of 0 and 1, or the first or last of all columns; 1 to 5 where no header
  gives names.
  """
  fit = [
    c
    for c in columns
    # `a > 1` as a name would be read as a comparison.
    if c.name and c.lengths is None and not set(c.name) & set("<>=")
    and c.name == c.name.strip() and c.cells
  ]  # fmt: skip
  whole = [c for c in fit if not c.missing]
  named = [c for c in whole if _named(c) and is_binary(c)]
  if named:
    return tuple(c.name for c in sorted(named, key=_rank))
  for some in (whole, fit):
    for c in some:
      if found := _compared(c):
        return (found,)
  two = [c for c in whole if is_binary(c) and c.distinct == 2]
  if len(two) == 1:
    return (two[0].name,)
  ends = [c.name for c in (columns[0], columns[-1]) if c in two]
  late = [c.name for c in fit if _named(c) and is_binary(c)]
  stars = [_rated(c) for c in whole if is_unnamed(c) and _is_stars(c)]
  return (*ends, *late, *stars)[:1]


def is_unnamed(c: Column) -> bool:
  """Returns whether a column has a name that no header gave it: c1, c2."""
  return bool(re.fullmatch(r"c\d+", c.name))


def _is_stars(c: Column) -> bool:
  """Returns whether a column holds 1 to 5, and may hold halves."""
  x = c.numbers
  if x is None or x.high != 5 or x.low not in (0.5, 1):
    return False
  return c.distinct == (5 if x.whole else 10)


def is_binary(c: Column) -> bool:
  """Returns whether a column holds 0 and 1, -1 and 1, or true and false."""
  if c.distinct > 2 or c.lengths is not None:
    return False
  if c.numbers is None:
    return {x.lower() for x in c.values.to_pylist()} <= _TRUTH
  low, high = c.numbers.low, c.numbers.high
  return (low, high) in ((0, 1), (-1, 1), (0, 0), (1, 1))


def _named(c: Column) -> bool:
  """Returns whether a name is that of a label, such as is_click or buy."""
  of = words(c.name)
  rest = of - _AROUND
  return bool(of & _GENERAL or rest) and rest <= _DEEDS and bool(of - {"is"})


def _rank(c: Column) -> int:
  """Orders labels: the one that is named so, clicks, what follows a click."""
  of = words(c.name)
  deeds = of & _DEEDS
  return 0 if not deeds else 1 if deeds & _CLICK else 2


def _compared(c: Column) -> str:
  """Returns the label that a comparison makes of a column; '' if none."""
  x, of = c.numbers, words(c.name)
  if x is None or x.low == x.high:
    return ""
  if _named(c):
    if x.low >= 0 and x.high <= 1:
      return c.name  # probabilities
    if x.whole and x.low >= 1 and x.high <= 10:
      return _rated(c)
    return f"{c.name} > 0" if x.whole and x.low == 0 else ""
  if of & _RATINGS and x.low >= 0 and 1 < x.high <= 10 and c.distinct <= 21:
    return _rated(c)
  if "ratio" in of and of & _SHARE_OF:
    return f"{c.name} > {1 if x.high > 1 else 0.5}"
  return ""


def _rated(c: Column) -> str:
  """Returns the label of ratings: above the middle of the scale."""
  return f"{c.name} > {3 if c.numbers.high <= 5 else 6}"


def leaks(c: Column, labels: Sequence[str]) -> bool:
  """Returns whether a column is known only once a label is.

  How long something was watched tells whether most of it was.
  """
  of = words(c.name)
  shares = any(
    "ratio" in words(x.rpartition(" > ")[0] or x) for x in labels if " > " in x
  )
  return shares and bool(of & _SHARE_OF)
