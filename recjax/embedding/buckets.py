"""Where the rows that travel stand: one order of (tier, owner, local row).

A bucket is an owner's rows of a tier, of any group. Bucket after bucket, group
after group, their rows are numbered: a row's number is its address. A sorted
list of addresses is therefore bucketed already, for all groups at once. The
replicas of a group have a bucket too where their touched gradients are
gathered; where all are reduced, they have none, and none travels.
"""

import functools
from typing import NamedTuple

import numpy as np

from recjax.embedding.coalesce import NONE
from recjax.errors import UserError
from recjax.plan.plan import Plan, Tier
from recjax.schema import DEVICE


class TierBuckets(NamedTuple):
  """A tier's buckets, neighbours in the order of all; all of it static."""

  group: int  # index in the plan
  tier: Tier
  first: int  # bucket
  base: int  # address of its first row
  buffer: int  # where its rows begin in a round's buffer of the group

  @property
  def count(self) -> int:
    """Buckets of the tier: its owners, 1 for replicas."""
    return self.tier.owners

  @property
  def rows(self) -> int:
    """Rows of its part of a round's buffer."""
    return self.count * self.tier.capacity

  @property
  def united(self) -> bool:
    """Whether a node's devices unite what they ask of the owners."""
    return self.tier.node_capacity > 0

  def asked_nodes(self, plan: Plan) -> int:
    """Nodes whose owners a proxy asks: N; 1 where every node has a copy."""
    return 1 if self.tier.axes == (DEVICE,) else plan.nodes


class Buckets(NamedTuple):
  """All Z buckets of a plan."""

  tiers: tuple[TierBuckets, ...]
  bases: np.ndarray  # [Z + 1] int32: first address of each bucket, and the end
  capacity: np.ndarray  # [Z] int32, rows of a round
  buffer: np.ndarray  # [Z] int32, where it begins in its group's buffer
  sizes: tuple[int, ...]  # rows of a round's buffer, a group

  @property
  def sharded(self) -> tuple[TierBuckets, ...]:
    """The tiers whose rows have owners."""
    return tuple(t for t in self.tiers if t.tier.axes)

  def of_group(self, group: int) -> tuple[TierBuckets, ...]:
    """The tiers of a group that travel."""
    return tuple(t for t in self.tiers if t.group == group)

  def gathered(self, group: int) -> TierBuckets | None:
    """The group's replicas, where their touched gradients are gathered."""
    return next((t for t in self.of_group(group) if not t.tier.axes), None)


@functools.cache
def buckets_of(plan: Plan) -> Buckets:
  """Returns the buckets of a plan, in the order of addresses.

  Raises:
    UserError: there are more rows than addresses.
  """
  tiers: list[TierBuckets] = []
  sizes = []
  count = base = 0
  for index, group in enumerate(plan.groups):
    travelling = [*group.sharded]
    if group.hot and group.hot_sync == "all_gather":
      travelling.append(group.hot)
    size = 0
    for tier in travelling:
      tiers.append(TierBuckets(index, tier, count, base, size))
      count += tier.owners
      base += tier.owners * tier.shard_rows
      size += tier.owners * tier.capacity
    sizes.append(size)
  if base >= NONE:
    raise UserError(
      f"the tables have {base:,} rows with the padding of their shards; a step "
      f"can address {NONE:,}. Raise --config.data.min_count"
    )
  none = np.zeros(0, np.int32)
  joined = lambda parts: np.concatenate([none, *parts]).astype(np.int32)
  of_owner = lambda t, first, size: first + np.arange(t.count) * size
  return Buckets(
    tuple(tiers),
    joined([*(of_owner(t, t.base, t.tier.shard_rows) for t in tiers), [base]]),
    joined(np.full(t.count, t.tier.capacity) for t in tiers),
    joined(of_owner(t, t.buffer, t.tier.capacity) for t in tiers),
    tuple(sizes),
  )
