"""Lines of progress: when they come, and what they say."""

from recjax.progress import Progress


def lines_of(additions, **arguments):
  """The lines that (seconds, count, share) lead to."""
  lines, now = [], [0.0]
  progress = Progress(report=lines.append, clock=lambda: now[0], **arguments)
  for seconds, count, share in additions:
    now[0] = seconds
    progress.add(count, share)
  return lines


def test_a_known_total():
  steps = [(1, 1_000, None), (10, 1_000, None), (11, 500, None)]
  assert lines_of(
    [*steps, (20, 5_500, None)],
    name="evaluate:",
    total=8_000,
    unit="samples",
    every_seconds=10.0,
  ) == [
    "evaluate: 2,000 of 8,000 samples, 200 samples/s, 30 s left",
    "evaluate: 8,000 samples, 400 samples/s",
  ]


def test_a_share_where_the_total_is_not_known():
  steps = [(2, 400, 0.1), (8, 400, 0.4), (20, 1_200, 1.0)]
  assert lines_of(steps, name="prepare: stage") == [
    "prepare: stage 800 rows, 100 rows/s, 12 s left",
    "prepare: stage 2,000 rows, 100 rows/s",
  ]


def test_neither_total_nor_share():
  steps = [(5, 10, None), (6, 10, None), (10, 10, None)]
  assert lines_of(steps, name="read") == [
    "read 10 rows, 2 rows/s",
    "read 30 rows, 3 rows/s",
  ]


def test_no_time_at_all_divides_nothing_by_zero():
  assert len(lines_of([(0, 5, None)], name="x", total=5)) == 1
