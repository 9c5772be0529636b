"""Several processes of one job on this machine.

  python scripts/launch_local.py --processes 4 -- --config configs/quickstart.py

What follows `--` goes to main.py. Shows what process 0 prints. Where one
process fails, all end: what the first to fail said is shown, and the exit code
is 1; SIGTERM and Ctrl-C end all, with 143 and 130. Start it again, and it goes
on from the newest checkpoint.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

ROOT = pathlib.Path(__file__).parents[1]
_LOST = os.EX_TEMPFAIL  # a process ended because another one did
_ENDED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
_SETTLE_SECONDS = 5  # for the others to say why they end


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--processes", type=int, required=True)
  parser.add_argument("arguments", nargs="*", help="of main.py, after --")
  args = parser.parse_args()
  if args.processes < 1:
    parser.error(f"--processes: {args.processes} found, at least 1 expected")
  with tempfile.TemporaryDirectory() as tmp:
    logs = [pathlib.Path(tmp) / str(i) for i in range(args.processes)]
    processes = start(args.processes, args.arguments, logs)
    # Process 0 decides for all; a terminal sends Ctrl-C to all by itself.
    signal.signal(signal.SIGTERM, lambda *_: processes[0].terminate())
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
      return wait(processes, logs)
    finally:
      for process in processes:
        process.kill()
        process.wait()


def start(
  count: int, arguments: list[str], logs: list[pathlib.Path]
) -> list[subprocess.Popen]:
  """Starts the processes.

  Process 0's output is shown; errors, and the others' output, go to the logs.
  """
  with socket.create_server(("127.0.0.1", 0)) as free:
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": coordinator}
  processes = []
  for index in range(count):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    command += [f"--coordinator={coordinator}", f"--processes={count}"]
    command += [f"--process_id={index}"]
    with logs[index].open("wb") as log:
      processes.append(
        subprocess.Popen(
          command,
          stdout=subprocess.PIPE if index == 0 else log,
          stderr=log,
          env=environment,
        )
      )
  threading.Thread(target=show, args=(processes[0].stdout,)).start()
  return processes


def show(output: IO[bytes] | None) -> None:
  """Prints lines as they come."""
  assert output is not None
  for line in output:
    if not line.startswith(b"[Gloo]"):  # which says that it is connected
      sys.stdout.buffer.write(line)
      sys.stdout.flush()


def wait(processes: list[subprocess.Popen], logs: list[pathlib.Path]) -> int:
  """Waits for all processes, or for the first that fails; returns 0 or 1."""
  while True:
    codes = [p.poll() for p in processes]
    if any(codes):
      break
    if all(code == 0 for code in codes):
      return 0
    time.sleep(0.1)
  return explain(processes, logs)


def explain(processes: list[subprocess.Popen], logs: list[pathlib.Path]) -> int:
  """Prints why the job failed; returns 1."""
  codes = [p.poll() for p in processes]
  if ended := [c for c in codes if c in _ENDED]:
    for process in processes:
      process.wait()
    print(logs[0].read_text(errors="replace").strip(), file=sys.stderr)
    return ended[0]
  until = time.monotonic() + _SETTLE_SECONDS
  while None in codes and time.monotonic() < until:
    time.sleep(0.1)
    codes = [p.poll() for p in processes]
  followed = (None, 0, _LOST, -signal.SIGABRT)  # JAX aborts without process 0
  failed = [i for i, code in enumerate(codes) if code not in followed]
  failed = failed or [i for i, code in enumerate(codes) if code is None]
  failed = failed or [i for i, code in enumerate(codes) if code]
  first, code = failed[0], codes[failed[0]]
  said = logs[first].read_text(errors="replace").strip()
  how = f"exit code {code}"
  if code is None:
    how = "it did not answer any more"
  elif code < 0:
    how = f"killed by {signal.Signals(-code).name}"
  if said:
    print(said, file=sys.stderr)
  if code != 1 or not said.startswith("error: "):
    print(
      f"error: process {first} of {len(processes)} ended ({how}), and so does "
      "the job. Start it again, and it goes on from its newest checkpoint",
      file=sys.stderr,
    )
  return 1


if __name__ == "__main__":
  sys.exit(main())
