"""Logs -> prepared data: against a plain Python reference, and its failures."""

import collections
import contextlib
import dataclasses
import glob
import os
import pathlib
import re

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from helpers_data import (
  CRITEO,
  arrays,
  config,
  content,
  log,
  needs_real_data,
  quiet,
)

from recjax.config import Config, Data, Synthetic
from recjax.data import (
  blocks,
  criteo,
  prepare,
  prepared,
  text_blocks,
  vocabulary,
)
from recjax.errors import UserError


def test_the_vocabulary_is_that_of_a_plain_count(tmp_path):
  cells = log(tmp_path / "log.tsv")
  p = prepare.prepare(
    config(tmp_path / "log.tsv", test_fraction=0.2), str(tmp_path / "p"), quiet
  )
  assert p.samples == {"train": 400, "test": 100}
  names = criteo.CATEGORIES
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
  c = config(tmp_path / "log.tsv", hotness=(3, *[1] * 25), min_count=1)
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
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", 3_000)
  monkeypatch.setattr(vocabulary, "_BATCH", 7)
  monkeypatch.setattr(blocks, "_FILE_BYTES", 1)
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


def test_a_value_out_of_range(tmp_path):
  """Of a config that no command line checked."""
  log(tmp_path / "log.tsv", 10)
  c = config(tmp_path / "log.tsv", test_fraction=1.0)
  with pytest.raises(UserError, match=r"data\.test_fraction: 1\.0 is not betw"):
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
  "damage",
  [
    "prepared.json",
    vocabulary.FILE,
    "blocks/recjax_blocks-train.array_record-00000",
  ],
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
    prepared.load(p.directory).blocks("train")


def test_a_flipped_bit_of_prepared_data_is_noticed(tmp_path):
  """In the manifest, the vocabulary and the blocks, or nobody reads it."""
  log(tmp_path / "log.tsv", 500)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  everything = lambda p: p.blocks("train")[range(len(p.blocks("train").sizes))]
  want, rng = everything(p), np.random.default_rng(0)
  for name, noticed in (
    ("prepared.json", 30),
    (vocabulary.FILE, 30),
    # Padded with up to 64 KiB of zeros.
    ("blocks/recjax_blocks-train.array_record-00000", 2),
  ):
    path = tmp_path / "p" / name
    whole, refused = path.read_bytes(), 0
    for at in rng.integers(0, len(whole), 30).tolist():
      data = bytearray(whole)
      data[at] ^= 1 << int(rng.integers(8))
      path.write_bytes(data)
      try:
        found = everything(prepared.load(p.directory))
      except UserError as e:
        refused += 1
        assert "\n" not in str(e)
        assert p.directory in str(e)
      else:
        for key, x in want.items():
          np.testing.assert_array_equal(found[key], x)
    assert refused >= noticed
    path.write_bytes(whole)
  prepared.load(p.directory)


def test_a_file_of_another_size_is_named(tmp_path):
  log(tmp_path / "log.tsv", 500)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  name = "blocks/recjax_blocks-test.array_record-00000"
  with open(tmp_path / "p" / name, "ab") as f:
    f.write(b"more")
  with pytest.raises(UserError, match=rf"{name} has [\d,]+ bytes, [\d,]+ were"):
    prepared.load(p.directory)


def test_a_damaged_vocabulary_is_not_copied(tmp_path):
  """It was whole when it was loaded."""
  log(tmp_path / "log.tsv", 500)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  to = tmp_path / "checkpoints"
  copied = pathlib.Path(prepared.copy_vocabulary(p, str(to)))
  whole = copied.read_bytes()
  path = tmp_path / "p" / vocabulary.FILE
  path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
  with pytest.raises(UserError, match="is not what was written"):
    prepared.copy_vocabulary(p, str(to))
  assert copied.read_bytes() == whole
  assert [x.name for x in to.iterdir()] == [vocabulary.FILE]


def test_counts_are_those_of_the_blocks(tmp_path):
  log(tmp_path / "log.tsv", 500)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  fewer = dataclasses.replace(p, samples=p.samples | {"train": 64})
  with pytest.raises(UserError, match=r"8 blocks of train where 64 samples"):
    fewer.blocks("train")
  other = dataclasses.replace(p, samples=p.samples | {"train": 449})
  with pytest.raises(UserError, match=r"block 7 has not 1 samples"):
    other.blocks("train")[[0, 7]]


def test_prepared_data_names_no_code_that_runs(tmp_path, monkeypatch):
  """tensorflow-datasets imports the module that features.json names."""
  log(tmp_path / "log.tsv", 100)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  want = p.blocks("train")[[0]]
  (tmp_path / "p" / "evil.py").write_text(
    f"open({str(tmp_path / 'it_ran')!r}, 'w').close()\n"
    "class Feature:\n"
    "  from_json = from_json_content = lambda *_: Feature()\n"
  )
  monkeypatch.syspath_prepend(tmp_path / "p")
  at = tmp_path / "p" / "blocks" / "features.json"
  named = '"pythonClassName": "evil.Feature"'
  at.write_text(re.sub(r'"pythonClassName": *"[^"]*"', named, at.read_text()))
  again = prepared.load(p.directory).blocks("train")[[0]]
  np.testing.assert_array_equal(again["ids"], want["ids"])
  assert not (tmp_path / "it_ran").exists()
  with contextlib.suppress(Exception):  # what it would do
    tfds.builder_from_directory(at.parent)
  assert (tmp_path / "it_ran").exists()


def test_the_vocabulary_travels(tmp_path):
  log(tmp_path / "log.tsv", 50)
  p = prepare.prepare(config(tmp_path / "log.tsv"), str(tmp_path / "p"), quiet)
  path = prepared.copy_vocabulary(p, str(tmp_path / "checkpoint" / "data"))
  found = vocabulary.read_profile(path, p.schema.tables, p.samples["train"])
  np.testing.assert_array_equal(found.counts, p.profile.counts)
  np.testing.assert_array_equal(found.table, p.profile.table)


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


def test_the_engine_reads_no_file_and_no_url(tmp_path):
  (tmp_path / "a.csv").write_text("1\n")
  with vocabulary.open_engine(128, str(tmp_path / "spill")) as engine:
    for what in (tmp_path / "a.csv", "https://localhost/a.csv"):
      with pytest.raises(duckdb.Error, match="disabled"):
        engine.execute("SELECT * FROM read_csv($path)", {"path": str(what)})
    with pytest.raises(duckdb.Error):
      engine.execute("LOAD httpfs")
