"""Damaged checkpoints, and those of another model, are refused and say so."""

import dataclasses
import importlib
import json
import pathlib
import re
import shutil
import sys

import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from helpers_checkpoint import (
  IDENTITY,
  OLDER,
  SAVED,
  assert_same,
  fresh,
  in_rank_order,
  restore,
  save,
)

from recjax.errors import UserError
from recjax.training import checkpoint, same_run

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


def flip(path, *places):
  data = bytearray(path.read_bytes())
  for at in places:
    data[at] ^= 0x10
  path.write_bytes(data)


def flip_rows(path):
  """Flips two bytes, one of which belongs to a row.

  Shards are stored with their padding, which nobody reads: in 12 of 400 saves
  of this state the byte in the middle of the file was one of a shard's last
  row, of padding, and its flip went unnoticed, as it may. Padding is less than
  1/256 of a shard, which is here 108 kB at most.
  """
  middle = path.stat().st_size // 2
  flip(path, middle, middle + 1_024)


def flip_middle(path):
  flip(path, path.stat().st_size // 2)


DAMAGES = {
  "tables_truncated": lambda d: truncate(largest_file(d / "tables")),
  "tables_flipped": lambda d: flip_rows(largest_file(d / "tables")),
  "tables_file_deleted": lambda d: largest_file(d / "tables").unlink(),
  "tables_deleted": lambda d: shutil.rmtree(d / "tables"),
  "index_deleted": lambda d: (d / "tables" / "manifest.ocdbt").unlink(),
  "stored_truncated": lambda d: truncate(largest_file(d / "stored")),
  "stored_flipped": lambda d: flip_middle(largest_file(d / "stored")),
  "stored_file_deleted": lambda d: largest_file(d / "stored").unlink(),
  "stored_deleted": lambda d: shutil.rmtree(d / "stored"),
  "stored_array_deleted": lambda d: shutil.rmtree(d / "stored/g.cold.v"),
  "stored_part_deleted": lambda d: (d / "stored/part.0.json").unlink(),
  "stored_part_garbage": lambda d: truncate(d / "stored/part.0.json"),
  "stored_part_other": lambda d: (d / "stored/part.0.json").write_text("[]"),
  "dense_truncated": lambda d: truncate(largest_file(d / "dense")),
  "dense_flipped": lambda d: flip_middle(largest_file(d / "dense")),
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


@pytest.fixture
def copied_groups(saved_groups, tmp_path):
  directory = tmp_path / "checkpoints"
  shutil.copytree(saved_groups[0], directory)
  return directory


def check_damaged(directory, name) -> str:
  message = error_of(restore, directory, name)
  assert message.startswith(f"checkpoint {SAVED} in {directory} is damaged: ")
  with pytest.raises(UserError) as e:
    checkpoint.check_whole(directory, SAVED, fresh(name))
  assert str(e.value)[:60] == message[:60]
  assert len(message) < 1_000
  return message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage, copied, saved):
  DAMAGES[damage](copied / str(SAVED))
  check_damaged(copied, "mixed")
  # The one before is there and whole.
  checkpoint.check_whole(copied, OLDER, fresh("mixed"))
  shutil.rmtree(copied / str(SAVED))
  assert checkpoint.newest(copied) == OLDER
  if damage in ("tables_flipped", "stored_flipped"):
    run = restore(copied, "mixed", OLDER)
    assert_same(in_rank_order(run), saved[1][OLDER])


@pytest.mark.parametrize("damage", ["tables_truncated", "tables_deleted"])
def test_damaged_checkpoint_of_groups(damage, copied_groups, saved_groups):
  DAMAGES[damage](copied_groups / str(SAVED))
  check_damaged(copied_groups, "groups_2_apart")


@pytest.mark.parametrize(
  ("item", "array", "named"),
  [
    ("stored", "g.cold.v", "g.cold.v"),
    ("tables", "h.hot.acc", "h.acc"),
    ("tables", "b.warm.rows", "b.rows"),
  ],
)
def test_an_array_of_any_group_is_checked(item, array, named, copied_groups):
  """One of its numbers is another one, and every file of it is readable."""
  overwrite_one(copied_groups / str(SAVED) / item, array)
  message = check_damaged(copied_groups, "groups")
  assert f"the checksum of {named} is " in message


@pytest.mark.parametrize(
  ("item", "array", "named"),
  [
    ("stored", "g.cold.rows", "g.cold.rows"),
    ("stored", "h.cold.acc", "h.cold.acc"),
    ("tables", "g.hot.rows", "g.rows"),
    ("tables", "b.warm.acc", "b.acc"),
  ],
)
def test_two_rows_in_each_other_s_place_are_noticed(
  item, array, named, copied_groups
):
  """In device memory, on every device or on one of them, and on hosts."""
  opened = open_array(copied_groups / str(SAVED) / item, array)
  whole = opened.read().result()
  assert (whole[0] != whole[1]).any()
  opened[:2].write(whole[1::-1]).result()
  message = check_damaged(copied_groups, "groups")
  assert f"the checksum of {named} is " in message


def open_array(path, array):
  """Opens an array of an item to read and write."""
  store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{array}/"}
  if path.name == "stored":
    store = {"driver": "file", "path": f"{path / array}/"}
  return ts.open({"driver": "zarr", "kvstore": store}, open=True).result()


def overwrite_one(path, array):
  """Adds 1 to the first number of an array."""
  opened = open_array(path, array)
  first = (0,) * len(opened.shape)
  opened[first].write(opened[first].read().result() + 1).result()


def test_meta_is_what_was_written(copied):
  """Whatever of it changes, even where the rows are the same."""
  path = copied / str(SAVED) / "meta" / "metadata"
  whole = json.loads(path.read_text())
  for change in (
    {"position": {"next": SAVED + 1}},
    {"seed": 12},
    {"identity": whole["identity"] | {"rows": 5}},
    {"plan": whole["plan"].replace('"capacity": 6', '"capacity": 7')},
    {"digest": "0" * 64},
  ):
    path.write_text(json.dumps(whole | change))
    assert json.loads(path.read_text()) != whole
    message = check_damaged(copied, "mixed")
    assert "its meta data is not what was written" in message
  path.write_text(json.dumps(dict(reversed(whole.items()))))
  restore(copied, "mixed")


def test_meta_without_a_field(copied):
  path = copied / str(SAVED) / "meta" / "metadata"
  whole = json.loads(path.read_text())
  for field in ("plan", "identity", "checksums"):
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
    message = error_of(restore, copied, "mixed")
    assert "is damaged" in message
    assert field in message


def test_a_checkpoint_of_another_version_is_not_read(copied):
  """Version 1 had no field to say so."""
  path = copied / str(SAVED) / "meta" / "metadata"
  whole = json.loads(path.read_text())
  older = {k: v for k, v in whole.items() if k not in ("version", "digest")}
  for version, meta in ((1, older), (5, whole | {"version": 5})):
    path.write_text(json.dumps(meta))
    for read in (checkpoint.read_meta, restore):
      args = (
        (copied, SAVED) if read == checkpoint.read_meta else (copied, "mixed")
      )
      message = error_of(read, *args)
      assert message == (
        f"checkpoint {SAVED} in {copied} has version {version}, this recjax "
        "reads version 4: use the recjax that wrote it, or another --workdir"
      )


CODE = """import pathlib
pathlib.Path(__file__).with_name("it ran").touch()
class Type: pass
"""
NOTED = {  # what Orbax notes the types of -> where it does
  "items": r'"[\w.]*Handler"',
  "values": r'(?<="value_type": )"[\w.]*"',
  "shardings": r'(?<=\\"sharding_type\\": )\\"\w*\\"',
}


@pytest.mark.parametrize("of", NOTED)
def test_a_type_that_orbax_notes_is_not_imported(of, copied, monkeypatch):
  """Its module lies beside, where an import finds it."""
  (copied / "noted.py").write_text(CODE)
  monkeypatch.syspath_prepend(copied)
  changed = 0
  for path in (copied / str(SAVED)).rglob("_*"):
    text, count = re.subn(
      NOTED[of],
      lambda m: re.sub(r"[\w.]+", "noted.Type", m[0]),
      path.read_text(),
    )
    path.write_text(text)
    changed += count
  assert changed >= 4
  try:
    restore(copied, "mixed")
  except UserError as e:
    assert "\n" not in str(e)
  assert not (copied / "it ran").exists()
  importlib.import_module("noted")
  assert (copied / "it ran").exists()
  del sys.modules["noted"]


def test_what_is_put_aside_is_no_checkpoint(copied, saved):
  for i in ("", ".2"):
    aside = checkpoint.set_aside(copied, SAVED)
    assert aside == copied / f"{SAVED}.damaged{i}"
    assert (aside / "meta" / "metadata").exists()
    assert checkpoint.newest(copied) == OLDER
    with checkpoint.manager(copied, keep=2) as to:  # and saved again
      save(to, SAVED, restore(copied, "mixed", OLDER))
    assert checkpoint.steps(copied) == [OLDER, SAVED]
    assert aside.exists()


def test_half_written_checkpoint_is_ignored(copied, saved):
  """Orbax writes into a folder with this suffix, and renames it when done."""
  part = copied / f"9{ocp.utils.TMP_DIR_SUFFIX}"
  shutil.copytree(copied / str(SAVED), part)
  (part / "commit_success.txt").unlink()
  shutil.rmtree(part / "tables")
  assert checkpoint.newest(copied) == SAVED
  message = error_of(checkpoint.read_meta, copied, 9)
  assert "there is no checkpoint 9" in message
  run = restore(copied, "mixed")
  assert_same(in_rank_order(run), saved[1][SAVED])
  with checkpoint.manager(copied) as to:  # and does not get in the way
    assert to.latest_step() == SAVED
    save(to, 9, run)
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
  run = restore(saved[0], "2_warm")
  with checkpoint.manager(tmp_path, keep=2) as to:
    for step in (1, 3, 4, 8):
      save(to, step, run)
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
  message = error_of(same_run.check_identity, directory, SAVED, meta, want)
  assert message.startswith(f"checkpoint {SAVED} in {directory}")
  stored = IDENTITY.model[field]
  assert f"{field} is {stored!r} there and {value!r} in this config" in message
  assert "--workdir" in message


def test_checkpoint_of_another_vocabulary(saved):
  directory, _ = saved
  meta = checkpoint.read_meta(directory, SAVED)
  want = dataclasses.replace(IDENTITY, vocabulary="f" * 64, rows=17)
  message = error_of(same_run.check_identity, directory, SAVED, meta, want)
  assert "another vocabulary (0123456789ab, 50003 rows" in message
  assert "this data set has ffffffffffff, 17 rows" in message
