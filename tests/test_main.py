"""The command line: each user error is one line, and the exit code says so."""

import concurrent.futures
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ("--config", "configs/quickstart.py")

FILES = {
  "typo.py": """
from recjax.config import Config

def get_config():
  c = Config()
  c.train.bach_size = 3
  return c
""",
  "wrong_type.py": """
from recjax.config import Config

def get_config():
  c = Config()
  c.train.steps = "10"
  return c
""",
  "no_function.py": "config = 3\n",
  "not_a_config.py": "def get_config():\n  return {'seed': 1}\n",
}

CASES = {
  "no config": ((), ["--config: missing", "configs/quickstart.py"]),
  "missing file": (
    ("--config", "configs/nothing.py"),
    ["--config: ", "No such file", "'configs/nothing.py'"],
  ),
  "unknown name": (
    ("--config=quikstart",),
    ["--config: ", "'quikstart'", "it has", "quickstart"],
  ),
  "typo": (
    (*CONFIG, "--config.train.bach_size=3"),
    ["did you mean train.batch_size?"],
  ),
  "group typo": (
    (*CONFIG, "--config.trian.steps=3"),
    ["did you mean train?"],
  ),
  "wrong type": (
    (*CONFIG, "--config.train.steps=many"),
    ["config.train.steps", "many"],
  ),
  "wrong choice": (
    (*CONFIG, "--config.model.name=dlmr"),
    ["model.name", "did you mean dlrm?"],
  ),
  "out of range": (
    (*CONFIG, "--config.train.batch_size=0"),
    ["train.batch_size", "at least 1"],
  ),
  "workdir of a pattern": (
    (*CONFIG, "--workdir", "{tmp}/a[1]"),
    ["--workdir: ", "'['", "Orbax", "another name"],
  ),
  "unknown mode": ((*CONFIG, "--mode", "tran"), ["mode", "tran", "train"]),
  "unknown flag": ((*CONFIG, "--workdri=x"), ["workdri", "workdir"]),
  "output of a mode without one": (
    (*CONFIG, "--output=rows.npy"),
    [
      "--output: --mode=train writes into --workdir",
      "--mode=predict or export_rows",
    ],
  ),
  "no output of a mode with one": (
    (*CONFIG, "--mode=export_rows", "--tables=item"),
    ["--output: missing", "--mode=export_rows"],
  ),
  "typo in the file": (
    ("--config", "{tmp}/typo.py"),
    ["train.bach_size", "did you mean train.batch_size?"],
  ),
  "wrong type in the file": (
    ("--config", "{tmp}/wrong_type.py"),
    ["train.steps", "'10' is a str", "expected int"],
  ),
  "file without get_config": (
    ("--config", "{tmp}/no_function.py"),
    ["get_config"],
  ),
  "file with another config": (
    ("--config", "{tmp}/not_a_config.py"),
    ["get_config", "Config"],
  ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """Every case's (exit code, stdout, stderr); two at a time."""
  tmp = tmp_path_factory.mktemp("configs")
  for name, text in FILES.items():
    (tmp / name).write_text(text)

  def run(arguments):
    done = subprocess.run(
      [sys.executable, "main.py", *(a.format(tmp=tmp) for a in arguments)],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    return done.returncode, done.stdout, done.stderr

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    results = pool.map(run, (arguments for arguments, _ in CASES.values()))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(name, outcomes):
  code, out, err = outcomes[name]
  assert code == 1, err
  assert out == ""
  assert err.startswith("error: ")
  assert err.endswith("\n")
  assert err.count("\n") == 1, err
  for part in CASES[name][1]:
    assert part in err
