"""The route of a batch, made on the host while the device is at another batch.

A route depends on nothing but ids (exchange.py), so the input pipeline can make
it ahead of the step. Where devices are CPUs it should: NumPy sorts 438,272 keys
in 3 ms, XLA:CPU in 22 (AVX-512, one core). A batch then holds

  route   Route of [n, ...] arrays, device by device, sharded like all else

and the step does not sort. Equal to `exchange.route`, array by array:
tests/embedding/test_host_route.py.
"""

from collections.abc import Sequence

import numpy as np

from recjax.embedding import exchange, table_wise
from recjax.embedding.buckets import buckets_of
from recjax.embedding.coalesce import NONE
from recjax.embedding.embedding import Embedding
from recjax.embedding.exchange import Route
from recjax.plan.plan import Plan


def routes(ids: np.ndarray, embedding: Embedding, devices: int) -> Route:
  """Returns the routes of this process's part of a batch, [devices, ...] each.

  Args:
    ids: [devices b, S] int32, positions as `lookup.forward` takes them.
    embedding: whose rows they are.
    devices: of this process, which take b samples each.
  """
  found = [
    route(flat_ids(mine, embedding), embedding.plan)
    for mine in ids.reshape(devices, -1, ids.shape[1])
  ]
  if devices == 1:
    return Route(*(x[None] for x in found[0]))
  return Route(*map(np.stack, zip(*found, strict=True)))


def needed(embedding: Embedding, training: bool) -> bool:
  """Returns whether batches need a route.

  They do not where no row travels, or only in the update, which evaluation does
  not have.
  """
  known = buckets_of(embedding.plan)
  return bool(known.tiers if training else known.sharded)


def flat_ids(ids: np.ndarray, embedding: Embedding) -> list[np.ndarray]:
  """Returns of each group what a device looks up: [L] int32, -1 = none.

  Without the lookups that go to a table's owner. ids [b, S] int32.
  """
  found = []
  for g in embedding.groups:
    mine = ids
    if g.lookups < ids.shape[1]:
      mine = np.concatenate([ids[:, at] for at in g.columns], axis=1)
    if g.group.table_wise:
      there = table_wise.to_owners(mine, g, embedding.plan.devices)
      mine = np.where(there, np.int32(-1), mine)
    found.append(mine.reshape(-1))
  return found


def route(ids: Sequence[np.ndarray], plan: Plan) -> Route:
  """Coalesces a device's lookups of all groups: `exchange.route` in NumPy."""
  buckets, addresses = exchange.addresses_of(ids, plan, np)
  distinct, index = coalesce(addresses)
  distinct = np.append(distinct, NONE)
  starts = np.searchsorted(distinct, buckets_of(plan).bases).astype(np.int32)
  return Route(distinct, starts, buckets, index)


def coalesce(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns what `coalesce.coalesce` does, of [m] int32 keys.

  Sorts `key << 32 | place` as one number, like it.
  """
  m = len(keys)
  wide = keys.astype("<u8")
  wide <<= np.uint64(32)
  wide |= np.arange(m, dtype=np.uint64)
  wide.sort()
  place, key = wide.view("<i4").reshape(m, 2).T
  new = np.empty(m, bool)
  new[:1] = True
  np.not_equal(key[1:], key[:-1], out=new[1:])
  index = np.empty(m, np.int32)
  index[place] = np.cumsum(new, dtype=np.int32) - np.int32(1)
  distinct = np.full(m, NONE)
  found = key[new]
  distinct[: len(found)] = found
  return distinct, index
