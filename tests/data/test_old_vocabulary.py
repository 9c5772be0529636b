"""Counts of another run's log that go into a new one's, and what goes on."""

import collections
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import config, log, quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.data import old_vocabulary, prepare, vocabulary
from recjax.data.old_vocabulary import BEFORE, DECAY, Before
from recjax.errors import UserError

# ---- Against a plain count


def written(path, counts, tables, min_count, before=None):
  """Writes the vocabulary of {(table, value or None = missing): count}."""
  keys = list(counts)
  part = (
    np.int16([tables.index(t) for t, _ in keys]),
    pa.array([v for _, v in keys], pa.string()),
    np.int64([counts[k] for k in keys]),
  )
  depends = {BEFORE: before.fingerprint, DECAY: 0.5} if before else {}
  with vocabulary.open_engine(256, f"{path}.spill") as engine:
    fingerprint, share = old_vocabulary.count(
      engine,
      iter([part]),
      tables,
      [min_count] * len(tables),
      path,
      before=before,
      settings=depends,
    )
  assert vocabulary.tables_of(path) == tables
  assert vocabulary.fingerprint_of(path, tables) == fingerprint
  return Before(path, fingerprint, {}), share


def plain(counts, tables, min_count, before):
  """{(table, kind, value): count} of a day; before: that of the day before."""
  total = collections.Counter(counts)
  found = dict.fromkeys(((t, k, None) for t in tables for k in
                         ("oov", "missing")), 0)  # fmt: skip
  for (t, kind, value), n in before.items():
    if t in tables and kind == "oov":
      found[t, "oov", None] += n // 2
    elif t in tables:
      total[t, value] += n // 2
  for (t, value), n in total.items():
    if value is None:
      found[t, "missing", None] += n
    elif n < min_count:
      found[t, "oov", None] += n
    else:
      found[t, "value", value] = n
  return found


def rows_of(path):
  rows = pq.read_table(path).to_pylist()
  return [(r["table"], r["kind"], r["value"]) for r in rows], [
    r["count"] for r in rows
  ]


_days = st.lists(
  st.dictionaries(
    st.tuples(
      st.sampled_from("abc"), st.none() | st.sampled_from(["", *"xyzü"])
    ),
    st.integers(1, 9),
    min_size=1,
  ),
  min_size=2,
  max_size=3,
)


@settings(max_examples=12)
@given(_days, st.integers(1, 3), st.permutations("abc"))
def test_days_are_merged_and_joined_as_a_plain_count_says(days, least, order):
  """Tables come and go and change their order; 'c' is of the first day only."""
  with tempfile.TemporaryDirectory() as folder:
    before, want, tables = None, {}, tuple(order)
    for i, counts in enumerate(days):
      if i:
        tables = ("b", "a")
      counts = {k: n for k, n in counts.items() if k[0] in tables}
      path = str(pathlib.Path(folder) / f"{i}.parquet")
      now, share = written(path, counts, tables, least, before)
      want = plain(counts, tables, least, want)
      keys, n = rows_of(path)
      assert dict(zip(keys, n, strict=True)) == want
      assert n == sorted(n, reverse=True)
      own = sum(counts.values())
      assert share == (sum(n) / max(own, 1) if i else 1)
      if before:
        old = {key: r for r, key in enumerate(rows_of(before.path)[0])}
        with vocabulary.open_engine(256, folder) as engine:
          ranks = old_vocabulary.ranks_in(engine, before.path, path, len(keys))
        assert ranks.tolist() == [old.get(key, -1) for key in keys]
      before = now


# ---- Prepared data


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """(folder of two logs, the data of the first as another run's)."""
  folder = tmp_path_factory.mktemp("days")
  for day in (1, 2):
    log(folder / f"{day}.tsv", 200, seed=day)
  p = prepare.prepare(config(folder / "1.tsv"), str(folder / "p"), quiet)
  path = str(folder / "p" / vocabulary.FILE)
  return folder, Before(path, p.vocabulary, p.settings), p


def test_a_new_log_is_prepared_with_the_counts_before(first, tmp_path):
  folder, before, old = first
  c, directory = config(folder / "2.tsv"), str(tmp_path / "p")
  p = prepare.prepare(c, directory, quiet, before=before)
  assert (p.settings[BEFORE], p.settings[DECAY]) == (before.fingerprint, 0.5)
  # 180 samples of each log train, 26 lookups each.
  assert p.profile.accesses > 26 * 1.45 * 180
  assert p.profile.samples == pytest.approx(p.profile.accesses / 26, abs=1)
  # Later the other run may be gone; with it, nothing is done again.
  for again in (None, before):
    found = prepare.prepare(c, directory, quiet, before=again)
    assert found.vocabulary == p.vocabulary != old.vocabulary
    assert found.profile.samples == p.profile.samples
  c.data.count_decay = 0.25
  with pytest.raises(UserError, match=r"data\.count_decay was 0\.5, is"):
    prepare.prepare(c, directory, quiet, before=before)


def test_without_decay_it_is_of_the_log_alone(first, tmp_path):
  folder, before, _ = first
  c = config(folder / "2.tsv", count_decay=0.0)
  p = prepare.prepare(c, str(tmp_path / "p"), quiet, before=before)
  alone = prepare.prepare(c, str(tmp_path / "alone"), quiet)
  assert p.vocabulary == alone.vocabulary and p.settings == alone.settings
  assert p.profile.samples == 180


def test_the_same_log_counts_once(first, tmp_path):
  """Also where the run before had counts of another one before it."""
  folder, before, old = first
  c = config(folder / "1.tsv")
  c.data.block_samples = 32  # which changes no count
  p = prepare.prepare(c, str(tmp_path / "same"), quiet, before=before)
  assert p.vocabulary == old.vocabulary and BEFORE not in p.settings

  c = config(folder / "2.tsv")
  p = prepare.prepare(c, str(tmp_path / "later"), quiet, before=before)
  path = str(tmp_path / "later" / vocabulary.FILE)
  later = Before(path, p.vocabulary, p.settings)
  same = prepare.prepare(c, str(tmp_path / "again"), quiet, before=later)
  assert same.vocabulary == p.vocabulary and same.settings == p.settings
  assert same.profile.samples == p.profile.samples


def test_a_vocabulary_is_found_where_it_is_whole(first, tmp_path):
  folder, before, _ = first
  (tmp_path / "data").mkdir()
  (tmp_path / "checkpoints").mkdir()
  find = lambda: old_vocabulary.find(tmp_path, before.fingerprint, "--workdir")
  with pytest.raises(UserError, match=r"--workdir: neither .* is the vocabu"):
    find()
  (tmp_path / "checkpoints" / vocabulary.FILE).write_bytes(b"PAR1")
  whole = (folder / "p" / vocabulary.FILE).read_bytes()
  (tmp_path / "data" / vocabulary.FILE).write_bytes(whole)
  assert find() == str(tmp_path / "data" / vocabulary.FILE)


def test_of_an_old_file_the_data_says_the_order_of_tables(first, tmp_path):
  folder, before, _ = first
  data = prepare.prepare(
    config(folder / "1.tsv"), str(tmp_path / "data"), quiet
  )
  (tmp_path / "checkpoints").mkdir()
  path = tmp_path / "checkpoints" / vocabulary.FILE
  pq.write_table(pq.read_table(before.path).replace_schema_metadata(), path)
  find = old_vocabulary.find(tmp_path, before.fingerprint, "--workdir")
  assert find == str(path)
  profile = old_vocabulary.profile_of(find)
  assert profile.tables == data.schema.tables
  np.testing.assert_array_equal(profile.counts, data.profile.counts)
