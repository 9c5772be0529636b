"""Damaged checkpoints, and those of another model, are refused and say so."""

import dataclasses
import json
import pathlib
import shutil

import orbax.checkpoint as ocp
import pytest
from test_checkpoint import (
  IDENTITY,
  OLDER,
  SAVED,
  assert_same,
  in_rank_order,
  restore,
  save,
  saved,
)

from recjax.errors import UserError
from recjax.training import checkpoint

__all__ = ["saved"]  # the fixture


# ---- Damage: the error names the step and the way out


def error_of(f, *args) -> str:
  with pytest.raises(UserError) as e:
    f(*args)
  assert "\n" not in str(e.value)
  return str(e.value)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


DAMAGES = {
  "tables_truncated": lambda d: truncate(largest_file(d / "tables")),
  "tables_flipped": lambda d: flip(largest_file(d / "tables")),
  "tables_file_deleted": lambda d: largest_file(d / "tables").unlink(),
  "tables_deleted": lambda d: shutil.rmtree(d / "tables"),
  "index_deleted": lambda d: (d / "tables" / "manifest.ocdbt").unlink(),
  "dense_truncated": lambda d: truncate(largest_file(d / "dense")),
  "dense_flipped": lambda d: flip(largest_file(d / "dense")),
  "dense_file_deleted": lambda d: largest_file(d / "dense").unlink(),
  "dense_deleted": lambda d: shutil.rmtree(d / "dense"),
  "meta_garbage": lambda d: (d / "meta" / "metadata").write_bytes(b"\xff{"),
  "meta_empty": lambda d: (d / "meta" / "metadata").write_text("{}"),
  "meta_truncated": lambda d: truncate(d / "meta" / "metadata"),
  "meta_deleted": lambda d: shutil.rmtree(d / "meta"),
  "all_deleted": lambda d: [shutil.rmtree(d), d.mkdir()],
}


@pytest.fixture
def copied(saved, tmp_path):
  directory = tmp_path / "checkpoints"
  shutil.copytree(saved[0], directory)
  return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage, copied, saved):
  DAMAGES[damage](copied / str(SAVED))
  message = error_of(restore, copied, "mixed")
  assert message.startswith(f"checkpoint {SAVED} in {copied} is damaged: ")
  assert f"Delete {copied / str(SAVED)} to go on" in message
  assert "--config.checkpoint.step" in message
  assert len(message) < 1_000
  # The way out works: the one before is there and whole.
  shutil.rmtree(copied / str(SAVED))
  assert checkpoint.newest(copied) == OLDER
  if damage == "tables_flipped":
    state = restore(copied, "mixed", OLDER)
    assert_same(in_rank_order(state, "mixed"), saved[1][OLDER])


def test_meta_without_a_field(copied):
  path = copied / str(SAVED) / "meta" / "metadata"
  whole = json.loads(path.read_text())
  for field in ("plan", "identity", "checksums"):
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
    message = error_of(restore, copied, "mixed")
    assert "is damaged" in message
    assert field in message


def test_half_written_checkpoint_is_ignored(copied, saved):
  """Orbax writes into a folder with this suffix, and renames it when done."""
  part = copied / f"9{ocp.utils.TMP_DIR_SUFFIX}"
  shutil.copytree(copied / str(SAVED), part)
  (part / "commit_success.txt").unlink()
  shutil.rmtree(part / "tables")
  assert checkpoint.newest(copied) == SAVED
  message = error_of(checkpoint.read_meta, copied, 9)
  assert "there is no checkpoint 9" in message
  state = restore(copied, "mixed")
  assert_same(in_rank_order(state, "mixed"), saved[1][SAVED])
  with checkpoint.manager(copied) as to:  # and does not get in the way
    assert to.latest_step() == SAVED
    save(to, 9, state)
  assert checkpoint.newest(copied) == 9
  assert not part.exists()


# ---- Which checkpoint


def test_no_such_step(saved):
  message = error_of(checkpoint.read_meta, saved[0], 4)
  assert message.startswith("checkpoint.step: there is no checkpoint 4")
  assert f"there are {[OLDER, SAVED]}" in message


def test_newest(saved, tmp_path):
  assert checkpoint.newest(saved[0]) == SAVED
  assert checkpoint.newest(tmp_path) is None
  assert checkpoint.newest(tmp_path / "nothing") is None
  assert not (tmp_path / "nothing").exists()


def test_the_newest_few_are_kept(saved, tmp_path):
  state = restore(saved[0], "2_warm")
  with checkpoint.manager(tmp_path, keep=2) as to:
    for step in (1, 3, 4, 8):
      save(to, step, state, "2_warm")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "8"]
  assert checkpoint.newest(tmp_path) == 8


@pytest.mark.parametrize(
  ("field", "value"),
  [("embedding.dim", 16), ("model.name", "dcnv2"), ("model.top", [4, 2])],
)
def test_checkpoint_of_another_model(field, value, saved):
  directory, _ = saved
  meta = checkpoint.read_meta(directory, SAVED)
  want = dataclasses.replace(IDENTITY, model=IDENTITY.model | {field: value})
  message = error_of(checkpoint.check_identity, directory, SAVED, meta, want)
  assert message.startswith(f"checkpoint {SAVED} in {directory}")
  stored = IDENTITY.model[field]
  assert f"{field} is {stored!r} there and {value!r} in this config" in message
  assert "--workdir" in message


def test_checkpoint_of_another_vocabulary(saved):
  directory, _ = saved
  meta = checkpoint.read_meta(directory, SAVED)
  want = dataclasses.replace(IDENTITY, vocabulary="f" * 64, rows=17)
  message = error_of(checkpoint.check_identity, directory, SAVED, meta, want)
  assert "another vocabulary (0123456789ab, 50003 rows" in message
  assert "this data set has ffffffffffff, 17 rows" in message
