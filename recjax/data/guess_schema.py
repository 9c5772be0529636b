"""What the columns of a log are: a schema that a person would begin with."""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.data import cells, guess_bags, guess_labels
from recjax.data.column_facts import Column, as_bag, plain, typed, words
from recjax.log_schema import Id, Ids, Number, Schema

_ID_WORDS = {"id", "ids", "uid", "iid", "pid", "code", "key", "hash", "type"}
_ID_WORDS |= {"user", "item", "product", "video", "movie", "ad", "category"}
_ID_WORDS |= {"cate", "brand", "shop", "seller", "device", "ip", "site", "app"}
_ID_WORDS |= {"campaign", "advertiser", "author", "customer", "member", "city"}
_ID_WORDS |= {"zip", "model", "position", "pos", "asin", "reviewer", "tag"}
_ID_WORDS |= {"country", "domain", "gender", "segment", "channel", "os", "cat"}
_NUMBER_WORDS = {"price", "age", "count", "cnt", "num", "number", "duration"}
_NUMBER_WORDS |= {"amount", "length", "len", "size", "qty", "quantity", "total"}
_NUMBER_WORDS |= {"sum", "avg", "mean", "rate", "ratio", "score", "freq", "ctr"}
_NUMBER_WORDS |= {"frequency", "distance", "cost", "bid", "seconds", "days"}
_NUMBER_WORDS |= {"minutes", "views", "clicks", "sales", "stock", "weight"}
_NUMBER_WORDS |= {"height", "width", "affinity", "propensity", "likes", "votes"}
_NUMBER_WORDS |= {"times", "useful", "helpful", "followers", "fans"}
_NUMBER_WORDS |= {"dwell", "percent", "salary", "income", "discount", "vote"}
# Of such a column each value stands for a row, of another for somebody.
_ROW_WORDS = {"request", "req", "impression", "event", "session", "log", "row"}
_ROW_WORDS |= {"review", "transaction", "order"}
_ROW_WORDS |= {"uuid", "guid", "trace", "index", "record", "sample", "unnamed"}
_TIME_WORDS = {"time", "timestamp", "ts", "date", "datetime", "hour", "day"}
_TIME_WORDS |= {"created", "updated", "at", "utc", "dt"}
_DATE = (
  r"^(19|20)\d\d[-/.]\d\d?[-/.]\d\d?([ T]|$)"
  r"|^\d\d?[-/. ]\d\d?[-/., ]+(19|20)\d\d([ T]|$)"
)
_WEIGHTS = {"weight", "w", "sample_weight", "instance_weight", "example_weight"}
_PAST = {"hist", "history", "his", "seq", "sequence", "list", "last", "past"}
_PAST |= {"recent", "prev", "previous", "clicked", "bought", "viewed", "click"}
_PAST |= {"behavior", "behaviors", "behaviour", "session", "recently", "buy"}
_MOST_OF_HISTORY, _MOST_OF_BAG = 50, 32
_EVERY_ROW = 0.95  # distinct values a row: one is of a row, not of somebody
_SPAN = 1_000  # integers of which each stands for somebody, per row at most
_FEW_ROWS = 20  # of fewer rows all may differ by chance


class Proposal(NamedTuple):
  """What is proposed for a log."""

  schema: Schema
  columns: dict[str, Column]  # by name, bags of text as lists
  left_out: dict[str, str]  # names of columns, and why
  split: tuple[str, str]  # data.split, and why


def propose(columns: Sequence[Column]) -> Proposal:
  """Proposes what columns are; labels are () where none looks like one."""
  labels = guess_labels.find(columns)
  compared = {x.rpartition(" > ")[0] or x for x in labels}
  seen: dict[str, Column] = {c.name: c for c in columns}
  numbers, features, keep, left_out = [], [], [], {}
  weight, time = "", _time(columns)
  for c in columns:
    if c.name in compared or c.name == time:
      continue
    bag = _bag(c)
    why = _left_out(c, labels, bag is not None)
    if not weight and not why and _is_weight(c):
      weight = c.name
    elif not why and _of_a_row(c):
      keep.append(c.name)
    elif why:
      left_out[c.name] = why
    elif bag is not None:
      seen[c.name], of = bag
      features.append(of)
    elif _is_number(c):
      numbers.append(_number(c))
    else:
      features.append(Id(c.name))
  features, left = _with_weights(features, seen)
  features = _with_histories(features, seen)
  if len(features) == 1 and not numbers:
    features = (_apart(features[0]),)
  schema = Schema(
    labels, tuple(numbers), features, weight, time, keep=tuple(keep)
  )
  return Proposal(schema, seen, left_out | left, _split(columns, time))


# ---- What is no input


def _left_out(c: Column, labels: Sequence[str], bag: bool) -> str:
  """Returns why a column is left out; '' if it is not.

  Args:
    c: the column.
    labels: the schema's.
    bag: whether it holds bags.
  """
  if not c.name:
    return "has no name"
  if c.unread:
    return c.unread
  if not c.cells:
    return "holds nothing"
  if is_time(c):
    return "a time: add what depends on it, such as the hour"
  if c.distinct == 1 and not c.missing and c.lengths is None:
    return "the same in all rows"
  if guess_labels.leaks(c, labels):
    return "known only once the label is"
  if guess_bags.in_brackets(c):
    return "lists in brackets: write them as lists, or parted by '|'"
  if guess_labels.is_unnamed(c) and guess_bags.holds(c, "::"):
    return "fields parted by '::': write tabs there (sed 's/::/\\t/g')"
  if bag:
    return ""
  if guess_bags.is_prose(c):
    return "free text"
  if _differs(c) and not _of_a_row(c) and not _is_number(c):
    of, x = words(c.name), c.numbers
    # Of a small sample the integers of a dense range may all differ, too.
    dense = x and not x.rising and x.high - x.low < _SPAN * c.rows
    if not dense and (not of & _ID_WORDS or of == {"id"}):
      return "differs in nearly every row"
  return ""


def is_time(c: Column) -> bool:
  """Returns whether a column tells when: a date, or large numbers."""
  if c.type.startswith(("timestamp", "date", "time")):
    return True
  if c.lengths is not None or not c.cells:
    return False
  if c.numbers is None:
    dates = pc.match_substring_regex(c.values[:1_000], _DATE)
    return pc.mean(dates).as_py() > 0.9
  x, named = c.numbers, bool(words(c.name) & _TIME_WORDS)
  if named and (x.low >= 1e6 or (x.rising and c.distinct > c.cells // 2)):
    return True
  # Seconds, milliseconds or so since 1970, of the years 1992 to 2065.
  since = any(
    7e8 * unit < x.low and x.high < 3e9 * unit for unit in (1, 1e3, 1e6)
  )
  counted = words(c.name) & _ID_WORDS
  return since and (x.rising or c.distinct > 20) and not counted


def _differs(c: Column) -> bool:
  """Returns whether nearly every row has another value."""
  return (
    c.lengths is None
    and c.cells >= _FEW_ROWS
    and c.distinct >= _EVERY_ROW * c.cells
  )


def _of_a_row(c: Column) -> bool:
  """Returns whether a column names rows: predictions repeat it."""
  of = words(c.name)
  named = of & _ROW_WORDS or of == {"id"}
  if c.lengths is not None or not named or (c.numbers and not c.numbers.whole):
    return False
  return _differs(c)


def _is_weight(c: Column) -> bool:
  """Returns whether a column holds weights of samples."""
  x = c.numbers
  return (
    plain(c.name).lower() in _WEIGHTS
    and c.lengths is None
    and x is not None
    and x.low >= 0
    and not c.missing
  )


# ---- Numbers


def _is_number(c: Column) -> bool:
  """Returns whether a column is a quantity and no id."""
  x, of = c.numbers, words(c.name)
  if x is None or c.lengths is not None or typed(c.name) == "token":
    return False
  if not x.whole or typed(c.name) == "float":
    return True
  last = re.fullmatch(r"(?i)([a-z]+)\d*", c.name)
  if last and last[1] in ("I", "i", "int", "dense", "num"):
    return c.distinct > 2
  if of & _ID_WORDS or c.distinct <= 2:
    return False
  if of & _NUMBER_WORDS:
    return True
  # Counts: small ones are the most frequent. (So may ids be that were numbered
  # by their frequency: names have to tell.)
  count = c.distinct > 20 and 0 <= x.median < 0.05 * x.high
  return count and -1 <= x.low <= 1 and not guess_labels.is_unnamed(c)


def _number(c: Column) -> Number:
  """Returns how a quantity is given to a model."""
  x = c.numbers
  tail = x.high > 10 and x.low > -10 and x.high > 10 * max(x.median, 0.1)
  missing = "mean" if c.missing else "zero"
  return Number(c.name, "log1p" if tail else "standard", missing)


# ---- Bags


def _bag(c: Column) -> tuple[Column, Ids] | None:
  """Returns a column as lists, and the bag that it is; None if it is none."""
  separator = weight = ""
  if not c.name or not c.cells or is_time(c):
    return None
  if c.lengths is None:
    parts = guess_bags.find(c)
    if parts is None:
      return None
    separator, weight = parts
    c = as_bag(c, separator, weight)
  most = max(1, min(c.longest, _MOST_OF_BAG))
  of = Ids(c.name, most, pooling="mean", weight_separator=weight)
  if separator:
    of = dataclasses.replace(of, separator=separator)
  return c, of


def _with_weights(
  features: Sequence[Id | Ids], seen: dict[str, Column]
) -> tuple[list[Id | Ids], dict[str, str]]:
  """Gives bags the columns of as many numbers as they have ids.

  Returns:
    (features without those columns, {column that is left out: why}).
  """
  left: dict[str, str] = {}
  out = {f.name: f for f in features if not _are_weights(f, seen)}
  bags = [f for f in out.values() if isinstance(f, Ids)]
  for f in features:
    if f.name in out:
      continue
    alike = [b for b in bags if _as_long(b.name, f.name, seen)]
    alike.sort(key=lambda b: -len(words(b.name) & words(f.name)))
    if not alike:
      left[f.name] = "numbers in lists: a vector, or weights of no bag"
    elif _all_ones(seen[f.name]):
      left[f.name] = f"weights of {alike[0].name!r} that are all 1"
    else:
      bag = alike[0]
      out[bag.name] = dataclasses.replace(bag, weights=f.name, pooling="sum")
      bags.remove(bag)
  return list(out.values()), left


def _are_weights(f: Id | Ids, seen: dict[str, Column]) -> bool:
  """Returns whether a bag holds numbers and no ids."""
  x = seen[f.name].numbers
  if not isinstance(f, Ids) or x is None:
    return False
  named = words(f.name) & {"weight", "weights", "score", "scores", "values"}
  return not x.whole or bool(named)


def _as_long(ids: str, weights: str, seen: dict[str, Column]) -> bool:
  """Returns whether a column has as many numbers as another has ids."""
  a, b = seen[ids].lengths, seen[weights].lengths
  return a is not None and b is not None and np.array_equal(a, b)


def _all_ones(c: Column) -> bool:
  return c.numbers.low == c.numbers.high == 1


def _with_histories(
  features: Sequence[Id | Ids], seen: dict[str, Column]
) -> tuple[Id | Ids, ...]:
  """Makes histories of what shares its ids with a feature of one."""
  single = [f for f in features if isinstance(f, Id)]
  single = [f for f in single if not words(f.name) & _PAST] or single
  out = []
  for f in features:
    of = [i for i in single if f not in single and _past_of(f, i, seen)]
    of.sort(key=lambda i: -_shared(seen[f.name], seen[i.name]))
    if of and isinstance(f, Id):  # a column for each of the last ones
      f = dataclasses.replace(f, table=of[0].name)
    elif of and isinstance(f, Ids):
      f = dataclasses.replace(
        f,
        most=max(1, min(seen[f.name].longest, _MOST_OF_HISTORY)),
        keep="last",
        pooling="none",
        table=of[0].name,
      )
    out.append(f)
  return tuple(out)


def _apart(f: Id | Ids) -> Id | Ids:
  """Leaves the ids of the only bag unpooled: models learn from pairs of them.

  So they do of libsvm's lines, whose ids are what other logs have as columns.
  """
  if not isinstance(f, Ids) or f.weighted or f.most > _MOST_OF_BAG:
    return f
  return dataclasses.replace(f, pooling="none")


def _past_of(bag: Id | Ids, single: Id, seen: dict[str, Column]) -> bool:
  """Returns whether a bag holds former values of a feature, by name or ids."""
  common = _shared(seen[bag.name], seen[single.name])
  if not common:
    return False
  if _stem(bag.name) == _stem(single.name):
    return True
  past = bool(words(bag.name) & _PAST)
  numeric = seen[bag.name].numbers is not None
  # Small integers are shared by chance.
  enough = 0.8 if numeric else 0.2
  return common > enough and (past or not numeric) and (
    not numeric or bool(words(single.name) & _ID_WORDS)
  )  # fmt: skip


def _stem(name: str) -> frozenset[str]:
  """Returns what a name is about: item of hist_items and of item_id."""
  rest = words(name) - _PAST - {"id", "ids"}
  return frozenset(w.removesuffix("s") for w in rest)


def _shared(bag: Column, single: Column) -> float:
  """Returns the share of a bag's ids that another column has, too."""
  there = pc.is_in(bag.values, pa.array(single.values))
  share = bag.counts[there.to_numpy(zero_copy_only=False)].sum()
  return float(share / max(bag.cells, 1))


# ---- The split


def _time(columns: Sequence[Column]) -> str:
  """Returns the column by whose times samples train or test; '' if none.

  Where most rows have the same time nothing would be before it.
  """
  fit = [
    c
    for c in columns
    if c.name and is_time(c) and not c.missing and c.distinct >= _FEW_ROWS
    and not cells.times(c.name, c.values)[1]
  ]  # fmt: skip
  return max(fit, key=lambda c: c.distinct).name if fit else ""


def _split(columns: Sequence[Column], time: str) -> tuple[str, str]:
  """Returns which part of the log tests, and why."""
  if time:
    return "time", f"the last of {time!r} test"
  for c in columns:
    if is_time(c) and _in_order(c):
      return "time", f"rows are in the order of {c.name!r}"
  for c in columns:
    sorted_by = c.numbers and c.numbers.rising and c.lengths is None
    of = words(c.name) & _ID_WORDS and c.distinct > 2 and not _differs(c)
    if sorted_by and of and not is_time(c):
      return "random", f"rows are sorted by {c.name!r}, not by time"
  return "time", "the last rows, as if they were the newest"


def _in_order(c: Column) -> bool:
  """Returns whether times rise from row to row, as numbers or as 2014-10-21."""
  if c.numbers is not None:
    return c.numbers.rising
  if c.codes is None:
    return False
  if not pc.all(pc.match_substring_regex(c.values, r"^\d{4}-")).as_py():
    return False  # an order of texts that is not that of times
  texts = pc.drop_null(c.codes.dictionary.take(c.codes.indices))
  return pc.all(pc.less_equal(texts[:-1], texts[1:])).as_py() is not False
