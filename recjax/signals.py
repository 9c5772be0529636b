"""SIGTERM and Ctrl-C: what can be saved is saved, and the process ends.

Only the command line listens. While a train loop runs, the first signal asks it
for a checkpoint, and it raises `Ended`. All other work ends at once: what it
wrote is whole, and the same command goes on from there. A thread of its own
takes the signals, so that no long call (compiling, counting) delays an end.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_TAKEN = (signal.SIGTERM, signal.SIGINT)
_GO_ON = "the same command goes on from what is done"


class Ended(Exception):
  """A run has saved its state because a signal asked it to."""

  def __init__(self, signum: int, message: str):
    super().__init__(f"ended by {name(signum)}: {message}")
    self.signum = signum


class _State:
  """What has arrived, and what is to be done about it."""

  def __init__(self):
    self.lock = threading.Lock()
    self.asked = 0  # the first signal
    self.saves = False  # a train loop will ask
    # Of several processes: what else is done with the first signal, and what
    # is done before the end.
    self.instead: Callable[[int], None] | None = None
    self.before: Callable[[int], None] = lambda _: None


_state = _State()


def name(signum: int) -> str:
  """Returns SIGTERM, or Ctrl-C (SIGINT)."""
  found = signal.Signals(signum).name
  return "Ctrl-C" if found == "SIGINT" else found


def code(signum: int) -> int:
  """Returns the exit code of a process that a signal ended, as shells do."""
  return 128 + signum


def listen() -> None:
  """Takes SIGTERM and Ctrl-C from now on; called once, in the main thread."""
  read, write = os.pipe()
  os.set_blocking(write, False)
  for signum in _TAKEN:
    signal.signal(signum, lambda *_: None)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threading.Thread(target=_take, args=(read,), daemon=True).start()


def _take(read: int) -> None:
  first = True
  while True:
    for signum in os.read(read, 1):
      if signum not in _TAKEN:
        continue
      if first:
        first = False
        (_state.instead or receive)(signum)
      elif signum == signal.SIGINT:  # SIGTERM is often sent twice
        end(signum, f"at once; {_GO_ON}")


def receive(signum: int) -> None:
  """Takes a signal: of this process, or that another one had."""
  with _state.lock:
    if _state.asked:
      return
    _state.asked = signum
    if _state.saves:
      say(f"{name(signum)}: a checkpoint first; Ctrl-C ends at once")
      return
  _state.before(signum)
  end(signum, _GO_ON)


def forward(instead: Callable[[int], None] | None, before=None) -> None:
  """Says what several processes do with signals.

  Args:
    instead: takes this process's first signal; None = `receive`.
    before: is called with the signal before this process ends at once.
  """
  _state.instead = instead
  _state.before = before or (lambda _: None)


def asked() -> int:
  """Returns the signal that asked for the end of this process; 0 = none."""
  return _state.asked


@contextlib.contextmanager
def saving(saved: Callable[[], str]) -> Iterator[Callable[[], None]]:
  """Yields what is called when there is something to be saved.

  From that call to the end of the block the first signal only sets `asked`. At
  the end of the block the process ends if it is set.

  Args:
    saved: says what is saved by then.
  """

  def begin() -> None:
    with _state.lock:
      _state.saves = True

  try:
    yield begin
  except BaseException:
    with _state.lock:
      _state.saves = False
    raise
  with _state.lock:
    late, _state.saves = _state.saves and _state.asked, False
  if late:
    _state.before(late)
    end(late, saved())


def say(message: str) -> None:
  """Prints a line; from any thread, whatever the others print."""
  with contextlib.suppress(OSError):
    os.write(2, f"{message}\n".encode())


def end(signum: int, message: str) -> None:
  """Ends this process at once."""
  say(str(Ended(signum, message)))
  os._exit(code(signum))
