"""Draws the module graph of BUILD.md from the imports.

  python scripts/draw_modules.py           # prints it
  python scripts/draw_modules.py --write   # puts it into BUILD.md

Rooms are nodes; an arrow goes to what a room imports, with the number of such
imports. Below are the levels of training/train.py: how long the longest chain
of imports below each module is that it reaches.
"""

import argparse
import ast
import functools
import pathlib
from collections import Counter

from recjax import files

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "recjax"
# In the order in which they may be used; root modules come first.
ROOMS = ("plan", "data", "models", "planner", "embedding", "training")
BEGIN, END = "<!-- scripts/draw_modules.py -->", "<!-- end -->"


def dotted(path: pathlib.Path) -> str:
  """Returns recjax.plan.plan for recjax/plan/plan.py."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(p for p in parts if p != "__init__")


MODULES = {dotted(p): p for p in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports(path: pathlib.Path) -> frozenset[str]:
  """Returns every module and name that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return frozenset(found)


@functools.cache
def own_imports(module: str) -> frozenset[str]:
  """Returns the modules of recjax that a module imports."""
  found = set()
  for name in imports(MODULES[module]):
    while name not in MODULES and "." in name:
      name = name.rpartition(".")[0]
    if name in MODULES and name != "recjax":
      found.add(name)
  return frozenset(found)


def room(module: str) -> int:
  """Returns a module's room, counted from 1; 0 for the root modules."""
  _, *rest = module.split(".")
  return 1 + ROOMS.index(rest[0]) if rest[0] in ROOMS else 0


@functools.cache
def level(module: str, above: tuple[str, ...] = ()) -> int:
  """Returns the length of the longest chain of imports that a module ends.

  Raises:
    ValueError: the imports make a circle.
  """
  if module in above:
    raise ValueError(f"a circle of imports: {above}")
  below = (level(m, (*above, module)) for m in own_imports(module))
  return 1 + max(below, default=0)


def reached(module: str) -> set[str]:
  """Returns all that a module imports, directly or not, and itself."""
  found, todo = set(), [module]
  while todo:
    if (now := todo.pop()) not in found:
      found.add(now)
      todo += own_imports(now)
  return found


def draw() -> str:
  names = ("root modules", *ROOMS)
  counts = Counter(
    (room(m), room(i))
    for m in MODULES
    if m not in ("recjax", *JOBS)
    for i in own_imports(m)
    if room(m) != room(i)
  )
  lines = ["```mermaid", "flowchart BT"]
  lines += [f"  r{i}[{name}]" for i, name in enumerate(names)]
  lines += [f"  r{a} -->|{n}| r{b}" for (a, b), n in sorted(counts.items())]
  lines += ["```", "", "Levels below `training/train.py`:", ""]
  by_level: dict[int, list[str]] = {}
  for module in reached("recjax.training.train"):
    name = module.removeprefix("recjax.").replace(".", "/")
    by_level.setdefault(level(module), []).append(name)
  for i in sorted(by_level):
    lines.append(f"{i}. {', '.join(sorted(by_level[i]))}")
  return "\n".join(lines)


# They use all rooms: what the command line and Python call.
JOBS = ("recjax.jobs", "recjax.api", "recjax.cli")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--write", action="store_true")
  args = parser.parse_args()
  if not args.write:
    print(draw())
    return
  path = ROOT / "BUILD.md"
  head, _, rest = path.read_text().partition(BEGIN)
  _, _, tail = rest.partition(END)
  files.write(path, f"{head}{BEGIN}\n{draw()}\n{END}{tail}")


if __name__ == "__main__":
  main()
