"""Seconds and memory of preparing a Criteo log with Beam and without.

    python scripts/bench_beam.py --log 'logs/*.tsv' [--workers 1 2]

The log should be of several files. Each way is a process of its own; of it and
the workers that it starts the seconds of all cores and the most memory that one
of them holds are printed, and whether all files are the same.
"""

import argparse
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import machine

PREPARE = """
import sys
from recjax.config import Config, Data
from recjax.data import prepare
if __name__ == "__main__":
  log, directory, engine, *options = sys.argv[1:]
  data = Data(train=log, engine=engine, beam_options=tuple(options))
  prepare.prepare(Config(data=data), directory, print)
"""
WORKERS = "--direct_running_mode=multi_processing"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--log", required=True, help="a path or glob")
  parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
  args = parser.parse_args()
  print(f"machine: {machine.cpu()}, {len(os.sched_getaffinity(0))} cores")
  ways = {"duckdb": ["duckdb"]}
  for n in args.workers:
    ways[f"beam, {n}"] = ["beam", WORKERS, f"--direct_num_workers={n}"]
  with tempfile.TemporaryDirectory() as tmp:
    contents = set()
    for i, (name, flags) in enumerate(ways.items()):
      _measure(name, [args.log, os.path.join(tmp, str(i)), *flags])
      contents.add(_content(pathlib.Path(tmp, str(i))))
    print("all files are the same" if len(contents) == 1 else "files differ")


def _measure(name: str, arguments: list[str]) -> None:
  """Prints what a way of preparing takes."""
  start, before = time.perf_counter(), os.times()
  process = subprocess.Popen(
    [sys.executable, "-c", PREPARE, *arguments],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  most: dict[int, int] = {}
  watch = threading.Thread(target=_watch, args=(process, most))
  watch.start()
  if process.wait():
    raise SystemExit(f"{name}: failed, exit code {process.returncode}")
  watch.join()
  after = os.times()
  cpu = sum(after[2:4]) - sum(before[2:4])
  print(
    f"{name:9} {time.perf_counter() - start:7.1f} s, {cpu:7.1f} s of cores,"
    f" {max(most.values()) >> 20:,} MiB at most in one process"
  )


def _watch(process: subprocess.Popen, most: dict[int, int]) -> None:
  """Keeps the most memory that each process of a tree has held."""
  family = {process.pid}
  while process.poll() is None:
    for at in pathlib.Path("/proc").glob("[0-9]*"):
      try:
        parent = int((at / "stat").read_text().rpartition(")")[2].split()[1])
        if parent in family:
          family.add(int(at.name))
        if int(at.name) in family:
          held = (at / "status").read_text().partition("VmHWM:")[2].split()
          if held:
            most[int(at.name)] = int(held[0]) << 10
      except (OSError, IndexError):  # it has ended
        continue
    time.sleep(0.2)


def _content(directory: pathlib.Path) -> str:
  """Hashes every file below a folder."""
  digest = hashlib.sha256()
  for path in sorted(p for p in directory.rglob("*") if p.is_file()):
    digest.update(str(path.relative_to(directory)).encode())
    with open(path, "rb") as f:
      digest.update(hashlib.file_digest(f, "sha256").digest())
  return digest.hexdigest()


if __name__ == "__main__":
  main()
