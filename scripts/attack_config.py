"""Sets every field of the config to odd values, one at a time.

  python scripts/attack_config.py [--only train.] [--jobs 2]

A tiny run (prepare, plan, build, train three steps, evaluate) with one field at
-1, 0, 1, 1e30, 2^63, NaN, infinity, empty, of another type. Right is that it
works, or one UserError of one line. A traceback, an abort and more than a
minute are wrong. A process a field, so that an abort is seen. Prints what was
tried, right and wrong; exits with 1 where anything was wrong.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from typing import Any

from recjax import config as config_lib
from recjax.training import same_run

ROOT = pathlib.Path(__file__).parents[1]
NUMBERS = (-1, 0, 1, 1e30, 2**31, 2**63, math.nan, math.inf, -math.inf)
OTHERS = ("", "text", "\0", None, (), (0,), (-1, 1), ("a",), [], {}, True)
VALUES = NUMBERS + OTHERS
_SECONDS = 60  # for a value
_BYTES = 24 << 30  # of address space


def small_config() -> config_lib.Config:
  """Returns the config of a run of a moment."""
  c = config_lib.Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples, c.data.synthetic.rows = 600, 200
  c.data.block_samples, c.data.min_count = 64, 1
  c.data.memory_mb = 256
  c.embedding.dim, c.model.bottom, c.model.top = 4, (4,), (4,)
  c.mesh.devices = 2
  c.plan.hot_rows, c.plan.warm_rows = 20, 100
  c.train.batch_size, c.train.steps = 64, 3
  return c


def try_field(path: str, folder: pathlib.Path) -> None:
  """Prints a line of JSON for each value: [index, what is wrong]."""
  from recjax import config_check, jobs, mesh
  from recjax.errors import UserError

  resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
  mesh.simulate_devices(8, 1)
  *groups, field = path.split(".")
  for i, value in enumerate(VALUES):
    config = small_config()
    group: Any = config
    for name in groups:
      group = getattr(group, name)
    setattr(group, field, value)
    workdir = folder / str(i)
    wrong = ""
    print(json.dumps([i, "begun"]), flush=True)
    try:
      config_check.check(config)
      jobs.train(config, workdir, lambda _: None)
    except UserError as e:
      wrong = "" if "\n" not in str(e) else f"several lines: {e}"
    except BaseException as e:
      where = traceback.extract_tb(e.__traceback__)[-1]
      wrong = f"{type(e).__name__} at {where.filename}:{where.lineno}: {e}"
    print(json.dumps([i, wrong[:300]]), flush=True)
    shutil.rmtree(workdir, ignore_errors=True)


def attack_field(path: str) -> dict[str, str]:
  """Returns what is wrong with each value of a field; "" = nothing."""
  with tempfile.TemporaryDirectory() as folder:
    flags = (f"--field={path}", f"--folder={folder}")
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    try:
      done = subprocess.run(
        [sys.executable, __file__, *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
        timeout=_SECONDS * len(VALUES),
      )
      said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as e:
      said, code = (e.stdout or b"").decode(), "none, it hangs"
  found = dict(json.loads(x) for x in said.splitlines() if x.startswith("["))
  ended = f"the process ended, exit code {code}"
  return {
    repr(value): {"begun": ended}.get(found.get(i, ended), found.get(i, ended))
    for i, value in enumerate(VALUES)
  }


def main() -> None:
  """Attacks as the command line says."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="fields that begin so")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--field", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.field:
    try_field(args.field, args.folder)
    return
  fields = [
    x for x in same_run.flat(config_lib.Config()) if x.startswith(args.only)
  ]
  tried = wrong = 0
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    for path, found in zip(fields, pool.map(attack_field, fields), strict=True):
      for value, what in found.items():
        tried, wrong = tried + 1, wrong + bool(what)
        if what:
          print(f"{path} = {value}: {what}", flush=True)
  print(f"tried {tried}, right {tried - wrong}, wrong {wrong}")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
