"""Text files -> lines: damaged lines, damaged .gz files, and which files."""

import gzip
import os

import pytest
from helpers_data import GOOD, field, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recjax.data import text as text_lib
from recjax.errors import UserError

DAMAGED = {
  "few": (GOOD.replace(b"\tc5", b""), r"line 3: 39 fields where 40"),
  "many": (GOOD[:-1] + b"\tx\n", r"line 3: 41 fields where 40"),
  "blank": (b"\n", r"line 3: 1 fields where 40"),
  "label": (field(GOOD, 0, b"2"), r"line 3, field label: '2' is not 0 or 1"),
  "no label": (field(GOOD, 0, b""), r"line 3, field label: '' is not 0 or 1"),
  "text label": (field(GOOD, 0, b"yes"), r"field label: 'yes' is not 0 or 1"),
  "integer": (field(GOOD, 5, b"4.5"), r"line 3, field I5: '4.5' is not an int"),
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
  monkeypatch.setattr(text_lib, "CHUNK_BYTES", 1_000)  # a few lines
  text = GOOD * 57 + field(GOOD, 3, b"x") + GOOD * 40 + b"\n" + GOOD
  path = tmp_path / "log.tsv.gz"
  path.write_bytes(gzip.compress(text))
  label, _, _, bad = read(path, limit=2)
  assert len(label) == 98
  assert [(line, f) for _, line, f, _ in bad.lines] == [(58, "I3"), (99, "")]


def test_an_endless_line_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(text_lib, "CHUNK_BYTES", 1_000)
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
  with pytest.raises(UserError, match=r"log\.tsv\.gz: the \.gz is truncated"):
    read(path, limit=10)


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


def test_files_are_found_in_natural_order(tmp_path):
  for i in (10, 2, 1):
    (tmp_path / f"day_{i}").write_bytes(GOOD)
  found = text_lib.find(str(tmp_path / "day_*"), "data.train")
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
      text_lib.find(str(pattern), "data.test")
