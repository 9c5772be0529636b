"""The order of an epoch's samples: turns, windows and permutations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.data import shuffle


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_blocks_take_turns(blocks):
  """Against dealing the samples one by one, of every few blocks."""
  for sizes in itertools.product(range(1, 5), repeat=blocks):
    turns = [(k, w) for w, size in enumerate(sizes) for k in range(size)]
    dealt = [w for _, w in sorted(turns)]
    for count in range(len(dealt) + 1):
      want = [dealt[:count].count(w) for w in range(blocks)]
      assert shuffle.taken(np.array(sizes), count).tolist() == want


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@given(SIZES, st.integers(1, 4), st.one_of(st.none(), st.integers(-5, 2**70)))
def test_pieces_are_the_whole_epoch(sizes, window, seed):
  """In pieces of any length: every sample once."""
  total = sum(sizes)
  order = shuffle.Order(np.array(sizes), window, seed)
  for step in (1, 3, total):
    seen = []
    for start in range(0, total, step):
      pieces = order.pieces(1, start, min(start + step, total))
      for p in pieces:
        seen += [(p.block, int(i)) for i in order.samples(1, p.block)][
          p.start : p.stop
        ]
      count = min(step, total - start)
      cut = shuffle.part(pieces, 1, count)
      assert sum(p.stop - p.start for p in cut) == count - 1
    stored = [(b, i) for b, size in enumerate(sizes) for i in range(size)]
    assert sorted(seen) == stored
    if seed is None:
      assert seen == stored


def test_the_order_is_that_of_seed_and_epoch():
  def order(seed, epoch):
    found = shuffle.Order(np.full(20, 16), 4, seed)
    return found.pieces(epoch, 0, 64), found.samples(epoch, 3).tolist()

  assert order(1, 0) == order(1, 0) == order(1 + 2**64, 0)
  for other in (order(1, 1), order(2, 0)):
    assert other[0] != order(1, 0)[0]
    assert other[1] != order(1, 0)[1]


@given(st.integers(1, 5), st.integers(0, 9), st.integers(0, 40))
def test_what_is_done_later_is_what_single_batches_do(size, more, batches):
  """From any place, over the ends of epochs, which leave out part of one."""
  samples = size + more
  for start in range(samples + 1):
    epoch, done = 3, start
    for _ in range(batches):
      if done + size > samples:
        epoch, done = epoch + 1, 0
      done += size
    got = shuffle.Done(3, start).after(batches, samples, size)
    assert got == (epoch, done)
