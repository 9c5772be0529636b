"""What inspect_log.py has found: a report, and a config file to start from."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from recjax import log_schema
from recjax.config import Config, Embedding, Text
from recjax.data.column_facts import Column
from recjax.data.inspect_log import Inspection
from recjax.data.text import shown
from recjax.log_schema import Hashed, Id, Ids, Number, Schema

_WIDTH = 34  # of names, and of what a column holds
_FIXED = ("criteo", "movielens", "synthetic")  # they need no schema
# Numbers of a row's slot variables, by the rows' dim.
SLOTS = {
  "rowwise_adagrad": lambda dim: 1,
  "sgd": lambda dim: 0,
  "adagrad": lambda dim: dim,
  "adam": lambda dim: 2 * dim,
}


# ---- The report


def report(found: Inspection, embedding: Embedding, schema: Schema) -> str:
  """Returns what a log holds, column by column, and the tables' memory.

  Args:
    found: what was found.
    embedding: how tables would be stored.
    schema: one that was given, to be shown beside; empty = none.
  """
  whole = found.rows >= found.total
  said = "all" if whole else f"of about {found.total:,} by their bytes"
  n = len(found.paths)
  lines = [
    f"{n:,} file{'s' if n > 1 else ''}, {_size(found.bytes)}, "
    f"data.format={found.data.format}: {found.rows:,} rows looked at, {said}"
  ]
  if found.damaged.lines:
    path, line, field, reason = found.damaged.lines[0]
    lines.append(
      f"{len(found.damaged.lines):,} damaged rows among them, the first:"
      f" {path}, line {line}{', ' + field if field else ''}: {reason}"
    )
  head = ["column", "type", "missing", "values", "top 1%", "holds", "proposed"]
  beside = bool(schema.labels or schema.features)
  rows = [head + ["config"] * beside]
  for c in found.columns:
    of = found.proposal.columns[c.name]
    rows.append(
      [
        *(_cut(_name(c.name)), _cut(c.type), f"{of.missing:.1%}"),
        *(_distinct(of, found), f"{of.skew:.0%}", _cut(_holds(of))),
        _proposed(c, found),
      ]
      + [role(schema, c.name) or "-"] * beside
    )
  lines += ["", *_aligned(rows), "", *_memory(found, embedding)]
  if not found.proposal.schema.labels:
    lines.append("no column looks like a label: name it in schema.labels")
  return "\n".join(lines)


def _proposed(c: Column, found: Inspection) -> str:
  why = found.proposal.left_out.get(c.name)
  if why:
    return f"left out: {_cut(why, 60)}"
  return role(found.proposal.schema, c.name)


def role(schema: Schema, name: str) -> str:
  """Returns what a schema makes of a column, in a few words; '' if nothing."""
  out = [
    "label" if label == name else f"label: {label}"
    for label in schema.labels
    if log_schema.label_of(label)[0] == name
  ]
  out += ["weight"] * (schema.weight == name != "")
  out += ["time"] * (schema.time == name != "")
  out += ["keep"] * (name in schema.keep)
  for x in schema.numbers:
    if x.name == name:
      out.append(f"number, {x.transform}" + ", buckets" * bool(x.buckets))
  for f in schema.features:
    if isinstance(f, log_schema.Cross):
      out += [f"in {f.name}"] * (name in f.names)
    elif isinstance(f, Ids) and f.weights == name:
      out.append(f"weights of {f.name}")
    elif f.name == name:
      out.append(_of_feature(f))
  return ", ".join(out)


def _of_feature(f: Id | Ids | Hashed) -> str:
  if isinstance(f, Hashed):
    return "id, hashed"
  if isinstance(f, Id):
    return "id" + f" of {f.table}" * bool(f.table)
  kind = "history" if f.keep == "last" else "bag"
  kind += ", not pooled" * (kind == "bag" and f.pooling == "none")
  return kind + f" of {f.table}" * bool(f.table)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
  """Yields the lines of a table."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = (x.ljust(w) for x, w in zip(row, widths, strict=True))
    yield "  ".join(cells).rstrip()


def _name(text: str) -> str:
  """Returns text as it is, escaped where it is not printable."""
  return text if text.isprintable() else repr(text)


def _cut(text: str, width: int = _WIDTH) -> str:
  text = _name(text)
  return text if len(text) <= width else text[: width - 3] + "..."


def _distinct(c: Column, found: Inspection) -> str:
  """Returns the distinct values of the sample, and of the log by estimate."""
  whole = c.distinct_of(found.total)
  return f"{c.distinct:,}" + f" (~{_round(whole)})" * (whole > c.distinct)


def _round(x: int) -> str:
  """Returns an estimate, two digits of it."""
  digits = max(0, len(str(x)) - 2)
  return f"{round(x, -digits):,}"


def _holds(c: Column) -> str:
  """Returns what is in a column: the range of numbers, lengths, examples."""
  out = []
  if c.lengths is not None:
    out.append(f"{c.lengths.mean():.3g} each, longest {c.longest}")
  if c.numbers is not None and c.distinct > 2:
    x = c.numbers
    out.append(f"{x.low:.4g} to {x.high:.4g}, mean {x.mean:.3g}")
  else:
    out.append(" ".join(_cut(x, 14) for x in c.values[:3].to_pylist()))
  return "; ".join(out)


# ---- Memory


def tables(found: Inspection) -> dict[str, int]:
  """Returns the rows of each table: its distinct values, by estimate."""
  out: dict[str, int] = {}
  for f in found.proposal.schema.features:
    table = log_schema.table_of(f)
    rows = found.proposal.columns[f.name].distinct_of(found.total)
    out[table] = max(out.get(table, 0), rows)
  return out


def _memory(found: Inspection, embedding: Embedding) -> Iterator[str]:
  """Yields what the tables would take."""
  dim, optimizer = embedding.dim, embedding.optimizer
  of_row = 4 * dim, 4 * SLOTS[optimizer](dim)
  rows = sorted(tables(found).items(), key=lambda x: -x[1])
  total = sum(n for _, n in rows)
  yield (
    f"tables, an estimate: {len(rows)} with {_round(total)} rows of dim {dim}:"
    f" {_size(total * of_row[0])}, and {_size(total * of_row[1])} for"
    f" {optimizer}'s slots"
  )
  for name, n in rows[:5]:
    yield f"  {_cut(_name(name))}: {_round(n)} rows, {_size(n * sum(of_row))}"
  if len(rows) > 5:
    yield f"  and {len(rows) - 5} smaller ones"


def _size(n: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if n < 1000:
      return f"{n:.3g} {unit}"
    n /= 1000
  return f"{n:,.3g} TB"


# ---- The config file


def config_file(found: Inspection, name: str = "") -> str:
  """Returns a config file that trains on the log as it is proposed.

  Args:
    found: what was found.
    name: of the file.
  """
  plain = name if re.fullmatch(r"[\w./-]+", name) else "mine.py"
  schema, fixed = found.proposal.schema, found.data.format in _FIXED
  kinds = {type(x).__name__ for x in (*schema.numbers, *schema.features)}
  lines = [
    '"""A config that --mode=inspect has written: a start, to be corrected.',
    "",
    f"  python main.py --config {plain}",
    '"""',
    "",
    "from recjax.config import Config",
  ]
  if not fixed:
    lines.append(
      f"from recjax.log_schema import {', '.join(sorted(kinds | {'Schema'}))}"
    )
  lines += ["", "", "def get_config() -> Config:", "  c = Config()"]
  lines += (f"  {line}" if line else "" for line in _settings(found, fixed))
  return "\n".join([*lines, "  return c", ""])


def _settings(found: Inspection, fixed: bool) -> Iterator[str]:
  """Yields the lines that set fields."""
  data, proposal = found.data, found.proposal
  yield f"c.data.format = {_quoted(data.format)}"
  yield f"c.data.train = {_quoted(data.train)}"
  if data.test:
    yield f"c.data.test = {_quoted(data.test)}"
  for f in dataclasses.fields(Text):
    value = getattr(data.text, f.name)
    if value != getattr(Text(), f.name):
      yield f"c.data.text.{f.name} = {_value(value)}"
  split, why = proposal.split
  yield f"c.data.split = {_quoted(split)}  # {why}"
  yield "c.data.min_count = 2  # rarer ids share a row of their table"
  if bad := _bad_rows(found):
    yield f"c.data.max_bad_rows = {bad:,}".replace(",", "_") + (
      "  # damaged, or without a label"
    )
  if fixed:
    longest = [f.most for f in proposal.schema.features if isinstance(f, Ids)]
    if data.format == "criteo" and longest:
      of = (getattr(f, "most", 1) for f in proposal.schema.features)
      yield f"c.data.hotness = {_value(tuple(of))}"
  else:
    yield from _schema(found)
  yield f"c.embedding.dim = {Config().embedding.dim}"
  if _vectors(proposal.schema) < 2:
    yield 'c.model.name = "dcnv2"  # dlrm needs two features'
  bottom = (64, 32) if proposal.schema.numbers else ()
  yield f"c.model.bottom = {bottom}" + "  # no numbers" * (not bottom)
  yield "c.model.top = (128, 64)"
  yield f"c.train.batch_size = {_batch_size(found.total)}"
  yield f"c.train.epochs = {1 if found.total >= 50_000 else 3}"


def _vectors(schema: Schema) -> int:
  """Returns how many vectors a model would interact, for dlrm 2 at least."""
  of = (
    f.most if isinstance(f, Ids) and f.pooling == "none" else 1
    for f in schema.features
  )  # fmt: skip
  return bool(schema.numbers) + sum(of)


def _batch_size(rows: int) -> int:
  """Returns a batch size that gives a log of so many rows some 500 steps."""
  return 2 ** min(max(round(math.log2(max(rows, 1) / 500)), 5), 11)


def _bad_rows(found: Inspection) -> int:
  """Returns how many rows to skip: twice what the sample lets expect."""
  bad = len(found.damaged.lines)
  for label in found.proposal.schema.labels:
    name = log_schema.label_of(label)[0]
    bad += round(found.proposal.columns[name].missing * found.rows)
  return math.ceil(2 * bad * found.total / max(found.rows, 1))


def _schema(found: Inspection) -> Iterator[str]:
  """Yields the lines of the schema, with what each column holds."""
  proposal, schema = found.proposal, found.proposal.schema
  if not schema.labels:
    yield "# No column looks like a label: name it here."
  yield "c.schema = Schema("
  yield f"  labels={_value(schema.labels)},"
  for field, of in (("numbers", schema.numbers), ("features", schema.features)):
    if of:
      yield f"  {field}=("
      for x in of:
        c = proposal.columns[x.name]
        yield from _commented(f"    {_written(x)},", _comment(x, c, found))
      yield "  ),"
  if schema.weight:
    yield f"  weight={_value(schema.weight)},"
  if schema.time:
    yield f"  time={_value(schema.time)},"
  if schema.keep:
    yield f"  keep={_value(schema.keep)},"
  yield ")"
  if proposal.left_out:
    yield "# Left out:"
    for name, why in proposal.left_out.items():
      yield f"#   {shown(name)}: {_cut(why, 100)}"


def _commented(line: str, comment: str) -> Iterator[str]:
  """Yields a line and its comment, above it where it is too long."""
  if len(line) + len(comment) < 74:
    yield f"{line}  # {comment}"
  else:
    yield f"    # {comment}"
    yield line


def _comment(x: Number | Id | Ids | Hashed, c: Column, found: Inspection):
  """Returns what a column holds, in a few words."""
  missing = f", {c.missing:.1%} missing" if c.missing else ""
  if isinstance(x, Number):
    return _holds(c) + missing
  each = "" if c.lengths is None else f", {c.lengths.mean():.3g} each"
  return f"{_distinct(c, found)} values{each}{missing}"


def _written(x: Number | Id | Ids | Hashed) -> str:
  """Returns the call that makes an input, without what is its default."""
  given = [_value(x.name)]
  for f in dataclasses.fields(x):
    value = getattr(x, f.name)
    if f.name != "name" and value != f.default:
      given.append(f"{f.name}={_value(value)}")
  return f"{type(x).__name__}({', '.join(given)})"


def _value(value: object) -> str:
  """Returns a value as Python has it."""
  if isinstance(value, str):
    return _quoted(value)
  if isinstance(value, tuple):
    return _tuple(map(_value, value))
  return repr(value)


def _tuple(values: Iterable[str]) -> str:
  given = list(values)
  return f"({', '.join(given)}{',' * (len(given) == 1)})"


def _quoted(text: str) -> str:
  """Returns a string's literal; no text can end it, as repr escapes."""
  plain = text.isprintable() and not set('"\\') & set(text)
  return f'"{text}"' if plain else repr(text)
