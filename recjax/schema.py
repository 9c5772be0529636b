"""What a log holds and what a model looks up: features, tables, groups.

Dimensions, here and everywhere in recjax:
  B  global batch size          b  local batch size, B / n
  n  devices of the mesh        N  nodes, of g devices each
  P  processes                  D  dense (numeric) inputs
  F  features                   S  lookup columns: the sum of the hotnesses
  h  activations of a feature   d  embedding dim of a feature or group
  R  rows of a group            U  distinct rows of a local batch
  L  lookups of a local batch   C  capacity of an exchange buffer, rows a peer
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

Pooling = Literal["sum", "mean", "none"]  # of a bag's rows; none = a sequence
NODE, DEVICE = AXES = ("node", "device")  # the mesh's axes, outer first


@dataclasses.dataclass(frozen=True)
class Feature:
  """One categorical input and how it is looked up.

  `hotness` is the longest bag kept: of a longer one the first ids count, the
  others are dropped. It is also the number of columns of the `ids` array that
  the feature takes. `pooling` is 'sum', 'mean' or 'none'
  (a sequence: one activation a position). A weighted feature has a float32
  weight a lookup; a weighted mean divides by the sum of the weights.
  """

  name: str
  table: str
  hotness: int = 1
  pooling: Pooling = "sum"
  weighted: bool = False

  def __post_init__(self):
    """Raises ValueError for a pooling or hotness that there is not."""
    if self.pooling not in get_args(Pooling):
      raise ValueError(
        f"feature {self.name!r}: pooling {self.pooling!r} found, one of "
        f"{', '.join(get_args(Pooling))} expected"
      )
    if self.hotness < 1:
      raise ValueError(
        f"feature {self.name!r}: hotness {self.hotness} found, at least 1 "
        "expected"
      )

  @property
  def activations(self) -> int:
    """h, activations of width d that the feature gives a sample."""
    return self.hotness if self.pooling == "none" else 1


def columns_of(features: Iterable[Feature]) -> dict[str, slice]:
  """Returns each feature's columns of the `ids` array, by its name."""
  found, at = {}, 0
  for f in features:
    found[f.name] = slice(at, at + f.hotness)
    at += f.hotness
  return found


def activations_of(features: Iterable[Feature]) -> dict[str, slice]:
  """Returns each feature's place among all A activations, by its name."""
  found, at = {}, 0
  for f in features:
    found[f.name] = slice(at, at + f.activations)
    at += f.activations
  return found


@dataclasses.dataclass(frozen=True)
class Schema:
  """The inputs of a sample: D numbers, then the features in column order."""

  dense: tuple[str, ...]
  features: tuple[Feature, ...]
  labels: tuple[str, ...] = ("label",)  # K; a model learns the first
  sample_weighted: bool = False  # whether samples have weights

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
    """Whether lookups have weights."""
    return any(f.weighted for f in self.features)


@dataclasses.dataclass(frozen=True)
class TableSpec:
  """How a table's rows are stored and trained."""

  name: str
  dim: int
  dtype: str = "float32"  # or "bfloat16"
  optimizer: str = "rowwise_adagrad"  # of embedding/optimizers.py
  learning_rate: float = 0.02


@dataclasses.dataclass(frozen=True)
class TableGroup:
  """Tables of the same dim, dtype and optimizer: they share a row space."""

  name: str
  tables: tuple[str, ...]
  dim: int
  dtype: str
  optimizer: str
  learning_rate: float


def groups_of(specs: Iterable[TableSpec]) -> tuple[TableGroup, ...]:
  """The tables in groups, in the order of each group's first table."""
  members: dict[tuple, list[str]] = {}
  for s in specs:
    key = (s.dim, s.dtype, s.optimizer, s.learning_rate)
    members.setdefault(key, []).append(s.name)
  kinds = [key[:3] for key in members]
  groups = []
  for key, tables in members.items():
    dim, dtype, optimizer, rate = key
    name = f"{optimizer}_{dtype}_{dim}"
    if kinds.count(key[:3]) > 1:  # they differ in the learning rate alone
      name += f"_{rate:g}"
    groups.append(TableGroup(name, tuple(tables), *key))
  return tuple(groups)
