"""Folders that users name: a name is that folder, no pattern and no URL."""

import os
import pathlib
import re

from recjax.errors import UserError

# What some library that is given the path takes for more than a name.
_NO_NAMES = (
  (r"\0", "no file system takes it"),
  (r"[\ud800-\udfff]", "it is not UTF-8"),
  (r"[*?\[]", "Orbax takes it for a pattern of file names"),
  (r"\\", "TensorStore and DuckDB take it for a slash"),
  (r"gs:(?=/)|^/(gs|s3|az|hf)(?=/)", "Orbax takes it for a URL"),
)


def named(given: str | os.PathLike[str], field: str) -> pathlib.Path:
  """Returns the absolute path of a folder for runs, as the user names it.

  Args:
    given: the name, as it is: no pattern, no URL, no `~`.
    field: where it was given.

  Raises:
    UserError: a URL, or a library would read or write elsewhere.
  """
  text = os.fspath(given)
  if re.match(r"[a-z][a-z0-9+.-]*://", text):
    raise UserError(
      f"{field}: {text!r} is a URL; give a folder, where the storage is mounted"
    )
  path = pathlib.Path(text).absolute()
  if ".." in path.parts and "\0" not in text:
    # Orbax takes a/link/.. for a, whatever the link is.
    path = pathlib.Path(os.path.realpath(path))
  for pattern, why in _NO_NAMES:
    if found := re.search(pattern, f"{path}/"):
      raise UserError(
        f"{field}: {str(path)!r} has {found[0]!r} in it: {why}; use a folder"
        " of another name"
      )
  return path
