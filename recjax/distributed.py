"""Several processes of one job: how they start, agree, and end together.

Every process runs the same program on its own devices; `jax.distributed` joins
them. None can go on without the others, so where one dies all end, and are
started again from the newest checkpoint. Each holds a connection to process 0:
the system closes it when either end dies. Where that cannot be seen (a machine
or the network is gone) the coordinator misses the heartbeats, and JAX aborts.
Signals, too, go to process 0, and it decides for all.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import queue
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters  # no public name has these
from jax._src import distributed as _jax_distributed
from jax.experimental import multihost_utils

from recjax import rendezvous, signals
from recjax.errors import UserError

LOST = os.EX_TEMPFAIL  # exit code of a process that lost another
_JOIN_SECONDS = 300  # for all processes to start
_PATIENCE_SECONDS = 10  # before it says that it waits
_HEARTBEAT_SECONDS = 20  # of silence
_GRACE_SECONDS = 3  # to end for a reason of one's own
_FOREVER_MS = 1 << 40
# What goes over a connection: its kind, and a number.
_FRAME = struct.Struct(">Bi")
_DONE, _DECIDED, _SIGNAL, _END, _LOST = range(5)

T = TypeVar("T")
_count = itertools.count()


@contextlib.contextmanager
def job(
  coordinator: str | None,
  processes: int | None,
  process_id: int | None,
  *,
  settings: Mapping[str, Any] | None = None,
  workdir: pathlib.Path | None = None,
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
    settings: must be the same on all, JSON by the names that users know.
    workdir: must be one folder for all.

  Raises:
    UserError: the arguments do not fit together; not all processes came; they
      are not of one job.
  """
  found = _find(coordinator, processes, process_id)
  if found is None:
    yield 0, 1
    return
  at, local_devices = found
  at = dataclasses.replace(at, settings=settings or {}, workdir=workdir)
  with _says_that_it_waits(at.address):
    peers = rendezvous.meet(at)
    _start_jax(at, local_devices)
  connections = _Connections(at.index, at.processes, peers)
  try:
    with connections:
      yield at.index, at.processes
  except Exception as e:
    if not isinstance(e, signals.Ended):
      connections.fail(e)
    raise


def _exit(code: int, message: str) -> None:
  """Without JAX's own exit, which waits for the others."""
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(code)


# ---- Starting


def _find(coordinator, processes, process_id):
  """Returns (rendezvous.Job, local device ids or None); None = alone."""
  if processes == 1:
    return None
  given = [x is not None for x in (coordinator, processes, process_id)]
  if any(given) and not all(given):
    raise UserError(
      "--coordinator, --processes and --process_id go together: give all "
      "three, or none"
    )
  devices = None
  if all(given):
    rendezvous.parse_address(coordinator)
    if not 0 <= process_id < processes:
      raise UserError(
        f"--process_id: {process_id} found, 0 to {processes - 1} expected "
        f"(--processes={processes})"
      )
  else:
    coordinator, processes, process_id, devices = _detect()
    if None in (coordinator, processes, process_id) or processes == 1:
      return None
  at = rendezvous.Job(
    coordinator, processes, process_id, {}, seconds=_JOIN_SECONDS
  )
  return at, devices


def _detect():
  """Returns what JAX knows of the cluster, as jax.distributed finds it."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Kubernetes environment detected")
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
      os.environ.get("JAX_COORDINATOR_ADDRESS"),
      *(None, None, None, None),
      _JOIN_SECONDS,
    )


@contextlib.contextmanager
def _says_that_it_waits(address: str) -> Iterator[None]:
  slow = threading.Timer(
    _PATIENCE_SECONDS,
    signals.say,
    [
      f"waiting for the other processes at {address}, {_JOIN_SECONDS} s at most"
    ],
  )
  slow.daemon = True
  slow.start()
  try:
    yield
  finally:
    slow.cancel()


def _start_jax(at: rendezvous.Job, local_devices) -> None:
  # Its preemption service takes SIGTERM, and asks nobody.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      at.address,
      at.processes,
      at.index,
      local_devices,
      initialization_timeout=_JOIN_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except RuntimeError as e:
    raise UserError(
      f"--coordinator: cannot join the other processes at {at.address} "
      f"({str(e).splitlines()[0][:200]}): start all of them with the same "
      "address, or one alone with --processes=1"
    ) from e


# ---- Ending together


class _Connections:
  """Of this process to process 0, or of process 0 to all others."""

  def __init__(self, index: int, count: int, peers: dict[int, socket.socket]):
    self._index, self._count, self._peers = index, count, peers
    self._ending = threading.Event()  # connections may break now
    self._lost = threading.Event()  # one broke
    self._decided: queue.Queue[int] = queue.Queue()  # by process 0
    self._threads: list[threading.Thread] = []

  def __enter__(self):
    global _connections
    _connections = self
    for item in self._peers.items():
      item[1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      thread = threading.Thread(target=self._listen, args=item, daemon=True)
      self._threads.append(thread)
      thread.start()
    forwards = lambda signum: self._tell(_SIGNAL, signum)
    signals.forward(forwards if self._index else None, self._end_all)
    return self

  def __exit__(self, kind, *_):
    global _connections
    if kind is None or issubclass(kind, signals.Ended):
      _connections = None
      self._tell(_DONE)

  def decided(self, value: int) -> int:
    """Returns process 0's value of its last call; see `decided`."""
    if self._index == 0:
      self._tell(_DECIDED, value)
      self._decided.put(value)
    return self._decided.get()

  def fail(self, error: Exception) -> None:
    """Ends this process for an error; or says which other one had it."""
    for_itself = isinstance(error, UserError) and error.__cause__ is None
    # It may be that a process is gone: the libraries' errors do not say so.
    # It is known at once, but for the way of a packet.
    if not for_itself and self._lost.wait(_GRACE_SECONDS):
      time.sleep(4 * _GRACE_SECONDS)  # until it is said
    if isinstance(error, UserError):
      _exit(1, f"error: {error}")
    _exit(1, "".join(traceback.format_exception(error)).rstrip())

  def _listen(self, peer: int, connection: socket.socket) -> None:
    while True:
      kind, value = self._read(connection)
      if kind == _DONE:
        return
      if kind == _DECIDED:
        self._decided.put(value)
      elif kind == _SIGNAL:
        threading.Thread(target=signals.receive, args=(value,)).start()
      elif kind == _END:
        os._exit(signals.code(value))  # process 0 says why
      else:
        break
    self._lose(value if kind == _LOST else peer)

  def _lose(self, peer: int) -> None:
    self._lost.set()
    if self._ending.is_set():
      return
    if self._index == 0:  # without it JAX aborts the others in no time
      time.sleep(_GRACE_SECONDS)
      self._tell(_LOST, peer)
    _exit(
      LOST,
      f"error: process {peer} of {self._count} ended, so process "
      f"{self._index} ends too: see its output. Start all of them again, and "
      "the job goes on from its newest checkpoint",
    )

  def _end_all(self, signum: int) -> None:
    """Ends the other processes; process 0 goes last."""
    self._ending.set()
    self._tell(_END, signum)
    for thread in self._threads:
      thread.join(_GRACE_SECONDS)

  def _tell(self, kind: int, value: int = 0) -> None:
    for connection in self._peers.values():
      with contextlib.suppress(OSError):
        connection.sendall(_FRAME.pack(kind, value))

  def _read(self, connection: socket.socket) -> tuple[int, int]:
    """Returns a frame; (-1, 0) where the connection broke."""
    try:
      data = connection.recv(_FRAME.size, socket.MSG_WAITALL)
    except OSError:
      data = b""
    return _FRAME.unpack(data) if len(data) == _FRAME.size else (-1, 0)


_connections: _Connections | None = None


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


def decided(value: int) -> int:
  """What process 0 gives, on every process, in calls that all make.

  Nobody waits for it where no process is more than a call ahead of process 0.
  """
  return _connections.decided(value) if _connections else value


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
