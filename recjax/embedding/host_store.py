"""The host store: stored rows in this host's memory, or in files on its SSD.

It holds the cold and the frozen rows of the owners that this process has, with
their slot variables, in NumPy arrays that host threads read and write in
place. Rows are in rank order, so that neighbours in frequency share pages: row
l of the k-th of m owners is record l m + k.

All reads and writes are jobs of one queue, and run one after the other in the
order in which they were given; the threads of a pool share a job's rows out.
"""

import functools
import itertools
import mmap
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recjax.embedding.coalesce import NONE
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.row_random import initial_rows
from recjax.embedding.snapshot import Bits, Snapshot
from recjax.errors import UserError
from recjax.plan.plan import Tier

# Of the pool at most: enough to fill a host's memory channels, and to wait for
# an SSD's pages side by side.
_THREADS = 8
_LEAST_ROWS = 8192  # of a thread's share of a job, in memory
_LEAST_IN_FILES = 64  # which a thread waits for, not works at
_BLOCK_BYTES = 16 << 20  # of rows that are made or summed at a time


class StoredRows:
  """A group's stored rows of this process's owners, as records in rank order.

  Attributes:
    first: position of the group's first stored row.
    owners: of the rows on this process, ascending.
    devices: n, of all owners.
    records: in all parts.
    parts: their arrays [records, d] or [records] of NumPy, of cold rows in
      memory and of frozen ones in mapped files.
  """

  def __init__(self, g: EmbeddingGroup, owners: Sequence[int], directory: str):
    """Makes the arrays, whose values are not set.

    Raises:
      UserError: no room, or more rows than an owner can count.
    """
    stored = g.group.stored
    self.first, self.devices = stored[0].first, stored[0].owners
    self.owners, self.name = tuple(owners), g.name
    self._last = g.group.rows - self.first  # stored rows of all owners
    if sum(t.shard_rows for t in stored) * self.devices >= NONE:
      raise UserError(
        f"group {g.name} stores {self._last:,} rows, {NONE:,} are the most. "
        "Raise --config.data.min_count"
      )
    counts = [-(-t.rows // t.owners) * len(owners) for t in stored]
    self._starts = np.cumsum([0, *counts])
    self._tiers = stored
    self.parts = tuple(
      _arrays(g, tier, count, directory)
      for tier, count in zip(stored, counts, strict=True)
    )
    self._views = [jax.tree.map(_as_records, part) for part in self.parts]
    self._lock = threading.Lock()
    self._snapshot: Snapshot | None = None
    self.written: Bits | None = None  # since the last full save; None = unknown

  @property
  def records(self) -> int:
    """Rows of all parts, the padding of the last local row included."""
    return int(self._starts[-1])

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(self.parts))

  def tiers(self) -> list[tuple[Tier, int, int]]:
    """Returns (a tier, its first record, one past its last) of each."""
    starts = [int(x) for x in self._starts]
    return list(zip(self._tiers, starts[:-1], starts[1:], strict=True))

  def records_of(self, k: int, local: np.ndarray) -> np.ndarray:
    """Returns the records of the k-th owner's local rows [v] int32."""
    return local.astype(np.int64) * len(self.owners) + k

  def positions(self, records: np.ndarray) -> np.ndarray:
    """Returns the positions of records in the group; [m] int64."""
    local, k = np.divmod(records, len(self.owners))
    return self.first + local * self.devices + np.asarray(self.owners)[k]

  def records_at(self, positions: np.ndarray) -> np.ndarray:
    """Returns the records of those positions that this process owns.

    The inverse of `positions`; ascending [m] int64.
    """
    local, owner = np.divmod(positions - self.first, self.devices)
    owners = np.asarray(self.owners)
    k = np.minimum(np.searchsorted(owners, owner), len(owners) - 1)
    mine = owners[k] == owner
    return np.sort(local[mine].astype(np.int64) * len(owners) + k[mine])

  def holds_row(self, records: np.ndarray) -> np.ndarray:
    """Returns which records are rows, not padding: [m] bool."""
    return self.positions(records) < self.first + self._last

  def read(self, records: np.ndarray, out: TierArrays) -> None:
    """Copies records, ascending [v], into the first v rows of `out`."""
    for part, at, to in self._split(records):
      jax.tree.map(
        lambda x, y, at=at, to=to: np.take(
          x, at, out=_as_records(y)[to], mode="clip"
        ),
        part,
        out,
      )

  def write(self, records: np.ndarray, values: TierArrays) -> None:
    """Sets records, ascending [v], to the first v rows of `values`.

    Waits where a save is under way and has no room for their old values.
    """
    if self.written is not None:
      with self._lock:  # records of two threads may share a byte
        self.written.add(records)
    if self._snapshot is not None:
      self._snapshot.keep(records)
    for part, at, to in self._split(records):
      jax.tree.map(lambda x, y, at=at, to=to: _put(x, at, y[to]), part, values)

  def write_rows(self, records: np.ndarray, rows: np.ndarray) -> None:
    """Sets the rows alone, not the slot variables."""
    for part, at, to in self._split(records):
      _put(part.rows, at, rows[to])

  def _split(self, records: np.ndarray) -> Iterator[tuple[Any, Any, slice]]:
    """Yields (a part's views, places in it, slice of the records)."""
    cuts = np.searchsorted(records, self._starts)
    for view, start, a, b in zip(
      self._views, self._starts, cuts[:-1], cuts[1:], strict=False
    ):
      if a < b:
        yield view, records[a:b] - start, slice(a, b)

  def blocks(self, width: int) -> Iterator[tuple[int, int]]:
    """Yields (first, stop) of records in turn, `width` bytes a record."""
    step = max(1, _BLOCK_BYTES // width)
    for first in range(0, self.records, step):
      yield first, min(first + step, self.records)

  def block(self, first: int, stop: int) -> TierArrays:
    """Returns a copy of the records [first, stop)."""
    found = [
      jax.tree.map(
        lambda x, s=s: _read_ahead(x[max(0, first - s) : max(0, stop - s)]),
        part,
      )
      for part, s in zip(self.parts, self._starts, strict=False)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *found)

  def copy(self, records: np.ndarray) -> TierArrays:
    """Returns a copy of records, ascending [v]."""
    first = int(records[0]) if len(records) else 0
    if not len(records) or records[-1] - first + 1 == len(records):
      return self.block(first, first + len(records))
    make = lambda x: np.empty((len(records), *x.shape[1:]), x.dtype)
    out = jax.tree.map(make, self.parts[0])
    self.read(records, out)
    return out

  def snapshot(self, nbytes: int, *, changed: bool, follow: bool) -> Snapshot:
    """Begins a snapshot; there must be none, and nobody writing.

    Args:
      nbytes: to put records aside.
      changed: whether only records written since the last full one are wanted.
      follow: whether it is a full one, and what is written from now on will be
        asked for.
    """
    wanted = None
    if changed:
      assert self.written is not None
      wanted = self.written.copy()
    else:
      self.written = Bits(self.records) if follow else None
    self._snapshot = Snapshot(self.copy, self.records, nbytes, wanted)
    return self._snapshot


def _as_records(x: np.ndarray) -> np.ndarray:  # [m, ...] -> [m] void
  """Views rows as single items: NumPy takes and puts those fastest."""
  width = x.dtype.itemsize * int(np.prod(x.shape[1:]))
  return x.view(np.uint8).reshape(len(x), width).view(f"V{width}")[:, 0]


def _put(view, at, values):
  np.put(view, at, _as_records(np.ascontiguousarray(values)), mode="clip")


def _arrays(g: EmbeddingGroup, tier: Tier, records: int, directory: str):
  """Makes the arrays of a tier: rows, and slot variables of zeros."""
  try:
    make = np.zeros if tier.memory == "host" else _mapped(directory)
    slots = {
      name: make((records, g.dim) if wide else (records,), np.float32)
      for name, wide in g.optimizer.slots.items()
    }
    rows = make((records, g.dim), jnp.dtype(g.group.dtype))
    return TierArrays(rows, slots)
  except (MemoryError, OSError) as e:
    field, where = "plan.host_memory_mb", "this host's memory"
    if tier.memory != "host":
      field, where = "plan.ssd_memory_mb", f"plan.host_store_dir={directory}"
    raise UserError(
      f"{field}: no room for {records:,} {tier.name} rows of group {g.name} in "
      f"{where} ({e.strerror if isinstance(e, OSError) else e}); set "
      f"--config.{field} to what it has"
    ) from e


def _mapped(directory: str) -> Callable[[Any, Any], np.ndarray]:
  """Returns a maker of zeros in a mapped file, which ends with the process."""

  def make(shape, dtype) -> np.ndarray:
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # Without a name from the start: nothing is left behind, however it ends.
    with tempfile.TemporaryFile(dir=directory) as f:
      os.posix_fallocate(f.fileno(), 0, size)  # or an error now, not a signal
      whole = mmap.mmap(f.fileno(), size)
    whole.madvise(mmap.MADV_RANDOM)  # neighbours of a row are seldom asked for
    return np.frombuffer(whole, dtype).reshape(shape)

  return make


def _read_ahead(x: np.ndarray) -> np.ndarray:
  """Lets the kernel read all of a slice at once, if it is of a file."""
  whole = x.base
  while isinstance(whole, np.ndarray):
    whole = whole.base
  whole = whole.obj if isinstance(whole, memoryview) else None
  if isinstance(whole, mmap.mmap) and x.nbytes:
    address = lambda array: array.__array_interface__["data"][0]
    start = address(x) - address(np.frombuffer(whole, np.uint8))
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    whole.madvise(mmap.MADV_WILLNEED, first, start + x.nbytes - first)
  return x


class FullSave(NamedTuple):
  """The last full save of a store, to which later ones may refer."""

  directory: str
  step: int
  since: int  # later saves that refer to it


class HostStore:
  """The stored rows of all groups, and the queue of jobs on them."""

  def __init__(
    self,
    embedding: Embedding,
    owners: Sequence[int],
    directory: str = "",
    delay: Callable[[], None] | None = None,
  ):
    """Makes the store; `fill` or `init` sets its values.

    Args:
      embedding: whose stored rows they are.
      owners: places of this process's devices in the mesh.
      directory: of mapped files.
      delay: called before each job; for tests and experiments.

    Raises:
      UserError: no room.
    """
    self.groups = {
      g.name: StoredRows(g, owners, directory) for g in embedding.visited
    }
    tiers = [t for g in embedding.visited for t in g.group.stored]
    threads, self._least_rows = _THREADS, _LEAST_IN_FILES
    if not any(t.memory == "ssd" for t in tiers):
      threads, self._least_rows = min(threads, os.cpu_count() or 1), _LEAST_ROWS
    self._pool = ThreadPoolExecutor(threads, "recjax-store")
    self._queue = ThreadPoolExecutor(1, "recjax-store-queue")
    self._threads, self._delay = threads, delay
    self._writes: list[Future] = []
    self.version = 0  # counts how often all rows were replaced
    self.full: FullSave | None = None  # all groups know what was written since

  def submit(self, job: Callable[[], Any]) -> Future:
    """Puts a job at the end of the queue; returns the future of its result."""

    def run():
      if self._delay is not None:
        self._delay()
      return job()

    return self._queue.submit(run)

  def write(self, job: Callable[[], Any]) -> None:
    """Puts a job that writes at the end of the queue.

    Raises what an earlier one has raised.
    """
    for f in self._writes:
      if f.done():
        f.result()
    self._writes = [f for f in self._writes if not f.done()]
    self._writes.append(self.submit(job))

  def flush(self) -> None:
    """Waits for all writes; raises what one of them has raised."""
    for f in self._writes:
      f.result()
    self._writes = []

  def snapshot(
    self, nbytes: int, *, changed: bool, follow: bool
  ) -> dict[str, Snapshot]:
    """Begins a snapshot of every group, of what was written so far.

    Args:
      nbytes: to put records aside, of all groups together.
      changed, follow: see `StoredRows.snapshot`.
    """
    self.flush()
    total = sum(of.nbytes for of in self.groups.values())
    return {
      name: of.snapshot(
        nbytes * of.nbytes // total, changed=changed, follow=follow
      )
      for name, of in self.groups.items()
    }

  def close(self) -> None:
    """Ends the threads, after the jobs that were given."""
    self._queue.shutdown()
    self._pool.shutdown()

  def spread(self, f: Callable[[slice], None], rows: int) -> None:
    """Runs f on slices of so many rows, on the threads of the pool."""
    parts = max(1, min(self._threads, rows // self._least_rows))
    ends = np.linspace(0, rows, parts + 1).astype(int)
    slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
    if parts == 1:
      f(slices[0])
    else:
      list(self._pool.map(f, slices))  # raises what f raises


# ---- First values


def init(store: HostStore, embedding: Embedding, scale: float) -> None:
  """Sets rows uniform in +-scale by (seed, rank, column), as `tables.init`.

  Slot variables are 0 as they were made.
  """
  for g in embedding.visited:
    stored = store.groups[g.name]
    ahead = g.group.first_rank(g.group.stored[0]) - stored.first
    rows = stored.parts[0].rows
    for first, stop in stored.blocks(rows.itemsize * g.dim):
      at = np.arange(first, stop)
      ranks = (stored.positions(at) + ahead).astype(np.int32)
      made = first_rows(g.dim, scale, rows.dtype)(ranks, np.uint32(g.seed))
      stored.write_rows(at, np.asarray(made))


@functools.cache
def first_rows(dim: int, scale: float, dtype: np.dtype):
  """Returns the jitted (ranks [k] int32, seed uint32) -> rows [k, d]."""
  return jax.jit(
    lambda ranks, seed: initial_rows(ranks, dim, scale, seed).astype(dtype)
  )
