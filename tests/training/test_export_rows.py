"""Exported rows are those of the tables, wherever these lived."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import quiet
from helpers_checkpoint import (
  IDENTITY,
  PROFILE_OF_TWO,
  by_rank,
  fresh,
  make_plan,
  sums_of,
)

import recjax
from recjax.data import vocabulary
from recjax.errors import UserError
from recjax.training import checkpoint
from recjax.training.checkpoint import About
from recjax.training.state import At

TABLES = PROFILE_OF_TWO.tables
ROWS = PROFILE_OF_TWO.rows
SPECIAL = {0: ("oov", "missing"), 1: ("missing", "oov"), 2: ("oov", "missing")}
PLANS = {
  "eight, with owners": make_plan(
    "two",
    g={"table_wise": (("u", 6), ("t", 1)), "padding_rows": 16, "frozen": 500},
  ),
  "one, stored": make_plan("two_1_cold", g={"frozen": 9_999}),
}


def rows_of_vocabulary() -> list[tuple[int, str, str | None, int]]:
  """(table, kind, value, count) by rank; the special rows are in the middle."""
  found = []
  for rank, t in enumerate(PROFILE_OF_TWO.table.tolist()):
    found.append((t, "value", f"ü{rank}", 2 * ROWS - rank))
  for t, kinds in SPECIAL.items():
    at = np.flatnonzero(PROFILE_OF_TWO.table == t)[[7, 311]].tolist()
    for rank, kind in zip(at, kinds, strict=True):
      found[rank] = (t, kind, None, found[rank][-1])
  return found


def write_vocabulary(folder: pathlib.Path) -> str:
  """Writes the vocabulary of PROFILE_OF_TWO; returns its fingerprint."""
  oov, table, value, count = np.zeros(3, np.int64), [], [], []
  for t, kind, v, n in rows_of_vocabulary():
    if kind == "oov":
      oov[t] = n
      continue
    table.append(t)
    value.append(v)
    count.append(n)
  part = np.int16(table), pa.array(value, pa.string()), np.int64(count)
  with vocabulary.open_engine(256, str(folder / "spill")) as engine:
    return vocabulary.count(
      engine,
      iter([part]),
      TABLES,
      [1] * len(TABLES),
      str(folder / vocabulary.FILE),
      oov=oov,
    )


@pytest.fixture(scope="module", params=PLANS)
def saved(request, tmp_path_factory):
  """(workdir, run) of a full checkpoint, and one of what has changed."""
  workdir = tmp_path_factory.mktemp("#1 %41")
  directory = workdir / "checkpoints"
  directory.mkdir()
  run = fresh(PLANS[request.param], seed=3, profile=PROFILE_OF_TWO)
  fingerprint = write_vocabulary(directory)
  identity = dataclasses.replace(IDENTITY, vocabulary=fingerprint)
  with checkpoint.manager(directory) as to:
    for step in (1, 2):
      about = About(identity, At(step), sums_of(run))
      checkpoint.save(to, step, run, about, full_every=2)
      to.wait_until_finished()
      for stored in run.store.groups.values() if step == 1 else ():
        records = np.arange(0, stored.records, 3)
        records = records[stored.holds_row(records)]
        values = stored.copy(records)
        stored.write(records, values._replace(rows=values.rows * 2))
  assert checkpoint.read_meta(directory, 2)["stored"]["full"] == 1
  return workdir, run


def test_exported_rows_are_those_of_the_tables(saved, tmp_path):
  """Of a checkpoint of what has changed and the full one that it needs."""
  workdir, run = saved
  recjax.export_rows(workdir, tmp_path / "all", report=quiet)
  assert len(list((tmp_path / "all").iterdir())) == len(TABLES)
  rows, all_rows = by_rank(run, PROFILE_OF_TWO), rows_of_vocabulary()
  for g in run.spec.embedding.plan.groups:
    assert {t.memory for t in g.tiers} >= {"host"}
    mine = [TABLES[t] in g.tables for t in PROFILE_OF_TWO.table]
    tables = PROFILE_OF_TWO.table[mine]
    for name in g.tables:
      t = TABLES.index(name)
      found = pq.read_table(tmp_path / "all" / f"{name}.parquet")
      about = zip(*(found[c].to_pylist() for c in ("kind", "value", "count")),
                  strict=True)  # fmt: skip
      assert list(about) == [x[1:] for x in all_rows if x[0] == t]
      vectors = np.stack(found["vector"].to_numpy())
      assert vectors.dtype == np.float32
      np.testing.assert_array_equal(vectors, rows[g.name].rows[tables == t])


# ---- What is asked for


def test_npy_and_parquet_of_one_table_say_the_same(saved, tmp_path):
  workdir, _ = saved
  for name in ("v.npy", "deep/er/v.parquet"):
    recjax.export_rows(workdir, tmp_path / name, ["v"], report=quiet)
  vectors = np.load(tmp_path / "v.npy")
  about = pq.read_table(tmp_path / "v.values.parquet")
  both = pq.read_table(tmp_path / "deep" / "er" / "v.parquet")
  assert both.drop_columns("vector") == about
  np.testing.assert_array_equal(vectors, np.stack(both["vector"].to_numpy()))


def test_an_older_checkpoint_is_exported_too(saved, tmp_path):
  workdir, _ = saved
  for step in (1, 2):
    out = tmp_path / f"{step}.npy"
    recjax.export_rows(workdir, out, ["u"], step=step, report=quiet)
  before, after = np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy")
  changed = (before != after).any(axis=1)
  assert changed.any() and not changed.all()
  np.testing.assert_array_equal(after[changed], 2 * before[changed])


def test_what_cannot_be_exported_is_said_in_one_message(saved, tmp_path):
  workdir, _ = saved
  there = tmp_path / "there.npy"
  there.touch()
  (tmp_path / "other.values.parquet").touch()
  for output, tables, message in (
    ("a.parquet", ["w"], "--tables: there is no table 'w'; the tables are t, "),
    ("a.parquet", [], "--output: .* is a file, which holds one table; name"),
    ("there.npy", ["v"], "--output: .*there.npy is there already"),
    ("other.npy", ["v"], "--output: .*other.values.parquet is there"),
  ):
    with pytest.raises(UserError, match=message):
      recjax.export_rows(workdir, tmp_path / output, tables)
  with pytest.raises(UserError, match=r"--workdir: .* holds no checkpoint"):
    recjax.export_rows(tmp_path, tmp_path / "a.npy", ["v"])
  assert there.read_bytes() == b""


def test_a_damaged_checkpoint_leaves_no_output(saved, tmp_path):
  workdir, _ = saved
  array = next((workdir / "checkpoints" / "1" / "stored").glob("*.cold.rows"))
  chunk = next(array.glob("0.*"))
  whole = chunk.read_bytes()
  try:
    chunk.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match=r"checkpoint 2 in .* is damaged: the"):
      recjax.export_rows(workdir, tmp_path / "all", report=quiet)
  finally:
    chunk.write_bytes(whole)
  assert not list(tmp_path.iterdir())


def test_another_vocabulary_is_not_taken_for_its_own(saved, tmp_path):
  workdir, _ = saved
  path = workdir / "checkpoints" / vocabulary.FILE
  aside = path.rename(tmp_path / "aside")
  try:
    pq.write_table(pq.read_table(aside).slice(1), path)
    with pytest.raises(UserError, match=r"^--workdir: neither .* is the vocab"):
      recjax.export_rows(workdir, tmp_path / "all", report=quiet)
  finally:
    aside.rename(path)
