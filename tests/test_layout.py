"""The layout: what a room may import, and how long files and functions are."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "recjax"
# Each room imports from the root modules and from the rooms before it.
ROOMS = ("plan", "data", "models", "planner", "embedding", "training")
# Make and read data and plans where there is no accelerator and no JAX.
NO_JAX = ("plan", "data", "planner")
# Grain imports JAX itself, where JAX is installed.
IMPORTS_GRAIN = {"recjax.data.batches"}
FOLDERS = ("recjax", "configs", "scripts", "tests")
FILES = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
FILES.append(ROOT / "main.py")


def dotted(path: pathlib.Path) -> str:
  """recjax/plan/plan.py -> recjax.plan.plan."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(p for p in parts if p != "__init__")


MODULES = {dotted(p): p for p in PACKAGE.rglob("*.py")}


@functools.cache
def imports(path) -> frozenset[str]:
  """Every module and name that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return frozenset(found)


def own_imports(module: str) -> set[str]:
  """The modules of recjax that a module imports."""
  found = set()
  for name in imports(MODULES[module]):
    while name not in MODULES and "." in name:
      name = name.rpartition(".")[0]
    if name in MODULES and name != "recjax":
      found.add(name)
  return found


def room(module: str) -> int:
  """A module's room, counted from 1; 0 for the root modules."""
  _, *rest = module.split(".")
  return 1 + ROOMS.index(rest[0]) if rest[0] in ROOMS else 0


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"recjax"}))
def test_a_module_imports_only_from_its_room_and_those_before(module):
  for imported in own_imports(module):
    assert room(imported) <= room(module)
    if module.startswith("recjax.embedding"):
      assert not imported.startswith("recjax.planner")


@functools.cache
def depth(module: str, above: tuple[str, ...] = ()) -> int:
  """Levels of the longest chain of imports that ends in the module."""
  assert module not in above, f"a circle of imports: {above}"
  below = (depth(m, (*above, module)) for m in own_imports(module))
  return 1 + max(below, default=0)


def test_imports_make_no_circle():
  for module in MODULES:
    depth(module)


def test_data_and_plans_need_no_jax():
  alone = []
  for module, path in MODULES.items():
    if module.removeprefix("recjax.").split(".")[0] not in NO_JAX:
      continue
    for imported in imports(path):
      assert imported.split(".")[0] not in ("jax", "flax", "optax", "orbax")
    if module not in IMPORTS_GRAIN:
      alone.append(module)
  code = f"import sys, {', '.join(alone)}; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_is_short(path):
  assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=dotted)
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
