"""Counts the faults that the tests notice: one small change at a time.

  python scripts/mutate.py --tries=168 --results=/tmp/mutants.jsonl
  python scripts/mutate.py --slow --results=/tmp/mutants.jsonl  # survivors
  python scripts/mutate.py --only=data/ --tries=1000

Works in a copy of the tree. Each mutant runs the fast tests of one file, with
--slow all those that should notice it. One that outlasts the limit counts as
noticed. Run again with the same results it goes on; exits 1 where some survive.
"""

import argparse
import ast
import collections
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
STEP = "training/test_step.py::test_one_group_equals_one_dense_table"
VISIT = "training/test_visiting.py"
EXCHANGE, PLAN = "embedding/test_exchange.py", "planner/test_write_plan.py"
BUCKETS = "planner/test_bucket_cuts.py"
CUTS, COST = "planner/test_cut_points.py", "planner/test_step_cost.py"
# Module -> the tests that should notice: one file, and others for survivors.
TESTS = {
  "embedding/exchange": (EXCHANGE, "training/test_step.py"),
  "embedding/lookup": (STEP, "embedding/test_lookup.py"),
  "embedding/update": (STEP, EXCHANGE, "training/test_step.py"),
  "embedding/tables": ("embedding/test_tables.py", STEP),
  "embedding/coalesce": ("embedding/test_coalesce.py", STEP),
  "embedding/buckets": ("embedding/test_buckets.py", STEP),
  "embedding/pooling": ("embedding/test_pooling.py", STEP),
  "embedding/visits": (VISIT, STEP),
  "embedding/host_store": ("embedding/test_host_store.py", VISIT),
  "embedding/host_route": ("embedding/test_host_route.py", VISIT),
  "data/batches": ("data/test_batches.py",),
  "data/shuffle": ("data/test_shuffle.py", "data/test_batches.py"),
  "training/checkpoint": (
    "training/test_checkpoint.py",
    "training/test_checkpoint_refused.py",
    "training/test_checkpoint_stored.py",
  ),
  "training/evaluate": ("training/test_evaluate.py",),
  "training/metrics": ("training/test_metrics.py",),
  "training/visiting": (VISIT, "test_api.py"),
  "training/look_ahead": (VISIT, STEP),
  "planner/step_cost": ("planner/test_step_terms.py", COST, PLAN),
  "planner/traffic": ("planner/test_traffic.py", COST, CUTS),
  "planner/cut_points": (BUCKETS, CUTS, "planner/test_joint_cuts.py"),
  "planner/problem": ("planner/test_problem.py", CUTS, COST),
}
_SWAPS = (
  "Lt LtE, LtE Lt, Gt GtE, GtE Gt, Eq NotEq, NotEq Eq, In NotIn, NotIn In, "
  "Is IsNot, IsNot Is, Add Sub, Sub Add, Mult Add, Div Mult, FloorDiv Mult, "
  "Mod FloorDiv, BitAnd BitOr, BitOr BitAnd, LShift RShift, RShift LShift, "
  "And Or, Or And"
)
_OTHER = dict(
  [getattr(ast, name) for name in swap.split()] for swap in _SWAPS.split(", ")
)
_SLOW_LIMIT = 1_200  # seconds
# Types and texts: no test should notice.
_LEFT_OUT = {"annotation", "returns", "decorator_list", "exc", "msg"}


def sites(node):
  """Yields (parent, field, place in it) of every node that may change."""
  for field, value in ast.iter_fields(node):
    children = value if isinstance(value, list) else [value]
    for i, child in enumerate(children):
      if not isinstance(child, ast.AST) or field in _LEFT_OUT:
        continue
      yield node, field, i
      if not isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
        yield from sites(child)


def changes(node):
  """Yields what may be there instead of a node."""
  with_operator = lambda new: type(node)(**dict(ast.iter_fields(node)) | new)
  match node:
    case ast.Compare(ops=[op]) if type(op) in _OTHER:
      yield with_operator({"ops": [_OTHER[type(op)]()]})
    case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in _OTHER:
      yield with_operator({"op": _OTHER[type(op)]()})
    case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
      yield operand
    case ast.Constant(value=bool(x)):
      yield ast.Constant(not x)
    case ast.Constant(value=int(x)):
      yield from (ast.Constant(x + 1), ast.Constant(x - 1))
    case ast.IfExp(body=a, orelse=b):
      yield from (a, b)
    case ast.Return(value=ast.Call(args=[x, *_])):
      if not isinstance(x, ast.Starred):
        yield ast.Return(x)
    case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()):
      yield ast.Pass()
    case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
      yield ast.Pass()


def mutants(source: str) -> list[tuple[dict, str]]:
  """Returns (line, what was there, what is there now; the text) of each."""
  found = []
  for k, (parent, field, i) in enumerate(sites(ast.parse(source))):
    value = getattr(parent, field)
    old = value[i] if isinstance(value, list) else value
    for new in changes(old):
      tree = ast.parse(source)
      parent, _, _ = next(x for j, x in enumerate(sites(tree)) if j == k)
      if isinstance(value, list):
        getattr(parent, field)[i] = new
      else:
        setattr(parent, field, new)
      texts = [ast.unparse(ast.fix_missing_locations(x)) for x in (old, new)]
      what = {"line": old.lineno, "was": texts[0], "is": texts[1]}
      found.append((what, ast.unparse(ast.fix_missing_locations(tree))))
  return found


def _test(tree, module, slow):
  """Runs tests in the copy, with a group of processes of its own."""
  import hypothesis as h
  import pytest

  # A fault need not be made small.
  phases = (h.Phase.explicit, h.Phase.generate)
  h.settings.register_profile("mutants", phases=phases, database=None)
  h.settings.load_profile("mutants")
  os.setsid()
  os.chdir(tree)
  sys.path.insert(0, str(tree))
  with open(tree / "pytest.log", "a") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
  flags = ["-x", "-q", "-n0", "--hypothesis-seed=0"]
  flags += ["-W", "ignore:Module already imported", "-p", "no:cacheprovider"]
  files = TESTS[module] if slow else TESTS[module][:1]
  flags += [] if slow else ["-m", "not slow"]
  code = pytest.main([*(f"tests/{f}" for f in files), *flags])
  os._exit(code)


def survives(tree, module, slow, limit: float) -> bool:
  """Returns whether the tests pass within `limit` seconds."""
  child = multiprocessing.get_context("fork").Process(
    target=_test, args=(tree, module, slow)
  )
  child.start()
  child.join(limit)
  if child.exitcode is None:
    os.killpg(child.pid, signal.SIGKILL)
    child.join()
  return child.exitcode == 0


def sample(tree, only: str, tries: int, seed: int):
  """Yields (module, path, its text, its mutants): as many of each module."""
  modules = [m for m in TESTS if only in m]
  for module in modules:
    path = tree / "recjax" / f"{module}.py"
    source = path.read_text()
    found = mutants(source)
    random.Random(f"{seed} {module}").shuffle(found)
    yield module, path, source, found[: -(-tries // len(modules))]


def main(args) -> int:
  """Tests the mutants that have no result yet; returns the exit status."""
  log = pathlib.Path(args.results)
  lines = log.read_text().splitlines() if log.exists() else []
  name = lambda m: (m["module"], m["line"], m["was"], m["is"])
  known = {name(m): m for m in map(json.loads, lines)}
  tree = pathlib.Path(tempfile.mkdtemp(prefix="recjax-mutants-")).resolve()
  ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
  shutil.copytree(ROOT, tree, dirs_exist_ok=True, ignore=ignored)
  for module, path, source, found in sample(
    tree, args.only, args.tries, args.seed
  ):
    found = [({"module": module} | m, text) for m, text in found]
    survived = lambda m: known.get(name(m), {}).get("survived")
    due = survived if args.slow else lambda m: name(m) not in known
    todo = [(m, text) for m, text in found if due(m)]
    if not todo:
      continue
    limit, start = _SLOW_LIMIT, time.monotonic()
    if not args.slow:
      if not survives(tree, module, False, limit):
        sys.exit(f"{module}: fails without a fault: {tree}/pytest.log")
      limit = 60 + 3 * (time.monotonic() - start)
    for m, text in todo:
      path.write_text(text)
      m["survived"] = survives(tree, module, args.slow, limit)
      path.write_text(source)
      known[name(m)] = m
      with log.open("a") as f:
        f.write(json.dumps(m) + "\n")
      print("SURVIVED" if m["survived"] else "killed  ", m, flush=True)
  shutil.rmtree(tree)
  counts = collections.Counter(m["survived"] for m in known.values())
  for m in sorted(known.values(), key=name):
    if m["survived"]:
      print(f"{m['module']}:{m['line']}: {m['was']}  ->  {m['is']}")
  print(f"tried {counts.total()}, killed {counts[False]}, ", end="")
  print(f"survived {counts[True]}: {counts[False] / counts.total():.1%} killed")
  return 1 if counts[True] else 0


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tries", type=int, default=168)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="part of the module's name")
  parser.add_argument("--slow", action="store_true", help="survivors again")
  parser.add_argument("--results", default="mutants.jsonl")
  # Children find the libraries imported, and share what they compile.
  sys.dont_write_bytecode = True
  os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
  shared = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
  for library in (
    *("optax", "flax.nnx", "orbax.checkpoint", "grain", "duckdb", "hypothesis"),
    *("tensorflow_datasets", "scipy.optimize", "pyarrow.parquet"),
    *("tensorboardX", "ml_collections", "hypothesis.extra.numpy"),
  ):
    __import__(library)
  sys.exit(main(parser.parse_args()))
