"""Normalisers of a log's numbers, fitted to the training split alone.

Fitted chunk by chunk, in the order of the log, so that the same log gives the
same bits whoever counts it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from recjax.data.numbers import Fitted, transformed
from recjax.data.split import splitmix64
from recjax.log_schema import Number

# Rows of a quantile's sample, about: all of a log that has no more.
_SAMPLE = 1 << 20
_LEAST_WIDTH = 1e-30  # of what is scaled to 1


class Sums(NamedTuple):
  """What a part of the training split says of N transformed numbers: [N]."""

  count: np.ndarray  # int64, those that are not missing
  mean: np.ndarray
  squares: np.ndarray  # of what is off the mean
  least: np.ndarray
  most: np.ndarray
  sample: tuple[np.ndarray, ...]  # of each that has buckets


def sums(
  numbers: Sequence[Number],
  raw: np.ndarray,
  row: int,
  train: np.ndarray,
  total: int,
) -> Sums:
  """Sums the numbers of a chunk.

  Args:
    numbers: which they are.
    raw: [k, N] float64, nan = missing.
    row: of the log, the chunk's first.
    train: [k] bool, whether a sample trains.
    total: samples of the training split.
  """
  log = [x.transform == "log1p" for x in numbers]
  y = transformed(log, raw[train])
  there = ~np.isnan(y)
  count = there.sum(axis=0)
  some = np.where(there, y, 0)
  mean = some.sum(axis=0) / np.maximum(count, 1)
  off = np.where(there, y - mean, 0)
  at = np.flatnonzero(train).astype(np.uint64) + np.uint64(row)
  drawn = splitmix64(at) / 2.0**64 < _SAMPLE / max(total, 1)
  return Sums(
    count,
    mean,
    (off * off).sum(axis=0),
    np.min(np.where(there, y, np.inf), axis=0, initial=np.inf),
    np.max(np.where(there, y, -np.inf), axis=0, initial=-np.inf),
    tuple(
      raw[train][drawn & there[:, i], i] if x.buckets else np.empty(0)
      for i, x in enumerate(numbers)
    ),
  )


def fit(numbers: Sequence[Number], parts: Iterable[Sums]) -> tuple[Fitted, ...]:
  """Fits the normalisers to what `sums` says, chunk by chunk.

  Means and variances are joined as in Chan, Golub and LeVeque (1983).
  """
  n, mean, squares = (np.zeros(len(numbers)) for _ in range(3))
  least, most = np.full((2, len(numbers)), [[np.inf], [-np.inf]])
  samples: list[list[np.ndarray]] = [[] for _ in numbers]
  for part in parts:
    total = np.maximum(n + part.count, 1)
    apart = part.mean - mean
    squares = squares + part.squares + apart**2 * n * part.count / total
    mean = mean + apart * part.count / total
    n = n + part.count
    least, most = np.minimum(least, part.least), np.maximum(most, part.most)
    for of, drawn in zip(samples, part.sample, strict=True):
      of.append(drawn)
  deviation = np.sqrt(squares / np.maximum(n, 1))
  found = []
  for i, x in enumerate(numbers):
    scaled = {
      "standard": (mean[i], deviation[i]),
      "minmax": (least[i], most[i] - least[i]),
    }
    shift, width = scaled.get(x.transform, (0.0, 1.0))
    if not (n[i] and width > _LEAST_WIDTH):
      shift, width = mean[i], 1.0
    fill = (mean[i] - shift) / width if x.missing == "mean" else 0.0
    edges = _quantiles(x.buckets, samples[i]) if x.buckets else None
    log, of = x.transform == "log1p", (shift, 1 / width, fill)
    found.append(Fitted(x.name, log, *map(float, of), edges))
  return tuple(found)


def _quantiles(buckets: int, samples: list[np.ndarray]) -> tuple[float, ...]:
  """Returns the values at which the buckets but the first begin."""
  x = np.sort(np.concatenate([*samples, np.empty(0)]))
  if not len(x):
    return ()
  at = len(x) * np.arange(1, buckets) // buckets
  return tuple(np.unique(x[at]).tolist())
