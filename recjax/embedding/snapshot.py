"""Records as they were at one moment, while they are written over.

A save reads the records of the host store in ascending order; training goes on
and writes into them. What is about to be written and was not read yet is first
put aside, once (copy on write). The space for that is bounded: where it is
full, writers wait until the reader has got that far.

Records are in rank order, so the most used ones are read first, and what
training puts aside most often is soon no longer needed.
"""

import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

from recjax.embedding.optimizers import TierArrays

_SCAN = 1 << 20  # records at a time


class Bits:
  """A set of records, one bit each."""

  def __init__(self, records: int):
    """Begins empty; records: of the store."""
    self._bytes = np.zeros(-(-records // 8), np.uint8)

  def add(self, records: np.ndarray) -> None:
    """Adds records, ascending [v]."""
    if len(records):
      at, bit = records >> 3, (1 << (records & 7)).astype(np.uint8)
      starts = np.flatnonzero(np.diff(at, prepend=-1))
      self._bytes[at[starts]] |= np.bitwise_or.reduceat(bit, starts)

  def has(self, records: np.ndarray) -> np.ndarray:
    """Returns which of the records [v] are in it: [v] bool."""
    return (self._bytes[records >> 3] >> (records & 7) & 1).astype(bool)

  def members(self, first: int, stop: int) -> np.ndarray:
    """Returns those of [first, stop), ascending int64."""
    start = first // 8 * 8
    found = np.unpackbits(
      self._bytes[first // 8 : -(-stop // 8)], bitorder="little"
    )
    return np.flatnonzero(found[first - start : stop - start]) + first

  def count(self, first: int, stop: int) -> int:
    """Returns how many of [first, stop) are in it."""
    return sum(
      len(self.members(at, min(at + _SCAN, stop)))
      for at in range(first, stop, _SCAN)
    )

  def batches(self, first: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """Yields the members of [first, stop), `size` at a time, the last fewer."""
    left = np.arange(0)
    for at in range(first, stop, _SCAN):
      more = self.members(at, min(at + _SCAN, stop))
      left = np.concatenate([left, more])
      while len(left) >= size:
        yield left[:size]
        left = left[size:]
    if len(left):
      yield left

  def copy(self) -> "Bits":
    """Returns the same set, which no longer changes with this one."""
    other = Bits(0)
    other._bytes = self._bytes.copy()
    return other


class Snapshot:
  """The records of a store as they are when it is made; read once, ascending.

  Extra memory: what is put aside, and a bit a record.
  """

  def __init__(
    self,
    copy: Callable[[np.ndarray], TierArrays],
    records: int,
    nbytes: int,
    wanted: Bits | None = None,
  ):
    """Begins; from now on `keep` must be called before records are written.

    Args:
      copy: returns a copy of records, ascending [v], of the store.
      records: in the store.
      nbytes: to put records aside; room for one at least.
      wanted: which records will be read, if not all.
    """
    self._copy, self._records, self.wanted = copy, records, wanted
    none = copy(np.arange(0))
    sizes = [np.prod(x.shape[1:]) * x.itemsize for x in jax.tree.leaves(none)]
    width = int(sum(sizes))
    room = max(1, min(nbytes // (width + 16), records))
    self._aside = Bits(records)  # those put aside at any time
    self._lock = threading.Condition()
    self._read = 0  # records below it were read
    self._closed = False
    self._at = np.full(room, -1)  # which record lies where, -1 = none
    self._free, self._left = np.arange(room), room  # places; the first `left`
    self._values = jax.tree.map(
      lambda x: np.empty((room, *x.shape[1:]), x.dtype), none
    )
    self.kept = 0  # records put aside so far
    self.waits = 0  # times that a writer found no room

  def keep(self, records: np.ndarray) -> None:
    """Puts records [v], ascending, aside before they are written.

    Waits while there is no room. Threads may call it at once, for different
    records.
    """
    with self._lock:
      while len(todo := self._needed(records)):
        if not self._left:
          self.waits += 1
          self._lock.wait()
          continue
        now = todo[: self._left]
        self._left -= len(now)
        places = self._free[self._left : self._left + len(now)]
        values = self._copy(now)
        jax.tree.map(
          lambda x, y, at=places: x.__setitem__(at, y), self._values, values
        )
        self._at[places] = now
        self._aside.add(now)
        self.kept += len(now)

  def _needed(self, records: np.ndarray) -> np.ndarray:
    """Returns those that are to be read yet and are not aside."""
    if self._closed:
      return records[:0]
    later = records[np.searchsorted(records, self._read) :]
    if self.wanted is not None:
      later = later[self.wanted.has(later)]
    return later[~self._aside.has(later)]

  def read(self, records: np.ndarray) -> TierArrays:
    """Returns records [v], ascending, and past those that were read before.

    Raises:
      ValueError: it is closed.
    """
    # Of what is written meanwhile, the old value was put aside before.
    found = self._copy(records)
    first, stop = int(records[0]), int(records[-1]) + 1
    with self._lock:
      if self._closed:
        raise ValueError("the snapshot of the host store is closed")
      mine = np.flatnonzero((self._at >= first) & (self._at < stop))
      to = np.searchsorted(records, self._at[mine])
      jax.tree.map(lambda x, y: x.__setitem__(to, y[mine]), found, self._values)
      self._at[mine] = -1
      self._free[self._left : self._left + len(mine)] = mine
      self._left += len(mine)
      self._read = stop
      self._lock.notify_all()
    return found

  def close(self) -> None:
    """Ends it: nobody waits any more, and nothing is put aside."""
    with self._lock:
      self._closed = True
      self._values = jax.tree.map(lambda x: x[:0], self._copy(np.arange(0)))
      self._at, self._aside = self._at[:0], Bits(0)
      self._lock.notify_all()
