"""Checksums of arrays, which a swap of two rows changes as a damaged bit does.

The sum of an array wraps, over its words, of a word times an odd number that
belongs to the word's row and column. A row counts by its position in its group,
which is what a checkpoint stores it by: neither the mesh nor the order in which
rows are read matters. One word that is another one always changes the sum, as
odd numbers have inverses.
"""

import numpy as np

from recjax.embedding.row_random import mix

NONE = 0xFFFFFFFF  # no position
_CACHED_WORDS = 1 << 16  # that are worked on at a time, in a core's cache


class NotFiniteError(Exception):
  """A row that is to be saved has an infinity or a NaN."""

  def __init__(self, group: str, array: str, position: int):
    """array: "rows" or a slot variable; position: in the group."""
    super().__init__(f"{group}.{array} at position {position}")
    self.group, self.array, self.position = group, array, position


# ---- Of NumPy and of JAX


def folded(words):  # uint32 -> uint32, any shape
  """Lets low bits differ where high ones do: many floats end in zeros."""
  return words ^ (words >> 16)


def factor(at):  # uint32 -> uint32, any shape
  """Returns the odd number of a row or a column."""
  return mix(at) | np.uint32(1)


# ---- Of NumPy


def sum_of_rows(x: np.ndarray, at: np.ndarray) -> int:
  """Returns the sum of rows of a group, as a uint32.

  Args:
    x: [m, ...] of 2 or 4 bytes.
    at: [m] their positions.
  """
  x = np.ascontiguousarray(x).reshape(len(at), -1)
  words = x.view(f"u{x.dtype.itemsize}")
  factors = factor(at.astype(np.uint32))
  columns = factor(~np.arange(words.shape[1], dtype=np.uint32))
  total, step = 0, max(1, _CACHED_WORDS // len(columns))
  for a in range(0, len(at), step):
    part = folded(words[a : a + step].astype(np.uint32, copy=False))
    of_rows = np.einsum("rc,c->r", part, columns)  # wraps
    total += int((of_rows * factors[a : a + step]).sum(dtype=np.uint32))
  return total & 0xFFFFFFFF


def first_not_finite(x: np.ndarray, at: np.ndarray) -> int:
  """Returns the position of a row that has an infinity or a NaN; NONE if none.

  Args:
    x: [m, ...] float32 or bfloat16.
    at: [m] their positions, ascending.
  """
  x = np.ascontiguousarray(x).reshape(len(at), -1)
  words = x.view(f"u{x.dtype.itemsize}")
  exponent = 0xFF << (8 * x.dtype.itemsize - 8)  # all ones, without the sign
  step = max(1, _CACHED_WORDS // words.shape[1])
  for a in range(0, len(at), step):
    part = words[a : a + step] << 1
    if part.max() >= exponent:
      return int(at[a + np.flatnonzero((part >= exponent).any(axis=1))[0]])
  return NONE
