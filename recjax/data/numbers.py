"""Numbers of a log, normalised as the training split says (fit_numbers.py)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa


class Fitted(NamedTuple):
  """What is made of a number x; y = x or sign(x) log(1 + |x|)."""

  name: str
  log: bool
  shift: float
  scale: float  # the model gets (y - shift) * scale
  fill: float  # in place of a missing one
  # Of x: where buckets but the first begin; None = it has no buckets.
  edges: tuple[float, ...] | None

  @classmethod
  def from_json(cls, found: dict[str, Any]) -> "Fitted":
    """Reads what JSON made of `_asdict`."""
    edges = found["edges"]
    return cls(**found | {"edges": None if edges is None else tuple(edges)})


def normalised(fitted: Sequence[Fitted], raw: np.ndarray) -> np.ndarray:
  """Makes the model's numbers, [k, D] float32, of raw ones, [k, N] float64."""
  plain = [i for i, f in enumerate(fitted) if f.edges is None]
  y = transformed([f.log for f in fitted], raw)[:, plain]
  of = [(f.shift, f.scale, f.fill) for f in fitted if f.edges is None]
  shift, scale, fill = np.reshape(of, (-1, 3)).T
  return np.where(np.isnan(y), fill, (y - shift) * scale).astype(np.float32)


def transformed(log: Sequence[bool], raw: np.ndarray) -> np.ndarray:
  """Returns y of x, [k, N]; see Fitted."""
  with np.errstate(invalid="ignore"):
    return np.where(log, np.sign(raw) * np.log1p(np.abs(raw)), raw)


# ---- Buckets


def with_buckets(
  fitted: Sequence[Fitted], feature: np.ndarray, values: pa.Array
) -> tuple[np.ndarray, pa.Array]:
  """Appends the ids of bucketed numbers, "0", "1", ..., to a chunk's values.

  Args:
    fitted: the numbers.
    feature: [V] int16 of the values; the last features are the bucketed ones.
    values: [V] strings.
  """
  counts = [len(f.edges) + 1 for f in fitted if f.edges is not None]
  if not counts:
    return feature, values
  first = feature[-1] + 1 - len(counts)
  own = np.arange(first, first + len(counts), dtype=np.int16)
  names = pa.array([str(i) for n in counts for i in range(n)], pa.string())
  return (
    np.append(feature, np.repeat(own, counts)),
    pa.concat_arrays([values, names]),
  )


def bucketed(
  fitted: Sequence[Fitted], arrays: dict[str, np.ndarray], values: pa.Array
) -> tuple[dict[str, np.ndarray], pa.Array]:
  """Gives a chunk the codes of its bucketed numbers; a missing one keeps its.

  Args:
    fitted: the numbers.
    arrays: of a Chunk; the codes' last columns are those of these numbers.
    values: of the chunk.
  """
  own = [i for i, f in enumerate(fitted) if f.edges is not None]
  if not own:
    return arrays, values
  codes, start = arrays["codes"].copy(), len(values)
  feature, values = with_buckets(fitted, arrays["feature"], values)
  for column, i in enumerate(own, codes.shape[1] - len(own)):
    x = arrays["dense"][:, i]
    bucket = np.searchsorted(fitted[i].edges, x, side="right")
    codes[:, column] = np.where(np.isnan(x), codes[:, column], start + bucket)
    start += len(fitted[i].edges) + 1
  return arrays | {"codes": codes, "feature": feature}, values
