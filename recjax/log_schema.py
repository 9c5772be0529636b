"""What the columns of a log are: labels, numbers and ids, by their names.

  c.data.format = "parquet"  # or csv, jsonl, libsvm, one of your own
  c.schema = Schema(
    labels=("click",),
    numbers=(Number("price", transform="log1p"), Number("age", missing="mean")),
    features=(
      Id("user"),
      Id("item"),
      Ids("genres", most=6, separator="|", pooling="mean"),
      Ids("history", table="item", most=50, keep="last", pooling="none"),
      Hashed("user_agent", rows=100_000),
      Cross(("country", "device"), rows=10_000),
    ),
  )

An id is its text, of whatever type its column is: `1` and `"1"` are one id, and
so is `1.0`, since a column of integers with a hole in it becomes one of floats
on its way through pandas. What is missing is null, NaN, or one of the texts "",
"nan", "NaN", "null", "NULL" and "\\N". A label is 0 or 1, a probability, -1 or
1 (-1 counts as 0), or true or false; `rating > 3` makes one of a number.
"""

import operator
import re
from collections.abc import Callable

from recjax import schema as inputs
from recjax.config_fields import choice, dataclass, number
from recjax.errors import UserError

# How a label compares a column with a number.
_COMPARISONS: dict[str, Callable] = {
  ">=": operator.ge,
  "<=": operator.le,
  ">": operator.gt,
  "<": operator.lt,
  "==": operator.eq,
}


@dataclass
class Number:
  """A number, given to the model as it is or transformed.

  log1p is sign(x) log(1 + |x|); standard and minmax are fitted to the training
  split. A missing number is 0 to the model, or the training split's mean of
  what the transform makes of the others. With `buckets` it is an id instead:
  which of so many quantiles of the training split it lies in.
  """

  name: str
  transform: str = choice("none", "log1p", "standard", "minmax")
  missing: str = choice("zero", "mean")
  buckets: int = number(0, at_least=0, at_most=10_000)
  dim: int = number(0, at_least=0)  # of the buckets' table


@dataclass
class Id:
  """One id a sample."""

  name: str
  table: str = ""  # "" = one of its own, of the feature's name
  dim: int = number(0, at_least=0)  # of the table; 0 = embedding.dim
  # Of the table; 0 = data.min_count.
  min_count: int = number(0, at_least=0)


@dataclass
class Ids:
  """A bag of ids, or a sequence of them (pooling none).

  A list column, or text in which a separator parts the ids. Missing ones are
  left out.
  """

  name: str
  most: int = number(16, at_least=1)  # that count; of a longer one:
  keep: str = choice("first", "last")
  separator: str = "|"  # in text
  pooling: str = choice("sum", "mean", "none")
  # Column of as many numbers, what each id counts; "" = all count alike.
  weights: str = ""
  # Or in the same text, after the last of these: "ip:10.0:0.5" with ":" is
  # the id "ip:10.0" of weight 0.5.
  weight_separator: str = ""
  table: str = ""
  dim: int = number(0, at_least=0)
  min_count: int = number(0, at_least=0)

  @property
  def weighted(self) -> bool:
    """Whether ids have weights."""
    return bool(self.weights or self.weight_separator)


@dataclass
class Hashed:
  """One id of so many values that it is hashed to a row: CRC-32 modulo rows."""

  name: str
  rows: int = number(100_000, at_least=1)
  dim: int = number(0, at_least=0)


@dataclass
class Cross:
  """Several columns as one id, hashed to a row."""

  names: tuple[str, ...]
  rows: int = number(100_000, at_least=1)
  dim: int = number(0, at_least=0)

  @property
  def name(self) -> str:
    """Returns the name of the feature and its table: the columns', joined."""
    return "_x_".join(self.names)


Feature = Id | Ids | Hashed | Cross


@dataclass
class Schema:
  """The columns of a log; all others are left alone."""

  labels: tuple[str, ...] = ()  # the first is what a model learns
  numbers: tuple[Number, ...] = ()
  features: tuple[Feature, ...] = ()
  weight: str = ""  # column of sample weights, which losses are multiplied by
  # Column of the time, by which the last part tests (data.split); "" = the
  # order of the log. A number, or a date and time as in 2026-11-27 03:10:00.
  time: str = ""
  keep: tuple[str, ...] = ()  # columns that predictions repeat


# ---- What follows from it


def label_of(text: str) -> tuple[str, Callable | None]:
  """Reads a label: its column, and what makes 0 or 1 of a number.

  Raises:
    UserError: it compares with what is no number.
  """
  found = re.fullmatch(r"\s*(.+?)\s*(>=|<=|==|>|<)\s*(.+?)\s*", text)
  if not found:
    return text, None
  column, sign, than = found.groups()
  try:
    least = float(than)
  except ValueError:
    raise UserError(
      f"schema.labels: {text!r} compares with {than!r}, which is no number"
    ) from None
  compare = _COMPARISONS[sign]
  return column, lambda x: compare(x, least)


def table_of(feature: Feature) -> str:
  """Returns the name of the table that a feature looks up."""
  return getattr(feature, "table", "") or feature.name


def inputs_of(schema: Schema) -> inputs.Schema:
  """Returns the inputs of a sample.

  Raises:
    UserError: there is no label or feature, or a name comes twice.
  """
  for field, of in (("labels", schema.labels), ("features", schema.features)):
    if not of:
      raise UserError(
        f"schema.{field}: empty; say which columns of the log are which, as in "
        "configs/csv.py, or let --mode=inspect write a config to start from"
      )
  names = [f.name for f in (*schema.features, *schema.numbers)]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"schema: two inputs are named {name!r}; name each once")
  for f in schema.features:
    if isinstance(f, Ids) and f.weights and f.weight_separator:
      raise UserError(
        f"schema: {f.name}: weights are in a column or in the text; leave "
        "weights or weight_separator empty"
      )
  dims(schema)  # or an error
  return inputs.Schema(
    tuple(x.name for x in schema.numbers if not x.buckets),
    tuple(_input(f) for f in _with_tables(schema)),
    schema.labels,
    bool(schema.weight),
  )


def _with_tables(schema: Schema) -> tuple[Feature | Number, ...]:
  """Returns what has a table, in the order of the inputs' features."""
  return *schema.features, *(x for x in schema.numbers if x.buckets)


def _input(f: Feature | Number) -> inputs.Feature:
  if isinstance(f, Ids):
    return inputs.Feature(f.name, table_of(f), f.most, f.pooling, f.weighted)
  return inputs.Feature(f.name, table_of(f))


def min_counts(schema: Schema, default: int) -> dict[str, int]:
  """Returns how often an id of a table must come to have a row of its own."""
  found: dict[str, int] = {}
  for f in _with_tables(schema):
    few = isinstance(f, Hashed | Cross | Number)  # rows that are few anyhow
    own = 1 if few else f.min_count or default
    found[table_of(f)] = max(found.get(table_of(f), 0), own)
  return found


def dims(schema: Schema) -> dict[str, int]:
  """Returns the dim of each table that a feature gives one.

  Raises:
    UserError: two features give a table two dims.
  """
  found: dict[str, int] = {}
  for f in _with_tables(schema):
    if f.dim and found.setdefault(table_of(f), f.dim) != f.dim:
      raise UserError(
        f"schema: {f.name}: dim {f.dim}, but another feature gives table "
        f"{table_of(f)} dim {found[table_of(f)]}; a table has one"
      )
  return found
