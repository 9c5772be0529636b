"""Preparing on a full disk, killed, or with little memory: nothing is lost."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from helpers_data import config, content, log, quiet

from recjax.data import prepare, vocabulary

# Fills the disk, or dies, as a pass reports its end; or dies before a rename.
SCRIPT = """
import os, resource, signal, sys
from recjax.data import prepare
from recjax.config import Config, Data
from recjax.errors import UserError
train, directory, full, dies = sys.argv[1:]

def report(line):
  print(line, flush=True)
  if full and f"prepare: {full}" in line:
    fill()
  if dies and f"prepare: {dies}" in line:
    die()

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def rename(*paths, real=os.replace, calls=[]):
  calls.append(paths)
  return die() if str(len(calls)) == dies else real(*paths)

os.replace = rename

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


def run(train, directory, full="", dies=""):
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(train), str(directory), full, dies],
    cwd=os.path.join(os.path.dirname(__file__), "..", ".."),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow
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


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
  """One death after the other, each further on, all in the same folder."""
  log(tmp_path / "log.tsv", 20_000)
  start = time.monotonic()
  with run(tmp_path / "log.tsv", tmp_path / "p") as process:
    assert process.wait() == 0
  spent = time.monotonic() - start
  want = content(tmp_path / "p")
  # Before the renames of the chunk's two files, staged.json, the vocabulary;
  # counted.json; after the last sample; before prepared.json and the folder.
  for dies in ("1", "2", "3", "4", "2", "pack", "1", "2"):
    with run(tmp_path / "log.tsv", tmp_path / "q", dies=dies) as process:
      assert process.wait() == -signal.SIGKILL
  rng = random.Random(0)
  for _ in range(2):  # and at a moment that nobody chose
    with run(tmp_path / "log.tsv", tmp_path / "q") as process:
      time.sleep(spent * rng.uniform(0.4, 1.0))
      process.kill()
      process.wait()
    shutil.rmtree(tmp_path / "q", ignore_errors=True)  # where it was finished
  with run(tmp_path / "log.tsv", tmp_path / "q") as process:
    assert process.wait() == 0
  assert content(tmp_path / "q") == want


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
  """More distinct values than the engine may hold: it spills."""
  n = 3_000_000
  values = pa.array(np.random.default_rng(0).permutation(n)).cast(pa.string())

  def parts():
    for i in range(0, n, 100_000):
      text = pc.binary_join_element_wise(
        "a rather long value", values[i : i + 100_000], " "
      )
      yield np.zeros(100_000, np.int16), text

  spill = str(tmp_path / "spill")
  with vocabulary.open_engine(128, spill) as engine:
    counted = ((t, v, np.full(len(v), 3)) for t, v in parts())
    vocabulary.count(engine, counted, ("a",), [2], str(tmp_path / "v"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    ranks = np.concatenate(
      list(vocabulary.ranks(engine, parts, ("a",), str(tmp_path / "v")))
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
  assert len(np.unique(ranks)) == n
  assert after - before < 400  # MiB; the values alone take that
