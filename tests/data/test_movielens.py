"""MovieLens files -> prepared data, and each bad file."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from helpers_data import REAL, arrays, config, needs_real_data, quiet

from recjax.data import movielens, prepare, text_blocks, vocabulary
from recjax.errors import UserError


def movielens_files(directory, times=True):
  directory.mkdir()
  (directory / "users.dat").write_text("1::F::18::3::00001\n2::M::25::4::99\n")
  (directory / "movies.dat").write_text(
    "7::Am\xe9lie (2001)::Comedy|Romance\n8::Up::Drama\n", encoding="latin-1"
  )
  ratings = [(1, 7, 5, 30), (1, 8, 3, 10), (2, 7, 4, 20), (2, 9, 1, 40)] * 5
  if times:
    text = "".join(f"{u}::{m}::{r}::{t}\n" for u, m, r, t in ratings)
    (directory / "ratings.dat").write_text(text)
  else:
    text = "".join(f"{u}\t{m}\t{r}\n" for u, m, r, _ in ratings)
    (directory / "ratings.tsv").write_text(text)
  return directory


def test_movielens_in_time_order(tmp_path):
  files = movielens_files(tmp_path / "ml")
  c = config(files, format="movielens", min_count=1, test_fraction=0.25)
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert p.samples == {"train": 15, "test": 5}
  got = arrays(p, "train")
  assert "dense" not in got  # there are none
  assert p.blocks("train")[[0]]["dense"].shape == (15, 0)
  np.testing.assert_array_equal(got["label"], [0] * 5 + [1] * 10)
  table = pq.read_table(tmp_path / "p" / vocabulary.FILE)
  name = {r["rank"]: r["value"] or r["kind"] for r in table.to_pylist()}
  assert [name.get(i) for i in got["ids"][0]] == [
    "1", "8", "F", "18", "3", "00001", "Drama", *[None] * 5
  ]  # fmt: skip
  assert [name.get(i) for i in got["ids"][10][6:8]] == ["Comedy", "Romance"]
  # Movie 9 is not in movies.dat and only in the test part.
  last = arrays(p, "test")["ids"][-1]
  assert [name[i] for i in last[[0, 1, 6]]] == ["2", "oov", "missing"]


def test_movielens_errors(tmp_path):
  no_time = movielens_files(tmp_path / "no_time", times=False)
  files = movielens_files(tmp_path / "ml")
  cases = [
    (config(no_time), r"split=time needs times"),
    (config(tmp_path / "none"), r"none does not exist"),
    (config(files, test="x"), r"data\.test is x"),
  ]
  for c, message in cases:
    c.data.format = "movielens"
    with pytest.raises(UserError, match=message):
      prepare.prepare(c, str(tmp_path / "p"), quiet)
  c = config(files, format="movielens", split="random")
  for name, line, message in (
    ("ratings.dat", "1::7::6::1\n", r"line 1, field rating: '6' is not 1, 2"),
    ("ratings.dat", "1::7::5\n", r"line 1: 3 fields where 4"),
    ("users.dat", "1::F\n", r"users\.dat, line 1: 2 fields where 5"),
  ):
    kept = (files / name).read_text()
    (files / name).write_text(line)
    with pytest.raises(UserError, match=message):
      prepare.prepare(c, str(tmp_path / "p"), quiet)
    (files / name).write_text(kept)
  (files / "movies.dat").unlink()
  with pytest.raises(UserError, match=r"movies\.dat does not exist"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


def test_an_endless_line_beside_the_ratings(tmp_path, monkeypatch):
  files = movielens_files(tmp_path / "ml")
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", 1_000)
  with open(files / "users.dat", "a") as f:
    f.write("x" * 1_001)
  c = config(files, format="movielens")
  with pytest.raises(UserError, match=r"users\.dat, line 3: longer than 1,000"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


def test_movielens_that_cannot_be_downloaded(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setattr(movielens, "URL", "http://localhost:9/ml-1m.zip")
  c = config("", format="movielens")
  with pytest.raises(UserError, match=r"fetch and unpack it yourself and set"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


@needs_real_data
def test_real_movielens(tmp_path):
  c = config(
    os.path.join(REAL, "ml-1m"), format="movielens", split="random", min_count=1
  )
  c.data.block_samples = 8_192
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert sum(p.samples.values()) == 1_000_209
  rows = np.bincount(p.profile.table) - 2  # without the special rows
  assert rows[0] == 6_040
  assert rows[1] <= 3_706
  assert rows[6] == 18
