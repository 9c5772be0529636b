"""Text files -> lines: damaged lines, damaged .gz files."""

import contextlib
import gzip
import os
import re
import subprocess
import sys

import pytest
from helpers_data import GOOD, field, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recjax.data import text_blocks
from recjax.errors import UserError

DAMAGED = {
  "few": (GOOD.replace(b"\tc5", b""), r"line 3: 39 fields where 40"),
  "many": (GOOD[:-1] + b"\tx\n", r"line 3: 41 fields where 40"),
  "blank": (b"\n", r"line 3: 1 fields where 40"),
  "label": (field(GOOD, 0, b"2"), r"line 3, field label: '2' is not 0 or 1"),
  "no label": (field(GOOD, 0, b""), r"line 3, field label: '' is not 0 or 1"),
  "text label": (field(GOOD, 0, b"yes"), r"field label: 'yes' is not 0 or 1"),
  "integer": (field(GOOD, 5, b"4.5"), r"line 3, field I5: '4.5' is not an int"),
  "digits": (field(GOOD, 5, b"9" * 9_999), r"line 3, field I5: .* a 64-bit"),
  "range": (field(GOOD, 5, b"9" * 20), r"line 3, field I5: .* not a 64-bit"),
  "utf8": (field(GOOD, 16, b"\xff\xfe"), r"line 3, field C3: .* is not UTF-8"),
  "cr": (field(GOOD, 16, b"a\rb"), r"line 3, field C3: .* carriage return"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_line_is_named(tmp_path, name, zipped):
  line, message = DAMAGED[name]
  text = GOOD * 2 + line + GOOD * 100
  path = tmp_path / "log.tsv"
  path.write_bytes(gzip.compress(text) if zipped else text)
  with pytest.raises(UserError, match=message) as e:
    read(path)
  assert str(path) in str(e.value)
  assert "data.max_bad_rows" in str(e.value)


@settings(
  max_examples=30,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  lines=st.lists(st.sampled_from([None, *DAMAGED]), min_size=1, max_size=40)
)
def test_damaged_lines_are_skipped_up_to_the_limit(tmp_path, lines):
  path = tmp_path / "log.tsv"
  path.write_bytes(
    b"".join(GOOD if n is None else DAMAGED[n][0] for n in lines)
  )
  damaged = [i for i, n in enumerate(lines, start=1) if n is not None]
  label, _, _, bad = read(path, limit=len(damaged))
  assert len(label) == len(lines) - len(damaged)
  assert [line for _, line, _, _ in bad.lines] == damaged
  assert len(bad.report().splitlines()) == 1 + len(damaged)
  if damaged:
    with pytest.raises(UserError, match=rf"line {damaged[-1]}\b"):
      read(path, limit=len(damaged) - 1)


def test_line_numbers_hold_in_every_block(tmp_path, monkeypatch):
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", 1_000)  # a few lines
  text = GOOD * 57 + field(GOOD, 3, b"x") + GOOD * 40 + b"\n" + GOOD
  path = tmp_path / "log.tsv.gz"
  path.write_bytes(gzip.compress(text))
  label, _, _, bad = read(path, limit=2)
  assert len(label) == 98
  assert [(line, f) for _, line, f, _ in bad.lines] == [(58, "I3"), (99, "")]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_byte_order_mark_opens_a_file_and_no_other_line(
  tmp_path, monkeypatch, blocks
):
  path = tmp_path / "log.tsv"
  lines = [MARK + GOOD, GOOD, MARK + GOOD, GOOD, MARK + GOOD, GOOD]
  path.write_bytes(b"".join(lines))
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", 6 * len(GOOD) // blocks)
  label, _, _, bad = read(path, limit=2)
  assert len(label) == 4
  assert [(line, f) for _, line, f, _ in bad.lines] == [
    (3, "label"),
    (5, "label"),
  ]
  with pytest.raises(UserError, match=r"line 3, field label: .*order mark"):
    read(path)


def test_an_endless_line_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(text_blocks, "CHUNK_BYTES", 1_000)
  path = tmp_path / "log.bin"
  path.write_bytes(GOOD + b"x" * 5_000)
  with pytest.raises(UserError, match=r"longer than 1,000 bytes"):
    read(path)


@pytest.mark.parametrize("keep", [0.2, 0.99])
def test_a_truncated_gz_is_an_error(tmp_path, keep):
  path = tmp_path / "log.tsv.gz"
  zipped = gzip.compress(
    b"".join(
      field(GOOD, 20, os.urandom(8).hex().encode()) for _ in range(2_000)
    )
  )
  path.write_bytes(zipped[: int(len(zipped) * keep)])
  with pytest.raises(UserError, match=r"log\.tsv\.gz: the \.gz is trunc") as e:
    read(path, limit=10)
  with gzip.open(path) as f, contextlib.suppress(EOFError):
    lines = 0
    for _ in f:
      lines += 1
  found = re.search(r"after line ([\d,]+)", str(e.value))
  line = int(found[1].replace(",", ""))
  # To a piece of what is unpacked.
  assert lines - text_blocks.PIECE_BYTES // len(GOOD) <= line <= lines
  assert keep < 0.5 or line > 0


BOMB = """
import pathlib, re, resource, sys
from helpers_data import read
from recjax.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  read(pathlib.Path(sys.argv[1]), limit=int(sys.argv[2]))
except UserError as e:
  print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("content", ["newlines", "one line", "one field"])
def test_a_bomb_takes_bounded_memory(tmp_path, content):
  """256 MB in a .gz of 0.26."""
  path = tmp_path / "log.tsv.gz"
  begins = {"newlines": b"", "one line": b"", "one field": b"1\t2\t"}[content]
  with gzip.open(path, "wb", compresslevel=1) as f:
    f.write(begins)
    for _ in range(256):
      f.write((b"\n" if content == "newlines" else b"x") * (1 << 20))
  env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(
    [sys.executable, "-c", BOMB, path, "50"],
    env=env,
    capture_output=True,
    text=True,
    timeout=120,
  )
  # PyArrow's threads, still parsing, once aborted one exit of 70.
  assert (done.stderr, done.returncode) == ("", 0)
  said, grown = done.stdout.splitlines()
  assert "line 51: 1 fields" in said or "line 1: longer than" in said
  assert int(grown) < 600  # MiB


def test_a_damaged_gz_is_an_error(tmp_path):
  path = tmp_path / "log.tsv.gz"
  zipped = bytearray(gzip.compress(GOOD * 100))
  zipped[-6] ^= 1  # of the checksum
  path.write_bytes(bytes(zipped))
  with pytest.raises(UserError, match=r"truncated or damaged"):
    read(path)


def test_an_empty_gz_is_an_error(tmp_path):
  path = tmp_path / "log.tsv.gz"
  path.write_bytes(gzip.compress(b""))
  with pytest.raises(UserError, match=r"log\.tsv\.gz is empty"):
    read(path)
