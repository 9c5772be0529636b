"""What a message looks like."""

import string

from hypothesis import given
from hypothesis import strategies as st

from recjax.errors import UserError


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
