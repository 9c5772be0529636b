"""Rows of a log by the names of their columns: what readers of formats give."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa


class Rows(NamedTuple):
  """Consecutive rows of a file."""

  table: pa.Table  # the wanted columns
  at: np.ndarray  # [k] int64, the line or row of each; the first is 1
  read: int  # bytes of the file so far
