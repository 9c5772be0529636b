"""plan.html: the plan as one page of inline SVG, without dependencies."""

import html
import math

import numpy as np

from recjax.plan.plan import Plan, transports
from recjax.planner.baselines import Placed, size
from recjax.planner.cut_points import Problem

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 170, 20, 12, 34
_TIERS = {"hot": "#c0392b", "warm": "#d68910", "cold": "#2471a3"}
_BARS = (
  "#34495e", "#c0392b", "#d68910", "#2471a3", "#1e8449", "#7d3c98", "#839192",
  "#a04000", "#148f77",
)  # fmt: skip
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:44em;
color:#222}h1{font-size:1.4em}h2{font-size:1.1em;margin:1.6em 0 .3em}
svg{width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .6em;
border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child,
td:last-child,th:last-child{text-align:left}.note{color:#555}"""


def page(
  plan: Plan,
  problem: Problem,
  placed: tuple[Placed, ...],
  device_budget: int,
  measured_seconds: float | None = None,
) -> str:
  """The page's HTML.

  Args:
    plan, problem: what was planned.
    placed: the plan beside other placements (baselines.compare).
    device_budget: bytes of a device for tables and slots.
    measured_seconds: of a step, where there was a run.
  """
  total = plan.step_seconds
  rows = plan.rows - plan.spare
  title = f"{rows:,} rows x {plan.dim} on {plan.devices} devices"
  facts = (
    f"{html.escape(plan.topology)}, global batch {plan.batch_size:,}: "
    f"{total * 1e3:,.2f} ms a step, {plan.batch_size / total:,.0f} samples/s, "
    f"{plan.bytes_per_sample:,.0f} bytes a sample, predicted."
  )
  notes = []
  if problem.spectrum.assumed:
    notes.append(problem.spectrum.assumed)
  if plan.nodes > 1:
    notes.append(transports(plan))
  if problem.spectrum.measured is not None:
    notes.append("distinct rows corrected by those counted on real batches")
  if plan.pooled:
    of = ", ".join(f"{name} on device {owner}" for name, owner in plan.pooled)
    notes.append(f"vectors pooled at the owner: {of}")
  held = [
    (k, v) for k, v in plan.memory if k in ("replicas", "tables", "slots")
  ]
  step = [(k, v) for k, v in plan.memory if k not in dict(held)]
  seconds = [(k, 1e3 * v) for k, v in plan.seconds if v > 0]
  parts = [
    f"<h1>{title}</h1><p>{facts}</p>",
    f'<p class="note">{html.escape("; ".join(notes))}</p>' if notes else "",
    "<h2>Coverage and cut points</h2>",
    _coverage(plan, problem),
    "<h2>Memory of a device</h2>",
    _bars(
      [(k, v) for k, v in held + step if v],
      limit=("budget of tables and slots", device_budget),
      stacked=True,
      show=size,
    ),
    "<h2>A step, ms</h2>",
    _bars(
      seconds,
      limit=None
      if measured_seconds is None
      else ("measured", 1e3 * measured_seconds),
      stacked=True,
    ),
    "<h2>Bytes a sample by placement</h2>",
    _bars(
      [
        (p.name, p.bytes_per_sample)
        for p in placed
        if not math.isnan(p.seconds)
      ]
    ),
    _table(placed),
  ]
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f"<title>{title}</title><style>{_STYLE}</style></head><body>"
    + "\n".join(parts)
    + "</body></html>\n"
  )


def _svg(height: float, body: list[str], label: str) -> str:
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} '
    f'{height:g}" role="img" aria-label="{html.escape(label)}">'
    + "".join(body)
    + "</svg>"
  )


def _text(x, y, text, anchor="start", color="#222") -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
    f'style="fill:{color}">{html.escape(text)}</text>'
  )


def _line(x1, y1, x2, y2, color="#999", dash="") -> str:
  dash = f' stroke-dasharray="{dash}"' if dash else ""
  return (
    f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
    f'stroke="{color}"{dash}/>'
  )


def _coverage(plan: Plan, problem: Problem) -> str:
  """Share of the accesses to rows below a rank, over the rank's logarithm."""
  s = problem.spectrum
  rows = s.rows
  left, right = 50, _WIDTH - _RIGHT
  bottom = _HEIGHT - _BOTTOM
  decades = max(math.ceil(math.log10(max(rows, 2))), 1)
  x = lambda r: left + (right - left) * math.log10(max(r, 1)) / decades
  y = lambda f: bottom - (bottom - _TOP) * f
  below = s.below(s.uses)
  whole = max(float(below(rows)), 1e-300)
  ranks = np.unique(np.geomspace(1, rows, 200))
  points = " ".join(
    f"{x(r):.1f},{y(float(below(r)) / whole):.1f}" for r in ranks
  )
  body = []
  end = plan.warm_end - plan.spare
  cuts = {"hot": (0, plan.hot), "warm": (plan.hot, end), "cold": (end, rows)}
  for name, (start, stop) in cuts.items():
    if stop > start:
      body.append(
        f'<rect x="{x(start):.1f}" y="{_TOP}" '
        f'width="{max(x(stop) - x(start), 1):.1f}" '
        f'height="{bottom - _TOP}" fill="{_TIERS[name]}" opacity="0.13"/>'
      )
      middle = (x(start) + x(stop)) / 2
      body.append(_text(middle, bottom - 8, name, "middle", _TIERS[name]))
      if stop < rows:
        body.append(_line(x(stop), _TOP, x(stop), bottom, _TIERS[name], "4 3"))
  for k in range(decades + 1):
    body.append(_line(x(10**k), bottom, x(10**k), bottom + 4))
    body.append(_text(x(10**k), bottom + 18, _short(10**k), "middle"))
  for f in (0, 0.25, 0.5, 0.75, 1):
    body.append(_line(left, y(f), right, y(f), "#ddd"))
    body.append(_text(left - 6, y(f) + 4, f"{f:.0%}", "end"))
  body.append(
    f'<polyline points="{points}" fill="none" stroke="#222" stroke-width="2"/>'
  )
  return _svg(_HEIGHT, body, "share of the accesses by rank")


def _bars(items, limit=None, stacked=False, show=None) -> str:
  """Horizontal bars; `stacked`: each begins where the last ended."""
  row, show = 24, show or _short
  height = _TOP + row * (len(items) + (1 if stacked else 0)) + 26
  values = [v for _, v in items]
  most = max(sum(values) if stacked else max(values, default=0), 1e-300)
  if limit:
    most = max(most, limit[1])
  if not stacked and values and min(values) > 0:  # longer ones are cut
    most = min(most, 20 * min(values))
  right = _WIDTH - 90
  x = lambda v: _LEFT + (right - _LEFT) * v / most
  body, at, top = [], 0.0, float(_TOP)
  for i, (name, value) in enumerate(items):
    start = at if stacked else 0.0
    body.append(_text(_LEFT - 8, top + 16, name, "end"))
    body.append(
      f'<rect x="{x(start):.1f}" y="{top + 3:.1f}" '
      f'width="{max(min(x(start + value), right) - x(start), 0.5):.1f}" '
      f'height="{row - 6}" fill="{_BARS[i % len(_BARS)]}"/>'
    )
    body.append(_text(min(x(start + value), right) + 5, top + 16, show(value)))
    at, top = start + value, top + row
  if stacked:
    body.append(_text(_LEFT - 8, top + 16, "sum", "end"))
    body.append(
      f'<rect x="{_LEFT}" y="{top + 3:.1f}" width="{x(at) - _LEFT:.1f}" '
      f'height="{row - 6}" fill="#bbb"/>'
    )
    body.append(_text(x(at) + 5, top + 16, show(at)))
    top += row
  if limit:
    body.append(_line(x(limit[1]), _TOP, x(limit[1]), top, "#c0392b", "5 3"))
    body.append(
      _text(
        min(x(limit[1]), right),
        top + 16,
        f"{limit[0]} {show(limit[1])}",
        "end",
        "#c0392b",
      )
    )
  return _svg(height, body, ", ".join(name for name, _ in items))


def _short(value: float) -> str:
  """At most four digits: 12.3 k, 4.56 M."""
  for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
    if abs(value) >= limit:
      return f"{value / limit:.3g}{unit}"
  return f"{value:.3g}"


def _table(placed: tuple[Placed, ...]) -> str:
  head = (
    "<tr><th>placement<th>ms a step<th>bytes a sample<th>a device"
    "<th>all hosts<th></tr>"
  )
  lines = [head]
  for p in placed:
    gone = math.isnan(p.seconds)
    cells = [
      html.escape(p.name),
      "-" if gone else f"{p.seconds * 1e3:,.2f}",
      "-" if gone else f"{p.bytes_per_sample:,.0f}",
      size(p.device_bytes),
      size(p.host_bytes),
      html.escape(p.note),
    ]
    lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
  return f"<table>{''.join(lines)}</table>"
