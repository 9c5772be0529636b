"""The stored rows of a checkpoint: every process writes its own, by blocks.

The item `stored` of a step's folder holds cold and frozen rows. Each of a
tier's arrays is an array of zarr `GROUP.TIER.ARRAY/` [local rows, n, d] in rank
order, not compressed, whose chunks hold rows of one process's owners: no
process writes into another's files. `part.P.json` holds the checksums of what
process P has written.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from recjax.embedding.host_store import HostStore, StoredRows
from recjax.plan.plan import Tier
from recjax.training.checkpoint_reader import sum_of_words

BLOCK_BYTES = 16 << 20  # rows and slot variables that are written at a time
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
  """What `StoredHandler` saves."""

  begin: Callable[[pathlib.Path], Future]  # to write into a folder


@ocp.args.register_with_handler(StoredHandler, for_restore=True)
@dataclasses.dataclass
class StoredRestore(ocp.args.CheckpointArgs):
  """Nothing: Orbax wants a name for it."""


# ---- Writing


def make_save(store: HostStore) -> StoredSave:
  """Returns what writes the store's rows, while nothing else writes them."""

  def begin(folder: pathlib.Path) -> Future:
    write(folder, store)
    done: Future = Future()
    done.set_result(None)
    return done

  return StoredSave(begin)


def write(folder: pathlib.Path, store: HostStore) -> None:
  """Writes this process's rows of all groups, and their checksums."""
  writer = _Writer(folder)
  for name, stored in store.groups.items():
    for tier, first, _ in stored.tiers():
      _write_tier(writer, f"{name}.{tier.name}", stored, tier, first)
  writer.finish()


def _write_tier(
  writer: "_Writer", key: str, stored: StoredRows, tier: Tier, first: int
) -> None:
  """Writes a tier's rows, whose first record is `first`."""
  part = stored.block(first, first)  # of no rows, to know shapes and dtypes
  m, n = len(stored.owners), stored.devices
  local = -(-tier.rows // n)
  step = min(local, max(1, BLOCK_BYTES // (_width(part) * m)))
  arrays = {
    name: _open(
      writer.folder / f"{key}.{name}",
      ((local, n, *x.shape[1:]), (step, m, *x.shape[1:]), x.dtype),
      once=True,
    )
    for name, x in _named(part)
  }
  k = stored.owners[0]
  for at in range(0, local, step):
    rows = min(step, local - at)
    a = first + at * m
    block = stored.block(a, a + rows * m)
    held = stored.holds_row(np.arange(a, a + rows * m))
    for name, x in _named(block):
      writer.add(f"{key}.{name}", x if held.all() else x[held])
      place = arrays[name][at : at + rows, k : k + m]
      writer.put(place, x.reshape(rows, m, *x.shape[1:]))


def _named(arrays) -> Iterator[tuple[str, np.ndarray]]:
  yield "rows", arrays.rows
  yield from arrays.slots.items()


def _width(arrays) -> int:
  """Returns the bytes of a record."""
  return sum(
    x.dtype.itemsize * int(np.prod(x.shape[1:])) for _, x in _named(arrays)
  )


def _open(path: pathlib.Path, metadata, once: bool) -> ts.TensorStore:
  """Opens an array to write; metadata: (shape, chunk, dtype).

  Where all processes write into it (once), the first makes it.
  """
  shape, chunk, dtype = metadata
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": f"{path}/"},
    "metadata": {"shape": shape, "chunks": chunk, "compressor": None},
    "store_data_equal_to_fill_value": True,
  }
  make = not once or jax.process_index() == 0
  return ts.open(
    spec,
    dtype=ts.dtype(dtype.name),
    create=make,
    open=not make,
    assume_metadata=not make,
  ).result()


class _Writer:
  """Writes arrays of a folder, a few blocks at a time, and sums their words."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._sums: dict[str, int] = {}
    self._pending: collections.deque = collections.deque()

  def add(self, key: str, x: np.ndarray) -> None:
    """Adds an array's words to the checksum of that name."""
    total = self._sums.get(key, 0) + sum_of_words(x)
    self._sums[key] = total & 0xFFFFFFFF

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
    part.write_text(json.dumps({"sums": self._sums}))
