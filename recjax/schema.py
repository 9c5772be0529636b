"""What a log holds and what a model looks up: tables, features, groups.

Dimensions, here and everywhere in recjax:
  B  global batch size          b  local batch size, B / n
  n  devices of the mesh        P  processes
  F  features                   S  lookup columns: the sum of the hotnesses
  R  rows of a group            U  distinct rows of a local batch
  D  dense (numeric) inputs     d  embedding dim
  C  capacity of an exchange buffer, rows a peer and round
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Feature:
  """One categorical input and how it is looked up.

  `hotness` is the longest bag kept; it is also the number of columns of the
  `ids` array that the feature takes. `pooling` is 'sum', 'mean' or 'none'
  (a sequence: one activation a position). A weighted feature has a float32
  weight a lookup; a weighted mean divides by the sum of the weights.
  """

  name: str
  table: str
  hotness: int = 1
  pooling: Literal["sum", "mean", "none"] = "sum"
  weighted: bool = False

  @property
  def activations(self) -> int:
    """Activations of width d that the feature gives a sample."""
    return self.hotness if self.pooling == "none" else 1


@dataclasses.dataclass(frozen=True)
class Schema:
  """The inputs of a sample: D numbers, then the features in column order."""

  dense: tuple[str, ...]
  features: tuple[Feature, ...]

  @property
  def tables(self) -> tuple[str, ...]:
    """Table names, in order of first use."""
    return tuple(dict.fromkeys(f.table for f in self.features))

  @property
  def columns(self) -> int:
    """S, the width of the `ids` array."""
    return sum(f.hotness for f in self.features)

  @property
  def weighted(self) -> bool:
    return any(f.weighted for f in self.features)
