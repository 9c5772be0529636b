"""Random ranks of a power law: what ids of click logs look like."""

import numpy as np


def ranks(
  rng: np.random.Generator,
  shape: int | tuple[int, ...],
  rows: int,
  exponent: float,
) -> np.ndarray:
  """Draws ranks 0..rows-1 with P(r) about (r + 1)^-exponent.

  A bounded Pareto variable on [1, rows + 1), rounded down: inverting its
  distribution function needs no table of `rows` entries.

  Args:
    rng: gives the uniform numbers, one for each rank.
    shape: of the result.
    rows: of the table.
    exponent: 0 = uniform; any number of at least 0.

  Returns:
    int64 of that shape.
  """
  u = rng.random(shape, np.float64)
  if abs(exponent - 1) < 1e-6:
    x = np.exp(u * np.log(rows + 1))
  else:
    power = 1 - exponent
    x = (1 + u * ((rows + 1) ** power - 1)) ** (1 / power)
  return np.minimum(x.astype(np.int64) - 1, rows - 1)
