"""Prepared blocks -> batches of numpy arrays, at a position that resumes.

Grain drives a random-access source whose item i *is* batch i after a position,
which counts samples: restoring it costs nothing, and a run may go on with
batches of another size. An epoch's order is a function of (seed, epoch) alone
(shuffle.py), so that a run does not depend on the number of processes and
another number can go on with it. A global batch is in the order of its blocks,
and each process takes one piece of it: it reads only the blocks that are its
own in the window (and those at its edges, where the processes do not divide a
window).
"""

import collections
import threading
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from recjax.data import shuffle
from recjax.data.prepared import Prepared
from recjax.data.shuffle import Done
from recjax.errors import UserError

_FOREVER = 1 << 40  # batches of a run without end
Positions = Callable[[np.ndarray], np.ndarray]  # of ranks, of any shape


def steps_per_epoch(
  prepared: Prepared, split: str, batch_size: int, process_count: int = 1
) -> int:
  """Counts the batches of an epoch: the same number on every process.

  Training drops what does not fill a global batch; evaluation pads.

  Args:
    prepared: the data set.
    split: 'train' or 'test'.
    batch_size: local, b.
    process_count: P.

  Raises:
    UserError: not one training batch a process.
  """
  samples = prepared.samples[split]
  if split != "train":
    return -(-samples // (batch_size * process_count))
  steps = samples // (batch_size * process_count)
  if not steps:
    raise UserError(
      f"{samples:,} training samples do not give each of {process_count}"
      f" processes one batch of {batch_size:,}: lower train.batch_size"
    )
  return steps


def dataset(
  prepared: Prepared,
  split: str,
  batch_size: int,
  *,
  seed: int = 0,
  epochs: int | None = 1,
  done: Done = Done(),
  shuffle_blocks: int = 16,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 1,
  prefetch: int = 8,
  positions_of: Positions | None = None,
  then: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> grain.DatasetIterator:
  """Gives an iterator of batches.

  A batch is a dict: label [b] float32, dense [b, D] float32, ids [b, S] int32
  ranks (-1 = empty), weights [b, S] float32 where the schema is weighted, mask
  [b] float32 (1 = a sample, 0 = padding, only at the end of 'test'); of a
  schema that has them labels [b, K] and sample_weight [b], float32. Arrays may
  share memory: do not write into them.

  'train' is shuffled; 'test' comes in order, each sample on one process once.

  Args:
    prepared: the data set.
    split: 'train' or 'test'.
    batch_size: local, b.
    seed: of the shuffle.
    epochs: of the data, from the first; None = without end.
    done: of the training data, which is left out.
    shuffle_blocks: blocks of a window, that every batch draws from.
    process_index: of this process.
    process_count: P.
    threads: that read ahead.
    prefetch: batches read ahead.
    positions_of: gives what `ids` hold instead of ranks (plan/positions.py);
      None = the ranks.
    then: makes of a batch what is yielded, by the threads that read ahead.

  Raises:
    UserError: too few samples for one batch on each process.
  """
  source = Batches(
    prepared,
    split,
    batch_size,
    seed=seed if split == "train" else None,
    epochs=epochs,
    done=done,
    shuffle_blocks=shuffle_blocks,
    process=(process_index, process_count),
    positions_of=positions_of,
  )
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(prefetch, threads)
  )
  data = grain.MapDataset.source(source)
  if then is not None:
    data = data.map(then)
  return iter(data.to_iter_dataset(options))


class Batches:
  """Random access to the batches of a run: Grain's source protocol."""

  def __init__(
    self,
    prepared: Prepared,
    split: str,
    batch_size: int,
    *,
    seed: int | None,
    epochs: int | None,
    done: Done,
    shuffle_blocks: int,
    process: tuple[int, int],
    positions_of: Positions | None,
  ):
    """Opens the blocks of a split; the arguments are those of `dataset`.

    Without a seed the samples come in order.
    """
    self.blocks = prepared.blocks(split)
    self.order = shuffle.Order(self.blocks.sizes, shuffle_blocks, seed)
    self.batch_size, self.process = batch_size, process
    self.steps = steps_per_epoch(prepared, split, batch_size, process[1])
    self.done, self.samples = done, prepared.samples[split]
    self.length = self.steps
    if seed is not None:
      self.length = _FOREVER
      if epochs is not None:
        self.length = done.until(epochs, self.samples, batch_size * process[1])
    self.positions_of = positions_of
    self.lock = threading.Lock()
    # (epoch, block) -> its samples, shuffled.
    self.recent: collections.OrderedDict[tuple[int, int], dict]
    self.recent = collections.OrderedDict()

  def __len__(self) -> int:
    return self.length

  def __repr__(self) -> str:
    return f"Batches(seed={self.order.seed}, batch_size={self.batch_size})"

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    epoch, b, (process, count) = 0, self.batch_size, self.process
    if self.order.seed is None:  # this process's part of the split, in order
      first = (process * self.steps + int(index)) * b
      pieces = self.order.pieces(0, first, first + b)
    else:
      epoch, end = self.done.after(int(index) + 1, self.samples, b * count)
      pieces = self.order.pieces(epoch, end - b * count, end)
      pieces = shuffle.part(pieces, process * b, (process + 1) * b)
    batch = self._read(epoch, pieces)
    if self.positions_of is not None:
      batch["ids"] = self.positions_of(batch["ids"])
    batch["mask"] = np.ones(len(batch["label"]), np.float32)
    return padded(batch, b)

  def _read(
    self, epoch: int, pieces: list[shuffle.Piece]
  ) -> dict[str, np.ndarray]:
    """Reads the samples of the pieces, one piece after the other."""
    if not pieces:  # only padding
      pieces = [shuffle.Piece(0, 0, 0)]
    with self.lock:
      blocks = self._shuffled(epoch, [p.block for p in pieces])
    parts = [
      {a: x[p.start : p.stop] for a, x in blocks[p.block].items()}
      for p in pieces
    ]
    if len(parts) == 1:
      return parts[0]
    return {a: np.concatenate([p[a] for p in parts]) for a in parts[0]}

  def _shuffled(
    self, epoch: int, blocks: list[int]
  ) -> dict[int, dict[str, np.ndarray]]:
    """Reads blocks and shuffles their samples; keeps those of two windows."""
    missing = [
      i for i in dict.fromkeys(blocks) if (epoch, i) not in self.recent
    ]
    if missing:
      joined = self.blocks[missing]
      start = 0
      for block in missing:
        rows = start + self.order.samples(epoch, block)
        start += len(rows)
        self.recent[epoch, block] = {a: x[rows] for a, x in joined.items()}
    found = {block: self.recent[epoch, block] for block in blocks}
    for block in blocks:
      self.recent.move_to_end((epoch, block))
    while len(self.recent) > max(2 * self.order.window_blocks, len(found)):
      self.recent.popitem(last=False)
    return found


def padded(batch: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
  """Fills a batch up to `size` samples: ids with -1, all else with 0."""
  missing = size - len(batch["label"])
  if not missing:
    return batch
  return {
    name: np.pad(
      x,
      [(0, missing)] + [(0, 0)] * (x.ndim - 1),
      constant_values=-1 if name == "ids" else 0,
    )
    for name, x in batch.items()
  }
