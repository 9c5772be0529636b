"""Several processes of one job: how they start, agree, and end together.

Every process runs the same program on its own devices; `jax.distributed` joins
them. None can go on without the others, so where one dies all end, and are
started again from the newest checkpoint. Each holds a connection to process 0:
the system closes it when either end dies. Where that cannot be seen (a machine
or the network is gone) the coordinator misses the heartbeats, and JAX aborts.
"""

import contextlib
import itertools
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed as _jax_distributed  # no public name has these
from jax.experimental import multihost_utils

from recjax.errors import UserError

LOST = os.EX_TEMPFAIL  # exit code of a process that lost another
_JOIN_SECONDS = 300  # for all processes to start
_PATIENCE_SECONDS = 10  # before it says that it waits
_HEARTBEAT_SECONDS = 20  # of silence
_GRACE_SECONDS = 3  # to end for a reason of one's own
_FOREVER_MS = 1 << 40

T = TypeVar("T")
_count = itertools.count()


@contextlib.contextmanager
def job(
  coordinator: str | None, processes: int | None, process_id: int | None
) -> Iterator[tuple[int, int]]:
  """Joins the other processes; yields this one's index, and how many.

  Enter before JAX's backend starts. Arguments that are None come from the
  cluster's environment, where JAX knows it (Slurm, Open MPI, Kubernetes, TPU
  pods); without either this process is alone. Of several processes one that
  fails in the body exits at once, with a message: its peers wait for it.

  Args:
    coordinator: host:port; process 0 listens there.
    processes: P.
    process_id: of this process, 0..P-1.

  Raises:
    UserError: the arguments do not fit together; not all processes came.
  """
  index, count = _join(coordinator, processes, process_id)
  if count == 1:
    yield index, count
    return
  try:
    with _watch(index, count):
      yield index, count
  except UserError as e:
    _exit(1, f"error: {e}")
  except Exception as e:
    if isinstance(e, jax.errors.JaxRuntimeError):
      time.sleep(2 * _GRACE_SECONDS)  # it may be that a peer is gone
    _exit(1, traceback.format_exc().rstrip())


def _exit(code: int, message: str) -> None:
  """Without JAX's own exit, which waits for the others."""
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(code)


def _join(coordinator, processes, process_id) -> tuple[int, int]:
  if processes == 1:
    return 0, 1
  given = [x is not None for x in (coordinator, processes, process_id)]
  if any(given) and not all(given):
    raise UserError(
      "--coordinator, --processes and --process_id go together: give all "
      "three, or none"
    )
  if all(given) and not 0 <= process_id < processes:
    raise UserError(
      f"--process_id: {process_id} found, 0 to {processes - 1} expected "
      f"(--processes={processes})"
    )
  where = coordinator or "the address that JAX detects"
  slow = threading.Timer(
    _PATIENCE_SECONDS,
    print,
    [f"waiting for the other processes at {where}, {_JOIN_SECONDS} s at most"],
    {"file": sys.stderr, "flush": True},
  )
  slow.daemon = True
  slow.start()
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "Kubernetes environment detected")
      jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        initialization_timeout=_JOIN_SECONDS,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      )
  except ValueError:
    if any(given):
      raise
    return 0, 1  # no cluster
  except RuntimeError as e:
    raise UserError(
      f"--coordinator: cannot join the other processes at {where} "
      f"({str(e).splitlines()[0][:200]}): start all of them with the same "
      "address, or one alone with --processes=1"
    ) from e
  finally:
    slow.cancel()
  state = _jax_distributed.global_state
  return state.process_id, state.num_processes


# ---- Ending together


@contextlib.contextmanager
def _watch(index: int, count: int) -> Iterator[None]:
  """Ends this process when the connection to another one breaks."""
  host = _jax_distributed.global_state.coordinator_address.rpartition(":")[0]
  peers = {}
  if index == 0:
    token = secrets.token_hex(16)  # a stranger's connection is none
    with socket.create_server((_local(host), 0)) as server:
      port = server.getsockname()[1]
      from_first(lambda: f"{port} {token}")
      while len(peers) < count - 1:
        connection, _ = server.accept()
        connection.settimeout(_GRACE_SECONDS)
        found = _read(connection, 40).decode(errors="replace")
        if found[:32] == token:
          peers[int(found[32:])] = connection
  else:
    port, token = from_first(str).split()
    peers[0] = socket.create_connection((host, int(port)), _JOIN_SECONDS)
    peers[0].sendall(f"{token}{index:8}".encode())

  def wait(peer, connection):
    connection.settimeout(None)
    if _read(connection, 1):
      return  # it is done
    if index == 0:  # without it JAX aborts the others in no time
      time.sleep(_GRACE_SECONDS)
    _exit(
      LOST,
      f"error: process {peer} of {count} ended, so process {index} ends too: "
      "see its output. Start all of them again, and the job goes on from its "
      "newest checkpoint",
    )

  for item in peers.items():
    threading.Thread(target=wait, args=item, daemon=True).start()
  yield
  for connection in peers.values():
    with contextlib.suppress(OSError):
      connection.sendall(b".")


def _local(host: str) -> str:
  """An address to listen on: the host's own, or any where it has an alias."""
  try:
    with socket.create_server((host, 0)):
      return host
  except OSError:
    return ""


def _read(connection: socket.socket, size: int) -> bytes:
  """That many bytes; none where the connection broke."""
  try:
    return connection.recv(size, socket.MSG_WAITALL)
  except OSError:
    return b""


# ---- Agreeing


def from_first(make: Callable[[], str]) -> str:
  """What process 0 makes, on every process; the others wait for it.

  Every process must make the same calls of this and of `first_alone`.
  """
  state = _jax_distributed.global_state
  if state.client is None or state.num_processes == 1:
    return make()
  key = f"recjax/{next(_count)}"
  if state.process_id == 0:
    state.client.key_value_set(key, make())
  return state.client.blocking_key_value_get(key, _FOREVER_MS)


def machines() -> int:
  """How many machines the processes run on."""
  state = _jax_distributed.global_state
  if state.client is None:
    return 1
  key = f"recjax/{next(_count)}"
  state.client.key_value_set(f"{key}/{state.process_id}", socket.gethostname())
  return len(
    {
      state.client.blocking_key_value_get(f"{key}/{i}", _FOREVER_MS)
      for i in range(state.num_processes)
    }
  )


def sum_over_processes(words: np.ndarray) -> np.ndarray:
  """Returns the wrapping sums of uint32 words [m] over all processes."""
  if jax.process_count() == 1:
    return words.astype(np.uint32)
  words = multihost_utils.process_allgather(words.astype(np.uint32))
  return words.sum(0, dtype=np.uint32)


def first_alone(make: Callable[[], T]) -> T:
  """make() on every process; on the others after process 0 is done."""
  result = []

  def call():
    result.append(make())
    return "done"

  from_first(call)
  return result[0] if result else make()
