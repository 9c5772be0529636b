"""The stored rows of a checkpoint: every process writes its own, by blocks.

The item `stored` of a step's folder holds cold and frozen rows. Of a full save,
each of a tier's arrays is an array of zarr `GROUP.TIER.ARRAY/` [local rows, n,
d] in rank order, not compressed, whose chunks hold rows of one process's
owners: no process writes into another's files. A differential save holds the
rows that were written since the last full one, which it needs to be restored:
`GROUP.TIER.ARRAY.P/` [k, d] of process P, and their places in the tier
`GROUP.TIER.at.P/` [k] int32. `part.P.json` has the checksums of what process P
has written, and its numbers of rows k.

The store is written while training goes on, from a snapshot of it
(embedding/snapshot.py).
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from recjax.embedding.host_store import FullSave, HostStore, StoredRows
from recjax.embedding.snapshot import Snapshot
from recjax.errors import UserError
from recjax.plan.plan import Tier
from recjax.training.checkpoint_reader import AT
from recjax.training.finite import Refusal
from recjax.training.row_checks import (
  NONE,
  NotFiniteError,
  first_not_finite,
  sum_of_rows,
)

BLOCK_BYTES = 16 << 20  # rows and slot variables that are written at a time
ASIDE_BYTES = 256 << 20  # old values of rows that were written meanwhile
_IN_FLIGHT = 4  # blocks


# ---- As an item of Orbax's step


class StoredHandler(ocp.AsyncCheckpointHandler):
  """Lets a thread write the item into the folder that Orbax will rename."""

  async def async_save(self, directory, *args: Any, **kwargs: Any):
    """Starts to write; returns [the future of its end]."""
    del args
    return [kwargs["args"].begin(pathlib.Path(directory))]

  def save(self, directory, *args: Any, **kwargs: Any):
    """Writes; returns when all of this process's is written."""
    del args
    kwargs["args"].begin(pathlib.Path(directory)).result()

  def restore(self, directory, *args: Any, **kwargs: Any):
    """Raises NotImplementedError: checkpoint_reader.py reads it by blocks."""
    raise NotImplementedError


@ocp.args.register_with_handler(StoredHandler, for_save=True)
@dataclasses.dataclass
class StoredSave(ocp.args.CheckpointArgs):
  """What `StoredHandler` saves: a store, as its snapshots have it."""

  store: HostStore
  snapshots: dict[str, Snapshot]
  of: str  # which checkpoint, in words
  refusal: Refusal

  def begin(self, folder: pathlib.Path) -> Future:
    """Starts to write into a folder; returns the future of the end."""

    def run():
      try:
        write(folder, self.store, self.snapshots)
      except NotFiniteError as e:
        raise self.refusal.of_row(e) from e
      except Exception as e:
        line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
          f"{self.of} cannot be saved: {line[:300]}. Make room there, and "
          "start again: the run goes on from the checkpoint before"
        ) from e
      finally:
        self.close()

    threads = ThreadPoolExecutor(1, "recjax-save")
    future = threads.submit(run)
    threads.shutdown(wait=False)
    return future

  def close(self) -> None:
    """Ends the snapshots, whatever was written."""
    for snapshot in self.snapshots.values():
      snapshot.close()


@ocp.args.register_with_handler(StoredHandler, for_restore=True)
@dataclasses.dataclass
class StoredRestore(ocp.args.CheckpointArgs):
  """Nothing: Orbax wants a name for it."""


# ---- Writing


def make_save(
  store: HostStore,
  directory: str,
  step: int,
  every: int,
  refusal: Refusal,
) -> tuple[StoredSave, dict]:
  """Takes a snapshot of the store, and returns what writes it.

  Training may go on at once. While the save is under way this process holds,
  beside its stored rows, `ASIDE_BYTES` of old values at most, some blocks and
  two bits a row; where that is not enough, whoever writes into the store waits.

  Args:
    store: to save; what was given to it to write is waited for.
    directory: of the checkpoints.
    step: whose state it holds.
    every: how many saves there are for each full one; the others hold the rows
      written since it alone.
    refusal: what the error says where a row is not finite.

  Returns:
    (the item, what `meta` must say of it).
  """
  full = store.full
  if full and full.directory == directory and full.since + 1 < every:
    full = full._replace(since=full.since + 1)
  else:
    full = FullSave(directory, step, 0)
  changed = full.step != step
  snapshots = store.snapshot(ASIDE_BYTES, changed=changed, follow=every > 1)
  store.full = full if every > 1 else None
  about = {
    "processes": jax.process_count(),
    "full": full.step,
    "since": full.since,
  }
  name = f"checkpoint {step} in {directory}"
  return StoredSave(store, snapshots, name, refusal), about


def write(
  folder: pathlib.Path, store: HostStore, snapshots: dict[str, Snapshot]
) -> None:
  """Writes this process's rows of all groups, and their checksums.

  Raises:
    NotFiniteError: a row has an infinity or a NaN.
  """
  writer = _Writer(folder)
  for name, stored in store.groups.items():
    for tier, first, stop in stored.tiers():
      part = _Tier(f"{name}.{tier.name}", tier, stored, first, stop)
      if snapshots[name].wanted is None:
        _write_all(writer, part, snapshots[name])
      else:
        _write_changed(writer, part, snapshots[name])
  writer.finish()


class _Tier(NamedTuple):
  """A tier's records [first, stop) of a group's stored rows."""

  key: str  # group.tier
  tier: Tier
  stored: StoredRows
  first: int
  stop: int

  @property
  def shapes(self) -> list[tuple[str, np.ndarray]]:
    """Its arrays by name, without any record."""
    return list(_named(self.stored.block(0, 0)))

  def block(self, records: int) -> int:
    """Returns how many records are written at a time, as whole local rows.

    Blocks share `records` evenly: a chunk of zarr is as long on disk as any
    other, the last one too.
    """
    sizes = [np.prod(x.shape[1:]) * x.itemsize for _, x in self.shapes]
    m = len(self.stored.owners)
    most = max(1, BLOCK_BYTES // (m * int(sum(sizes))))  # local rows
    local = -(-records // m)
    return m * -(-local // -(-local // most))


def _write_all(writer: "_Writer", part: _Tier, snapshot: Snapshot) -> None:
  """Writes all rows of a tier into its arrays, which processes share."""
  stored, k = part.stored, part.stored.owners[0]
  m, n = len(stored.owners), stored.devices
  local = (part.stop - part.first) // m
  step = part.block(local * m) // m
  arrays = {
    name: _open(
      writer.folder / f"{part.key}.{name}",
      ((local, n, *x.shape[1:]), (step, m, *x.shape[1:]), x.dtype),
      jax.process_index() == 0,
    )
    for name, x in part.shapes
  }
  for at in range(0, local, step):
    rows = min(step, local - at)
    records = np.arange(rows * m) + part.first + at * m
    held, positions = stored.holds_row(records), stored.positions(records)
    for name, x in _named(snapshot.read(records)):
      some = (x, positions) if held.all() else (x[held], positions[held])
      writer.add_rows(part, name, *some)
      place = arrays[name][at : at + rows, k : k + m]
      writer.put(place, x.reshape(rows, m, *x.shape[1:]))


def _write_changed(writer: "_Writer", part: _Tier, snapshot: Snapshot) -> None:
  """Writes a tier's rows that changed, into arrays of this process."""
  wanted, stored = snapshot.wanted, part.stored
  assert wanted is not None
  count = wanted.count(part.first, part.stop)
  writer.rows[part.key] = count
  if not count:
    return
  step = min(count, part.block(count))
  shapes = [(AT, np.zeros(0, np.int32)), *part.shapes]
  arrays = {
    name: _open(
      writer.folder / f"{part.key}.{name}.{jax.process_index()}",
      ((count, *x.shape[1:]), (step, *x.shape[1:]), x.dtype),
      True,
    )
    for name, x in shapes
  }
  done = 0
  for records in wanted.batches(part.first, part.stop, step):
    positions = stored.positions(records)
    at = (positions - part.tier.first).astype(np.int32)
    writer.add(f"{part.key}.{AT}", at, np.arange(done, done + len(at)))
    values = dict(_named(snapshot.read(records)))
    for name, x in values.items():
      writer.add_rows(part, name, x, positions)
    for name, x in ({AT: at} | values).items():
      writer.put(arrays[name][done : done + len(x)], x)
    done += len(records)


def _named(arrays) -> Iterator[tuple[str, np.ndarray]]:
  yield "rows", arrays.rows
  yield from arrays.slots.items()


def _open(path: pathlib.Path, metadata, make: bool) -> ts.TensorStore:
  """Makes an array to write, or opens one that another process makes.

  metadata: (shape, chunk, dtype).
  """
  shape, chunk, dtype = metadata
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": f"{path}/"},
    "metadata": {"shape": shape, "chunks": chunk, "compressor": None},
    "store_data_equal_to_fill_value": True,
  }
  return ts.open(
    spec,
    dtype=ts.dtype(dtype.name),
    create=make,
    open=not make,
    assume_metadata=not make,
  ).result()


class _Writer:
  """Writes arrays of a folder, a few blocks at a time, and checksums."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.rows: dict[str, int] = {}  # that changed, of a tier
    self._sums: dict[str, int] = {}
    self._pending: collections.deque = collections.deque()

  def add(self, key: str, x: np.ndarray, at: np.ndarray) -> None:
    """Adds rows x [m, ...] at positions [m] to the checksum of that name."""
    total = self._sums.get(key, 0) + sum_of_rows(x, at)
    self._sums[key] = total & 0xFFFFFFFF

  def add_rows(
    self, part: _Tier, name: str, x: np.ndarray, at: np.ndarray
  ) -> None:
    """Adds rows of a tier's array to its checksum.

    Raises:
      NotFiniteError: one of them has an infinity or a NaN.
    """
    bad = first_not_finite(x, at)
    if bad != NONE:
      raise NotFiniteError(part.stored.name, name, bad)
    self.add(f"{part.key}.{name}", x, at)

  def put(self, place: ts.TensorStore, x: np.ndarray) -> None:
    """Starts to write; waits while too much is under way."""
    self._pending.append((place.write(x), x.nbytes))
    while sum(size for _, size in self._pending) > _IN_FLIGHT * BLOCK_BYTES:
      self._pending.popleft()[0].result()

  def finish(self) -> None:
    """Waits until all is written, and writes the checksums."""
    for future, _ in self._pending:
      future.result()
    part = self.folder / f"part.{jax.process_index()}.json"
    part.write_text(json.dumps({"sums": self._sums, "rows": self.rows}))
