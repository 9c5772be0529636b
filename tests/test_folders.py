"""Which folder a name names, and which names are refused."""

import pathlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax import folders
from recjax.errors import UserError

NAMES = st.text(set(string.printable) - set("/*?[\\"), min_size=1)


@given(NAMES.filter(lambda x: not x.endswith("gs:")))
def test_a_folder_is_called_as_it_is_said(name):
  assert (
    folders.named(f"/a/./{name}/", "f") == pathlib.Path("/a", name).resolve()
  )
  assert folders.named(pathlib.Path(name), "f").is_absolute()


@pytest.mark.parametrize(
  "name, part",
  [
    ("a[1]", "'['"),
    ("day_*", "'*'"),
    ("x?y", "'?'"),
    ("a\\b", "'\\\\'"),
    ("logs:", "'gs:'"),
    ("a\0", "'\\x00'"),
    ("\udce9", "'\\udce9'"),
    ("/gs/bucket", "'/gs'"),
  ],
)
def test_what_a_library_takes_for_more_than_a_name(name, part):
  """As the folder, and above it."""
  for given_name in (name, f"{name}/run", pathlib.Path("x", "..", name)):
    with pytest.raises(UserError) as e:
      folders.named(given_name, "--workdir")
    assert str(e.value).startswith("--workdir: ")
    assert f" has {part} in it: " in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://a", "file:///tmp/a"])
def test_a_url_is_no_folder(url):
  with pytest.raises(UserError, match=f"^f: '{url}' is a URL; give a folder"):
    folders.named(url, "f")


def test_a_folder_above_a_link(tmp_path):
  """Where the system finds it, which is not what the letters say."""
  (tmp_path / "there" / "below").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "there" / "below")
  found = folders.named(tmp_path / "link" / ".." / "run", "f")
  assert found == (tmp_path / "there" / "run").resolve()
  # A link to another folder has the name that it was given.
  assert folders.named(tmp_path / "link", "f") == tmp_path / "link"
