"""JSON lines, libsvm and Parquet; any table through each format."""

import csv
import io
import json

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from recjax.config import Text
from recjax.data import (
  csv_rows,
  json_rows,
  libsvm_rows,
  parquet_rows,
  text_blocks,
)
from recjax.data.text import DamagedLines
from recjax.errors import UserError

FOUND = Text()
MARK = b"\xef\xbb\xbf"


def rows(reader, path, wanted, options=FOUND, limit=0):
  """Returns columns, numbers of rows, and (line, column, reason) of damage."""
  damaged = DamagedLines(limit)
  found, at = {name: [] for name in wanted}, []
  for part in reader.read(str(path), wanted, options, damaged):
    assert part.table.column_names == list(wanted)
    assert len(part.at) == part.table.num_rows > 0
    for name, cells in part.table.to_pydict().items():
      found[name] += cells
    at += part.at.tolist()
  return found, at, [line[1:] for line in damaged.lines]


@pytest.fixture
def read(tmp_path):
  def of(reader, data, wanted, limit=0):
    path = tmp_path / "x.log"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return rows(reader, path, wanted, limit=limit)

  return of


# ---- JSON lines


def test_json_values_come_as_they_are_written(read):
  lines = [
    '{"a": "0.10", "b": 12345678901234567890}',
    '{"a": 1, "b": -9223372036854775808}\r',
    "",
    '{"a": 1.0, "b": null}',
    '{"a": "2020-01-01 00:00:00", "b": 9223372036854775807}',
    '{"a": "", "b": true}',
  ]
  found, at, _ = read(json_rows, "\n".join(lines), {"b": "number", "a": "id"})
  assert found["a"] == ["0.10", "1", "1.0", "2020-01-01 00:00:00", None]
  assert found["b"] == [
    "12345678901234567890",
    "-9223372036854775808",
    None,
    "9223372036854775807",
    "1",
  ]
  assert at == [1, 2, 4, 5, 6]


def test_json_lists_and_objects_in_objects(read, tmp_path):
  lines = [
    '{"a": ["x", 1, null, "[1]", ""], "u": {"i": 1}}',
    '{"a": [], "u.i": 3}',
    '{"a": "s", "c.d": {"e/f~": "y"}}',
    '{"a": "[1]", "u": 7}',
  ]
  data = MARK + ("\n" + MARK.decode()).join(lines).encode()
  wanted = {"a": "id", "u.i": "id", "c.d.e/f~": "id"}
  found, _, _ = read(json_rows, data, wanted)
  assert found == {
    "a": [["x", "1", None, "[1]", ""], [], ["s"], ["[1]"]],
    "u.i": ["1", "3", None, None],
    "c.d.e/f~": [None, None, "y", None],
  }
  named = json_rows.names(str(tmp_path / "x.log"), FOUND)
  assert named["u.i"] == "integer"
  assert named["a"] == "list of integer and text or list of nothing or text"


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
  ("bad", "column", "reason"),
  [
    (b'{"a": tru}', "", "is not JSON: Expecting value"),
    (b'{"a": 1} x', "", "is not JSON"),
    (b"[1]", "", "is no JSON object"),
    (b'{"a": "\xff"}', "", "is not UTF-8"),
    (b'{"a": "\0"}', "", "is not JSON"),
    (b'{"a": {"b": 1}}', "a", "an object, or a list in a list"),
    (b'{"a": [[1]]}', "a", "an object, or a list in a list"),
    (DEEP.encode(), "a", "an object, or a list in a list"),
    (DEEP[:-9].encode(), "", "is not JSON"),
  ],
  ids=range(9),
)
def test_a_damaged_json_line_is_left_out(read, bad, column, reason):
  data = b'{"a": 1}\n' + bad + b'\n{"a": 2}\n' + bad + b"\n"
  found, at, damaged = read(json_rows, data, {"a": "id"}, limit=2)
  assert at == [1, 3]
  assert found["a"] in (["1", "2"], [["1"], ["2"]])
  assert [d[:2] for d in damaged] == [(2, column), (4, column)]
  assert all(reason in d[2] and len(d[2]) < 200 for d in damaged)
  with pytest.raises(UserError, match=r"x\.log, line 2"):
    read(json_rows, data, {"a": "id"})


@pytest.mark.parametrize(
  ("data", "said"),
  [
    ('[{"a": 1},\n{"a": 2}]', "is no JSON object: write an object a line (jq"),
    ('{\n  "a": 1\n}', "is no JSON object: write an object a line (jq"),
    ("a,b\n1,2", "is no JSON object: write an object a line, or set data.f"),
    ('{"aa": 1}', "has no column 'a' (nearest: 'aa'); it has 'aa'. These are"),
    (b"PAR1\0\0", "is a Parquet file, not text"),
    ("", "is empty"),
  ],
)
def test_no_json_lines(read, data, said):
  with pytest.raises(UserError) as e:
    read(json_rows, data, {"a": "id"}, limit=9)
  assert said in str(e.value)


# ---- libsvm


def test_libsvm_libfm_and_libffm(read):
  data = b"# c\n+1 1:0.5 2:1e3 # c\n-1\n\n0.5\t3:7:1 x:-.5\r\n"
  wanted = {"label": "number", "values": "number", "features": "id"}
  found, at, _ = read(libsvm_rows, data, wanted)
  assert found == {
    "label": ["+1", "-1", "0.5"],
    "values": [[0.5, 1000.0], [], [1.0, -0.5]],
    "features": [["1", "2"], [], ["3:7", "x"]],
  }
  assert at == [2, 3, 5]


@pytest.mark.parametrize(
  ("bad", "column"),
  [
    ("4", "features"),
    ("5:x", "values"),
    (":3", "features"),
    ("5:", "features"),
  ],
)
def test_a_damaged_libsvm_line_is_left_out(read, bad, column):
  data = f"1 1:1\n0 2:2 {bad}\n1 3:3\n"
  found, at, damaged = read(libsvm_rows, data, {"features": "id"}, limit=1)
  assert (found["features"], at) == ([["1"], ["3"]], [1, 3])
  assert damaged[0][:2] == (2, column)


@pytest.mark.parametrize("data", ["a,b\n1,2\n", "1 2 3\n", "1,2:3\n"])
def test_no_libsvm(read, data):
  with pytest.raises(UserError, match="is not 'label index:value"):
    read(libsvm_rows, data, {"label": "number"}, limit=9)


# ---- Parquet


def table(k=3):
  cells = {
    "a": ["x", None, "y"],
    "n": [1, 2, None],
    "l": [["a", None], [], None],
    "u": [{"i": "7", "d": {"x": 1}}, None, {"i": None, "d": None}],
    "b": [b"q", b"\xff", b"z"],
    "f.g": [1.5, float("nan"), 3.0],
  }
  return pa.table(cells).append_column(
    "s", pa.array(["p", "q", None], pa.large_string()).dictionary_encode()
  )


def test_parquet_columns_come_as_they_are(tmp_path):
  path = tmp_path / "x.parquet"
  pq.write_table(table(), path)
  wanted = dict.fromkeys(("s", "l", "u.i", "u.d.x", "a", "f.g", "n"), "id")
  found, at, _ = rows(parquet_rows, path, wanted | {"a": "text"})
  assert found.pop("f.g")[::2] == [1.5, 3.0]
  assert found == {
    "s": ["p", "q", None],
    "l": [["a", None], [], None],
    "u.i": ["7", None, None],
    "u.d.x": [1, None, None],
    "a": ["x", None, "y"],
    "n": [1, 2, None],
  }
  assert at == [1, 2, 3]
  (part,) = parquet_rows.read(
    str(path), {"a": "id", "s": "id", "n": "id"}, FOUND, DamagedLines(0)
  )
  codes = pa.dictionary(pa.int32(), pa.string())
  assert part.table.schema.types == [codes, codes, pa.int64()]
  assert part.read == path.stat().st_size
  assert parquet_rows.names(str(path), FOUND)["u.d.x"] == "int64"


def test_a_parquet_row_that_is_not_utf8_is_left_out(tmp_path):
  path = tmp_path / "x.parquet"
  pq.write_table(table(), path)
  for kind in ("id", "text"):
    found, at, damaged = rows(parquet_rows, path, {"b": kind}, limit=1)
    assert (found["b"], at) == (["q", "z"], [1, 3])
    assert damaged == [(2, "b", "is not UTF-8")]


def test_parquet_is_streamed(tmp_path, monkeypatch):
  path = tmp_path / "x.parquet"
  cells = pa.table({"a": [f"{i:0100d}" for i in range(5_000)]})
  pq.write_table(cells, path, row_group_size=2_000)
  monkeypatch.setattr(parquet_rows, "CHUNK_BYTES", 10_000)
  parts = list(
    parquet_rows.read(str(path), {"a": "id"}, FOUND, DamagedLines(0))
  )
  assert max(len(p.at) for p in parts) < 300
  assert np.concatenate([p.at for p in parts]).tolist() == list(range(1, 5_001))
  assert pa.concat_tables([p.table.cast(cells.schema) for p in parts]).equals(
    cells
  )


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (lambda raw: raw[:-9], "is truncated or damaged at its end; fetch it"),
    (lambda raw: raw[:-90] + bytes(82) + raw[-8:], "is damaged ("),
    (lambda raw: b"PAR1" + b"\xff" * 4 + b"PAR1", "is damaged ("),
    (lambda raw: raw[:4] + bytes(60) + raw[64:], "is damaged ("),
    (lambda raw: b"a,b\n1,2\n", "is no Parquet file: it begins with b'a,b"),
    (lambda raw: raw[:-4] + b"PARE", "is encrypted"),
    (lambda raw: b"", "is empty"),
  ],
)
def test_damaged_parquet(tmp_path, damage, said):
  path = tmp_path / "x.parquet"
  pq.write_table(table(), path)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError) as e:
    rows(parquet_rows, path, {"a": "id", "n": "id"})
  assert said in str(e.value)
  assert "x.parquet" in str(e.value)


def test_what_is_wrong_with_parquet(tmp_path):
  path = tmp_path / "x.parquet"
  pq.write_table(table(), path)
  with pytest.raises(UserError, match=r"no column 'A', 'u\.I' \(nearest"):
    rows(parquet_rows, path, {"A": "id", "u.I": "id"})
  with pytest.raises(UserError, match="is a directory"):
    rows(parquet_rows, tmp_path, {"a": "id"})
  with pytest.raises(UserError, match="does not exist"):
    rows(parquet_rows, "s3://b/x.parquet", {"a": "id"})


# ---- Any table


WORDS = st.one_of(
  st.none(),
  st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
  st.text('",;|\t\r\n\ufeff a', max_size=6),
  st.integers(-(2**63), 2**63 - 1).map(str),
)
TABLES = st.lists(
  st.tuples(WORDS, WORDS, st.lists(WORDS, max_size=3)), min_size=1, max_size=12
)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
  TABLES, st.sampled_from(("\n", "\r\n")), st.booleans(), st.integers(400, 900)
)
def test_any_table_comes_back_from_each_format(
  tmp_path_factory, cells, end, mark, chunk
):
  folder = tmp_path_factory.mktemp("any")
  names = ('a "b",\n', "ü;.c", "bag")
  missing = [[x or None for x in column] for column in zip(*cells, strict=True)]
  wanted = dict(zip(names[:2], ("id", "text"), strict=True))
  mark = MARK * mark
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(text_blocks, "CHUNK_BYTES", chunk)
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerow(names[:2])
    writer.writerows(row[:2] for row in cells)
    path = folder / "x.csv"
    path.write_bytes(mark + out.getvalue().encode())
    found, _, _ = rows(csv_rows, path, wanted)
    assert found == dict(zip(names[:2], missing[:2], strict=True))

    dump = json.JSONEncoder(ensure_ascii=False).encode
    lines = [dump(dict(zip(names, row, strict=True))) for row in cells]
    path = folder / "x.jsonl"
    path.write_bytes(mark + end.join(lines).encode())
    found, at, _ = rows(json_rows, path, wanted | {"bag": "id"})
    assert [found[n] for n in names[:2]] == missing[:2]
    assert [x or [] for x in found["bag"]] == [row[2] for row in cells]
    assert at == list(range(1, len(cells) + 1))

  path = folder / "x.parquet"
  columns = [
    pa.array(c, pa.string()) for c in zip(*(r[:2] for r in cells), strict=True)
  ]
  bags = pa.array([row[2] for row in cells], pa.list_(pa.string()))
  pq.write_table(pa.table([*columns, bags], names=names), path)
  found, _, _ = rows(parquet_rows, path, wanted | {"bag": "id"})
  assert list(found.values()) == [list(c) for c in zip(*cells, strict=True)]
