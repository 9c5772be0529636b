"""libsvm, libFM and libFFM lines -> rows.

label index:value index:value ...   # comment
label field:index:value ...
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recjax.config import Text
from recjax.data import lines
from recjax.data.rows import Rows, check_wanted, is_number, without
from recjax.data.text import DamagedLines, shown
from recjax.data.text_blocks import head
from recjax.errors import UserError

COLUMNS = {
  "label": "number",
  "features": "list of text",
  "values": "list of number",
}
# What Arrow casts to a float, but for words.
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def names(path: str, options: Text) -> dict[str, str]:
  """Returns the columns of a file and what they are, in words.

  Raises:
    UserError: the file cannot be read, or is not of this format.
  """
  del options
  _check(path)
  return dict(COLUMNS)


def _check(path: str) -> None:
  """Raises UserError where none of the first lines is of this format."""
  first = [x.split(b"#")[0].split() for x in head(path).split(b"\n")[:20]]
  first = [tokens for tokens in first if tokens]
  if first and not any(map(plausible, first)):
    line = b" ".join(first[0]).decode("utf-8", "replace")
    raise UserError(
      f"{path}, line 1: {shown(line)} is not 'label index:value ...': set"
      " data.format to what it is"
    )


def plausible(tokens: list[bytes]) -> bool:
  """Returns whether a line may be of this format."""
  return is_number(tokens[0].decode("latin-1")) and all(
    b":" in token for token in tokens[1:]
  )


def read(
  path: str, wanted: Mapping[str, str], options: Text, damaged: DamagedLines
) -> Iterator[Rows]:
  """Reads labels (strings), indices and values, some tens of MB at a time.

  Args:
    path: of the file, plain or packed by gzip, bzip2 or zstd.
    wanted: of 'label', 'features' (lists of strings: 'index', or 'field:index')
      and 'values' (lists of float32, as long).
    options: nothing of it matters here.
    damaged: takes the damaged lines, which are left out.

  Yields:
    The next rows.

  Raises:
    UserError: the file cannot be read; more damaged lines than are allowed.
  """
  del options
  check_wanted(path, wanted, list(COLUMNS))
  _check(path)
  for text, at, so_far in lines.read(path, damaged):
    text = pc.ascii_trim_whitespace(
      pc.replace_substring_regex(text, r"(?s)#.*", "")
    )
    keep = pc.not_equal(text, "").to_numpy(zero_copy_only=False)
    text, at = text.filter(pa.array(keep)), at[keep]
    columns, at = _parsed(path, text, at, damaged)
    if len(at):
      yield Rows(columns.select(list(wanted)), at, so_far)


def _parsed(
  path: str, text: pa.Array, at: np.ndarray, damaged: DamagedLines
) -> tuple[pa.Table, np.ndarray]:
  """Returns the columns of lines, and the numbers of the lines."""
  tokens = pc.ascii_split_whitespace(text)
  offsets, flat = tokens.offsets.to_numpy(), tokens.values
  row = np.repeat(np.arange(len(text)), np.diff(offsets))
  first = np.zeros(len(flat), bool)
  first[offsets[:-1]] = True
  pairs, row = flat.filter(pa.array(~first)), row[~first]
  ok = pc.match_substring_regex(pairs, r"^[^:].*:[^:]+$|^[^:]:[^:]+$")
  # The last ':' parts the value from what it belongs to.
  halves = pc.split_pattern(
    pc.if_else(ok, pairs, ":"), ":", max_splits=1, reverse=True
  ).values
  index, value = halves[::2], halves[1::2]
  number = pc.match_substring_regex(value, _NUMBER)
  bad: dict[int, tuple[str, str]] = {}
  for good, name, said in (
    (number, "values", "has no number after the last ':'"),
    (ok, "features", "is not index:value"),
  ):
    for i in np.flatnonzero(~good.to_numpy(zero_copy_only=False)).tolist():
      bad[int(row[i])] = name, f"{shown(pairs[i].as_py())} {said}"
  for i in sorted(bad):
    damaged.add(path, int(at[i]), *bad[i])
  counts = np.diff(offsets) - 1
  starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
  value = pc.if_else(number, value, "0").cast(pa.float32())
  table = pa.table(
    {
      "label": flat.filter(pa.array(first)),
      "features": pa.ListArray.from_arrays(pa.array(starts), index),
      "values": pa.ListArray.from_arrays(pa.array(starts), value),
    }
  )
  return without(table, at, bad)
