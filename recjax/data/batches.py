"""Prepared blocks -> batches of numpy arrays, at a position that resumes.

Grain drives a random-access source whose item i *is* batch i of the run, so
the position is one number: restoring it costs nothing. The global batches are
a function of (seed, epoch) alone, so that a run does not depend on the number
of processes and another number can go on with it: blocks are permuted every
epoch, the samples of a block are shuffled, and `shuffle_blocks` neighbours in
that permutation are a window, of which every batch takes the same part of each
block. A global batch is in the order of its blocks, and each process takes one
piece of it: it reads only the blocks that are its own in the window (and
those at its edges, where the processes do not divide a window).
"""

import bisect
import collections
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from recjax.data import prepare
from recjax.data.blocks import Blocks
from recjax.data.prepare import Prepared
from recjax.errors import UserError

_FOREVER = 1 << 40  # batches of a run without end
_Piece = tuple[
  int, int, int
]  # block; first sample of it after its shuffle; end


def steps_per_epoch(
  prepared: Prepared, split: str, batch_size: int, process_count: int = 1
) -> int:
  """Batches an epoch: the same number on every process.

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
  shuffle_blocks: int = 16,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 1,
  prefetch: int = 8,
  positions_of: Callable[[np.ndarray], np.ndarray] | None = None,
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
    shuffle_blocks: blocks of a window, that every batch draws from.
    process_index: of this process.
    process_count: P.
    threads: that read ahead.
    prefetch: batches read ahead.
    positions_of: what `ids` then hold for the ranks, see plan/positions.py; None =
      the ranks.

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
    positions_of=positions_of,
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
    positions_of: Callable[[np.ndarray], np.ndarray] | None = None,
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
    self.positions_of = positions_of
    self.seed = None if seed is None else seed % 2**64  # any integer will do
    # The test split is in order: no block is mixed with another.
    self.window_blocks = 1 if seed is None else max(1, window_blocks)
    self.lock = threading.Lock()
    self.recent: collections.OrderedDict[Any, dict] = collections.OrderedDict()
    self.order = functools.lru_cache(maxsize=2)(self._order)

  def __len__(self) -> int:
    return self.length

  def __repr__(self) -> str:
    return f"Batches(seed={self.seed}, batch_size={self.batch_size})"

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    epoch, step = divmod(int(index), self.steps)
    b, (process, count) = self.batch_size, self.process
    if self.seed is None:  # this process's part of the split, in order
      first = (process * self.steps + step) * b
      pieces = self._pieces(0, first, first + b)
    else:
      first = step * b * count
      pieces = self._pieces(epoch, first, first + b * count)
      pieces = _part(pieces, process * b, (process + 1) * b)
    batch = self._read(epoch, pieces)
    if self.positions_of is not None:
      batch["ids"] = self.positions_of(batch["ids"])
    size = len(batch["label"])
    batch["mask"] = np.ones(size, np.float32)
    if size == b:
      return batch
    return {
      a: np.concatenate(
        [
          x,
          np.full((b - size, *x.shape[1:]), -1 if a == "ids" else 0, x.dtype),
        ]
      )
      for a, x in batch.items()
    }

  def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """All blocks in order [n], and the first sample of each window.

    The second ends in the number of all samples.
    """
    order = np.arange(len(self.blocks.sizes))
    if self.seed is not None:
      rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 0]))
      order = rng.permutation(order)
    ends = np.cumsum(self.blocks.sizes[order])
    last = np.arange(self.window_blocks, len(order), self.window_blocks)
    return order, np.concatenate([[0], ends[last - 1], ends[-1:]])

  def _pieces(self, epoch: int, start: int, stop: int) -> list[_Piece]:
    """What samples start..stop of the epoch are, by their place in a window."""
    order, starts = self.order(epoch)
    pieces = []
    first = int(np.searchsorted(starts, start, side="right")) - 1
    for w in range(first, len(starts) - 1):
      if starts[w] >= stop:
        break
      n = self.window_blocks
      blocks = order[w * n : (w + 1) * n]
      sizes = self.blocks.sizes[blocks]
      a = taken(sizes, max(start - starts[w], 0))
      b = taken(sizes, min(stop, starts[w + 1]) - starts[w])
      pieces += [
        (place, *piece)
        for place, piece in enumerate(zip(blocks, a, b, strict=True))
        if piece[1] < piece[2]
      ]
    return [piece for _, *piece in sorted(pieces, key=lambda p: p[0])]

  def _read(self, epoch: int, pieces: list[_Piece]) -> dict[str, np.ndarray]:
    if not pieces:  # only padding
      pieces = [(0, 0, 0)]
    with self.lock:
      blocks = self._shuffled(epoch, [int(p[0]) for p in pieces])
    parts = [
      {a: x[start:stop] for a, x in blocks[block].items()}
      for block, start, stop in pieces
    ]
    if len(parts) == 1:
      return parts[0]
    return {a: np.concatenate([p[a] for p in parts]) for a in parts[0]}

  def _shuffled(self, epoch: int, blocks: list[int]) -> dict[int, dict]:
    """The blocks' samples, shuffled; those of two windows are kept."""
    missing = [
      i for i in dict.fromkeys(blocks) if (epoch, i) not in self.recent
    ]
    if missing:
      joined = self.blocks[missing]
      ends = np.cumsum(self.blocks.sizes[missing])
      for block, stop in zip(missing, ends, strict=True):
        rows = np.arange(stop - self.blocks.sizes[block], stop)
        if self.seed is not None:
          key = [self.seed, epoch, 1, block]
          np.random.Generator(np.random.PCG64(key)).shuffle(rows)
        self.recent[epoch, block] = {a: x[rows] for a, x in joined.items()}
    found = {block: self.recent[epoch, block] for block in blocks}
    for block in blocks:
      self.recent.move_to_end((epoch, block))
    while len(self.recent) > max(2 * self.window_blocks, len(found)):
      self.recent.popitem(last=False)
    return found


def taken(sizes, count: int) -> np.ndarray:
  """How many samples of each block the first `count` of a window are.

  They take turns: first sample 0 of each block, then sample 1, and so on; a
  block that has no more is left out.

  Args:
    sizes: [w] int, samples of the window's blocks.
    count: at most their sum.

  Returns:
    [w] int.
  """
  turns = bisect.bisect_right(
    range(int(max(sizes)) + 1),
    count,
    key=lambda k: int(np.minimum(sizes, k).sum()),
  )
  whole = np.minimum(sizes, turns - 1)
  rest = count - whole.sum()
  more = sizes > whole
  return whole + (more & (np.cumsum(more) <= rest))


def _part(pieces: list[_Piece], start: int, stop: int) -> list[_Piece]:
  """Samples start..stop of all that the pieces hold."""
  part, at = [], 0
  for block, a, b in pieces:
    first, last = max(a, a + start - at), min(b, a + stop - at)
    if first < last:
      part.append((block, first, last))
    at += b - a
  return part
