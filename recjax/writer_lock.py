"""One writer a workdir: a lock that ends with the process that holds it.

The system's lock on a file (flock), which it lifts however a process ends. On
NFS it holds between hosts where these lock at all: a lock daemon, or version 4.
A file system that knows no locks keeps nobody out. Who only reads needs none.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from recjax.errors import UserError

FILE = "writer.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[pathlib.Path] = set()  # by this process


@contextlib.contextmanager
def writing(workdir: pathlib.Path, here: bool = True) -> Iterator[None]:
  """Keeps other processes from writing into a workdir meanwhile.

  Within itself it does nothing more.

  Args:
    workdir: made where there is none.
    here: whether this process is the one of its job that locks.

  Raises:
    UserError: another process writes there.
  """
  path = workdir.absolute() / FILE
  if not here or path in _held:
    yield
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+", encoding="utf-8") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      f.seek(0)
      raise UserError(
        f"--workdir: {workdir} is being written to by {f.read(200).strip()}: "
        "wait for its end, or use another --workdir"
      ) from e
    except OSError as e:
      if e.errno not in _NO_LOCKS:
        raise
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()}, ")
    f.write(time.strftime("since %Y-%m-%d %H:%M:%S\n"))
    f.flush()
    _held.add(path)
    try:
      yield
    finally:
      _held.discard(path)
