"""Preparation in tasks: bit for bit what one machine prepares."""

import collections
import dataclasses
import os
import random

import helpers_beam
import pytest
from helpers_data import GOOD, config, content, field, log, quiet

from recjax.config import Config
from recjax.data import (
  beam_prepare,
  prepare,
  prepared,
  shards,
  staging,
  tasks,
  vocabulary,
)
from recjax.data.columns import Columns
from recjax.data.old_vocabulary import NUMBERS, Before
from recjax.errors import UserError


def in_any_order(job, options, report, *, stop: int | None = None):
  """Does each task twice, in any order, as workers may; without Beam.

  Args:
    job: see beam_prepare._run.
    options: the same.
    report: the same.
    stop: after so many tasks, as if killed.
  """
  done, rng = 0, random.Random(0)
  for step in shards.PASSES:
    of = list(range(tasks.count(job, step))) * 2
    rng.shuffle(of)
    for i in of:
      tasks.do(job, step, i)
      done += 1
      if done == stop:
        raise KeyboardInterrupt
  return done


@pytest.fixture(autouse=True)
def no_beam(monkeypatch):
  """Runs tasks here, with ranges of a few values."""
  monkeypatch.setattr(beam_prepare, "_run", in_any_order)
  monkeypatch.setattr(vocabulary, "_BATCH", 64)
  monkeypatch.setattr(tasks.Job, "__new__", _small(tasks.Job.__new__))


def _small(new):
  def of(cls, *args):
    return new(cls, *args, 20_000)

  return of


def both(c: Config, tmp_path, before=None) -> dict[str, str]:
  """Prepares in both ways; returns the files of one and compares them."""
  beam = dataclasses.replace(c, data=dataclasses.replace(c.data, engine="beam"))
  told = [], []
  prepare.prepare(c, str(tmp_path / "a"), told[0].append, before=before)
  prepare.prepare(beam, str(tmp_path / "b"), told[1].append, before=before)
  want, got = content(tmp_path / "a"), content(tmp_path / "b")
  assert got == want
  left = [[t for t in x if "cut" in t or "skipped" in t] for x in told]
  assert left[0] == left[1]
  return got


def files(tmp_path, rows=(200, 7, 300)):
  for i, n in enumerate(rows):
    log(tmp_path / f"log_{i}.tsv", n, seed=i, hotness=4)
  return tmp_path / "log_*.tsv"


CASES = {
  "time": {"weighted": True, "min_count": 1, "test_fraction": 0.4},
  "random": {"split": "random", "seed": 3, "hotness": (3, *[1] * 25)},
}


@pytest.mark.parametrize("name", CASES)
def test_a_criteo_log_is_prepared_the_same(tmp_path, name):
  got = both(config(files(tmp_path), **CASES[name]), tmp_path)
  assert {"vocabulary.parquet", "prepared.json"} < got.keys()


def test_a_test_log_and_damaged_lines_are_the_same(tmp_path):
  train = files(tmp_path)
  (tmp_path / "test.tsv").write_bytes(GOOD + field(GOOD, 3, b"x") + GOOD)
  with open(tmp_path / "log_1.tsv", "ab") as f:
    f.write(field(GOOD, 0, b"7") + GOOD)
  test = str(tmp_path / "test.tsv")
  assert "skipped.tsv" in both(
    config(train, test=test, max_bad_rows=2), tmp_path
  )


def test_blocks_of_several_files_are_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr("recjax.data.blocks._FILE_BYTES", 40_000)
  got = both(config(files(tmp_path)), tmp_path)
  assert sum("array_record" in name for name in got) == 4


@pytest.fixture
def own_format():
  """A registered format: the config of a log of it."""
  with helpers_beam.registered() as of:
    yield of


def test_normalised_numbers_and_buckets_are_the_same(tmp_path, own_format):
  for i, n in enumerate((250, 30, 420)):
    helpers_beam.write(tmp_path / f"log_{i}", n, i)
  both(own_format(tmp_path / "log_*", split="random"), tmp_path)


def test_a_log_is_split_by_its_times(tmp_path, own_format):
  for i in range(3):
    helpers_beam.write(tmp_path / f"log_{i}", 200, i)
  c = own_format(tmp_path / "log_*", test_fraction=0.3)
  both(dataclasses.replace(c, schema=helpers_beam.TIMED), tmp_path)


def test_normalisers_of_another_run_are_used(tmp_path, own_format):
  for i in range(3):
    helpers_beam.write(tmp_path / f"log_{i}", 100, i)
  old = own_format(tmp_path / "log_2")
  was = prepare.prepare(old, str(tmp_path / "old"), quiet)
  numbers = {NUMBERS: [x._asdict() for x in was.numbers]}
  before = Before("", "", was.settings | numbers)
  both(own_format(tmp_path / "log_[01]", count_decay=0.0), tmp_path, before)
  assert prepared.load(str(tmp_path / "b")).numbers == was.numbers


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
  c = config(files(tmp_path), engine="beam")
  total = []

  def counted(*args):
    total.append(in_any_order(*args))

  monkeypatch.setattr(beam_prepare, "_run", counted)
  prepare.prepare(c, str(tmp_path / "a"), quiet)
  for stop in (5, 14, total[0]):
    monkeypatch.setattr(
      beam_prepare, "_run", lambda *a, s=stop: in_any_order(*a, stop=s)
    )
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(c, str(tmp_path / "b"), quiet)
    stage = tmp_path / "b.unfinished" / "stage"
    os.makedirs(stage / f"stage-000000.{'0' * 32}" / "half")  # of one killed
  monkeypatch.setattr(beam_prepare, "_run", in_any_order)
  prepare.prepare(c, str(tmp_path / "b"), quiet)
  assert content(tmp_path / "b") == content(tmp_path / "a")


def test_what_is_done_is_not_done_again(tmp_path):
  job = tasks.Job(str(tmp_path), config("x").data, None, (), ())
  times = collections.Counter()

  def task(job, i, folder):
    times[i] += 1
    tasks.write_json(folder, i)

  step = tasks.Pass("count", lambda job: 2, task)
  for i in (0, 1, 0, 1):
    tasks.do(job, step, i)
  assert times == {0: 1, 1: 1}
  assert tasks.read_json(job.at("count", 1)) == 1


# ---- Errors


def test_errors_are_those_of_one_machine(tmp_path):
  train = files(tmp_path)
  for name in ("log_2.tsv", "log_1.tsv"):
    with open(tmp_path / name, "ab") as f:
      f.write(field(GOOD, 3, b"x") * 2)
  for data in ({"max_bad_rows": 2}, {"max_bad_rows": 1}, {}):
    said = []
    for engine in ("duckdb", "beam"):
      c = config(train, engine=engine, **data)
      with pytest.raises(UserError) as e:
        prepare.prepare(c, str(tmp_path / "p"), quiet)
      said.append(str(e.value))
    assert said[0] == said[1] and "log_" in said[0]


def test_too_few_samples_are_an_error(tmp_path):
  log(tmp_path / "log.tsv", 1)
  c = config(tmp_path / "log.tsv", engine="beam")
  with pytest.raises(UserError, match="the logs hold 1 samples"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)


def test_counts_of_another_run_are_an_error(tmp_path):
  log(tmp_path / "old.tsv", 20)
  log(tmp_path / "new.tsv", 20, seed=1)
  old = prepare.prepare(
    config(tmp_path / "old.tsv"), str(tmp_path / "old"), quiet
  )
  path = str(tmp_path / "old" / vocabulary.FILE)
  before = Before(path, old.vocabulary, old.settings)
  c = config(tmp_path / "new.tsv", engine="beam")
  with pytest.raises(UserError, match=r"counts of another run: set it to"):
    prepare.prepare(c, str(tmp_path / "p"), quiet, before=before)


def test_samples_in_memory_are_an_error():
  c = config("", engine="beam")
  nothing = Columns(None, "label", None)
  with pytest.raises(UserError, match=r"data\.engine is beam, but the samples"):
    beam_prepare.run(c.data, nothing, "nowhere", quiet)


def test_a_format_that_workers_cannot_import_is_an_error(tmp_path, own_format):
  helpers_beam.write(tmp_path / "log", 9, 0)
  c = own_format(tmp_path / "log", engine="beam")

  def read(*args):
    return helpers_beam.read(*args)

  read.__module__ = "my_config_file"
  staging.register_format("fields", helpers_beam.Format(read))
  with pytest.raises(UserError, match="a function of my_config_file, which"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)
