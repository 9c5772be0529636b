"""Files and folders appear whole or not at all."""

import os

import pytest

from recjax import files


def test_content_is_replaced(tmp_path):
  path = tmp_path / "a.txt"
  files.write(path, "first, and longer")
  files.write(path, "né")
  assert path.read_text(encoding="utf-8") == "né"
  files.write(str(path), b"\x00\xff")
  assert path.read_bytes() == b"\x00\xff"
  assert os.listdir(tmp_path) == ["a.txt"]


def test_a_name_without_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  files.write("a", "text")
  assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_half_written(tmp_path, error):
  path = tmp_path / "a"
  for before in (None, "old"):
    if before:
      files.write(path, before)
    with pytest.raises(error), files.replacing(path) as part:
      with open(part, "w") as f:
        f.write("ha")
      assert not before or path.read_text() == before
      raise error
    assert os.listdir(tmp_path) == (["a"] if before else [])
  assert path.read_text() == "old"


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
  files.write(tmp_path / "a", "old")
  with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a"):
    pass
  assert (tmp_path / "a").read_text() == "old"


def test_what_a_killed_process_left_is_overwritten(tmp_path):
  (tmp_path / "a.part").write_text("a long rest of a killed process")
  files.write(tmp_path / "a", "new")
  assert (tmp_path / "a").read_text() == "new"
  (tmp_path / "b.part").mkdir()
  (tmp_path / "b.part" / "rest").touch()
  with files.replacing_folder(tmp_path / "b"):
    pass
  assert os.listdir(tmp_path / "b") == []
  assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_is_replaced_whole(tmp_path):
  path = tmp_path / "folder"
  for name in ("first", "second"):
    with files.replacing_folder(path) as part:
      os.makedirs(os.path.join(part, "deep"))
      files.write(os.path.join(part, "deep", name), name)
      assert not (path / "deep" / name).exists()
    assert os.listdir(path / "deep") == [name]
  with (
    pytest.raises(ValueError, match="stop"),
    files.replacing_folder(path) as part,
  ):
    files.write(os.path.join(part, "third"), "")
    raise ValueError("stop")
  assert os.listdir(path / "deep") == ["second"]
  assert os.listdir(tmp_path) == ["folder"]


def test_a_finished_folder_moves(tmp_path):
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "a").write_text("text")
  files.move_folder(tmp_path / "new", tmp_path / "place")
  assert (tmp_path / "place" / "a").read_text() == "text"
  assert os.listdir(tmp_path) == ["place"]


def test_json_that_anybody_may_have_written(tmp_path):
  path = tmp_path / "a.json"
  for text in (b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000):
    path.write_bytes(text)
    with pytest.raises(ValueError):
      files.read_json(path)
  path.write_bytes(b'{"a": [1]}')
  assert files.read_json(path) == {"a": [1]}
  os.mkfifo(tmp_path / "fifo")
  with pytest.raises(ValueError, match="is not a file"):
    files.read_json(tmp_path / "fifo")
