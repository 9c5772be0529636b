"""The tutorial runs, and so does the README's example."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def run(code, tmp_path) -> str:
  """What a script prints, run as a user's own, in a folder of its own."""
  script = tmp_path / "script.py"
  script.write_text(code)
  done = subprocess.run(
    [sys.executable, script], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  return done.stdout


def test_the_tutorial(tmp_path):
  notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
  cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
  assert not any(c["outputs"] for c in cells)  # none that are out of date
  printed = run("\n".join("".join(c["source"]) for c in cells), tmp_path)
  aucs = [float(x) for x in re.findall(r"test auc (\d\.\d+)", printed)]
  assert len(aucs) == 2 and min(aucs) > 0.65
  first, last = re.findall(r"loss (\d\.\d+) -> (\d\.\d+)", printed)
  for before, after in (first, last):
    assert float(after) < float(before)
  (both,) = re.findall(r"log loss (\S+), restored (\S+)", printed)
  kept, restored = map(float, both)
  assert abs(kept - restored) < 1e-6


def test_the_example_of_the_readme(tmp_path):
  code = (ROOT / "README.md").read_text().split("```python\n")[1]
  code = code.split("```")[0]
  assert len(code.splitlines()) <= 25
  printed = run(code, tmp_path)
  auc = float(re.search(r"^(0\.\d+)$", printed, re.MULTILINE)[1])
  assert auc > 0.65
