"""Runs in folders of awkward names: all works there, or nothing is begun.

    python scripts/attack_paths.py [--tries 100] [--seed 0]

A try prepares, trains, resumes and evaluates a run of seconds whose workdir has
a name that some program may take for a pattern, a URL, a flag or an escape. So
has the folder of its topology file and of its frozen rows. The names hold every
printable character. Right is either of

- all numbers, and the names of all files, are those of a run in a folder of a
  plain name, and there is nothing beside the folder.
- a UserError of one line, before anything is written, which names the field and
  a part of the name.

Anything else is wrong and printed, and the exit code is 1. A try that hangs
ends the attack with the stacks of all threads.
"""

import argparse
import collections
import dataclasses
import faulthandler
import os
import pathlib
import random
import re
import string
import sys
import tempfile
from collections.abc import Iterator

import jax
from absl import logging

from recjax import folders, jobs, mesh
from recjax.config import Config
from recjax.errors import UserError
from recjax.planner import presets, topology

SECONDS = 600  # a try may take, on a busy machine; it needs about five
DEVICES = 2
AWKWARD = (
  "#", "?", "%", "[1]", "*", "**", "a b", " a ", "~", "~root", "-x", "--mode",
  "a.", ".a", "...", "'", '"', "`id`", "$HOME", "${HOME}", "%41%2f", "%00",
  "a:b", "a\\b", "a\nb", "\t", "{a,b}", "a\x1b[1m", "a\x1bc", "\udce9",
  "file:", "gs:", "logs:", "s3:", "day_*[0-9]", "x" * 255, "é" * 127, "日本",
  "😀", "a\u0301", "a.part", "a.unfinished", "checkpoints", "metadata",
  "1.orbax-checkpoint-tmp", "a;b&c|d>e<f(g)",
)  # fmt: skip


@dataclasses.dataclass
class Result:
  """What came of the tries."""

  counts: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )  # 'worked', 'refused'
  wrong: list[str] = dataclasses.field(default_factory=list)


def names(seed: int) -> Iterator[str]:
  """Yields the awkward names, then others of all printable characters."""
  yield from AWKWARD
  rng = random.Random(seed)
  letters = sorted({*string.printable, *"éß日😀"} - {"/"})
  while True:
    rng.shuffle(letters)
    rest = "".join(letters)
    while rest:
      k = rng.choice((1, 2, 4, 8))
      if rest[:k] not in (".", ".."):
        yield rest[:k]
      rest = rest[k:]


def small_config(beside: pathlib.Path) -> Config:
  """Returns the config of a run with rows in all tiers.

  Args:
    beside: the folder of the topology file and the frozen rows.
  """
  c = Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples, c.data.synthetic.rows = 1_500, 1_000
  c.data.block_samples, c.data.min_count = 256, 1
  c.embedding.dim = 4
  c.model.bottom = c.model.top = (4,)
  c.mesh.devices = DEVICES
  c.plan.hot_rows, c.plan.warm_rows, c.plan.cold_rows = 50, 200, 100
  c.plan.host_store_dir = str(beside)
  c.plan.topology = str(beside / "here.json")
  c.train.batch_size, c.train.steps = 128, 4
  c.checkpoint.every_steps = 2
  return c


def _run(name: str, root: pathlib.Path) -> list:
  """Runs all jobs under a name; returns what each said and left.

  Args:
    name: of the folders.
    root: a new folder for them.
  """
  beside = root / "beside" / name
  config, seen = small_config(beside), []
  workdir = folders.named(root / "runs" / name, "--workdir")  # as cli.main
  beside.mkdir(parents=True)
  topology.save(presets.cpu(DEVICES), config.plan.topology)
  quiet = lambda _: None
  jobs.prepare(config, workdir, quiet)
  seen.append(jobs.train(config, workdir, quiet))
  config.train.steps = 6
  seen.append(jobs.train(config, workdir, quiet))
  seen.append(jobs.evaluate(config, workdir, quiet))
  speed = r', "samples_per_second": [^,]*'
  seen.append(re.sub(speed, "", (workdir / "metrics.jsonl").read_text()))
  drawn = r"\d{3,}.*|[0-9a-f]{32}"  # times and names that are never the same
  seen.append(sorted({re.sub(drawn, "N", x) for x in _under(workdir)}))
  for folder in ("runs", "beside"):
    if os.listdir(root / folder) != [name]:
      raise ValueError(f"beside the folder lies {os.listdir(root / folder)}")
  return seen


def _under(folder: pathlib.Path) -> Iterator[str]:
  """Yields the names of all files below a folder."""
  for where, _, found in os.walk(folder):
    yield from (os.path.relpath(os.path.join(where, x), folder) for x in found)


def _one(name: str, want: list) -> str:
  """Tries a name; returns 'worked' or 'refused'.

  Raises:
    ValueError: neither is right.
  """
  with tempfile.TemporaryDirectory(prefix="attack-") as root:
    try:
      seen = _run(name, pathlib.Path(root))
    except UserError as e:
      part = re.search(r"^--workdir: .* has '(.+?)' in it: ", str(e))
      if "\n" in str(e) or not part or part[1] not in repr(f"{name}/"):
        raise ValueError(f"refused with {e}") from e
      if list(_under(pathlib.Path(root))):
        raise ValueError("refused after something was written") from e
      return "refused"
  for got, wanted in zip(seen, want, strict=True):
    if got != wanted:
      raise ValueError(f"{got} where a plain name has {wanted}")
  return "worked"


def attack(tries: int, seed: int, first: tuple[str, ...] = ()) -> Result:
  """Tries so many names.

  Args:
    tries: how many.
    seed: of those that are drawn.
    first: to try before the others.
  """
  result = Result()
  with tempfile.TemporaryDirectory(prefix="attack-") as root:
    want = _run("plain", pathlib.Path(root))
  given = (name for source in (first, names(seed)) for name in source)
  for _, name in zip(range(tries), given, strict=False):
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
      result.counts[_one(name, want)] += 1
    except Exception as e:
      result.wrong.append(f"{name!r}: {type(e).__name__}: {e}")
    finally:
      faulthandler.cancel_dump_traceback_later()
  return result


def main() -> int:
  """Attacks; returns the exit code."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--tries", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  mesh.simulate_devices(DEVICES, 1)
  with tempfile.TemporaryDirectory(prefix="attack-compiled-") as compiled:
    # All tries compile the same programs.
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    result = attack(args.tries, args.seed)
  for line in result.wrong:
    print(line)
  right = sum(result.counts.values())
  print(
    f"tried {args.tries}, right {right} ({dict(result.counts)}), "
    f"wrong {len(result.wrong)}"
  )
  return 1 if result.wrong else 0


if __name__ == "__main__":
  sys.exit(main())
