"""The host store: rows in memory and in files, its queue, what it refuses."""

import functools
import os
import threading
import time

import helpers
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.embedding import host_store, optimizers
from recjax.embedding.embedding import make_embedding
from recjax.embedding.host_store import HostStore
from recjax.embedding.row_random import initial_rows
from recjax.errors import UserError
from recjax.plan.plan import Plan
from recjax.schema import Feature

DEVICES, ROWS, HOT, DIM = 4, 203, 10, 3


def embedding_of(frozen=0, dtype="float32", optimizer="adam", rows=ROWS):
  group = helpers.make_group(
    DEVICES, rows, HOT, 0, dim=DIM, dtype=dtype, frozen=frozen, padding_rows=0
  )
  return make_embedding(
    Plan(DEVICES, DEVICES, (group,)),
    (Feature("t", "t"),),
    {"g": optimizers.OPTIMIZERS[optimizer](0.1)},
  )


def numbered(stored, at):
  """Values that say which record and column of which array they are."""
  like = stored.parts[0]
  number = lambda x, add: (
    (at.reshape(-1, *(1,) * (x.ndim - 1)) + np.zeros(x.shape[1:])) + add
  ).astype(x.dtype)
  leaves, tree = jax.tree.flatten(like)
  return tree.unflatten([number(x, 1000 * i) for i, x in enumerate(leaves)])


@settings(deadline=None, max_examples=25)
@given(
  owners=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
  frozen=st.sampled_from([0, 80, ROWS - HOT]),
  dtype=st.sampled_from(["float32", "bfloat16"]),
  data=st.data(),
)
def test_what_was_written_is_read(
  tmp_path_factory, owners, frozen, dtype, data
):
  directory = str(tmp_path_factory.mktemp("store"))
  owners = sorted(owners)
  store = HostStore(embedding_of(frozen, dtype), owners, directory)
  stored = store.groups["g"]
  assert len(stored.parts) == (1 if frozen in (0, ROWS - HOT) else 2)
  everything = np.arange(stored.records)
  stored.write(everything, numbered(stored, everything))
  at = sorted(data.draw(st.sets(st.integers(0, stored.records - 1))))
  at = np.array(at, np.int64)
  stored.write(at, numbered(stored, at + 300))
  values = np.where(np.isin(everything, at), everything + 300, everything)
  got = stored.block(0, stored.records)
  equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  equal(got, numbered(stored, values))
  # In a row, alone, with gaps, and with gaps behind the second one.
  for some in (everything[3:7], at, np.array([0, 3, 5, 9])):
    if len(some) and some[-1] < stored.records:
      equal(stored.copy(some), numbered(stored, values[some]))
  store.close()


@pytest.mark.parametrize("frozen", [0, 80])
def test_records_are_in_rank_order(frozen, tmp_path):
  """Of all owners on one process they are the ranks; of some, theirs."""
  make = lambda owners: HostStore(
    embedding_of(frozen), owners, str(tmp_path)
  ).groups["g"]
  stored = make(range(DEVICES))
  assert stored.first == HOT
  at = np.arange(ROWS - HOT)
  np.testing.assert_array_equal(stored.positions(at), HOT + at)
  assert stored.holds_row(at).all()
  assert not stored.holds_row(np.arange(ROWS - HOT, stored.records)).any()
  some = make([1, 3])
  np.testing.assert_array_equal(some.positions(np.arange(4)), [11, 13, 15, 17])
  local = np.array([0, 5, 9], np.int32)
  np.testing.assert_array_equal(
    some.positions(some.records_of(1, local)), HOT + 3 + DEVICES * local
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_values_are_those_of_their_ranks(dtype, tmp_path):
  embedding = embedding_of(80, dtype)
  store = HostStore(embedding, [1, 2], str(tmp_path))
  host_store.init(store, embedding, 0.5)
  stored = store.groups["g"]
  got = stored.block(0, stored.records)
  ranks = stored.positions(np.arange(stored.records)).astype(np.int32)
  want = initial_rows(ranks, DIM, 0.5, np.uint32(0)).astype(dtype)
  np.testing.assert_array_equal(got.rows, np.asarray(want))
  assert not any(x.any() for x in got.slots.values())


def test_a_differential_snapshot_holds_what_was_written_since_the_full_one():
  store = HostStore(embedding_of(), [0])
  stored = store.groups["g"]

  def snapshot(**kind):
    found = stored.snapshot(1_000, **kind)
    found.close()
    return found.wanted and found.wanted.members(0, stored.records).tolist()

  def write(*records):
    at = np.array(records)
    stored.write(at, numbered(stored, at))

  write(1)
  assert snapshot(changed=False, follow=True) is None  # all records
  write(3, 5)
  assert snapshot(changed=True, follow=True) == [3, 5]
  write(4)
  assert snapshot(changed=True, follow=True) == [3, 4, 5]
  assert snapshot(changed=False, follow=True) is None
  write(7)
  assert snapshot(changed=True, follow=True) == [7]
  assert snapshot(changed=False, follow=False) is None
  assert stored.written is None  # and nothing is followed
  store.close()


# ---- Files


def test_files_end_with_the_process(tmp_path):
  """They have no name: nothing is left behind, however it ends."""
  before = os.statvfs(tmp_path).f_bavail
  folder = tmp_path / "[1] *?#%41\\"  # a name, whatever is in it
  store = HostStore(embedding_of(10**6, rows=10**6 + 400), [0], str(folder))
  size = store.groups["g"].parts[-1].rows.nbytes
  assert size > 2 << 20
  assert os.listdir(folder) == []
  assert os.listdir(tmp_path) == [folder.name]
  del before, store


def test_no_room_on_the_disk_is_said(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(
    UserError, match=r"plan.ssd_memory_mb: no room for 84 fro"
  ):
    HostStore(embedding_of(80), range(DEVICES), str(tmp_path))


def test_no_room_in_memory_is_said():
  huge = embedding_of(rows=500_000_000)
  with (
    helpers.limited_memory(4 << 30),
    pytest.raises(UserError, match=r"plan.host_memory_mb: no room for 49"),
  ):
    HostStore(huge, range(DEVICES))


def test_more_rows_than_numbers_are_refused():
  with pytest.raises(UserError, match="stores 2,147,483,6"):
    HostStore(embedding_of(rows=2**31 - 8), range(DEVICES))


# ---- Queue


def test_jobs_run_in_their_order():
  store, seen, lock = HostStore(embedding_of(), [0]), [], threading.Lock()

  def job(i):
    time.sleep(0.002 * (i % 3))
    with lock:
      seen.append(i)
    return i

  futures = [store.submit(lambda i=i: job(i)) for i in range(20)]
  assert [f.result() for f in futures] == seen == list(range(20))
  store.close()


def test_what_a_write_raises_is_raised_later():
  store = HostStore(embedding_of(), [0])

  def fail():
    raise OSError("the disk is gone")

  store.write(fail)
  with pytest.raises(OSError, match="the disk is gone"):
    store.flush()


@pytest.mark.parametrize("rows", [0, 1, 8_191, 50_000])
def test_threads_share_rows_out(rows):
  store, seen = HostStore(embedding_of(), [0]), np.zeros(rows, int)

  def touch(at):
    seen[at] += 1

  store.spread(touch, rows)
  assert (seen == 1).all()

  def fail(at):
    raise ValueError(f"rows from {at.start}")

  with pytest.raises(ValueError, match="rows from 0"):
    store.spread(fail, rows)
