"""Batches: every sample once, the same again, from any position."""

import collections
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recjax.data import batches, blocks
from recjax.data.prepared import Prepared
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.schema import Feature, Schema

BLOCK = 16
TRAIN, TEST = 250, 101  # the last block of each is not full


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Samples that know their number: dense[:, 0], and ids = number + column."""
  directory = str(tmp_path_factory.mktemp("prepared") / "p")
  schema = Schema(("n",), (Feature("a", "a", 2, weighted=True),))

  def parts():
    for split, samples in (("train", TRAIN), ("test", TEST)):
      for start in range(0, samples, 30):
        n = np.arange(start, min(start + 30, samples))
        yield (
          split,
          {
            "label": (n % 2).astype(np.float32),
            "dense": n[:, None].astype(np.float32),
            "ids": np.stack([n, n + 1], 1).astype(np.int32),
            "weights": np.ones((len(n), 2), np.float32),
          },
        )

  samples = blocks.write(parts(), schema, BLOCK, f"{directory}/blocks")
  assert samples == {"train": TRAIN, "test": TEST}
  profile = Profile(TRAIN, ("a",), np.ones(251, np.int64), np.zeros(251, "i2"))
  settings = {"data.block_samples": BLOCK}
  return Prepared(directory, schema, profile, samples, "", settings, {})


def numbers(batch):
  """The samples of a batch, after checking that their arrays agree."""
  real = batch["mask"] > 0
  n = batch["dense"][real, 0].astype(int)
  np.testing.assert_array_equal(batch["ids"][real], np.stack([n, n + 1], 1))
  np.testing.assert_array_equal(batch["label"][real], n % 2)
  assert (batch["ids"][~real] == -1).all()
  return n.tolist()


def flat(batch_numbers):
  return [n for batch in batch_numbers for n in batch]


def train(prepared, size=8, **kwargs):
  return [
    numbers(b)
    for b in batches.dataset(
      prepared, "train", size, shuffle_blocks=3, **kwargs
    )
  ]


def test_shapes_and_types(prepared):
  for split in ("train", "test"):
    for batch in batches.dataset(prepared, split, 8):
      assert {a: (x.shape, x.dtype.name) for a, x in batch.items()} == {
        "label": ((8,), "float32"),
        "dense": ((8, 1), "float32"),
        "ids": ((8, 2), "int32"),
        "weights": ((8, 2), "float32"),
        "mask": ((8,), "float32"),
      }
      if split == "train":
        assert batch["mask"].all()


def test_an_epoch_is_every_sample_once(prepared):
  found = train(prepared, size=10)  # 250 = 25 batches
  assert sorted(flat(found)) == list(range(TRAIN))
  assert flat(found) != list(range(TRAIN))


def test_epochs_and_seeds_differ_and_repeat(prepared):
  steps = batches.steps_per_epoch(prepared, "train", 10)
  assert steps == 25
  two = train(prepared, 10, epochs=2, seed=5)
  assert two[:steps] != two[steps:]
  assert sorted(flat(two[:steps])) == sorted(flat(two[steps:]))
  assert train(prepared, 10, epochs=2, seed=5) == two
  assert train(prepared, 10, epochs=2, seed=6) != two
  forever = batches.dataset(
    prepared, "train", 10, epochs=None, seed=5, shuffle_blocks=3
  )
  assert [numbers(next(forever)) for _ in range(2 * steps)] == two


def test_a_block_is_shuffled_anew_in_every_epoch(prepared):
  """Not only the blocks: the samples of each, which come in their order."""
  steps = batches.steps_per_epoch(prepared, "train", 10)
  found = train(prepared, 10, epochs=3, seed=5)
  epochs = [flat(found[i * steps : (i + 1) * steps]) for i in range(3)]
  for block in range(TRAIN // BLOCK):  # 16! orders: none comes twice by chance
    orders = {
      tuple(n for n in epoch if n // BLOCK == block) for epoch in epochs
    }
    assert len(orders) == 3


def test_samples_mix_across_blocks(prepared):
  first = train(prepared, 40)[0]
  assert len({n // BLOCK for n in first}) == 3


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 30), st.sampled_from([1, 3]))
def test_a_position_resumes_anywhere(prepared, stop, threads):
  kwargs = dict(epochs=3, seed=1, shuffle_blocks=3, threads=threads)
  whole = batches.dataset(prepared, "train", 24, **kwargs)
  want = [numbers(b) for b in whole]
  first = batches.dataset(prepared, "train", 24, **kwargs)
  for _ in range(min(stop, len(want))):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  second = batches.dataset(prepared, "train", 24, **kwargs)
  second.set_state(state)
  assert [numbers(b) for b in second] == want[stop:]


def test_the_test_split_comes_in_order_and_padded(prepared):
  found = list(batches.dataset(prepared, "test", 16))
  assert len(found) == batches.steps_per_epoch(prepared, "test", 16) == 7
  assert flat(map(numbers, found)) == list(range(TEST))
  assert found[-1]["mask"].tolist() == [1.0] * 5 + [0.0] * 11
  assert not found[-1]["weights"][5:].any()


@settings(
  max_examples=15,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 6), st.integers(1, 20))
def test_processes_share_the_samples(prepared, count, size):
  for split in ("train", "test"):
    steps = batches.steps_per_epoch(prepared, split, size, count)
    seen = collections.Counter()
    for index in range(count):
      found = list(
        batches.dataset(
          prepared, split, size, process_index=index, process_count=count
        )
      )
      assert len(found) == steps
      seen.update(flat(map(numbers, found)))
    assert not seen or max(seen.values()) == 1
    if split == "test":
      assert sorted(seen) == list(range(TEST))
    else:
      assert len(seen) == steps * size * count


@pytest.mark.slow
@settings(
  max_examples=15,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(2, 5), st.integers(1, 10), st.integers(1, 5))
def test_global_batches_are_the_same_for_any_processes(
  prepared, count, size, window
):
  def read(index, processes, size):
    dataset = batches.dataset(
      prepared,
      "train",
      size,
      epochs=2,
      seed=3,
      shuffle_blocks=window,
      process_index=index,
      process_count=processes,
    )
    return [numbers(b) for b in dataset]

  alone = read(0, 1, size * count)
  parts = [read(i, count, size) for i in range(count)]
  assert [flat(p) for p in zip(*parts, strict=True)] == alone


def test_a_process_reads_its_own_blocks_only(prepared, monkeypatch):
  """15 full blocks in windows of 4: each of 4 processes reads a quarter."""
  read = []
  getitem = blocks.Blocks.__getitem__
  monkeypatch.setattr(
    blocks.Blocks,
    "__getitem__",
    lambda self, indices: read.extend(indices) or getitem(self, indices),
  )
  shards = []
  for index in range(4):
    read.clear()
    source = batches.dataset(
      prepared,
      "train",
      4,
      shuffle_blocks=4,
      process_index=index,
      process_count=4,
    )
    for _ in range(8):  # two windows, both full
      next(source)
    del source
    shards.append(list(read))
  assert all(len(shard) == len(set(shard)) for shard in shards)
  first_two = [set(shard[:2]) for shard in shards]
  assert len(set.union(*first_two)) == 8


def test_only_the_blocks_of_two_windows_are_kept(prepared):
  source = batches.Batches(
    prepared,
    "train",
    10,
    seed=0,
    epochs=3,
    done=batches.Done(),
    shuffle_blocks=3,
    process=(0, 1),
    positions_of=None,
  )
  for i in range(len(source)):
    source[i]
    assert len(source.recent) <= 6
  assert len(source.recent) == 6


@pytest.mark.parametrize(("size", "count"), [(251, 1), (16, 17), (100, 4)])
def test_too_few_samples_for_a_batch(prepared, size, count):
  with pytest.raises(UserError, match=r"lower train\.batch_size"):
    batches.dataset(prepared, "train", size, process_count=count)


def test_damaged_blocks_are_an_error(prepared, tmp_path):
  with pytest.raises(UserError, match=r"is damaged .*prepare again"):
    blocks.Blocks(
      str(tmp_path), prepared.schema, "train", samples=1, block_samples=1
    )
