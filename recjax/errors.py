"""The one error for what a user can put right."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

# What a system refuses whatever a program does. Libraries written in C++ pass
# on these words, in errors of their own types.
_REFUSALS = (
  errno.EACCES,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
  errno.EISDIR,
  errno.EMFILE,
  errno.ENAMETOOLONG,
  errno.ENFILE,
  errno.ENOSPC,
  errno.ENOTDIR,
  errno.EPERM,
  errno.EROFS,
)
_WORDS = re.compile("|".join(re.escape(os.strerror(n)) for n in _REFUSALS))


class UserError(Exception):
  """Bad config, data, plan or checkpoint: one message, exit code not 0.

  The message names the field, the file and line or the table, says what was
  found, and what to do. main.py prints it without a traceback. It is one line
  of what a terminal shows, whatever was found: a path may hold a line's end.
  """

  def __str__(self) -> str:
    """Returns the message, with escapes for what is not printable."""
    shown = lambda c: c if c.isprintable() else repr(c)[1:-1]
    return "".join(map(shown, super().__str__()))


@contextlib.contextmanager
def of_the_system(what: str) -> Iterator[None]:
  """Makes what the operating system refuses a UserError.

  Args:
    what: is done meanwhile, and where.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    if said := refusal(e):
      raise UserError(
        f"{what}: {said}. What is written so far is kept: put that right, and "
        "run the same command again"
      ) from e
    raise


def refusal(error: BaseException | None) -> str | None:
  """Returns what the operating system refused, and where; None: nothing.

  An error that only came while another one was handled is one of its own.
  """
  while error is not None:
    if isinstance(error, OSError) and error.strerror:
      names = [str(x) for x in (error.filename, error.filename2) if x]
      return ": ".join([*names, error.strerror])
    if found := _WORDS.search(str(error)):
      paths = re.findall(r'"(/[^"]+)"', str(error)[: found.start()])
      return ": ".join([*paths[-1:], found[0]])
    error = error.__cause__
  return None
