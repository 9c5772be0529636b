"""Draws docs/tiers.svg: the ranks of a group with two cuts and three tiers.

  python scripts/draw_tiers.py [--out docs/tiers.svg] [--exponent 1.15]

The curve is the share of the accesses that go to rows below a rank, for a
power law over the 33.8 M rows of the Criteo Kaggle tables; the cuts are where a
plan for eight devices might put them.
"""

import argparse

import numpy as np

from recjax import files
from recjax.data.criteo import KAGGLE_ROWS

WIDTH, HEIGHT = 760, 362
LEFT, RIGHT, TOP, BOTTOM = 60, 740, 30, 200
CUTS = (20_000, 8_000_000)  # hot, warm_end
TIERS = (
  ("hot", "#c0392b", "a replica on every device", "gradients all-reduced"),
  ("warm", "#d68910", "sharded, device memory", "rows exchanged, coalesced"),
  ("cold", "#2471a3", "sharded, host memory", "rows fetched from the host"),
)


def coverage(ranks, exponent: float):  # [m] -> [m] float64, from 0 to 1
  """Shares of the accesses below ranks, all tables merged by frequency."""
  counts = []
  for rows in KAGGLE_ROWS:
    p = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    counts.append(p / p.sum() / len(KAGGLE_ROWS))
  below = np.cumsum(np.sort(np.concatenate(counts))[::-1])
  return below[np.asarray(ranks) - 1]


def text(x, y, content, color="#222", anchor="middle", size=13) -> str:
  return (
    f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" '
    f'font-size="{size}" fill="{color}">{content}</text>'
  )


def draw(exponent: float) -> str:
  rows = sum(KAGGLE_ROWS)
  x = lambda r: LEFT + (RIGHT - LEFT) * np.log10(max(r, 1)) / np.log10(rows)
  y = lambda share: BOTTOM - (BOTTOM - TOP) * share
  ends = (1, *CUTS, rows)
  body = []
  for i, (name, color, where, how) in enumerate(TIERS):
    a, b = x(ends[i]), x(ends[i + 1])
    body.append(
      f'<rect x="{a:.0f}" y="{TOP}" width="{b - a:.0f}" '
      f'height="{BOTTOM - TOP}" fill="{color}" opacity="0.14"/>'
    )
    middle = (a + b) / 2
    share = np.diff(coverage(ends[i : i + 2], exponent))[0]
    share += coverage([1], exponent)[0] if i == 0 else 0
    body.append(text(middle, TOP - 10, name, color, size=16))
    # The last tier is narrow on a logarithmic axis: its notes lean left.
    at, anchor = (middle, "middle") if i < 2 else (RIGHT, "end")
    y0 = BOTTOM + 42 + (48 if i == 2 else 0)
    body.append(text(at, y0, f"{share:.1%} of the accesses", color, anchor))
    body.append(text(at, y0 + 16, where, "#222", anchor))
    body.append(text(at, y0 + 32, how, "#555", anchor))
  for cut in CUTS:
    body.append(
      f'<line x1="{x(cut):.0f}" y1="{TOP}" x2="{x(cut):.0f}" y2="{BOTTOM}" '
      'stroke="#222" stroke-dasharray="5 3"/>'
    )
  ranks = np.unique(np.geomspace(1, rows, 300).astype(np.int64))
  shares = coverage(ranks, exponent)
  points = " ".join(
    f"{x(r):.1f},{y(s):.1f}" for r, s in zip(ranks, shares, strict=True)
  )
  body.append(
    f'<polyline points="{points}" fill="none" stroke="#222" stroke-width="2"/>'
  )
  for share in (0, 0.5, 1):
    body.append(text(LEFT - 8, y(share) + 4, f"{share:.0%}", anchor="end"))
  for power in range(0, 8):
    label = ("1", "10", "100", "1 k", "10 k", "100 k", "1 M", "10 M")[power]
    body.append(text(x(10**power), BOTTOM + 18, label, "#555"))
  body.append(
    text(LEFT, HEIGHT - 8, "rank of a row, most used first (log scale); "
         "the curve: share of the accesses below it", "#555", "start")
  )  # fmt: skip
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    'font-family="system-ui,sans-serif" role="img" aria-label="Rows by rank: '
    'hot, warm and cold">'
    '<rect width="100%" height="100%" fill="#fff"/>'
    + "\n".join(body)
    + "</svg>\n"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default="docs/tiers.svg")
  parser.add_argument("--exponent", type=float, default=1.15)
  args = parser.parse_args()
  files.write(args.out, draw(args.exponent))
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
