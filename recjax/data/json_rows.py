"""JSON lines, an object each -> rows.

DuckDB's functions take the wanted values out. They read what Arrow's reader
refuses or guesses at: a column that is a number here and a string there, dates,
integers past int64. Everything comes as text, as from CSV; lists as lists of
text.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.config import Text
from recjax.data import lines
from recjax.data.rows import Rows, check_wanted, without
from recjax.data.text import DamagedLines, shown
from recjax.data.text_blocks import head
from recjax.data.vocabulary import open_engine
from recjax.errors import UserError

_LOOKED_AT = 1_000  # lines
_MEMORY_MB = 2_048
_STRINGS = pa.list_(pa.string())


def names(path: str, options: Text) -> dict[str, str]:
  """Returns the columns of a file and what they look like, in words.

  Raises:
    UserError: the file cannot be read.
  """
  del options
  keys = _Keys({}, {})
  for value in _sample(path):
    _look(value, ("", ""), keys)
  return {
    name: " or ".join(sorted(words)) or "empty"
    for name, words in keys.words.items()
  }


class _Keys(NamedTuple):
  """The keys of objects, by their names: `user.id` of an object in one."""

  words: dict[str, set[str]]  # what their values are
  pointers: dict[str, set[str]]  # where they are


def _sample(path: str) -> list[dict]:
  """Returns the first objects of a file.

  Raises:
    UserError: it is no text, or its lines are no objects.
  """
  found, other = [], ""
  data = head(path)
  cut = data.rpartition(b"\n")[0] or data
  for line in cut.split(b"\n")[:_LOOKED_AT]:
    try:
      value = json.loads(line)
    except (ValueError, RecursionError):
      value = None
    if isinstance(value, dict):
      found.append(value)
    elif line.strip() and not other:
      other = line.decode("utf-8", "replace").strip()
  if not found and other and not _objects(cut):
    todo = "write an object a line"
    if other.startswith(("[", "{")):
      todo += " (jq -c '.[]' or jq -c . does)"
    raise UserError(
      f"{path}, line 1: {shown(other)} is no JSON object: {todo}, or set"
      " data.format to what it is"
    )
  return found


def _objects(data: bytes) -> bool:
  """Returns whether any line is an object, as DuckDB sees it."""
  return any(
    line.lstrip().startswith(b"{") and line.rstrip().endswith(b"}")
    for line in data.split(b"\n")[:_LOOKED_AT]
  )


def _look(value: dict, inside: tuple[str, str], keys: _Keys) -> None:
  """Adds the keys of an object that is inside (prefix of names, pointer)."""
  for key, one in value.items():
    name = inside[0] + key
    pointer = f"{inside[1]}/{key.replace('~', '~0').replace('/', '~1')}"
    if isinstance(one, dict):
      _look(one, (name + ".", pointer), keys)
      continue
    keys.pointers.setdefault(name, set()).add(pointer)
    words = keys.words.setdefault(name, set())
    if isinstance(one, list):
      of = {w for x in one if (w := _word(x))}
      words.add("list of " + (" and ".join(sorted(of)) or "nothing"))
    elif word := _word(one):
      words.add(word)


def _word(value: object) -> str:
  """Returns what a value is; '' of null."""
  for kind, word in (
    (bool, "true or false"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
    (list, "list"),
    (dict, "object"),
  ):
    if isinstance(value, kind):
      return word
  return ""


def read(
  path: str, wanted: Mapping[str, str], options: Text, damaged: DamagedLines
) -> Iterator[Rows]:
  """Reads values of a file's objects, some tens of MB at a time.

  Args:
    path: of the file, plain or packed by gzip, bzip2 or zstd.
    wanted: the kinds of columns, by name: of a key, or of keys of objects in
      objects with '.' between them. 'number' gives true as 1 and false as 0.
    options: nothing of it matters here.
    damaged: takes the damaged lines, which are left out.

  Yields:
    The next rows. Columns are strings: of a number what DuckDB writes (1, 1.0,
    and 0.1 of 0.10; an integer as it is). If any of the first lines or of these
    rows has a list in a column, it holds lists of strings; other values are
    lists of one. Null, a key that is missing and an empty string are null.

  Raises:
    UserError: the file cannot be read; a key is not there; more damaged lines
      than are allowed.
  """
  keys, sample = _Keys({}, {}), _sample(path)
  for value in sample:
    _look(value, ("", ""), keys)
  hint = f"These are the keys of its first {len(sample):,} lines"
  check_wanted(path, wanted, list(keys.words), hint)
  lists = {n for n in wanted if any("list" in w for w in keys.words[n])}
  where = [(n, p) for n in wanted for p in sorted(keys.pointers[n])]
  with open_engine(_MEMORY_MB, "") as engine:
    engine.execute("SET preserve_insertion_order = true")
    for part, at, so_far in lines.read(path, damaged):
      table, at = _parsed(engine, path, (part, at), where, damaged)
      if len(at):
        columns = {
          n: _cleaned(table.column(n).combine_chunks(), kind, n in lists)
          for n, kind in wanted.items()
        }
        yield Rows(pa.table(columns), at, so_far)


def _parsed(
  engine: duckdb.DuckDBPyConnection,
  path: str,
  part: tuple[pa.Array, np.ndarray],
  where: list[tuple[str, str]],
  damaged: DamagedLines,
) -> tuple[pa.Table, np.ndarray]:
  """Returns columns of lines, by (name, pointer), and the lines' numbers."""
  text, at = part
  good = _query(
    engine,
    text,
    "SELECT coalesce(CASE WHEN json_valid(line) THEN json_type(line) ="
    " 'OBJECT' END, false) FROM lines",
  )[0].to_numpy(zero_copy_only=False)
  for i in np.flatnonzero(~good).tolist():
    damaged.add(path, int(at[i]), "", _reason(text[i].as_py()))
  if not good.all():
    text, at = text.filter(pa.array(good)), at[good]
  cells = _query(
    engine,
    text,
    f"SELECT {', '.join(f's[{i + 1}]' for i in range(len(where)))} FROM"
    " (SELECT json_extract_string(line, $paths) AS s FROM lines)",
    {"paths": [p for _, p in where]},
  )
  columns: dict[str, pa.Array] = {}
  bad: dict[int, tuple[str, str]] = {}
  for (name, pointer), cell in zip(where, cells, strict=True):
    cell, nested = _lists(engine, text, pointer, cell)
    for i in nested:
      bad[i] = name, "an object, or a list in a list, and no value"
    columns[name] = _either(columns[name], cell) if name in columns else cell
  for i in sorted(bad):
    damaged.add(path, int(at[i]), *bad[i])
  return without(pa.table(columns), at, bad)


def _query(
  engine: duckdb.DuckDBPyConnection,
  text: pa.Array,
  query: str,
  values: Mapping[str, object] | None = None,
) -> list[pa.Array]:
  """Returns the columns of a query of the table `lines`, in its order."""
  engine.register("lines", pa.table({"line": text}))
  found = engine.sql(query, params=values).to_arrow_table()
  engine.unregister("lines")
  return [c.combine_chunks() for c in found.columns]


def _reason(line: str) -> str:
  """Says what is wrong with a line."""
  try:
    value = json.loads(line)
  except RecursionError:
    return f"{shown(line.strip())} is not JSON"
  except ValueError as e:
    return f"{shown(line.strip())} is not JSON: {e}"
  if isinstance(value, dict):
    return f"{shown(line.strip())} is not JSON"
  return f"{shown(line.strip())} is no JSON object"


def _lists(
  engine: duckdb.DuckDBPyConnection,
  text: pa.Array,
  pointer: str,
  cells: pa.Array,
) -> tuple[pa.Array, list[int]]:
  """Makes lists of the cells if one of them is a list.

  Returns:
    (strings or lists of strings, the rows that hold an object or lists in
    lists).
  """
  if not _open(cells).any():
    return cells, []
  kind, lists = _query(
    engine,
    text,
    "SELECT json_type(line, $p), CASE WHEN json_type(line, $p) = 'ARRAY' THEN"
    " from_json(json_extract(line, $p), '[\"VARCHAR\"]') END FROM lines",
    {"p": pointer},
  )
  is_object = pc.fill_null(pc.equal(kind, "OBJECT"), False)
  bad = is_object.to_numpy(zero_copy_only=False).copy()
  if not pc.any(pc.equal(kind, "ARRAY")).as_py():
    return cells, np.flatnonzero(bad).tolist()
  lists = lists.cast(_STRINGS)
  if _open(lists.flatten()).any():
    (quoted,) = _query(
      engine,
      text,
      "SELECT CASE WHEN json_type(line, $p) = 'ARRAY' THEN"
      " from_json(json_extract(line, $p), '[\"JSON\"]')::VARCHAR[] END"
      " FROM lines",
      {"p": pointer},
    )
    row = pc.list_parent_indices(quoted).to_numpy()
    bad[row[_open(quoted.flatten())]] = True
  return _either(lists, cells), np.flatnonzero(bad).tolist()


def _open(cells: pa.Array) -> np.ndarray:
  """Returns whether each cell begins as a list or an object does."""
  found = pc.or_(pc.starts_with(cells, "["), pc.starts_with(cells, "{"))
  return pc.fill_null(found, False).to_numpy(zero_copy_only=False)


def _either(one: pa.Array, other: pa.Array) -> pa.Array:
  """Returns one's cells, and the other's where those are null."""
  if pa.types.is_list(one.type) != pa.types.is_list(other.type):
    one, other = (
      c if pa.types.is_list(c.type) else _lists_of_one(c) for c in (one, other)
    )
  return pc.coalesce(one, other)


def _lists_of_one(cells: pa.Array) -> pa.Array:
  """Returns lists of one string; null of null."""
  there = cells.is_valid().to_numpy(zero_copy_only=False)
  offsets = np.concatenate([[0], np.cumsum(there)]).astype(np.int32)
  return pa.ListArray.from_arrays(
    pa.array(offsets), cells.drop_null(), mask=pa.array(~there)
  )


def _cleaned(cells: pa.Array, kind: str, lists: bool) -> pa.Array:
  """Makes empty strings null, of true and false numbers, and lists if asked."""
  if pa.types.is_list(cells.type):
    return cells
  if kind == "number":
    for word, number in (("true", "1"), ("false", "0")):
      cells = pc.if_else(pc.equal(cells, word), number, cells)
  cells = pc.if_else(pc.equal(cells, ""), None, cells)
  return _lists_of_one(cells) if lists else cells
