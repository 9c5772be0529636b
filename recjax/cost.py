"""Expected traffic of a row space: pure formulas, numpy only.

`p` is the probability that a sample touches a row, rows in rank order.
"""

import math

import numpy as np


def touch_probability(p: np.ndarray, samples: int) -> np.ndarray:
  """pi_i(m) = 1 - (1 - p_i)^m: m independent samples touch the row.

  Args:
    p: [R] float64, the probability that one sample does.
    samples: m.

  Returns:
    [R] float64.
  """
  with np.errstate(divide="ignore"):  # p = 1
    return -np.expm1(samples * np.log1p(-p))


def capacity(mean: float, overflow_probability: float) -> int:
  """Rows that a buffer needs so that it overflows with at most that chance.

  The distinct rows of a buffer are a sum of negatively associated Bernoullis
  with that mean, so its variance is at most the mean, and Bernstein's
  inequality holds: P(X >= mean + t) <= exp(-t^2 / (2 (mean + t / 3))). Solved
  for t.
  """
  log = -math.log(overflow_probability)
  t = log / 3 + math.sqrt(log * log / 9 + 2 * mean * log)
  return math.ceil(mean + t)
