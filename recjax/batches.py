"""Prepared blocks -> batches of numpy arrays, at a position that resumes.

Grain drives a random-access source whose item i *is* batch i of the run, so
the position is one number: restoring it costs nothing. The order is a function
of (seed, epoch, process) alone: blocks are permuted every epoch, and the
samples of `shuffle_blocks` neighbours in that permutation are shuffled
together.
"""

import collections
import functools
import os
import threading
from typing import Any

import grain
import numpy as np

from recjax import prepare
from recjax.blocks import Blocks
from recjax.errors import UserError
from recjax.prepare import Prepared

_FOREVER = 1 << 40  # batches of a run without end


def steps_per_epoch(
  prepared: Prepared, split: str, batch_size: int, process_count: int = 1
) -> int:
  """Batches an epoch: the same number on every process.

  Training drops what does not fill a batch on every process; evaluation pads.

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
  block = prepared.settings["data.block_samples"]
  blocks = -(-samples // block)
  least = samples  # of one process, whatever the permutation
  if process_count > 1:
    short = blocks * block - samples  # what the last block lacks
    least = blocks // process_count * block - short
  steps = max(least, 0) // batch_size
  if not steps:
    raise UserError(
      f"{samples:,} training samples in blocks of {block:,}"
      f" (data.block_samples) do not give each of {process_count} processes"
      f" one batch of {batch_size:,}: lower train.batch_size or"
      " data.block_samples"
    )
  return steps


def dataset(
  prepared: Prepared,
  split: str,
  batch_size: int,
  *,
  seed: int = 0,
  epochs: int | None = 1,
  shuffle_blocks: int = 16,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 1,
  prefetch: int = 8,
) -> grain.DatasetIterator:
  """An iterator of batches; its get_state() is small and goes into JSON.

  A batch is a dict: label [b] float32, dense [b, D] float32, ids [b, S] int32
  ranks (-1 = empty), weights [b, S] float32 where the schema is weighted, mask
  [b] float32 (1 = a sample, 0 = padding, only at the end of 'test'). Arrays
  may share memory: do not write into them.

  'train' is shuffled; 'test' comes in order, each sample on one process once.

  Args:
    prepared: the data set.
    split: 'train' or 'test'.
    batch_size: local, b.
    seed: of the shuffle.
    epochs: of the data; None = without end.
    shuffle_blocks: blocks whose samples are shuffled together.
    process_index: of this process.
    process_count: P.
    threads: that read ahead.
    prefetch: batches read ahead.

  Raises:
    UserError: too few samples for one batch on each process.
  """
  steps = steps_per_epoch(prepared, split, batch_size, process_count)
  window = functools.partial(
    Batches, prepared, split, batch_size, steps, process_index, process_count
  )
  source = window(
    seed=seed if split == "train" else None,
    length=_FOREVER if epochs is None else steps * epochs,
    window_blocks=shuffle_blocks,
  )
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(prefetch, threads)
  )
  return iter(grain.MapDataset.source(source).to_iter_dataset(options))


class Batches:
  """Random access to the batches of a run: Grain's source protocol."""

  def __init__(
    self,
    prepared: Prepared,
    split: str,
    batch_size: int,
    steps: int,
    process_index: int,
    process_count: int,
    *,
    seed: int | None,
    length: int,
    window_blocks: int,
  ):
    self.samples = prepared.samples[split]
    self.blocks = Blocks(
      os.path.join(prepared.directory, prepare.BLOCKS),
      split,
      self.samples,
      prepared.settings["data.block_samples"],
    )
    self.batch_size, self.steps, self.length = batch_size, steps, length
    self.process = process_index, process_count
    self.seed = None if seed is None else seed % 2**64  # any integer will do
    self.window_blocks = max(1, window_blocks)
    self.lock = threading.Lock()
    self.windows: collections.OrderedDict[Any, dict] = collections.OrderedDict()
    self.order = functools.lru_cache(maxsize=2)(self._order)

  def __len__(self) -> int:
    return self.length

  def __repr__(self) -> str:
    return f"Batches(seed={self.seed}, batch_size={self.batch_size})"

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    epoch, step = divmod(int(index), self.steps)
    start, stop = step * self.batch_size, (step + 1) * self.batch_size
    if self.seed is None:  # this process's part of the split, in order
      first = self.process[0] * self.steps * self.batch_size
      start, stop = (min(first + x, self.samples) for x in (start, stop))
    batch = self._read(epoch, start, stop)
    size = stop - start
    batch["mask"] = np.ones(size, np.float32)
    if size == self.batch_size:
      return batch
    return {
      a: np.concatenate(
        [
          x,
          np.full(
            (self.batch_size - size, *x.shape[1:]),
            -1 if a == "ids" else 0,
            x.dtype,
          ),
        ]
      )
      for a, x in batch.items()
    }

  def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's blocks [n] in order, and the first sample of each window.

    The second ends in the number of all samples.
    """
    order = np.arange(len(self.blocks.sizes))
    if self.seed is not None:
      rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 0]))
      index, count = self.process
      order = rng.permutation(order)[index::count]
    ends = np.cumsum(self.blocks.sizes[order])
    last = np.arange(self.window_blocks, len(order), self.window_blocks)
    return order, np.concatenate([[0], ends[last - 1], ends[-1:]])

  def _read(self, epoch: int, start: int, stop: int) -> dict[str, np.ndarray]:
    """Samples start..stop of the epoch of this process."""
    _, starts = self.order(epoch)
    first = int(np.searchsorted(starts, start, side="right")) - 1
    first = min(first, len(starts) - 2)
    parts = []
    for w in range(first, len(starts) - 1):
      if w > first and starts[w] >= stop:
        break
      window = self._window(epoch, w)
      a, b = max(start - starts[w], 0), max(stop - starts[w], 0)
      parts.append({name: x[a:b] for name, x in window.items()})
    if len(parts) == 1:
      return parts[0]
    return {a: np.concatenate([p[a] for p in parts]) for a in parts[0]}

  def _window(self, epoch: int, w: int) -> dict[str, np.ndarray]:
    """All samples of a window, shuffled; the last few windows are kept."""
    with self.lock:
      if (epoch, w) in self.windows:
        self.windows.move_to_end((epoch, w))
        return self.windows[epoch, w]
      order, _ = self.order(epoch)
      n = self.window_blocks
      window = self.blocks[order[w * n : (w + 1) * n]]
      if self.seed is not None:
        key = [self.seed, epoch, 1, w, self.process[0]]
        rng = np.random.Generator(np.random.PCG64(key))
        shuffled = rng.permutation(len(window["label"]))
        window = {a: x[shuffled] for a, x in window.items()}
      self.windows[epoch, w] = window
      if len(self.windows) > 2:
        self.windows.popitem(last=False)
      return window
