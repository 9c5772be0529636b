"""Batches of prepared data for a run: this process's parts, onto devices."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import jax

from recjax.config import Config
from recjax.data import batches as batches_lib
from recjax.data.prepared import Prepared
from recjax.plan import positions
from recjax.training.state import Run


def local_batch(config: Config) -> int:
  """Returns the samples of a step that this process reads."""
  return config.train.batch_size // jax.process_count()


def run_length(config: Config, prepared: Prepared) -> tuple[int, int]:
  """Returns (steps, epochs begun) of a whole run.

  Raises:
    UserError: the training split is smaller than a batch.
  """
  per_epoch = batches_lib.steps_per_epoch(
    prepared, "train", local_batch(config), jax.process_count()
  )
  steps = config.train.steps or per_epoch * config.train.epochs
  return steps, -(-steps // per_epoch)


def batches(
  run: Run, prepared: Prepared, split: str, batch_size: int, **options: Any
) -> grain.DatasetIterator:
  """Iterates over this process's parts of the run's batches, as numpy arrays.

  Prepared: with what the host finds out ahead of the step.

  Args:
    run: whose plan says where the rows lie.
    prepared: the data set.
    split: 'train' or 'test'.
    batch_size: local, b.
    **options: of `data.batches.dataset`: seed, epochs, shuffle_blocks, ...
  """
  plan = run.spec.embedding.plan
  where = positions.of_batches(plan, prepared.profile, prepared.schema.features)
  return batches_lib.dataset(
    prepared,
    split,
    batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    positions_of=where and where.of_batch,
    then=functools.partial(run.prepare, training=split == "train"),
    **options,
  )


def training_batches(
  config: Config, prepared: Prepared, run: Run, first: int = 0
) -> grain.DatasetIterator:
  """Iterates over this process's parts of a run's training batches.

  Args:
    config: whose run it is.
    prepared: the data set.
    run: whose plan says where the rows lie.
    first: batches that are left out.
  """
  data = batches(
    run,
    prepared,
    "train",
    local_batch(config),
    seed=config.seed,
    epochs=run_length(config, prepared)[1],
    shuffle_blocks=config.data.shuffle_blocks,
  )
  if first:
    data.set_state({"next_index": first})
  return data


def fed(
  data: grain.DatasetIterator, run: Run, steps: int
) -> Iterator[tuple[dict[str, Any], dict]]:
  """Iterates over the next `steps` batches on the run's mesh, one ahead.

  Yields:
    (a batch as `run.step` takes it, the state of `data` after it).
  """

  def one():
    batch = next(data)
    batch.pop("mask")
    return run.place(batch), data.get_state()

  yield from one_ahead(one() for _ in range(steps))


def scored_batches(run: Run, prepared: Prepared) -> Iterator[dict[str, Any]]:
  """Iterates over the test split on the run's mesh, in order, padded."""
  size = run.spec.embedding.plan.batch_size // jax.process_count()
  found = batches(run, prepared, "test", size)
  yield from one_ahead(run.place(batch) for batch in found)


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
  """Yields items, each when the next one is there: what looks ahead."""
  items = iter(items)
  try:
    item = next(items)
  except StopIteration:
    return
  for following in items:
    yield item
    item = following
  yield item
