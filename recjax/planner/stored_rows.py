"""Which stored rows the hosts' memory holds, and which are frozen on SSDs.

A frozen row costs what a cold one does, and its page of the SSD read and, in
training, written. The cost of a page grows with the chance that a batch touches
it, so the hosts' memory has the most used of the stored rows. Where several
groups share it, a byte of it is worth most where it saves most pages: rows are
taken by pages saved a byte until the memory is full, which no other choice
beats but for the rows that pad shards.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recjax.plan import layout
from recjax.planner.frequency_buckets import BucketedProfile
from recjax.planner.topology import PAGE_BYTES

_ALL = 1 << 62  # more rows than there are


def pages_of_row(pi: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Pages that a row's bucket has read in a step, over the bucket's rows.

  Rows, and each of their slot variables, lie in a file of their own
  (embedding/host_store.py), in rank order. On average (P + s - gcd(P, s)) / s
  neighbours of s bytes have a part in a page of P bytes. It is read if any of
  them is touched, for which they are taken to be as likely as the row.

  Args:
    pi: [K] the probability that the batch touches a row.
    sizes: bytes of what a row has in each of the files.

  Returns:
    [K] float64.
  """
  with np.errstate(divide="ignore"):  # pi = 1
    untouched = np.log1p(-np.asarray(pi, np.float64))
  pages = np.zeros(len(pi))
  for size in sizes:
    in_page = (PAGE_BYTES + size - math.gcd(PAGE_BYTES, size)) / size
    read = -np.expm1(untouched * in_page)
    pages += read * (size / PAGE_BYTES)
  return pages


class Room(NamedTuple):
  """Rows of a group that all hosts' memories and all their SSDs have room for.

  cold: cold rows that are given; -1: as many as there is room for.
  """

  host: int
  ssd: int = 0
  cold: int = -1

  def cold_rows(self, stored: Any, devices: int) -> Any:
    """Cold rows of so many stored ones: all, or a multiple of the devices.

    The frozen rows then continue the cold ones' cyclic layout.
    """
    if self.cold >= 0:
      most = self.cold // devices * devices
      return np.where(stored <= self.cold, stored, most)
    if not self.ssd:
      return stored
    return np.minimum(stored, most_cold(self.host, devices))

  def fits(self, stored: Any, devices: int) -> Any:
    """Whether so many stored rows find room."""
    cold = self.cold_rows(stored, devices)
    padded = lambda rows: layout.shard_rows(rows, devices) * devices
    return (padded(cold) <= self.host) & (padded(stored - cold) <= self.ssd)

  def cold_end(self, rows: int, warm_end: Any, devices: int) -> Any:
    """The rank where the frozen ones of `rows` rows begin."""
    return warm_end + self.cold_rows(rows - warm_end, devices)


def most_cold(host: int, devices: int) -> int:
  """Cold rows that fill the hosts' memory of `host` rows, shards padded."""
  each = max(int(host), 0) // devices
  return int(layout.most_sharded(_ALL, 0, each, devices))


class Stored(NamedTuple):
  """The stored rows of a group, hottest first, as K buckets of equal rows."""

  count: np.ndarray  # [K] rows
  saved: np.ndarray  # [K] pages that a byte of the hosts' memory saves
  size: int  # bytes of a row

  @property
  def rows(self) -> int:
    """All stored rows."""
    return int(self.count.sum())


def of_group(
  profile: BucketedProfile, pages: np.ndarray, warm_end: int, size: int
) -> Stored:
  """The stored rows of a profile.

  Args:
    profile: of the group.
    pages: [K] read for a frozen row of each bucket.
    warm_end: rank of the first stored row.
    size: bytes of a row.
  """
  count = np.diff(np.maximum(profile.ends, warm_end))
  some = count > 0
  return Stored(count[some], pages[some] / size, size)


def share_out(
  groups: Sequence[Stored], host_bytes: int, devices: int
) -> list[int]:
  """Cold rows of each group in the hosts' memory that they share.

  Args:
    groups: their stored rows.
    host_bytes: of all hosts.
    devices: n; a group whose rows are not all cold has a multiple of it.
  """
  padded = lambda rows: int(layout.shard_rows(rows, devices)) * devices
  if sum(padded(g.rows) * g.size for g in groups) <= host_bytes:
    return [g.rows for g in groups]
  saved = np.concatenate([g.saved for g in groups])
  whose = np.repeat(np.arange(len(groups)), [len(g.count) for g in groups])
  held = np.concatenate([g.count.astype(np.float64) * g.size for g in groups])
  order = np.argsort(-saved, kind="stable")
  before = np.cumsum(held[order]) - held[order]
  taken = np.zeros(len(held))
  taken[order] = np.clip(host_bytes - before, 0, held[order])
  cold = []
  for g, group in enumerate(groups):
    share = int(taken[whose == g].sum())
    cold.append(min(group.rows, most_cold(share // group.size, devices)))
  # What rounding to whole shards leaves, first where the next row saves most.
  left = host_bytes - sum(
    padded(rows) * g.size for rows, g in zip(cold, groups, strict=True)
  )
  for g in sorted(range(len(groups)), key=lambda g: -_next(groups[g], cold[g])):
    group = groups[g]
    room = left // group.size + padded(cold[g])
    more = group.rows
    if padded(more) > room:
      more = min(more, most_cold(room, devices))
    more = max(more, cold[g])
    left -= (padded(more) - padded(cold[g])) * group.size
    cold[g] = more
  return cold


def _next(group: Stored, cold: int) -> float:
  """Pages a byte that the row after `cold` cold ones would save."""
  k = int(np.searchsorted(np.cumsum(group.count), cold, side="right"))
  return float(group.saved[k]) if k < len(group.saved) else -1.0
