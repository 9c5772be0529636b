"""Logs with a schema: the same samples from every format; what is refused."""

import csv
import json
import pathlib

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import quiet
from hypothesis import strategies as st

from recjax.config import Config, Data
from recjax.data import log, prepare, staging, vocabulary
from recjax.data.rows import Rows
from recjax.data.text import DamagedLines
from recjax.errors import UserError
from recjax.log_schema import Cross, Hashed, Id, Ids, Number, Schema

SCHEMA = Schema(
  labels=("y", "stars > 3"),
  numbers=(Number("price"),),
  features=(
    Id("user"),
    Ids("tags", most=2, pooling="mean", weights="of"),
    Ids("seen", table="user", most=3, keep="last", pooling="none"),
    Hashed("agent", rows=7),
    Cross(("user", "agent"), rows=9),
  ),
  weight="w",
)
FORMATS = ("csv", "jsonl", "parquet")


def config(path: pathlib.Path, schema: Schema = SCHEMA, **data) -> Config:
  return Config(
    data=Data(format=path.suffix[1:], train=str(path), memory_mb=256, **data),
    schema=schema,
  )


def samples(path: pathlib.Path, schema: Schema = SCHEMA, limit: int = 0):
  """Reads a log: its samples in plain lists, and its damaged rows."""
  of = config(path, schema)
  reader = staging.reader_of(of)
  inputs, damaged = reader.schema(of.data), DamagedLines(limit)
  found = []
  for c in reader.chunks(of.data, inputs, (str(path),), damaged):
    values = [*c.values.to_pylist(), "-"]  # -1: an empty position
    for i, codes in enumerate(c.codes):
      found.append(
        (
          c.label[i].item(),
          None if c.labels is None else c.labels[i].tolist(),
          [None if np.isnan(x) else x for x in c.dense[i].tolist()],
          [values[k] for k in codes],
          None if c.weights is None else c.weights[i].tolist(),
          None if c.sample_weight is None else c.sample_weight[i].item(),
        )
      )
  return found, damaged.lines


def written(folder: pathlib.Path, rows: list[dict]) -> list[pathlib.Path]:
  """Writes a log in each format; bags are '|'-separated text in CSV."""
  paths = [folder / f"log.{f}" for f in FORMATS]
  with open(paths[0], "w", newline="", encoding="utf-8-sig") as f:
    writer = csv.writer(f)
    writer.writerow(list(rows[0]))
    text = lambda x: (
      "|".join(map(str, x)) if isinstance(x, list) else "" if x is None else x
    )
    writer.writerows([text(row[name]) for name in rows[0]] for row in rows)
  paths[1].write_text("\n".join(json.dumps(row) for row in rows))
  pq.write_table(pa.Table.from_pylist(rows), paths[2])
  return paths


WORD = st.text(
  st.characters(
    codec="utf-8", exclude_characters="\0|", exclude_categories=["Cs"]
  ),
  max_size=5,
)
ROW = st.fixed_dictionaries(
  {
    "y": st.sampled_from([0, 1, -1]),
    "stars": st.integers(1, 5),
    "price": st.none() | st.floats(-(2.0**99), 2.0**99, width=32),
    "user": st.none() | st.integers(-(2**63), 2**63 - 1),
    "agent": st.none() | WORD,
    "seen": st.none() | st.lists(st.integers(0, 2**63 - 1), max_size=5),
    "tags": st.lists(
      WORD.filter(lambda x: x not in ("", "nan", "NaN", "null", "NULL", "\\N")),
      max_size=4,
    ),
    "w": st.sampled_from([0.0, 0.5, 2.0]),
  }
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(ROW, min_size=1, max_size=6))
def test_every_format_gives_the_same_samples(tmp_path_factory, rows):
  rows = [r | {"of": [i + 1.5 for i, _ in enumerate(r["tags"])]} for r in rows]
  folder = tmp_path_factory.mktemp("log")
  first, *others = (samples(path) for path in written(folder, rows))
  assert len(first[0]) == len(rows) and not first[1]
  for row, (label, labels, dense, ids, _, weight) in zip(
    rows, first[0], strict=True
  ):
    assert label == max(row["y"], 0) and labels[1] == (row["stars"] > 3)
    assert dense == [row["price"]] and weight == row["w"]
    assert ids[0] == (None if row["user"] is None else str(row["user"]))
    last = [str(x) for x in (row["seen"] or [])[-3:]]
    assert ids[3:6] == last + ["-"] * (3 - len(last))
  for other in others:
    assert other == first


def test_damaged_rows_are_named_and_left_out(tmp_path):
  path = tmp_path / "x.csv"
  lines = ["y,price,user,tags,of", "1,2,a,t|s,1|2", "2,2,a,t,1", "0,x,a,t,1"]
  lines += ["0,1,a,t,1|2", "0,1,a,t|s,1|y", "1,0x1F,b,,", "0,,,,", "1,1,c"]
  path.write_text("\n".join(lines))
  schema = Schema(
    labels=("y",),
    numbers=SCHEMA.numbers,
    features=SCHEMA.features[:2],
  )
  found, damaged = samples(path, schema, limit=6)
  assert [x[3] for x in found] == [["a", "t", "s"], [None, "-", "-"]]
  of = {line: (column, reason) for _, line, column, reason in damaged}
  columns = {3: "y", 4: "price", 5: "of", 6: "of", 7: "price", 9: ""}
  assert {line: column for line, (column, _) in of.items()} == columns
  assert of[3][1].startswith("'2' is no label")
  assert of[7][1] == "'0x1F' is not a finite number"
  with pytest.raises(UserError, match=r"line 3, field y: .*max_bad_rows"):
    samples(path, schema)


def test_a_log_of_damaged_rows_alone_has_no_samples(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("y,user\n7,a\n8,b\n")
  schema = Schema(labels=("y",), features=SCHEMA.features[:1])
  assert samples(path, schema, limit=2)[0] == []


def test_bags_that_are_cut_are_counted(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("y,tags\n" + "1,a|b|c\n0,a\n" * 50)
  schema = Schema(labels=("y",), features=(Ids("tags", most=2),))
  said: list[str] = []
  prepare.prepare(config(path, schema), str(tmp_path / "d"), said.append)
  assert (
    "prepare: tags: 50 of 100 bags had more than 2 ids and were cut" in said
  )


def test_an_id_with_a_colon_has_a_weight_only_where_that_is_said(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("y,at\n1,ip:10.0:0.5|12:30\n")
  for separator, wanted in (
    ("", ["ip:10.0:0.5", "12:30"]),
    (":", ["ip:10.0", "12"]),
  ):
    ids = Ids("at", most=2, weight_separator=separator)
    ((_, _, _, found, weights, _),), _ = samples(
      path, Schema(labels=("y",), features=(ids,))
    )
    assert found == wanted
    assert weights == ([0.5, 30] if separator else None)


def test_libsvm_is_a_bag_with_weights(tmp_path):
  path = tmp_path / "x.libsvm"
  path.write_text("-1 3:1 7:0.5 # here\n+1 2:1\n")
  schema = Schema(
    labels=("label",), features=(Ids("features", most=3, weights="values"),)
  )
  found, _ = samples(path, schema)
  assert [(x[0], x[3], x[4]) for x in found] == [
    (0, ["3", "7", "-"], [1, 0.5, 0]),
    (1, ["2", "-", "-"], [1, 0, 0]),
  ]


def test_ids_of_a_table_share_it_and_have_its_least_count(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("y,a,b,c\n" + "1,x,y,x\n" * 3 + "0,y,x,r\n0,q,x,q\n" * 2)
  schema = Schema(
    labels=("y",),
    features=(
      Id("a", table="t", min_count=3),
      Id("b", table="t"),
      Id("c", min_count=1),
    ),
  )
  of = config(path, schema, test_fraction=0.1)
  found = prepare.prepare(of, str(tmp_path / "d"), quiet)
  stored = pq.read_table(f"{found.directory}/{vocabulary.FILE}").to_pydict()
  values = {"t": set(), "c": set()}
  for table, value in zip(stored["table"], stored["value"], strict=True):
    values[table].add(value)
  assert values == {"t": {None, "x", "y"}, "c": {None, "x", "r", "q"}}


@pytest.mark.parametrize(
  "schema, wanted",
  [
    (Schema(), "schema.labels: empty"),
    (Schema(labels=("y",)), "schema.features: empty"),
    (
      Schema(labels=("y > x",), features=(Id("a"),)),
      "compares with 'x', which is no number",
    ),
    (
      Schema(labels=("y",), features=(Id("a"),), numbers=(Number("a"),)),
      "two inputs are named 'a'",
    ),
    (
      Schema(labels=("y",), features=(Id("a", dim=4), Id("b", "a", dim=8))),
      "another feature gives table a dim 4",
    ),
  ],
)
def test_a_schema_that_cannot_be_is_refused(tmp_path, schema, wanted):
  path = tmp_path / "x.csv"
  path.write_text("y,a,b\n1,2,3\n" * 9)
  with pytest.raises(UserError, match=wanted):
    prepare.prepare(config(path, schema), str(tmp_path / "d"), quiet)


def test_a_format_of_ones_own(tmp_path):
  """Lines of key=value, as the tutorial reads them."""

  def read(path, wanted, text, damaged):
    with open(path) as f:
      rows = [dict(x.split("=") for x in line.split()) for line in f]
    table = pa.table({name: [r.get(name) for r in rows] for name in wanted})
    yield Rows(table, np.arange(len(rows)) + 1, 1)

  path = tmp_path / "x.pairs"
  path.write_text("y=1 a=3\ny=0\n" * 10)
  staging.register_format("pairs", log.Format(read))
  schema = Schema(labels=("y",), features=(Id("a"),))
  found, _ = samples(path, schema)
  assert [x[3] for x in found[:2]] == [["3"], [None]]
  prepare.prepare(config(path, schema), str(tmp_path / "d"), quiet)


def test_the_last_times_test_whatever_the_order_of_the_log(tmp_path):
  path = tmp_path / "x.csv"
  days = np.random.default_rng(0).permutation(np.arange(1, 31))
  lines = "".join(f"{int(d > 27)},2026-11-{d:02} 10:00:00,a\n" for d in days)
  path.write_text("y,ts,a\n" + lines)
  schema = Schema(labels=("y",), features=(Id("a"),), time="ts")
  found = prepare.prepare(config(path, schema), str(tmp_path / "d"), quiet)
  assert found.samples == {"train": 27, "test": 3}
  assert found.blocks("test")[[0]]["label"].tolist() == [1, 1, 1]
