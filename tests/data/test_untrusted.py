"""Prepared data of somebody who knows how its hashes are made."""

import json
import os

import pytest
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


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "{}"])
def test_a_pass_whose_mark_is_damaged_runs_again(prepared, tmp_path, text):
  c, p = prepared
  stage = tmp_path / "q.unfinished" / "stage"
  stage.mkdir(parents=True)
  (stage / "staged.json").write_text(text)
  prepare.prepare(c, str(tmp_path / "q"), quiet)
  name = vocabulary.FILE
  assert content(tmp_path / "q")[name] == content(p.directory)[name]
