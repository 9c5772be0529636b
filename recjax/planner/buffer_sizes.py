"""How many distinct rows a batch touches, and how large buffers must be.

`p` is the probability that a sample touches a row, rows in rank order; samples
are independent unless said otherwise. A row is touched by m samples with
probability pi(m) = 1 - (1-p)^m. A buffer is so large that the number of
distinct rows passes it with a probability that a tail bound limits. Functions
of rows and cuts take arrays as well as numbers.
"""

import math
from typing import Any, NamedTuple

import numpy as np


def bag_probability(r, sizes):
  """Returns p = 1 - sum_h P(h) (1-r)^h: a bag of lookups holds the row.

  Lookups are independent. Duplicates within a bag count once.

  Args:
    r: [R] float64, the probability that a lookup is the row.
    sizes: h of every bag, or [H + 1] P(a bag has h lookups), h = 0 ... H.
  """
  r = np.asarray(r, np.float64)
  if np.ndim(sizes) == 0:
    return touch_probability(r, sizes)
  return sum(x * touch_probability(r, h) for h, x in enumerate(sizes) if h)


def touch_probability(p: np.ndarray, samples: int) -> np.ndarray:
  """Returns pi_i(m) = 1 - (1 - p_i)^m: m samples touch row i.

  Args:
    p: [R] float64, the probability that one sample does.
    samples: m.

  Returns:
    [R] float64.
  """
  with np.errstate(divide="ignore"):  # p = 1
    return -np.expm1(samples * np.log1p(-p))


def variance_bound(pi: np.ndarray, rows=1) -> float:
  """Bounds the variance of the number of distinct rows: sum pi (1 - pi).

  Lookups that fill a batch compete, so the indicators 'row i is touched' are
  negatively associated (Joag-Dev and Proschan, 1983) and covariances are <= 0.
  """
  return float(np.sum(rows * pi * (1 - pi)))


def overflow_bound(
  mean: float, capacity: float, variance: float | None = None
) -> float:
  """Bounds the probability that a buffer's distinct rows exceed its capacity.

  Bernstein's inequality, which holds for negatively associated Bernoullis:
  P(X >= mean + t) <= exp(-t^2 / (2 (variance + t / 3))), with any bound on the
  variance; None = the mean.
  """
  t = capacity - mean
  variance = mean if variance is None else variance
  return 1.0 if t <= 0 else math.exp(-t * t / (2 * (variance + t / 3)))


def capacity(
  mean: float, overflow_probability: float, variance: float | None = None
) -> int:
  """Rows that a buffer needs so that it overflows with at most that chance.

  It solves `overflow_bound` for the capacity.
  """
  variance = mean if variance is None else variance
  return math.ceil(_capacity(mean, overflow_probability, variance))


def _capacity(mean, overflow_probability, variance):
  log = -math.log(overflow_probability)
  return mean + log / 3 + np.sqrt(log * log / 9 + 2 * variance * log)


class DistinctRows(NamedTuple):
  """The distribution of a tier's distinct rows; numbers or arrays."""

  mean: Any  # expected distinct rows that a device (or node) touches
  variance: Any  # a bound on theirs, `variance_bound`
  top: Any  # pi of the tier's hottest row
  rows: Any  # of the tier


def buffer_rows(
  distinct: DistinctRows,
  owners: int,
  lookups: float,
  overflow_probability: float | None,
):
  """Rows of a tier's exchange buffer, from its distribution of distinct rows.

  Owners are cyclic in rank, so none has more of the mean than its n-th part
  and one row; nor of the variance, sum pi (1 - pi), whose summands rise, then
  fall with the rank: its n-th part and twice the largest, 1/4. C is at most
  an owner's rows and the batch's lookups.

  Args:
    distinct: of the tier.
    owners: n, of the tier's rows.
    lookups: L, of a device and step.
    overflow_probability: of one buffer; None = the mean, without padding.

  Returns:
    n C; 0 where the tier has no rows.
  """
  mean, variance, top, rows = distinct
  if overflow_probability is None:
    # A tier with rows is exchanged, however seldom they are used.
    return np.where(rows > 0, np.maximum(mean, 1e-9), 0.0)
  c = _capacity(
    mean / owners + (top if owners > 1 else 0.0),
    overflow_probability,
    variance / owners + (0.5 if owners > 1 else 0.0),
  )
  c = np.minimum(np.ceil(c), np.minimum(np.ceil(rows / owners), lookups))
  return np.where(rows > 0, owners * c, 0.0)
