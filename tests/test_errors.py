"""What a message looks like."""

import errno
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.errors import UserError, of_the_system, refusal


@given(st.text())
def test_a_message_is_one_line_that_a_terminal_shows(found):
  message = str(UserError(f"--workdir: {found}: é"))
  assert message.isprintable()
  assert message.startswith("--workdir: ") and message.endswith(": é")


def test_what_is_printable_stays():
  text = (
    "".join(sorted(set(string.printable) - set(string.whitespace))) + " é日😀"
  )
  assert str(UserError(text)) == text
  assert str(UserError("a\n\t\x1b[1mb\u202e\udce9")) == (
    r"a\n\t\x1b[1mb\u202e\udce9"
  )


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")


def test_what_the_system_refuses_is_a_message_with_its_path():
  with (
    pytest.raises(
      UserError, match=r"^saving: /a/b: No space left on device\. "
    ),
    of_the_system("saving"),
  ):
    raise RuntimeError("a save failed") from FULL
  text = (
    'Error writing local file "/c/d": [OS error 28: No space left on device]'
  )
  assert refusal(ValueError(text)) == "/c/d: No space left on device"


def test_a_fault_of_our_own_keeps_its_traceback():
  """Also one that comes while a refusal is handled."""
  with pytest.raises(KeyError), of_the_system("saving"):
    try:
      raise FULL
    except OSError:
      {}["a"]
