"""The order of an epoch's samples: blocks are permuted, and windows mixed.

Blocks are permuted in every epoch, and so are the samples of each block.
`window_blocks` neighbours in that permutation are a window, whose blocks take
turns, so that every batch takes the same part of each. All of it is a function
of (seed, epoch) alone.
"""

import bisect
import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Done(NamedTuple):
  """What a run has done of its training data.

  samples below is those of the training split, batch_size the global one, B.
  """

  epoch: int = 0  # epochs before this one
  samples: int = 0  # of this one, on all processes

  def until(self, epochs: int, samples: int, batch_size: int) -> int:
    """Counts the batches that are left of so many epochs."""
    whole = max(0, epochs - self.epoch - 1) * (samples // batch_size)
    mine = epochs > self.epoch
    return mine * max(0, samples - self.samples) // batch_size + whole

  def after(self, batches: int, samples: int, batch_size: int) -> "Done":
    """Returns what is done so many batches later.

    What does not fill a batch at the end of an epoch is left out.
    """
    left = self.until(self.epoch + 1, samples, batch_size)
    if batches <= left:
      return Done(self.epoch, self.samples + batches * batch_size)
    per_epoch = samples // batch_size
    epochs, rest = divmod(batches - left - 1, per_epoch)
    return Done(self.epoch + 1 + epochs, (rest + 1) * batch_size)


class Piece(NamedTuple):
  """Consecutive samples of a block, counted after its shuffle."""

  block: int
  start: int
  stop: int


class Order:
  """The order in which the samples of a split come.

  Without a seed they come as they are stored: no block is mixed with another.
  """

  def __init__(self, sizes: np.ndarray, window_blocks: int, seed: int | None):
    """Orders the samples of blocks.

    Args:
      sizes: [blocks] int, samples of each.
      window_blocks: that are mixed.
      seed: any integer; None = as they are stored.
    """
    self.sizes = sizes
    self.seed = None if seed is None else seed % 2**64  # any integer will do
    self.window_blocks = 1 if seed is None else max(1, window_blocks)
    self._windows_of = functools.lru_cache(maxsize=2)(self._windows)

  def pieces(self, epoch: int, start: int, stop: int) -> list[Piece]:
    """Finds samples start..stop of the epoch, window by window."""
    order, starts = self._windows_of(epoch)
    pieces = []
    first = int(np.searchsorted(starts, start, side="right")) - 1
    for w in range(first, len(starts) - 1):
      if starts[w] >= stop:
        break
      n = self.window_blocks
      blocks = order[w * n : (w + 1) * n]
      sizes = self.sizes[blocks]
      a = taken(sizes, max(start - starts[w], 0))
      b = taken(sizes, min(stop, starts[w + 1]) - starts[w])
      pieces += [
        (place, Piece(int(block), int(i), int(j)))
        for place, (block, i, j) in enumerate(zip(blocks, a, b, strict=True))
        if i < j
      ]
    # By place in the window, so that a process reads few blocks.
    return [piece for _, piece in sorted(pieces, key=lambda p: p[0])]

  def samples(self, epoch: int, block: int) -> np.ndarray:
    """The order of a block's own samples: a permutation, [size] int64."""
    rows = np.arange(self.sizes[block])
    if self.seed is not None:
      key = [self.seed, epoch, 1, block]
      np.random.Generator(np.random.PCG64(key)).shuffle(rows)
    return rows

  def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Permutes the blocks.

    Returns:
      (blocks in order [n], first sample of each window and the number of all
      samples).
    """
    order = np.arange(len(self.sizes))
    if self.seed is not None:
      rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 0]))
      order = rng.permutation(order)
    ends = np.cumsum(self.sizes[order])
    last = np.arange(self.window_blocks, len(order), self.window_blocks)
    return order, np.concatenate([[0], ends[last - 1], ends[-1:]])


def taken(sizes: np.ndarray, count: int) -> np.ndarray:
  """How many samples of each block the first `count` of a window are.

  The blocks take turns: first sample 0 of each block, then sample 1, and so
  on; a block that has no more is left out.

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


def part(pieces: Iterable[Piece], start: int, stop: int) -> list[Piece]:
  """Cuts out samples start..stop of all that the pieces hold."""
  found, at = [], 0
  for block, a, b in pieces:
    first, last = max(a, a + start - at), min(b, a + stop - at)
    if first < last:
      found.append(Piece(block, first, last))
    at += b - a
  return found
