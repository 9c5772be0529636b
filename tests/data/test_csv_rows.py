"""CSV and TSV: what is read, what is damaged, and what is said."""

import bz2
import gzip

import numpy as np
import pyarrow as pa
import pytest

from recjax.config import Text
from recjax.data import csv_rows, text_blocks
from recjax.data.text import DamagedLines
from recjax.errors import UserError

FOUND = Text()
AB = {"a": "id", "b": "text"}


def write(path, data):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return str(path)


def rows(path, wanted=AB, options=FOUND, limit=0):
  damaged = DamagedLines(limit)
  found, at = [], []
  for part in csv_rows.read(path, wanted, options, damaged):
    assert part.table.column_names == list(wanted)
    assert len(part.at) == part.table.num_rows
    found += [tuple(r.values()) for r in part.table.to_pylist()]
    at += part.at.tolist()
  return found, at, [line[1:] for line in damaged.lines]


def read(tmp_path, data, *args, **kwargs):
  return rows(write(tmp_path / "x.csv", data), *args, **kwargs)


def error(tmp_path, data, *args, **kwargs):
  with pytest.raises(UserError) as e:
    read(tmp_path, data, *args, **kwargs)
  return str(e.value)


def test_columns_come_by_name_and_kind_in_the_order_asked_for(tmp_path):
  path = write(tmp_path / "x.csv", "z,b,a\n1,2,3\n4,,\n")
  (part,) = csv_rows.read(path, AB, Text(), DamagedLines(0))
  assert part.table.schema.types == [
    pa.dictionary(pa.int32(), pa.string()),
    pa.string(),
  ]
  assert part.table.to_pydict() == {"a": ["3", None], "b": ["2", None]}
  assert part.at.tolist() == [2, 3]
  assert part.read == 16
  assert csv_rows.names(path, Text()) == {
    "z": "integer",
    "b": "integer",
    "a": "integer",
  }


@pytest.mark.parametrize("separator", list(",\t;|"))
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_are_found(tmp_path, separator, end):
  text = f"a{separator}b{end}1{separator}x:y{end}2{separator}z"
  assert read(tmp_path, text)[:2] == ([("1", "x:y"), ("2", "z")], [2, 3])


def test_a_bag_does_not_hide_the_separator(tmp_path):
  assert (
    read(tmp_path, "a,b\n1|2|3,4|5|6\n1|2|3,4|5|6\n")[0]
    == [("1|2|3", "4|5|6")] * 2
  )
  assert read(
    tmp_path, "1;2\tx\n3;4\ty\n", options=Text(header=False, names=("a", "b"))
  )[0] == [("1;2", "x"), ("3;4", "y")]


@pytest.mark.parametrize("chunk", [1 << 20, 40])
def test_quoted_fields_hold_anything(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", chunk)
  text = '"a","b"\n"1,2","x\ny"\r\n"",""\n\n"q""q",5" pipe\n"\r","\n\n,"\n'
  found, at, _ = read(tmp_path, text)
  assert found == [
    ("1,2", "x\ny"), (None, None), ('q"q', '5" pipe'), ("\r", "\n\n,")
  ]  # fmt: skip
  assert at == [2, 4, 6, 7]


def test_quotes_are_text_where_they_are_told_to_be(tmp_path):
  found, _, _ = read(tmp_path, 'a,b\n"1,2"\n', options=Text(quote=""))
  assert found == [('"1', '2"')]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, "zstd"])
def test_packed_files_with_marks(tmp_path, pack):
  data = b"\xef\xbb\xbfa,b\n1,2\n\xef\xbb\xbf3,4\n"
  if pack == "zstd":
    pack = lambda data: pa.compress(data, "zstd", asbytes=True)
  found, at, _ = read(tmp_path, pack(data))
  assert (found, at) == ([("1", "2"), ("3", "4")], [2, 3])
  if pack is not bytes:
    whole = pack(data + np.random.default_rng(0).bytes(9_000).hex().encode())
    said = error(tmp_path, whole[: len(whole) * 4 // 5])
    assert "truncated or damaged" in said


def test_header_and_names(tmp_path):
  said = Text(header=False)
  assert read(tmp_path, "1,2\n", {"2": "id"}, said)[0] == [("2",)]
  said = Text(names=("a", "b"))
  assert read(tmp_path, "x,y\n1,2\n", options=said)[0] == [("1", "2")]
  said = Text(header=False, names=("a", "b"))
  assert read(tmp_path, "x,y\n1,2\n", options=said)[1] == [1, 2]


BAD = [
  (b"1,2,3\n", "", "3 fields where 2 are expected"),
  (b"1\n", "", "1 fields where 2 are expected"),
  (b"1\r2,3\n", "a", "holds a carriage return"),
  (b"1,\xff\n", "b", r"b'\xff' is not UTF-8"),
  (b"1,\0\n", "b", r"b'\x00' holds a NUL"),
  (b'1,"x\ny","z"\n', "", "3 fields where 2 are expected"),
]


@pytest.mark.parametrize(("bad", "column", "reason"), BAD)
@pytest.mark.parametrize("quoted", [b"", b'7,"8\n9"\n'])
def test_a_damaged_row_is_named_and_left_out(
  tmp_path, bad, column, reason, quoted
):
  data = b"a,b\n\n" + b"1,2\n" * 3 + quoted + bad + b"5,6\n" + bad + quoted
  found, at, damaged = read(tmp_path, data, limit=2)
  line = 6 + quoted.count(b"\n")
  after = line + bad.count(b"\n")
  cells = [("7", "8\n9")] if quoted else []
  assert found == [("1", "2")] * 3 + cells + [("5", "6")] + cells
  assert at[:3] == [3, 4, 5]
  assert at[3 + len(cells)] == after
  assert [(at, of) for at, of, _ in damaged] == [
    (line, column),
    (after + 1, column),
  ]
  assert all(reason in said for _, _, said in damaged)
  assert f"x.csv, line {line}" in error(tmp_path, data)
  assert read(tmp_path, b"a,b\n" + bad, limit=1)[0] == []


def test_bytes_of_columns_that_nobody_wants_do_not_matter(tmp_path):
  data = b"a,b\n\xff,2\n1,\xff\n"
  found, _, damaged = read(tmp_path, data, {"a": "id"}, limit=1)
  assert (found, damaged[0][:2]) == ([("1",)], (2, "a"))


@pytest.mark.parametrize("chunk", [1 << 20, 40])
def test_an_open_quote_is_an_error(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", chunk)
  said = error(tmp_path, 'a,b\n1,2\n3,"x\n' + "5,6\n" * 40, limit=9)
  assert "line 3: a quote opens and does not close" in said
  assert "data.text.quote=''" in said
  found, _, damaged = read(tmp_path, 'a,b\n1,2\n3,"x', limit=1)
  assert (found, damaged[0][0]) == ([("1", "2")], 3)


WRONG = [
  ("a,c\n1,2\n", Text(), "has no column 'b' (nearest: 'bb'); it has 'a', 'c'"),
  ("1,2\n3,4\n", Text(), "holds numbers such as '1' and looks like data"),
  (
    "a,b\n1,2\n",
    Text(header=False, names=("a", "b")),
    "set data.text.header=T",
  ),
  ("a,b\n1,2\n", Text(header=False), "line 1 names the columns"),
  ("a;b\n1;2\n", Text(","), "line 1 holds semicolons: set data.text.separator"),
  ("a,b\n1,2\n", Text(names=("b",)), "2 fields where data.text.names names 1"),
  ("1\n", Text(header=False, names=("b", "a")), "is the label missing?"),
  ("a,b,a\n1,2,3\n", Text(), "has the column 'a' 2 times"),
  ('{"a": 1, "b": 2}\n', Text(","), "data.format='jsonl'"),
  ('{"a": 1}\n', Text(), "set data.format='jsonl'"),
  ("", Text(), "is empty"),
  ("\n\n", Text(), "has no row"),
  ("a,b\n", Text(",,"), "data.text.separator is ',,': give one character"),
  (b"a,\xff\n", Text(), "is not UTF-8"),
  (b"PAR1\0\0\0\0", Text(), "is a Parquet file, not text: set data.format"),
  (b"PK\3\4\0\0", Text(), "is a zip archive, not text"),
  (gzip.compress(b"PK\3\4\0\0"), Text(), "holds a zip archive, not text"),
  (gzip.compress(gzip.compress(b"a,b\n")), Text(), "holds packed by gzip"),
  ("a,b\n".encode("utf-16"), Text(), "is UTF-16 text, not text: write it as"),
  (bytes(range(256)), Text(), "is binary, not text"),
]


@pytest.mark.parametrize(("data", "options", "said"), WRONG)
def test_what_is_really_wrong_is_said(tmp_path, data, options, said):
  if "nearest" in said:
    data, said = data.replace("c", "bb"), said.replace("'c'", "'bb'")
  assert said in error(tmp_path, data, options=options)


def test_names_with_data_in_place_of_a_header(tmp_path):
  wanted = {"a": "number", "b": "id"}
  said = error(tmp_path, "1,x\n2,y\n", wanted, Text(names=("a", "b")))
  assert "would be skipped as a header: set data.text.header=False" in said


def test_a_directory_is_no_log(tmp_path):
  with pytest.raises(UserError, match="is a directory"):
    rows(str(tmp_path))


def test_long_lists_of_columns_are_cut(tmp_path):
  header = ",".join(f"column{i}" for i in range(10_000))
  assert len(error(tmp_path, header + "\n")) < 1_000


def test_long_rows_are_parsed(tmp_path):
  long = "x" * (csv_rows._PART_BYTES + 9)
  for text in (long, f'"{long}"'):
    found, at, _ = read(tmp_path, f'a,b\n1,""\n2,{text}\n3,\n')
    assert found == [("1", None), ("2", long), ("3", None)]
    assert at == [2, 3, 4]


def test_few_rows_are_parsed_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(text_blocks, "LINES", 3)
  for quoted in ("", '"'):
    text = "a,b\n" + "".join(f"{i},{quoted}x{quoted}\n" for i in range(10))
    found, at, _ = read(tmp_path, text)
    assert at == list(range(2, 12))
    assert [int(a) for a, _ in found] == list(range(10))


def test_ids_parted_as_hive_does_are_text(tmp_path):
  bags = ["\x02".join("1234"), "\x01".join("98"), "5\x036"] * 10
  found, _, _ = read(tmp_path, "a,b\n" + "".join(f"x,{b}\n" for b in bags))
  assert found == [("x", b) for b in bags]
