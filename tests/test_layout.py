"""The layout: what a room may import, and how long files and functions are."""

import ast
import importlib.util
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location(
  "draw_modules", ROOT / "scripts" / "draw_modules.py"
)
graph = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(graph)

# Make and read data and plans where there is no accelerator and no JAX.
NO_JAX = ("plan", "data", "planner")
# Grain imports JAX itself, where JAX is installed.
IMPORTS_GRAIN = {"recjax.data.batches"}
JOBS = graph.JOBS
FOLDERS = ("recjax", "configs", "scripts", "tests")
FILES = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
FILES.append(ROOT / "main.py")
SOURCES = sorted((ROOT / "recjax").rglob("*.py"))
MODULES = sorted(set(graph.MODULES) - {"recjax"})


def functions(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield node


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_room_and_those_before(module):
  if module in JOBS:
    return
  for imported in graph.own_imports(module):
    assert graph.room(imported) <= graph.room(module)
    assert imported not in JOBS
    if module.startswith(("recjax.embedding", "recjax.training")):
      assert not imported.startswith("recjax.planner")


def test_imports_make_no_circle():
  for module in graph.MODULES:
    graph.level(module)


def test_the_train_loop_is_near_the_ground():
  assert graph.level("recjax.training.train") <= 6


def test_build_md_shows_the_modules_as_they_are():
  """Run scripts/draw_modules.py --write where this fails."""
  text = (ROOT / "BUILD.md").read_text()
  assert f"{graph.BEGIN}\n{graph.draw()}\n{graph.END}" in text


def test_build_md_names_every_file():
  text = (ROOT / "BUILD.md").read_text()
  tree = text.partition("\nrecjax/\n")[2].partition("```")[0]
  named = re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE)
  there = [p.name for p in SOURCES if p.name != "__init__.py"]
  assert sorted(named) == sorted(there)


def test_data_and_plans_need_no_jax():
  alone = []
  for module, path in graph.MODULES.items():
    if module.removeprefix("recjax.").split(".")[0] not in NO_JAX:
      continue
    for imported in graph.imports(path):
      assert imported.split(".")[0] not in ("jax", "flax", "optax", "orbax")
    if module not in IMPORTS_GRAIN:
      alone.append(module)
  code = f"import sys, {', '.join(alone)}; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


# ---- Sizes


@pytest.mark.parametrize("path", FILES, ids=graph.dotted)
def test_a_file_is_short(path):
  assert len(path.read_text().splitlines()) <= 400


def test_half_of_the_files_are_very_short():
  lengths = [len(p.read_text().splitlines()) for p in SOURCES]
  assert statistics.median(length for length in lengths if length) <= 200


@pytest.mark.parametrize("path", SOURCES, ids=graph.dotted)
def test_a_function_is_short_and_takes_few_arguments(path):
  """60 lines of code; at most five positional arguments, self not counted."""
  for f in functions(path):
    lines = f.end_lineno - f.lineno + 1
    if ast.get_docstring(f):
      doc = f.body[0]
      lines -= doc.end_lineno - doc.lineno + 1
    assert lines <= 60, f"{f.name}: {lines} lines"
    arguments = [a.arg for a in (*f.args.posonlyargs, *f.args.args)]
    if arguments[:1] in (["self"], ["cls"]):
      arguments = arguments[1:]
    assert len(arguments) <= 5, f"{f.name}: {arguments}"


def test_no_code_asks_for_a_tier_by_its_name():
  for path in SOURCES:
    found = re.findall(r'[!=]= "(?:cold|warm|hot)"', path.read_text())
    assert not found, path.name


# ---- Safety


@pytest.mark.parametrize("path", FILES, ids=graph.dotted)
def test_a_file_never_unpickles(path):
  for imported in graph.imports(path):
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


@pytest.mark.parametrize("path", FILES, ids=graph.dotted)
def test_test_files_do_not_import_each_other(path):
  for imported in graph.imports(path):
    assert not imported.startswith(("test_", "tests."))


def test_the_tests_that_security_md_names_are_there():
  text = (ROOT / "SECURITY.md").read_text()
  named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
  assert len(named) >= 8
  for path, name in named:
    assert f"def {name or 'test_'}" in (ROOT / path).read_text(), (path, name)
