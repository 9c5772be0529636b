"""Records as they were, while threads write over them."""

import threading

import jax
import numpy as np
import pytest

from recjax.embedding.optimizers import TierArrays
from recjax.embedding.snapshot import Bits, Snapshot

RECORDS = 4_001


def some(rng, count, of=RECORDS):
  return np.sort(rng.choice(of, count, replace=False))


def test_bits_are_a_set():
  rng = np.random.default_rng(0)
  bits, want = Bits(RECORDS), set()
  for count in (0, 1, 7, 900, 2_000):
    records = some(rng, count)
    bits.add(records)
    want |= set(records.tolist())
    every = np.arange(RECORDS)
    assert set(every[bits.has(every)].tolist()) == want
  for first, stop in ((0, RECORDS), (3, 4), (9, 1_000), (16, 16), (5, 4_000)):
    mine = sorted(x for x in want if first <= x < stop)
    assert bits.members(first, stop).tolist() == mine
    assert bits.count(first, stop) == len(mine)
    for size in (1, 64, 5_000):
      found = [x.tolist() for x in bits.batches(first, stop, size)]
      assert [x for part in found for x in part] == mine
      assert all(len(x) == size for x in found[:-1])


def test_a_copy_of_bits_stays_as_it_was():
  bits = Bits(RECORDS)
  bits.add(np.array([1, 9]))
  copy = bits.copy()
  bits.add(np.array([2]))
  assert copy.members(0, RECORDS).tolist() == [1, 9]


@pytest.mark.parametrize("differential", [False, True])
@pytest.mark.parametrize("room", [1, 20, RECORDS])  # records put aside at once
def test_a_snapshot_is_of_its_moment(differential, room):
  """Four threads write 40 times each, while one reads block after block."""
  rng = np.random.default_rng(1)
  live = TierArrays(
    rng.normal(size=(RECORDS, 3)).astype(np.float32),
    {"acc": rng.normal(size=RECORDS).astype(np.float32)},
  )
  want = jax.tree.map(np.copy, live)
  wanted = None
  if differential:
    wanted = Bits(RECORDS)
    wanted.add(some(rng, 1_500))
  copy = lambda at: jax.tree.map(lambda x: x[at], live)
  snapshot = Snapshot(copy, RECORDS, room * (16 + 16), wanted)
  begun = threading.Barrier(5)

  def write(k):
    rng = np.random.default_rng(k)
    begun.wait()
    for _ in range(40):
      mine = some(rng, 200, RECORDS // 4) * 4 + k  # a thread's own
      snapshot.keep(mine)
      live.rows[mine] += 1
      live.slots["acc"][mine] = rng.normal(size=200)

  threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
  for t in threads:
    t.start()
  begun.wait()
  blocks = (np.arange(a, min(a + 50, RECORDS)) for a in range(0, RECORDS, 50))
  if wanted is not None:
    blocks = wanted.batches(0, RECORDS, 50)
  for records in blocks:
    got = snapshot.read(records)
    jax.tree.map(
      lambda x, y, at=records: np.testing.assert_array_equal(x, y[at]),
      got,
      want,
    )
  for t in threads:
    t.join()
  assert not np.array_equal(live.rows, want.rows)


def test_nobody_waits_for_a_snapshot_that_is_closed():
  live = TierArrays(np.zeros((RECORDS, 2), np.float32), {})
  copy = lambda at: jax.tree.map(lambda x: x[at], live)
  snapshot = Snapshot(copy, RECORDS, 1)
  snapshot.keep(np.array([7]))
  waits = threading.Thread(target=snapshot.keep, args=(np.array([8, 9]),))
  waits.start()
  waits.join(0.05)
  assert waits.is_alive()  # there is room for one
  snapshot.close()
  waits.join()
  snapshot.keep(np.arange(100))
  with pytest.raises(ValueError, match="is closed"):
    snapshot.read(np.arange(3))
