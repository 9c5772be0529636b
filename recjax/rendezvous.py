"""The processes of a job meet: all there, once, with the same settings.

They meet at the coordinator's address before JAX does: what does not fit is
said on every process, in one line, where JAX would abort or wait. Process 0
listens; the others connect, say who they are, and wait for its answer. The
connections stay, for as long as the job runs.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recjax.errors import UserError

_BANNER = b"recjax 1\n"  # whoever says something else is something else
_HEADER = 4  # bytes, of a message's length
_LONGEST = 1 << 24  # bytes, of a message
_ANSWER_SECONDS = 5  # for a banner, a hello
_LINGER_SECONDS = 10  # to tell late ones what is wrong
_NAME_SECONDS = 20  # for a host's name to be known
_SHARED_SECONDS = 10  # for a file to be seen on another machine


@dataclass(frozen=True)
class Job:
  """A job as one of its processes sees it.

  Attributes:
    address: host:port of process 0.
    processes: how many.
    index: of this process.
    settings: must be the same on all, JSON; names as users write them.
    workdir: must be one folder for all; None = there is none.
    seconds: for all processes to come.
  """

  address: str
  processes: int
  index: int
  settings: Mapping[str, Any]
  workdir: pathlib.Path | None = None
  seconds: float = 300


def parse_address(text: str) -> tuple[str, int]:
  """Returns (host, port) of host:port.

  Raises:
    UserError: it is something else.
  """
  host, _, port = text.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not (host and port.isascii() and port.isdecimal() and len(port) < 6):
    port = "0"
  if not 1 <= int(port) <= 65_535:
    raise UserError(
      f"--coordinator: {text!r} found, host:port expected, with a port from 1 "
      "to 65535"
    )
  return host, int(port)


def meet(job: Job) -> dict[int, socket.socket]:
  """Waits for all processes of a job.

  Returns:
    The connections by process: on process 0 to all others, else to process 0.

  Raises:
    UserError: not all came, or what they say does not fit together.
  """
  until = time.monotonic() + job.seconds
  if job.index == 0:
    return _Host(job, until).gather()
  return {0: _join(job, until)}


# ---- Process 0


class _Host:
  """Process 0's side."""

  def __init__(self, job: Job, until: float):
    self._job, self._until = job, until
    self._found: dict[int, socket.socket] = {}
    self._refused: list[socket.socket] = []

  def gather(self) -> dict[int, socket.socket]:
    """Returns the connections to all other processes."""
    job = self._job
    with _listen(job, self._until) as server:
      try:
        while missing := self._missing():
          if time.monotonic() > self._until:
            raise UserError(
              f"process {', '.join(map(str, missing))} of {job.processes} did "
              f"not come to {job.address} within {job.seconds:.0f} s: start "
              "all of them with the same --coordinator"
            )
          self._accept(server)
        self._check_workdir()
      except UserError as e:
        self._tell_all(server, str(e))
        raise
    # JAX may listen there now.
    for connection in self._found.values():
      _send(connection, {"go": True})
      connection.settimeout(None)
    return self._found

  def _missing(self) -> list[int]:
    return [i for i in range(1, self._job.processes) if i not in self._found]

  def _accept(self, server: socket.socket, error: str = "") -> None:
    """Takes a process that comes within a second.

    Args:
      server: listens.
      error: what it is told; "" = it is checked, and kept.
    """
    server.settimeout(1)
    try:
      connection, _ = server.accept()
    except TimeoutError:
      self._check_alive()
      return
    connection.settimeout(_ANSWER_SECONDS)
    try:
      connection.sendall(_BANNER)
      hello = _receive(connection)
      index = int(hello["index"])
    except (OSError, ValueError, KeyError, TypeError):
      connection.close()  # of a stranger
      return
    if not error and not (error := self._fault(index, hello)):
      self._found[index] = connection
      return
    self._refused.append(connection)
    _send(connection, {"error": error})
    if index in self._missing():
      self._found[index] = connection
    raise UserError(error)

  def _check_alive(self) -> None:
    for index, connection in self._found.items():
      if _closed(connection):
        raise UserError(
          f"process {index} of {self._job.processes} ended before all had "
          "come: see its output, and start all of them again"
        )

  def _fault(self, index: int, hello: Mapping[str, Any]) -> str:
    """Returns what is wrong with a process that says hello; "" = nothing."""
    job = self._job
    if hello["processes"] != job.processes:
      return (
        f"--processes: {job.processes} on process 0, but "
        f"{hello['processes']} on process {index}: start all of them with the "
        "same flags, and each job with a --coordinator of its own"
      )
    if index in self._found or not 0 < index < job.processes:
      return (
        f"--process_id: two processes have {index} at {job.address}: give "
        f"each its own, 0 to {job.processes - 1}, and each job a "
        "--coordinator of its own"
      )
    here, there = dict(job.settings), hello["settings"]
    for name in sorted(here.keys() | there.keys()):
      if here.get(name) != there.get(name):
        return (
          f"{name}: {here.get(name)!r:.80} on process 0, but "
          f"{there.get(name)!r:.80} on process {index}: start all of them "
          "with the same settings, and each job with a --coordinator of its own"
        )
    return ""

  def _check_workdir(self) -> None:
    """Raises UserError where a process does not see this one's workdir."""
    with _mark(self._job.workdir) as token:
      for connection in self._found.values():
        _send(connection, {"token": token})
      for index, connection in self._found.items():
        connection.settimeout(_SHARED_SECONDS + _ANSWER_SECONDS)
        try:
          seen = _receive(connection)["seen"]
        except (OSError, ValueError, KeyError) as e:
          raise UserError(
            f"process {index} of {self._job.processes} ended at the start: "
            "see its output, and start all of them again"
          ) from e
        if not seen:
          raise UserError(
            f"--workdir: process {index} does not see what process 0 writes "
            f"into {self._job.workdir}: all processes need one folder that "
            "they share"
          )

  def _tell_all(self, server: socket.socket, error: str) -> None:
    """Tells every process what is wrong, also those that come soon."""
    for connection in self._found.values():
      if connection not in self._refused:
        _send(connection, {"error": error})
    until = min(time.monotonic() + _LINGER_SECONDS, self._until)
    while self._missing() and time.monotonic() < until:
      with contextlib.suppress(UserError):
        self._accept(server, error)
    for connection in (*self._found.values(), *self._refused):
      connection.close()


def _listen(job: Job, until: float) -> socket.socket:
  """Listens where JAX's coordinator will."""
  _, port = parse_address(job.address)
  bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
  host, port = parse_address(bind) if bind else ("", port)
  both = not host and socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
  try:
    return socket.create_server(
      (host, port), family=family, dualstack_ipv6=both, backlog=job.processes
    )
  except OSError as e:
    if e.errno != errno.EADDRINUSE:
      raise UserError(
        f"--coordinator: process 0 cannot listen at {host or '*'}:{port} "
        f"({e.strerror or e})"
      ) from e
  # Another process 0 of this job can tell all of them.
  soon = min(until, time.monotonic() + _ANSWER_SECONDS)
  with contextlib.suppress(OSError):
    _join(job, soon).close()
  raise _in_use(job)


def _in_use(job: Job) -> UserError:
  return UserError(
    f"--coordinator: something else listens at {job.address}, maybe another "
    "job: choose another port, the same on all processes"
  )


@contextlib.contextmanager
def _mark(workdir: pathlib.Path | None):
  """Yields the name of a file that is in the folder while the block runs.

  None where there is no folder to write to.
  """
  path = workdir and workdir / f".job-{secrets.token_hex(8)}"
  try:
    if path and workdir:
      workdir.mkdir(parents=True, exist_ok=True)
      path.touch()
  except OSError:
    path = None  # what needs it will say so
  try:
    yield path and path.name
  finally:
    if path:
      with contextlib.suppress(OSError):
        path.unlink()


# ---- The others


def _join(job: Job, until: float) -> socket.socket:
  """Returns the connection to process 0, when all have come."""
  connection = _connect(job, until)
  connection.settimeout(_ANSWER_SECONDS)
  try:
    banner = _exactly(connection, len(_BANNER))
  except OSError:
    banner = b""
  if banner != _BANNER:
    connection.close()
    raise _in_use(job)
  hello = {
    "index": job.index,
    "processes": job.processes,
    "settings": dict(job.settings),
  }
  connection.settimeout(max(until - time.monotonic(), 0) + _LINGER_SECONDS)
  try:
    _send(connection, hello)
    answer = _receive(connection)
    if "token" in answer:
      _send(connection, {"seen": _sees(job.workdir, answer["token"])})
      answer = _receive(connection)
  except (OSError, ValueError) as e:
    raise UserError(
      f"process 0 at {job.address} ended before all had come: see its output, "
      "and start all of them again"
    ) from e
  if "error" in answer:
    connection.close()
    raise UserError(answer["error"])
  connection.settimeout(None)
  return connection


def _connect(job: Job, until: float) -> socket.socket:
  """Returns a connection to process 0, which may start later than this."""
  address = parse_address(job.address)
  known = time.monotonic() + _NAME_SECONDS
  while True:
    try:
      return socket.create_connection(address, _ANSWER_SECONDS)
    except OSError as e:
      unknown = isinstance(e, socket.gaierror)
      if time.monotonic() > (min(known, until) if unknown else until):
        raise UserError(
          f"--coordinator: no process 0 at {job.address} "
          f"({e.strerror or e}): start all processes with the same address, "
          "or one alone with --processes=1"
        ) from e
      time.sleep(0.1)


def _sees(workdir: pathlib.Path | None, token: str | None) -> bool:
  """Whether the file is there; on some file systems it is soon."""
  if token is None or workdir is None:
    return True
  until = time.monotonic() + _SHARED_SECONDS
  path = workdir / pathlib.Path(token).name
  while not path.exists():
    if time.monotonic() > until:
      return False
    time.sleep(0.1)
  return True


# ---- Messages


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
  """Sends a message; one that cannot come is not waited for."""
  data = json.dumps(message).encode()
  with contextlib.suppress(OSError):
    connection.sendall(len(data).to_bytes(_HEADER, "big") + data)


def _receive(connection: socket.socket) -> dict[str, Any]:
  """Returns the next message.

  Raises:
    OSError: the connection is broken, or nothing comes.
    ValueError: it is not a message.
  """
  size = int.from_bytes(_exactly(connection, _HEADER), "big")
  if size > _LONGEST:
    raise ValueError("too long")
  found = json.loads(_exactly(connection, size))
  if not isinstance(found, dict):
    raise ValueError("not a message")
  return found


def _exactly(connection: socket.socket, size: int) -> bytes:
  """Returns so many bytes; OSError where the connection breaks before."""
  data = b""
  while len(data) < size:
    part = connection.recv(size - len(data))
    if not part:
      raise ConnectionError("closed")
    data += part
  return data


def _closed(connection: socket.socket) -> bool:
  """Whether the other end is closed; it has nothing to say yet."""
  try:
    return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
  except BlockingIOError:
    return False
  except OSError:
    return True
