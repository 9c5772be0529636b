"""Logs -> prepared data: against a plain Python reference, and its failures."""

import collections
import dataclasses
import glob
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from recjax import (
  blocks,
  formats,
  movielens,
  parsing,
  prepare,
  stage,
  vocabulary,
)
from recjax.config import Config, Data, Synthetic
from recjax.errors import UserError

REAL = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
CRITEO = os.path.join(REAL, "criteo_kaggle_80k.tsv.gz")
needs_real_data = pytest.mark.skipif(
  not os.path.exists(CRITEO), reason=f"no {CRITEO}"
)


def quiet(_):
  pass


def log(path, rows=500, seed=0, hotness=1):
  """A Criteo log of few, skewed values; returns its cells [rows][26]."""
  rng = random.Random(seed)
  table = []
  with open(path, "w") as f:
    for i in range(rows):
      cells = [
        ",".join(
          f"v{int(rng.paretovariate(0.7)) % 200}"
          for _ in range(rng.randint(1, hotness) if c == 0 else 1)
        )
        for c in range(26)
      ]
      cells = [c if rng.random() < 0.9 else "" for c in cells]
      ints = [str(i + j) for j in range(13)]
      f.write("\t".join([str(i % 2), *ints, *cells]) + "\n")
      table.append(cells)
  return table


def config(train, **data) -> Config:
  return Config(
    data=Data(train=str(train), block_samples=64, memory_mb=256, **data)
  )


def arrays(prepared, split):
  """All samples of a split, through tensorflow-datasets itself."""
  at = os.path.join(prepared.directory, prepare.BLOCKS)
  source = tfds.builder_from_directory(at).as_data_source(split)
  found = [source[i] for i in range(len(source))]
  return {a: np.concatenate([b[a] for b in found]) for a in found[0]}


def content(directory):
  """File -> hash."""
  found = {}
  for path in glob.glob(os.path.join(directory, "**"), recursive=True):
    if os.path.isfile(path):
      with open(path, "rb") as f:
        name = os.path.relpath(path, directory)
        found[name] = hashlib.sha256(f.read()).hexdigest()
  return found


def test_the_vocabulary_is_that_of_a_plain_count(tmp_path):
  cells = log(tmp_path / "log.tsv")
  p = prepare.prepare(
    config(tmp_path / "log.tsv", test_fraction=0.2), str(tmp_path / "p"), quiet
  )
  assert p.samples == {"train": 400, "test": 100}
  names = formats.CATEGORIES
  want = []  # count, table, kind, value
  for t in range(26):
    counts = collections.Counter(row[t] for row in cells[:400])
    missing = counts.pop("", 0)
    want += [(n, t, 2, v) for v, n in counts.items() if n >= 2]
    want.append((sum(n for n in counts.values() if n < 2), t, 0, None))
    want.append((missing, t, 1, None))
  want.sort(key=lambda r: (-r[0], r[1], r[2], r[3] or ""))
  table = pq.read_table(tmp_path / "p" / vocabulary.FILE)
  assert table["count"].to_pylist() == [r[0] for r in want]
  assert table["table"].to_pylist() == [names[r[1]] for r in want]
  kinds = ("oov", "missing", "value")
  assert table["kind"].to_pylist() == [kinds[r[2]] for r in want]
  assert table["value"].to_pylist() == [r[3] for r in want]
  assert table["rank"].to_pylist() == list(range(len(want)))
  np.testing.assert_array_equal(p.profile.counts, [r[0] for r in want])
  np.testing.assert_array_equal(p.profile.table, [r[1] for r in want])
  assert p.profile.samples == 400

  rank = {(r[1], r[2], r[3]): i for i, r in enumerate(want)}

  def expected(t, value):
    if not value:
      return rank[t, 1, None]
    return rank.get((t, 2, value), rank[t, 0, None])

  ids = [[expected(t, v) for t, v in enumerate(row)] for row in cells]
  for split, part in (("train", slice(400)), ("test", slice(400, None))):
    got = arrays(p, split)
    np.testing.assert_array_equal(got["ids"], ids[part])
    np.testing.assert_array_equal(got["label"], (np.arange(500) % 2)[part])
    assert got["ids"].dtype == np.int32
  dense = np.log(np.arange(500)[:, None] + np.arange(13) + 2)
  np.testing.assert_allclose(arrays(p, "train")["dense"], dense[:400], 1e-6)


def test_bags_keep_their_positions(tmp_path):
  cells = log(tmp_path / "log.tsv", hotness=4)
  c = config(tmp_path / "log.tsv", hotness=(3, *[1] * 25), min_count=0)
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  ids = arrays(p, "train")["ids"]
  assert ids.shape == (450, 28)
  values = pq.read_table(tmp_path / "p" / vocabulary.FILE)["value"].to_pylist()
  for row, bag in zip(ids[:, :3], cells, strict=False):
    want = [v or None for v in bag[0].split(",")[:3]]
    assert [values[i] for i in row if i >= 0] == want
    assert (row[len(want) :] == -1).all()
  assert p.profile.counts.sum() == (ids >= 0).sum()


def test_weights_are_kept(tmp_path):
  log(tmp_path / "log.tsv", rows=10)
  text = (tmp_path / "log.tsv").read_text().splitlines()
  text = [
    line[: line.rindex("\t")] + f"\tw:{i / 4}" for i, line in enumerate(text)
  ]
  (tmp_path / "log.tsv").write_text("\n".join(text))
  c = config(tmp_path / "log.tsv", weighted=True)
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert p.schema.weighted
  weights = arrays(p, "train")["weights"]
  np.testing.assert_array_equal(weights[:, -1], np.arange(9) / 4)
  assert (weights[:, :-1] == 1).all()


def test_a_test_file_is_the_test_split(tmp_path):
  log(tmp_path / "a.tsv", 100, seed=1)
  log(tmp_path / "b.tsv", 40, seed=2)
  c = config(tmp_path / "a.tsv", test=str(tmp_path / "b.tsv"))
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert p.samples == {"train": 100, "test": 40}
  assert p.profile.counts.sum() == 100 * 26


def test_a_random_split_is_a_seeded_share(tmp_path):
  log(tmp_path / "log.tsv", 2_000)
  label = {}
  for seed in (0, 0, 1):
    c = config(tmp_path / "log.tsv", split="random", seed=seed)
    p = prepare.prepare(c, str(tmp_path / f"p{seed}"), quiet)
    assert sum(p.samples.values()) == 2_000
    assert 140 < p.samples["test"] < 260
    label[seed] = arrays(p, "test")["dense"][:, 0]
  assert set(label[0]) != set(label[1])


def test_chunks_and_blocks_do_not_matter(tmp_path, monkeypatch):
  log(tmp_path / "log.tsv")
  c = config(tmp_path / "log.tsv")
  whole = prepare.prepare(c, str(tmp_path / "p"), quiet)
  monkeypatch.setattr(parsing, "CHUNK_BYTES", 3_000)
  monkeypatch.setattr(vocabulary, "_BATCH", 7)
  monkeypatch.setattr(blocks, "_SHARD_BYTES", 1)
  c.data.block_samples = 10
  parts = prepare.prepare(c, str(tmp_path / "q"), quiet)
  assert parts.vocabulary == whole.vocabulary
  assert len(glob.glob(str(tmp_path / "q" / "blocks" / "*train*"))) == 45
  for split in ("train", "test"):
    a, b = arrays(whole, split), arrays(parts, split)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_the_fingerprint_is_of_the_content(tmp_path):
  found = set()
  for seed in (1, 2):
    log(tmp_path / "log.tsv", seed=seed)
    p = prepare.prepare(
      config(tmp_path / "log.tsv"), str(tmp_path / f"p{seed}"), quiet
    )
    found.add(p.vocabulary)
  assert len(found) == 2


def test_prepared_once(tmp_path):
  log(tmp_path / "log.tsv")
  c = config(tmp_path / "log.tsv")
  lines = []
  first = prepare.prepare(c, str(tmp_path / "p"), lines.append)
  assert any("rows/s" in line for line in lines)
  before = content(tmp_path / "p")
  lines.clear()
  (tmp_path / "p" / "stage").mkdir()  # as a kill right after the end leaves it
  again = prepare.prepare(c, str(tmp_path / "p") + "/", lines.append)
  assert not lines
  assert content(tmp_path / "p") == before
  assert again.vocabulary == first.vocabulary
  assert again.schema == first.schema
  np.testing.assert_array_equal(again.profile.counts, first.profile.counts)
  assert sorted(os.listdir(tmp_path)) == ["log.tsv", "p"]


def test_other_logs_or_settings_are_refused(tmp_path):
  log(tmp_path / "log.tsv")
  c = config(tmp_path / "log.tsv")
  prepare.prepare(c, str(tmp_path / "p"), quiet)
  before = content(tmp_path / "p")
  changed = [
    (
      dataclasses.replace(c.data, min_count=5),
      r"data\.min_count was 2, is now",
    ),
    (dataclasses.replace(c.data, pooling="mean"), r"data\.pooling was 'sum'"),
    (dataclasses.replace(c.data, split="random"), r"data\.split was 'time'"),
  ]
  for data, message in changed:
    with pytest.raises(UserError, match=message):
      prepare.prepare(Config(data=data), str(tmp_path / "p"), quiet)
  c.data.memory_mb = 999  # the result does not depend on it
  prepare.prepare(c, str(tmp_path / "p"), quiet)
  log(tmp_path / "log.tsv", seed=9)
  with pytest.raises(UserError, match=r"data\.train was .*delete"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert content(tmp_path / "p") == before


def test_a_directory_with_other_files_is_left_alone(tmp_path):
  log(tmp_path / "log.tsv")
  (tmp_path / "p").mkdir()
  (tmp_path / "p" / "mine").touch()
  with pytest.raises(UserError, match="holds other files"):
    prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  assert os.listdir(tmp_path / "p") == ["mine"]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("test_fraction", 0.0),
    ("test_fraction", 1.0),
    ("block_samples", 0),
    ("memory_mb", 1),
    ("max_bad_rows", -1),
    ("seed", -1),
  ],
)
def test_values_out_of_range(tmp_path, field, value):
  log(tmp_path / "log.tsv", 10)
  c = config(tmp_path / "log.tsv")
  setattr(c.data, field, value)
  with pytest.raises(UserError, match=rf"data\.{field} is {value}"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


def test_too_few_samples(tmp_path):
  log(tmp_path / "log.tsv", 2)
  with pytest.raises(UserError, match="hold 2 samples, of which 2 would train"):
    prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)


def test_skipped_lines_are_reported(tmp_path):
  log(tmp_path / "log.tsv", 100)
  lines = (tmp_path / "log.tsv").read_text().splitlines()
  lines[30] = "?" + lines[30]
  lines[60] += "\tmore"
  (tmp_path / "log.tsv").write_text("\n".join(lines))
  c = config(tmp_path / "log.tsv", max_bad_rows=1)
  with pytest.raises(UserError, match=r"line 61: 41 fields.*max_bad_rows=1"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)
  c.data.max_bad_rows = 2
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert sum(p.samples.values()) == 98
  report = (tmp_path / "p" / "skipped.tsv").read_text().splitlines()
  path = str(tmp_path / "log.tsv")
  assert [r.split("\t")[:3] for r in report[1:]] == [
    [path, "31", "label"],
    [path, "61", ""],
  ]


@pytest.mark.parametrize(
  "damage", ["prepared.json", vocabulary.FILE, "blocks/dataset_info.json"]
)
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_damaged_prepared_data_is_an_error(tmp_path, damage, how):
  log(tmp_path / "log.tsv", 50)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  path = tmp_path / "p" / damage
  if how == "gone":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(UserError, match=str(tmp_path / "p")):
    prepare.load(p.directory)
    at = os.path.join(p.directory, prepare.BLOCKS)
    blocks.Blocks(at, "train", 45, 64)


def test_the_vocabulary_travels(tmp_path):
  log(tmp_path / "log.tsv", 50)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  path = prepare.copy_vocabulary(p, str(tmp_path / "checkpoint" / "data"))
  found = vocabulary.read_profile(path, p.schema.tables, p.samples["train"])
  np.testing.assert_array_equal(found.counts, p.profile.counts)
  np.testing.assert_array_equal(found.table, p.profile.table)


SCRIPT = """
import resource, sys
from recjax import prepare
from recjax.config import Config, Data
from recjax.errors import UserError
train, directory, full = sys.argv[1:]

def report(line):
  print(line, flush=True)
  if full and f"prepare: {full}" in line:
    fill()

def fill():
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

if full == "start":
  fill()
c = Config(data=Data(train=train, block_samples=64, memory_mb=256))
try:
  prepare.prepare(c, directory, report)
except UserError as e:
  print("UserError:", e)
  sys.exit(1)
"""


def run(train, directory, full=""):
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(train), str(directory), full],
    cwd=os.path.join(os.path.dirname(__file__), ".."),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.parametrize("full", ["start", "stage", "count", "pack"])
def test_a_full_disk_loses_nothing(tmp_path, full):
  """Full from the start, and as a pass ends, before its result is written.

  A limit on the size of files stands for it: writes fail the same way.
  """
  log(tmp_path / "log.tsv", 2_500)
  with run(tmp_path / "log.tsv", tmp_path / "p", full) as process:
    out = process.communicate()[0]
  assert process.returncode == 1, out
  assert "UserError: no space left on the disk of" in out
  assert not (tmp_path / "p").exists()
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  assert sum(p.samples.values()) == 2_500


def test_no_space_to_spill_counts_as_a_full_disk(tmp_path):
  with vocabulary.open_engine(128, str(tmp_path)) as engine:
    engine.execute("SET max_temp_directory_size = '1MB'")
    with pytest.raises(Exception, match="max_temp_directory_size") as e:
      engine.execute(
        "CREATE TABLE t AS SELECT random()::VARCHAR || range AS x"
        " FROM range(10_000_000) ORDER BY x"
      )
  assert prepare._disk_full(e.value)


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
  log(tmp_path / "log.tsv", 20_000)
  start = time.monotonic()
  with run(tmp_path / "log.tsv", tmp_path / "p") as process:
    assert process.wait() == 0
  spent = time.monotonic() - start
  want = content(tmp_path / "p")
  rng = random.Random(0)
  killed = 0
  for _ in range(5):
    with run(tmp_path / "log.tsv", tmp_path / "q") as process:
      time.sleep(spent * rng.uniform(0.4, 1.0))
      process.send_signal(signal.SIGKILL)
      killed += process.wait() == -signal.SIGKILL
    shutil.rmtree(tmp_path / "q", ignore_errors=True)  # where it was finished
  with run(tmp_path / "log.tsv", tmp_path / "q") as process:
    assert process.wait() == 0
  assert killed
  assert content(tmp_path / "q") == want


def test_memory_stays_bounded(tmp_path):
  """More distinct values than the engine may hold: it spills."""
  n = 3_000_000
  values = np.random.default_rng(0).permutation(n)

  def parts():
    for i in range(0, n, 100_000):
      text = np.char.add(
        "a rather long value ", values[i : i + 100_000].astype(str)
      )
      yield np.zeros(100_000, np.int16), vocabulary.pa.array(text)

  spill = str(tmp_path / "spill")
  with vocabulary.open_engine(128, spill) as engine:
    counted = ((t, v, np.full(len(v), 3)) for t, v in parts())
    vocabulary.count(engine, counted, ("a",), 2, str(tmp_path / "v"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    ranks = np.concatenate(
      list(vocabulary.ranks(engine, parts, ("a",), str(tmp_path / "v")))
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
  assert len(np.unique(ranks)) == n
  assert after - before < 400  # MiB; the values alone take that


def test_synthetic_logs_go_the_same_way(tmp_path):
  c = Config(
    data=Data(
      format="synthetic", synthetic=Synthetic(samples=5_000, rows=1_000)
    )
  )
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert p.samples == {"train": 4_500, "test": 500}
  assert 0.7 < p.teacher["auc"] < 0.95
  assert p.teacher["test_samples"] == 500
  c.data.seed = 1
  with pytest.raises(UserError, match=r"data\.seed was 0, is now 1"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


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
  at = os.path.join(p.directory, prepare.BLOCKS)
  assert blocks.Blocks(at, "train", 15, 64)[[0]]["dense"].shape == (15, 0)
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
  for name, text, message in (
    ("ratings.dat", "1::7::6::1\n", r"line 1, field rating: '6' is not 1, 2"),
    ("ratings.dat", "1::7::5\n", r"line 1: 3 fields where 4"),
    ("users.dat", "1::F\n", r"users\.dat, line 1: 2 fields where 5"),
  ):
    kept = (files / name).read_text()
    (files / name).write_text(text)
    with pytest.raises(UserError, match=message):
      prepare.prepare(c, str(tmp_path / "p"), quiet)
    (files / name).write_text(kept)
  (files / "movies.dat").unlink()
  with pytest.raises(UserError, match=r"movies\.dat does not exist"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


def test_movielens_that_cannot_be_downloaded(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setattr(movielens, "URL", "http://localhost:9/ml-1m.zip")
  c = config("", format="movielens")
  with pytest.raises(UserError, match=r"fetch and unpack it yourself and set"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


def test_the_split_is_the_same_row_by_row():
  split = stage.Split(Data(split="random"), None, 1_000)
  whole = split.mask(0, 1_000)
  parts = [split.mask(i, 10) for i in range(0, 1_000, 10)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert split.train == whole.sum()


@needs_real_data
def test_real_criteo(tmp_path):
  c = config(CRITEO, test_fraction=0.2)
  p = prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert p.samples == {"train": 64_000, "test": 16_000}
  assert p.profile.accesses == 64_000 * 26
  test = arrays(p, "test")["label"].mean()
  train = arrays(p, "train")["label"].mean()
  assert test == pytest.approx(0.2221, abs=5e-5)
  assert 0.8 * train + 0.2 * test == pytest.approx(0.2245, abs=5e-5)


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
