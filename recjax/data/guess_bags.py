"""Whether text holds bags of ids, and what parts them."""

import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.data.column_facts import Column, typed

_SEPARATORS = ("|", ", ", ",", "; ", ";", "^", "\x01", "\x02", " ")
_VALUES = 5_000  # distinct values that are looked at
_OFTEN = 0.2  # share of values that hold a separator
_ID = re.compile(r"[^\s()\[\]{}\"'/\\<>?!,;]+")
_NAME = re.compile(r"[^()\[\]{}\"<>]+")
_WORDS = {"the", "and", "of", "a", "an", "to", "in", "is", "for", "with", "it"}
_WORDS |= {"this", "i", "my", "und", "der", "die", "das", "et", "de", "la", "&"}


class Parts(NamedTuple):
  """How text is parted."""

  separator: str
  weight_separator: str = ""


def find(c: Column) -> Parts | None:
  """Returns what parts a column of text into ids; None where it is one id.

  Parts are ids where there are fewer distinct ones than texts, and none of
  them is a word of a sentence; or where all have digits.
  """
  if c.lengths is not None or (c.numbers is not None and c.numbers.whole):
    return None
  if typed(c.name) == "token_seq":
    return Parts(" ")
  if typed(c.name) or c.numbers is not None:
    return None
  values = c.values[:_VALUES]
  for separator in _SEPARATORS:
    holds = pc.match_substring(values, separator)
    if pc.mean(holds).as_py() < _OFTEN:
      continue
    parts = pc.split_pattern(values, separator).flatten()
    parts = parts.filter(pc.not_equal(parts, ""))
    for weight in _weight_separators(parts):
      ids = _without(parts, weight)
      if _are_ids(c, values, ids, separator):
        return Parts(separator, weight)
  return None


def in_brackets(c: Column) -> bool:
  """Returns whether text is lists as a program prints them: [1, 2]."""
  texts = c.values[:100].to_pylist()
  return c.numbers is None and bool(texts) and all(
    t[:1] in "[({" and t[-1:] in "])}" for t in texts
  )  # fmt: skip


def holds(c: Column, text: str) -> bool:
  """Returns whether all of the first values hold this text."""
  return pc.all(pc.match_substring(c.values[:100], text)).as_py()


def is_prose(c: Column) -> bool:
  """Returns whether a column holds sentences: several words, seldom twice."""
  values = c.values[:_VALUES]
  spaces = pc.count_substring(values, " ")
  return (
    c.numbers is None
    and c.distinct > c.cells // 2
    and len(values) > 0
    and pc.mean(spaces).as_py() >= 2
  )


def _weight_separators(parts: pa.Array) -> tuple[str, ...]:
  """Returns ':' where a number follows the last one in nearly all parts."""
  if not len(parts):
    return ("",)
  weighted = pc.match_substring_regex(parts, r"^.+:\d*\.\d+$|^.+:[01]$")
  return (":", "") if pc.mean(weighted).as_py() > 0.95 else ("",)


def _without(parts: pa.Array, weight_separator: str) -> pa.Array:
  if not weight_separator:
    return parts
  return pc.replace_substring_regex(parts, r":[^:]*$", "")


def _are_ids(
  c: Column, values: pa.Array, parts: pa.Array, separator: str
) -> bool:
  """Returns whether the parts of texts are ids."""
  if len(parts) <= len(values):
    return False
  counted = pc.value_counts(parts)
  counts = counted.field("counts").to_numpy()
  kinds = counted.field("values").to_pylist()
  sure = separator in "|^\x01\x02"
  if not sure:
    form = _ID if separator == " " else _NAME
    plain = sum(bool(form.fullmatch(x)) for x in kinds) / len(kinds)
    often = {kinds[i].lower() for i in np.argsort(-counts)[:100]}
    if plain < 0.98 or _WORDS & often:
      return False
  if len(kinds) <= len(values) / 2:
    return True
  # A large catalogue: most ids come once in the sample.
  digits = all(any(x.isdigit() for x in kind) for kind in kinds)
  single = all(_ID.fullmatch(x) for x in kinds)
  return c.distinct > c.cells / 2 and single and (digits or sure)
