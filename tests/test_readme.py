"""Runs the README's commands as they are written there."""

import gzip
import os
import pathlib
import re
import shutil
import subprocess
import sys

import compile_targets
import pyarrow.parquet as pq
import pytest
from helpers_data import log
from helpers_logs import behaviour

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PARTS = (
  *("configs", "constraints", "main.py", "pyproject.toml", "recjax"),
  "scripts",
)

# Not run here, and why.
ELSEWHERE = {
  'scripts/test.sh -m "not slow"': "it is what runs this test",
  'pip install -e ".[compile]"': "needs a network; scripts/test.sh installs "
  "the same packages",
}


def commands() -> list[str]:
  """The commands of the README's blocks of no language, a line each."""
  found = []
  for block in README.split("```")[1::2]:
    if block.startswith("\n"):
      text = re.sub(r"\s*\\\n\s*", " ", block)
      lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.split("\n")]
      found += [x for x in lines if re.match(r"(python|pip|scripts/)", x)]
  return found


QUICKSTART, INSPECT, MINE, PREDICT, *OTHERS, COMPILE = [
  c for c in commands() if c not in ELSEWHERE
]


TRAIN, EVALUATE, NEXT_DAY, EXPORT = OTHERS


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
  """A checkout in which this Python, and what it has, is installed."""
  for part in PARTS:
    (tmp_path / part).symlink_to(ROOT / part)
  for name in (".venv/bin/python", "bin/python"):
    python = tmp_path / name
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
  version = f"python{sys.version_info[0]}.{sys.version_info[1]}.txt"
  said = [tmp_path / "pyproject.toml", tmp_path / "constraints" / version]
  stamp = b"".join(path.read_bytes() for path in said if path.exists())
  summed = subprocess.run(["cksum"], input=stamp, capture_output=True)
  (tmp_path / ".venv" / "installed-plain").write_bytes(summed.stdout)
  return tmp_path


def run(command: str, checkout: pathlib.Path, **changes: str) -> str:
  """What a command prints, run by a shell in the checkout."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  env |= {"PATH": f"{checkout / 'bin'}:{env['PATH']}"} | changes
  done = subprocess.run(
    ["bash", "-c", command],
    cwd=checkout,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  return done.stdout + done.stderr


def test_every_command_is_known():
  assert set(ELSEWHERE) < set(commands())
  assert QUICKSTART == "scripts/run.sh --config configs/quickstart.py"
  assert "--mode=evaluate" in EVALUATE and "--mode" not in TRAIN
  assert COMPILE.startswith("python scripts/compile_for.py ")


@pytest.mark.slow
def test_quickstart(checkout):
  printed = run(QUICKSTART, checkout)
  expected = README.split("The last lines are\n\n```\n")[1].split("```")[0]
  for line in expected.splitlines():
    assert line.strip().removesuffix("...") in printed


@pytest.mark.slow
def test_a_log_without_a_config(checkout):
  (checkout / "logs").mkdir()
  made = behaviour(checkout, "parquet")
  made.rename(checkout / "logs" / "day.parquet")
  (checkout / "new").mkdir()
  new = pq.read_table(checkout / "logs" / "day.parquet").slice(0, 100)
  label = next(x for x in new.column_names if "click" in x)
  pq.write_table(new.drop_columns([label]), checkout / "new" / "a.parquet")
  fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  printed = run(INSPECT, checkout, **fast)
  assert "history of item_id" in printed and "holds a config" in printed
  assert re.search(r"^ +auc 0\.\d+$", run(MINE, checkout, **fast), re.MULTILINE)
  run(PREDICT, checkout, **fast)
  found = pq.read_table(checkout / "predictions.parquet")
  assert len(found) == 100 and "probability" in found.column_names


@pytest.mark.slow
def test_your_own_logs(checkout):
  (checkout / "logs").mkdir()
  for day in range(2):
    plain = checkout / "log"
    log(plain, 10_000, seed=day)
    packed = checkout / "logs" / f"day_{day}.tsv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
  fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  printed = [run(command, checkout, **fast) for command in (TRAIN, EVALUATE)]
  aucs = [re.findall(r"^ +auc (0\.\d+)$", x, re.MULTILINE) for x in printed]
  assert len(aucs[0]) == 1 and aucs[0] == aucs[1]
  shutil.rmtree(checkout / "logs")
  (checkout / "logs").mkdir()
  log(plain, 10_000, seed=2)
  packed = checkout / "logs" / "next.tsv.gz"
  packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
  printed = run(NEXT_DAY, checkout, **fast)
  assert re.search(r"^of [\d,]+ rows [\d,]+ are new", printed, re.MULTILINE)
  run(EXPORT, checkout, **fast)
  found = {p.name for p in (checkout / "rows").iterdir()}
  assert found == {"C3.parquet", "C12.parquet"}


@pytest.mark.slow
def test_for_accelerators_that_you_do_not_have(checkout):
  target = compile_targets.parse("h200", 8)
  if lacks := compile_targets.missing(target):
    pytest.skip(lacks)
  installed = {"PYTHONPATH": str(compile_targets.COMPILERS)}
  printed = run(COMPILE, checkout, **installed)
  assert "compiled for 8 x h200, jax" in printed
  assert "train step, compiled in" in printed
