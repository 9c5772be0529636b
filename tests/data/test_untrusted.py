"""Prepared data of somebody who knows how its hashes are made."""

import json
import os
import pathlib

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from helpers_data import config, content, log, quiet

from recjax import files
from recjax.data import prepare, vocabulary
from recjax.errors import UserError


@pytest.fixture
def prepared(tmp_path):
  log(tmp_path / "log.tsv", 50)
  c = config(tmp_path / "log.tsv")
  return c, prepare.prepare(c, str(tmp_path / "p"), quiet)


def forge(directory, **changes):
  """Changes prepared.json so that its hash is right."""
  path = os.path.join(directory, "prepared.json")
  found = files.read_json(path) | changes
  del found["hash"]
  found["hash"] = files.hash_of_json(found)
  files.write(path, json.dumps(found))


@pytest.mark.parametrize(
  "name", [vocabulary.FILE, "blocks/recjax_blocks-train.array_record-00000"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_prepared_data_is_of_files(prepared, name, kind):
  c, p = prepared
  path = os.path.join(p.directory, name)
  os.remove(path)
  os.mkfifo(path) if kind == "pipe" else os.mkdir(path)
  forge(p.directory, sizes={})
  with pytest.raises(UserError, match=r"is not a file.*prepare again"):
    prepare.prepare(c, p.directory, quiet).blocks("train")


@pytest.mark.parametrize("field", ["samples", "settings", "logs", "sizes"])
@pytest.mark.parametrize("value", [None, [], "x", -1])
def test_another_kind_of_value_is_damage(prepared, field, value):
  c, p = prepared
  forge(p.directory, **{field: value})
  with pytest.raises(UserError, match=rf"is damaged .*{field} is"):
    prepare.prepare(c, p.directory, quiet)


@pytest.mark.parametrize("samples", [10**13, 10**30, "x", None, -1])
def test_numbers_of_samples_that_no_block_has_are_damage(prepared, samples):
  """10^13 samples would be a terabyte of sizes, before any block is read."""
  c, p = prepared
  forge(p.directory, samples={"train": samples, "test": 5})
  with pytest.raises(UserError, match=r"is damaged .*prepare again$"):
    prepare.prepare(c, p.directory, quiet).blocks("train")


def test_a_block_of_more_than_its_samples_is_damage(prepared):
  """Packed, 128 MiB of zeros are a file of the size that is right."""
  c, p = prepared
  (path,) = pathlib.Path(p.directory).glob("blocks/*-train.array_record-*")
  size = path.stat().st_size
  writer = ArrayRecordWriter(str(path), "group_size:1")
  writer.write(bytes(128 << 20))
  writer.close()
  assert path.stat().st_size == size
  with pytest.raises(UserError, match=r"is damaged .*prepare again$") as e:
    prepare.prepare(c, p.directory, quiet).blocks("train")[[0]]
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "{}"])
def test_a_pass_whose_mark_is_damaged_runs_again(prepared, tmp_path, text):
  c, p = prepared
  stage = tmp_path / "q.unfinished" / "stage"
  stage.mkdir(parents=True)
  (stage / "staged.json").write_text(text)
  prepare.prepare(c, str(tmp_path / "q"), quiet)
  name = vocabulary.FILE
  assert content(tmp_path / "q")[name] == content(p.directory)[name]
