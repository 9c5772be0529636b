"""The layout: what a module may import, and how long a file may be."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The modules in BUILD.md's tree; each imports only from those above it.
ORDER = re.findall(
  r"^  (\w+)\.py ",
  (ROOT / "BUILD.md").read_text().partition("\nrecjax/\n")[2],
  re.MULTILINE,
)
# Makes and reads data and plans where there is no accelerator and no JAX.
NO_JAX = ORDER[: ORDER.index("planner") + 1]
# Grain imports JAX itself, where JAX is installed.
IMPORTS_GRAIN = {"batches"}
FILES = sorted(
  p
  for folder in ("recjax", "configs", "scripts", "tests", ".")
  for p in (ROOT / folder).glob("*.py")
)


def imports(path) -> set[str]:
  """Every module that a file imports, anywhere in it, as dotted names."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def test_every_module_has_its_place():
  names = {p.stem for p in ROOT.glob("recjax/*.py")} - {"__init__"}
  assert sorted(names) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name):
  above = ORDER[: ORDER.index(name)]
  for imported in imports(ROOT / "recjax" / f"{name}.py"):
    package, *rest = imported.split(".")
    if package == "recjax":
      assert rest[0] in above


def test_data_and_plans_need_no_jax():
  for name in NO_JAX:
    for imported in imports(ROOT / "recjax" / f"{name}.py"):
      assert imported.split(".")[0] not in ("jax", "flax", "optax", "orbax")
  alone = [name for name in NO_JAX if name not in IMPORTS_GRAIN]
  names = ", ".join(f"recjax.{name}" for name in alone)
  code = f"import sys, {names}; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_is_short(path):
  assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_never_unpickles(path):
  for imported in imports(path):
    assert imported.split(".")[0] not in {
      "pickle",
      "cPickle",
      "dill",
      "cloudpickle",
      "shelve",
      "marshal",
      "joblib",
    }
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
      assert isinstance(node.value, ast.Constant)
      assert node.value.value is False
