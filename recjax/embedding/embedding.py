"""The static part of a model's embedding tables: what lookup and update know.

An `Embedding` is a plan together with what the plan leaves open: which columns
of a batch's ids belong to which group, and how each group's rows are trained.
Nothing in it is an array; a compiled step is a function of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from recjax.embedding.optimizers import Optimizer
from recjax.embedding.row_random import group_seed
from recjax.plan.plan import Group, Plan
from recjax.schema import Feature, columns_of


class EmbeddingGroup(NamedTuple):
  """A group of the plan, with the features that look its tables up."""

  name: str
  group: Group
  features: tuple[Feature, ...]  # in column order
  columns: tuple[slice, ...]  # of the ids, one a feature
  optimizer: Optimizer
  seed: int  # uint32, of first values and stochastic rounding

  @property
  def dim(self) -> int:
    """d, the width of the group's rows."""
    return self.group.dim

  @property
  def lookups(self) -> int:
    """Columns of the group: the lookups of a sample, at most."""
    return sum(f.hotness for f in self.features)

  def take(self, x):  # [b, S] -> [b, lookups]
    """Returns the group's columns of an array of all columns."""
    if self.lookups == x.shape[1]:
      return x
    parts = [x[:, at] for at in _joined(self.columns)]
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

  def put(self, x, mine):  # [b, S], [b, lookups] -> [b, S]
    """Returns an array of all columns with the group's columns replaced."""
    if self.lookups == x.shape[1]:
      return mine
    first = 0
    for at in _joined(self.columns):
      width = at.stop - at.start
      x = x.at[:, at].set(mine[:, first : first + width])
      first += width
    return x


class Embedding(NamedTuple):
  """All groups of a plan, in the plan's order."""

  plan: Plan
  groups: tuple[EmbeddingGroup, ...]
  wire_dtype: Any  # of rows and gradients between devices

  @property
  def features(self) -> tuple[Feature, ...]:
    """All features, group by group."""
    return tuple(f for g in self.groups for f in g.features)

  @property
  def columns(self) -> int:
    """S, the columns of the ids."""
    return sum(g.lookups for g in self.groups)

  @property
  def weighted(self) -> bool:
    """Whether lookups have weights."""
    return any(f.weighted for f in self.features)

  @property
  def visited(self) -> tuple[EmbeddingGroup, ...]:
    """The groups with stored rows, which visit."""
    return tuple(g for g in self.groups if g.group.visitors)

  def group(self, name: str) -> EmbeddingGroup:
    """The group of that name."""
    return next(g for g in self.groups if g.name == name)

  def with_visitors(self, rows: Mapping[str, int]) -> "Embedding":
    """The embedding with room for so many visitors an owner, by group."""
    plan = self.plan.with_visitors(rows)
    groups = tuple(
      g._replace(group=group)
      for g, group in zip(self.groups, plan.groups, strict=True)
    )
    return self._replace(plan=plan, groups=groups)


def make_embedding(
  plan: Plan,
  features: tuple[Feature, ...],
  optimizers: Mapping[str, Optimizer],
  *,
  wire_dtype: Any = np.float32,
  seed: int = 0,
) -> Embedding:
  """Joins a plan with the features that use it.

  Args:
    plan: where the rows live.
    features: in the order of the columns of `ids`; each one's table is in a
      group of the plan.
    optimizers: of the rows, by the group's name.
    wire_dtype: of rows and gradients between devices.
    seed: of first values and stochastic rounding.
  """
  columns = columns_of(features)
  groups = []
  for index, group in enumerate(plan.groups):
    mine = tuple(f for f in features if f.table in group.tables)
    groups.append(
      EmbeddingGroup(
        group.name,
        group,
        mine,
        tuple(columns[f.name] for f in mine),
        optimizers[group.name],
        group_seed(seed, index),
      )
    )
  return Embedding(plan, tuple(groups), jnp.dtype(wire_dtype))


def _joined(slices: tuple[slice, ...]) -> list[slice]:
  """Neighbouring slices as one."""
  found: list[slice] = []
  for s in slices:
    if found and found[-1].stop == s.start:
      found[-1] = slice(found[-1].start, s.stop)
    else:
      found.append(s)
  return found
