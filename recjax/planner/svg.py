"""Inline SVG: lines, text and bars, without dependencies."""

import html
from collections.abc import Callable, Sequence

WIDTH = 640
TOP = 12
RED = "#c0392b"
_LEFT = 170  # where bars begin
_ROW = 24  # height of a bar and its margin
_COLORS = (
  "#34495e", RED, "#d68910", "#2471a3", "#1e8449", "#7d3c98", "#839192",
  "#a04000", "#148f77",
)  # fmt: skip


def picture(height: float, body: list[str], label: str) -> str:
  """An SVG image of these elements; `label` is read to those who cannot see."""
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
    f'{height:g}" role="img" aria-label="{html.escape(label)}">'
    + "".join(body)
    + "</svg>"
  )


def text(
  x: float, y: float, words: str, anchor: str = "start", color: str = "#222"
) -> str:
  """A line of text at (x, y)."""
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
    f'style="fill:{color}">{html.escape(words)}</text>'
  )


def line(
  start: tuple[float, float],
  stop: tuple[float, float],
  color: str = "#999",
  dash: str = "",
) -> str:
  """A line between two points."""
  (x1, y1), (x2, y2) = start, stop
  dash = f' stroke-dasharray="{dash}"' if dash else ""
  return (
    f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
    f'stroke="{color}"{dash}/>'
  )


def rectangle(
  x: float, y: float, width: float, height: float, style: str
) -> str:
  """A rectangle; `style` are more attributes, as fill="#bbb"."""
  return (
    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
    f'height="{height:.1f}" {style}/>'
  )


def bars(
  items: Sequence[tuple[str, float]],
  *,
  limit: tuple[str, float] | None = None,
  stacked: bool = False,
  show: Callable[[float], str] | None = None,
) -> str:
  """Horizontal bars.

  Args:
    items: name and value of each.
    limit: what a dashed line marks, and where.
    stacked: whether each begins where the last ended, with their sum below.
    show: writes a value; None = `short`.
  """
  show = show or short
  height = TOP + _ROW * (len(items) + (1 if stacked else 0)) + 26
  right = WIDTH - 90
  most = _longest([v for _, v in items], limit, stacked)
  x = lambda v: _LEFT + (right - _LEFT) * v / most
  body: list[str] = []
  at, top = 0.0, float(TOP)
  for i, (name, value) in enumerate(items):
    start = at if stacked else 0.0
    end = min(x(start + value), right)
    fill = f'fill="{_COLORS[i % len(_COLORS)]}"'
    wide = max(end - x(start), 0.5)
    body += [
      text(_LEFT - 8, top + 16, name, "end"),
      rectangle(x(start), top + 3, wide, _ROW - 6, fill),
      text(end + 5, top + 16, show(value)),
    ]
    at, top = start + value, top + _ROW
  if stacked:
    body += [
      text(_LEFT - 8, top + 16, "sum", "end"),
      rectangle(_LEFT, top + 3, x(at) - _LEFT, _ROW - 6, 'fill="#bbb"'),
      text(x(at) + 5, top + 16, show(at)),
    ]
    top += _ROW
  if limit:
    where, words = x(limit[1]), f"{limit[0]} {show(limit[1])}"
    body += [
      line((where, TOP), (where, top), RED, "5 3"),
      text(min(where, right), top + 16, words, "end", RED),
    ]
  return picture(height, body, ", ".join(name for name, _ in items))


def _longest(
  values: Sequence[float], limit: tuple[str, float] | None, stacked: bool
) -> float:
  """The value that a bar of full length has."""
  most = max(sum(values) if stacked else max(values, default=0), 1e-300)
  if limit:
    most = max(most, limit[1])
  if not stacked and values and min(values) > 0:  # longer ones are cut
    most = min(most, 20 * min(values))
  return most


def short(value: float) -> str:
  """At most four digits: 12.3 k, 4.56 M."""
  for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
    if abs(value) >= limit:
      return f"{value / limit:.3g}{unit}"
  return f"{value:.3g}"
