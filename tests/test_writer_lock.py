"""One writer a workdir, and readers that change nothing."""

import contextlib
import errno
import os
import subprocess
import sys

import pytest

from recjax import writer_lock
from recjax.errors import UserError

HOLD = """
import pathlib, sys
from recjax import writer_lock
with writer_lock.writing(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
  """Another process that writes to a workdir."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, tmp_path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_a_second_writer_is_told_of_the_first(other, tmp_path):
  for _ in range(2):
    with (
      pytest.raises(UserError, match=rf"written to by process {other.pid} on "),
      writer_lock.writing(tmp_path),
    ):
      pass


def test_a_dead_writer_holds_nothing(other, tmp_path):
  other.kill()
  other.wait()
  with writer_lock.writing(tmp_path):
    content = (tmp_path / writer_lock.FILE).read_text()
    assert content.startswith(f"process {os.getpid()} on ")


def test_within_itself_and_after_it_ends(tmp_path):
  for _ in range(2):
    with writer_lock.writing(tmp_path), writer_lock.writing(tmp_path):
      pass


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_keeps_nobody_out(
  tmp_path, monkeypatch, number
):
  def refused(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(writer_lock.fcntl, "flock", refused)
  real = number == errno.EIO
  with contextlib.ExitStack() as stack:
    if real:
      stack.enter_context(pytest.raises(OSError))
    with writer_lock.writing(tmp_path):
      assert not real


def test_processes_that_do_not_lock_go_on(other, tmp_path):
  with writer_lock.writing(tmp_path, here=False):
    pass
