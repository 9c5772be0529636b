"""plan.html: the plan as one page of inline SVG, without dependencies."""

import html
import math
from collections.abc import Sequence

import numpy as np

from recjax.plan.plan import COLD, FROZEN, HOT, TIERS, WARM, Group, Plan
from recjax.planner import describe, svg
from recjax.planner.baselines import Baseline, size
from recjax.planner.problem import Problem

_HEIGHT, _LEFT, _RIGHT, _BOTTOM = 260, 50, 20, 34  # of a coverage chart
_COLORS = {HOT: svg.RED, WARM: "#d68910", COLD: "#2471a3", FROZEN: "#6c3483"}
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:44em;
color:#222}h1{font-size:1.4em}h2{font-size:1.1em;margin:1.6em 0 .3em}
svg{width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .6em;
border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child,
td:last-child,th:last-child{text-align:left}.note{color:#555}"""


def page(
  plan: Plan,
  problems: Sequence[Problem],
  placed: Sequence[Baseline],
  device_budget: int,
  measured_seconds: float | None = None,
) -> str:
  """The page's HTML.

  Args:
    plan, problems: what was planned.
    placed: the plan beside other placements (baselines.compare).
    device_budget: bytes of a device for tables and slot variables.
    measured_seconds: of a step, where there was a run.
  """
  one = len(plan.groups) == 1
  wide = f" x {plan.groups[0].dim}" if one else f" in {len(plan.groups)} groups"
  title = f"{plan.rows:,} rows{wide} on {plan.devices} devices"
  seconds = plan.prediction.step_seconds
  facts = (
    f"{html.escape(plan.prediction.topology)}, global batch "
    f"{plan.batch_size:,}: {seconds * 1e3:,.2f} ms a step, "
    f"{plan.batch_size / seconds:,.0f} samples/s, "
    f"{plan.bytes_per_sample:,.0f} bytes a sample, predicted."
  )
  notes = "; ".join(_notes(plan, problems))
  parts = [
    f"<h1>{title}</h1><p>{facts}</p>",
    f'<p class="note">{html.escape(notes)}</p>' if notes else "",
    *_charts(plan, problems),
    "<h2>Memory of a device</h2>",
    _memory(plan, device_budget),
    "<h2>A step, ms</h2>",
    _seconds(plan, measured_seconds),
    "<h2>Bytes a sample by placement</h2>",
    svg.bars(
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


def _notes(plan: Plan, problems: Sequence[Problem]) -> list[str]:
  notes = list(dict.fromkeys(p.profile.assumed for p in problems))
  notes = [note for note in notes if note]
  if beside := describe.host_path(plan):
    notes.append(beside)
  if plan.nodes > 1:
    notes.append(describe.transports(plan))
  if any(p.profile.measured is not None for p in problems):
    notes.append("distinct rows corrected by those counted on real batches")
  owners = describe.table_wise(plan)
  if owners:
    of = ", ".join(f"{name} on device {owner}" for name, owner in owners)
    notes.append(f"table-wise, pooled by the owner: {of}")
  return notes


def _memory(plan: Plan, budget: int) -> str:
  tables = ("replicas", "tables", "slot variables")
  terms = plan.prediction.memory
  held = [(k, v) for k, v in terms if k in tables]
  step = [(k, v) for k, v in terms if k not in tables]
  return svg.bars(
    [(k, v) for k, v in held + step if v],
    limit=("budget of tables and slot variables", budget),
    stacked=True,
    show=size,
  )


def _seconds(plan: Plan, measured: float | None) -> str:
  return svg.bars(
    [(k, 1e3 * v) for k, v in plan.prediction.seconds if v > 0],
    limit=None if measured is None else ("measured", 1e3 * measured),
    stacked=True,
  )


def _charts(plan: Plan, problems: Sequence[Problem]) -> list[str]:
  """A chart of coverage for each group, under its heading."""
  charts = []
  for group, problem in zip(plan.groups, problems, strict=True):
    of = f": {group.name}" if len(plan.groups) > 1 else ""
    charts.append(f"<h2>Coverage and cut points{html.escape(of)}</h2>")
    charts.append(_coverage(group, problem))
  return charts


def _coverage(group: Group, problem: Problem) -> str:
  """Share of the accesses to rows below a rank, over the rank's logarithm."""
  profile = problem.profile
  rows, right = profile.rows, svg.WIDTH - _RIGHT
  bottom = _HEIGHT - _BOTTOM
  decades = max(math.ceil(math.log10(max(rows, 2))), 1)
  x = lambda r: _LEFT + (right - _LEFT) * math.log10(max(r, 1)) / decades
  y = lambda f: bottom - (bottom - svg.TOP) * f
  below = profile.cumulative(profile.uses)
  whole = max(float(below(rows)), 1e-300)
  body, stop = [], 0
  for name in TIERS:
    start, stop = stop, stop + group.rows_of(name)
    if name == WARM:
      stop -= group.padding_rows
    if stop == start:
      continue
    color, wide = _COLORS[name], max(x(stop) - x(start), 1)
    style = f'fill="{color}" opacity="0.13"'
    body += [
      svg.rectangle(x(start), svg.TOP, wide, bottom - svg.TOP, style),
      svg.text((x(start) + x(stop)) / 2, bottom - 8, name, "middle", color),
    ]
    if stop < rows:
      body.append(svg.line((x(stop), svg.TOP), (x(stop), bottom), color, "4 3"))
  for k in range(decades + 1):
    at = x(10**k)
    body.append(svg.line((at, bottom), (at, bottom + 4)))
    body.append(svg.text(at, bottom + 18, svg.short(10**k), "middle"))
  for f in (0, 0.25, 0.5, 0.75, 1):
    body.append(svg.line((_LEFT, y(f)), (right, y(f)), "#ddd"))
    body.append(svg.text(_LEFT - 6, y(f) + 4, f"{f:.0%}", "end"))
  ranks = np.unique(np.geomspace(1, rows, 200))
  points = " ".join(
    f"{x(r):.1f},{y(float(below(r)) / whole):.1f}" for r in ranks
  )
  body.append(
    f'<polyline points="{points}" fill="none" stroke="#222" stroke-width="2"/>'
  )
  return svg.picture(_HEIGHT, body, "share of the accesses by rank")


def _table(placed: Sequence[Baseline]) -> str:
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
