"""The files of a log: found, told apart, and known again."""

import os
import pathlib
import re
import shlex
import socket
import string
import tempfile

import pytest
from helpers_data import config, content, log, quiet
from hypothesis import example, given
from hypothesis import strategies as st

from recjax.data import log_files, prepare
from recjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_files_are_found_in_natural_order(tmp_path):
  for i in (10, 2, 1):
    (tmp_path / f"day_{i}").write_text("a line")
  found = log_files.find(str(tmp_path / "day_*"), "data.train")
  assert [os.path.basename(p) for p in found] == ["day_1", "day_2", "day_10"]


def test_files_that_cannot_be_found(tmp_path):
  (tmp_path / "empty").touch()
  for pattern, message in (
    ("", r"data\.test is empty"),
    (tmp_path / "none", r"data\.test: .*none does not exist"),
    (tmp_path / "*.gz", r"data\.test: .*\*\.gz matches no file"),
    (tmp_path / "empty", r"data\.test: .*empty is empty"),
    (tmp_path, r"data\.test: .* is not a file"),
  ):
    with pytest.raises(UserError, match=message):
      log_files.find(str(pattern), "data.test")


def test_special_files_are_refused(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  with socket.socket(socket.AF_UNIX) as s:
    s.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/zero"):
      with pytest.raises(UserError, match="is not a file"):
        log_files.find(str(path), "data.train")


def test_several_globs(tmp_path):
  for i in range(24):
    (tmp_path / f"day_{i}").write_text("a line")
  globs = [f"{tmp_path}/day_{x}" for x in ("?", "1?", "2[0-2]")]
  found = log_files.find(",".join(globs), "data.train")
  assert [os.path.basename(p) for p in found] == [f"day_{i}" for i in range(23)]
  with pytest.raises(UserError, match=r"data\.train: .*none\* matches no file"):
    log_files.find(f"{globs[0]},{tmp_path}/none*", "data.train")


def test_the_documented_command_trains_on_all_days_but_its_test_day(tmp_path):
  text = (ROOT / "configs" / "criteo_terabyte.py").read_text()
  words = shlex.split(text.split("\n\n")[1])  # the command, in Python
  patterns = dict(
    re.fullmatch(r"--config\.(data\.\w+)=(.*)", word).groups()
    for word in words
    if word.startswith("--config.data.")
  )
  assert patterns.keys() == {"data.train", "data.test"}
  for i in range(24):
    (tmp_path / f"day_{i}").write_text("a line")
  sources = {
    field: log_files.find(pattern.replace("/1tb", str(tmp_path)), field)
    for field, pattern in patterns.items()
  }
  log_files.check_apart(sources)
  names = {k: [os.path.basename(p) for p in v] for k, v in sources.items()}
  assert names["data.train"] == [f"day_{i}" for i in range(23)]
  assert names["data.test"] == ["day_23"]


def test_a_name_is_a_name_before_it_is_a_pattern(tmp_path):
  for name in ("a[1].tsv", "a1.tsv", "b,c", "*"):
    (tmp_path / name).write_text("a line")
  for name in ("a[1].tsv", "b,c", "*"):
    path = str(tmp_path / name)
    assert log_files.find(path, "data.train") == (path,)


@given(st.text(set(string.printable) - {"/"}, min_size=1, max_size=9))
@example("a[1],b")
@example("[,]")
@example("1\u00b22")  # a digit that is no number
def test_an_escaped_name_is_found_alone(name):
  with tempfile.TemporaryDirectory() as root:
    folder = os.path.join(root, f"x{name}")
    for beside in (folder, os.path.join(root, "x1"), os.path.join(root, "x,")):
      os.makedirs(beside, exist_ok=True)
      for i in (10, 9):
        with open(os.path.join(beside, f"day_{i}"), "w") as f:
          f.write("a line")
    found = log_files.find(f"{log_files.escape(folder)}/day_*", "data.train")
    assert found == tuple(os.path.join(folder, f"day_{i}") for i in (9, 10))


@pytest.mark.parametrize("how", ["same", "link", "hard link", "packed", "dots"])
@pytest.mark.parametrize("field", ["data.train", "data.test"])
def test_a_sample_comes_once(tmp_path, how, field):
  day = tmp_path / "day_0"
  day.write_text("a line")
  again = tmp_path / "again"
  if how == "link":
    again.symlink_to(day)
  elif how == "hard link":
    again.hardlink_to(day)
  elif how == "packed":
    again = tmp_path / "day_0.gz"
    again.write_text("packed")
  else:
    again = day if how == "same" else f"{tmp_path}/../{tmp_path.name}/day_0"
  sources = {"data.train": (str(day),)}
  sources[field] = (*sources.get(field, ()), str(again))
  what = "data.train" if field == "data.train" else "data.train and data.test"
  with pytest.raises(UserError, match=rf"^{what}: .*day_0 and .* same file"):
    log_files.check_apart(sources)


def test_one_name_in_two_folders_is_two_files(tmp_path):
  paths = [tmp_path / name / "day_0" for name in "ab"]
  for path in paths:
    path.parent.mkdir()
    path.write_text("a line")
  log_files.check_apart({"data.train": tuple(map(str, paths))})


def test_it_stops_before_it_trains_on_its_test_day(tmp_path):
  for i in (1, 2, 3):
    log(tmp_path / f"day_{i}", 20, seed=i)
  c = config(tmp_path / "day_*", test=str(tmp_path / "day_3"))
  with pytest.raises(UserError, match=r"data\.train and data\.test: .*day_3"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert not (tmp_path / "p").exists()


# ---- Known again


def test_a_changed_byte_anywhere_is_noticed(tmp_path):
  """Beyond the first and the last MiB, too, at the same length."""
  path = tmp_path / "log.tsv"
  log(path, 30_000)
  assert path.stat().st_size > 3 << 20
  c = config(path)
  prepare.prepare(c, str(tmp_path / "p"), quiet)
  before = content(tmp_path / "p")
  data = bytearray(path.read_bytes())
  middle = data.index(b"\t", len(data) // 2) + 1
  data[middle] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match=r"data\.train was .*log\.tsv"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)
  assert content(tmp_path / "p") == before


def test_a_log_is_hashed_where_it_may_have_changed(tmp_path, monkeypatch):
  path = tmp_path / "log.tsv"
  log(path, 100)
  hashed = []
  real = log_files._hash
  monkeypatch.setattr(
    log_files, "_hash", lambda p, *a: hashed.append(p) or real(p, *a)
  )
  first = prepare.prepare(config(path), str(tmp_path / "p"), quiet)
  prepare.prepare(config(path), str(tmp_path / "p"), quiet)
  assert len(hashed) == 1  # its time of change is known
  moved = tmp_path / "elsewhere" / "log.tsv"
  moved.parent.mkdir()
  path.rename(moved)
  os.utime(moved, (1, 1))
  again = prepare.prepare(config(moved), str(tmp_path / "p"), quiet)
  assert len(hashed) == 2  # and it is the same
  assert again.settings == first.settings
