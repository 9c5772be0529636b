"""Which file --config means. What errors look like: test_main.py."""

import pathlib
import re
import subprocess
import sys

import pytest

from recjax import cli
from recjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def test_configs_of_a_checkout():
  expected = {p.stem: p for p in (ROOT / "configs").glob("*.py")}
  assert cli.own_configs() == expected


def test_configs_of_a_wheel(tmp_path, monkeypatch):
  """They lie in the package, as pyproject.toml's package-dir puts them."""
  package = tmp_path / "site-packages" / "recjax"
  (package / "configs").mkdir(parents=True)
  (package / "configs" / "quickstart.py").touch()
  (package.parent / "configs").mkdir()  # of another project
  (package.parent / "configs" / "other.py").touch()
  monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
  own = package / "configs" / "quickstart.py"
  assert cli.own_configs() == {"quickstart": own}


def test_a_config_by_name_or_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  own = str(ROOT / "configs" / "quickstart.py")
  pathlib.Path("quickstart").mkdir()  # a folder is no config
  assert cli.find_config("quickstart") == own
  assert cli.find_config("configs/quickstart.py") == own
  # Files come first.
  pathlib.Path("configs").mkdir()
  pathlib.Path("configs/quickstart.py").touch()
  assert cli.find_config("configs/quickstart.py") == "configs/quickstart.py"
  assert cli.find_config("quickstart") == own
  pathlib.Path("mine.py").touch()
  assert cli.find_config("mine.py") == "mine.py"
  # Left as they are, for the parser to name.
  for missing in ("mine/quickstart.py", "quickstart.py", "configs/mine.py", ""):
    assert cli.find_config(missing) == missing


def test_a_path_that_would_be_cut_is_an_error(tmp_path, monkeypatch):
  """ml_collections gives get_config() what comes after the first colon."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("a:b.py").touch()
  with pytest.raises(UserError, match=r"^--config: 'a:b\.py' has ':' in it"):
    cli.find_config("a:b.py")
  assert cli.find_config("a.py:b") == "a.py:b"  # an argument


def test_an_unknown_name_is_an_error():
  names = ", ".join(cli.own_configs())
  pattern = f"no file 'quikstart'.*it has {re.escape(names)}$"
  with pytest.raises(UserError, match=pattern):
    cli.find_config("quikstart")


# ---- --mode=inspect


def run(at, *arguments):
  done = subprocess.run(
    [sys.executable, ROOT / "main.py", "--mode=inspect", *arguments],
    cwd=at,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


def test_inspect_writes_a_config_once_and_needs_none(tmp_path):
  log = "click,item,price\n" + "1,a,0.5\n0,b,2.25\n" * 40
  (tmp_path / "log.csv").write_text(log)
  train = "--config.data.train=log.csv"
  code, out, err = run(tmp_path, train, "--output=mine.py")
  assert (code, err) == (0, "")
  assert "mine.py holds a config to start from" in out
  made = (tmp_path / "mine.py").read_text()
  assert 'labels=("click",)' in made
  code, out, err = run(tmp_path, train, "--output=mine.py")
  assert (code, out) == (1, "")
  assert err.startswith("error: --output: mine.py is there already")
  assert (tmp_path / "mine.py").read_text() == made
  # Beside a config; what follows the report is the config proposed.
  code, out, err = run(tmp_path, "--config", "mine.py")
  assert (code, err) == (0, "")
  rows = [line.split() for line in out.splitlines()]
  assert ["proposed", "config"] in [row[-2:] for row in rows]
  assert ["id", "id"] in [row[-2:] for row in rows if row[:1] == ["item"]]
  assert made in out


def test_a_new_config_has_a_folder_and_a_name_that_is_free(tmp_path):
  missing = tmp_path / "no" / "mine.py"
  with pytest.raises(UserError, match=r"^--output: there is no folder .*no$"):
    cli.new_config(str(missing))
  with pytest.raises(UserError, match=r"^--output: 'a:b\.py' has ':' in it"):
    cli.new_config("a:b.py")
  (tmp_path / "gone.py").symlink_to("nowhere")
  with pytest.raises(UserError, match="is there already"):
    cli.new_config(str(tmp_path / "gone.py"))
