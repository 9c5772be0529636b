"""Fills the disk of a run at every stage, and looks at how it ends.

  python scripts/attack_disk.py [--tries 12]

A small run of main.py in a file system in memory (tmpfs) that is full after so
many bytes of what the run would write. Right is one line, exit code 1, and the
same metrics to the last digit once there is space and the command is run again.
Needs Linux and root, to mount. Prints what was tried, right and wrong; exits
with 1 where anything was wrong.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import attack_kills

ROOT = pathlib.Path(__file__).parents[1]
_MOST = 100 << 20  # bytes that a run may take
_SECONDS = 120


@contextlib.contextmanager
def file_system(size: int) -> Iterator[pathlib.Path]:
  """Gives a file system in memory of so many bytes."""
  with tempfile.TemporaryDirectory() as folder:
    options = ["-o", f"size={size}"]
    mount = ["mount", "-t", "tmpfs", *options, "recjax", folder]
    subprocess.run(mount, check=True)
    try:
      yield pathlib.Path(folder)
    finally:
      subprocess.run(["umount", folder], check=True)


def grow(folder: pathlib.Path, size: int) -> None:
  """Lets the file system hold so many bytes."""
  options = f"remount,size={size}"
  subprocess.run(["mount", "-o", options, str(folder)], check=True)


def run(workdir: pathlib.Path) -> subprocess.CompletedProcess:
  """Trains to the end, or to where the disk is full."""
  return subprocess.run(
    [sys.executable, "main.py", *attack_kills.FLAGS, f"--workdir={workdir}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=_SECONDS,
    env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )


def result(done: subprocess.CompletedProcess) -> str:
  """Returns the metrics that a run printed; empty where it did not end."""
  return done.stdout.partition("test metrics")[2]


def wrong(size: int, want: str) -> str:
  """Returns what is wrong with a run whose disk has so many bytes."""
  with file_system(size) as folder:
    first = run(folder / "w")
    grow(folder, _MOST)
    again = run(folder / "w")
  if result(again) != want:
    return f"another end: {again.stdout[-300:]} {again.stderr[-300:]}"
  if first.returncode == 0:
    return "" if result(first) == want else "another end, with exit code 0"
  if first.returncode != 1 or first.stderr.count("\n") != 1:
    return f"exit code {first.returncode}: {first.stderr[:600]}"
  said = first.stderr.lower()
  return "" if "no space left" in said else f"another message: {said}"


def attack(tries: int) -> dict[int, str]:
  """Returns what was wrong, by the bytes of the disk."""
  with file_system(_MOST) as folder:
    whole = run(folder / "w")
    status = os.statvfs(folder)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
  if not result(whole):
    raise SystemExit(f"error: without limit it fails: {whole.stderr}")
  sizes = [used * (i + 1) // (tries + 1) for i in range(tries)]
  return {size: wrong(size, result(whole)) for size in sizes}


def main() -> None:
  """Attacks as the command line says."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tries", type=int, default=12)
  found = attack(parser.parse_args().tries)
  bad = {size: what for size, what in found.items() if what}
  for size, what in bad.items():
    print(f"{size:,} bytes: {what}")
  print(f"tried {len(found)}, right {len(found) - len(bad)}, wrong {len(bad)}")
  sys.exit(bool(bad))


if __name__ == "__main__":
  main()
