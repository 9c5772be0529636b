"""Batches of prepared data for a run: this process's parts, onto devices."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import jax

from recjax.config import Config
from recjax.data import batches as batches_lib
from recjax.data.prepared import Prepared
from recjax.data.shuffle import Done
from recjax.plan import positions
from recjax.training.state import At, Run


def local_batch(config: Config) -> int:
  """Returns the samples of a step that this process reads."""
  return config.train.batch_size // jax.process_count()


def last_step(config: Config, prepared: Prepared, at: At = At()) -> int:
  """Returns the step with which a run ends.

  Raises:
    UserError: the training split is smaller than a batch.
  """
  batches_lib.steps_per_epoch(
    prepared, "train", local_batch(config), jax.process_count()
  )
  if config.train.steps:
    return at.began + config.train.steps
  sizes = prepared.samples["train"], config.train.batch_size
  return at.step + at.done.until(config.train.epochs, *sizes)


def later(at: At, steps: int, config: Config, prepared: Prepared) -> At:
  """Returns where a run stands so many steps later."""
  sizes = prepared.samples["train"], config.train.batch_size
  return At(at.step + steps, at.done.after(steps, *sizes), at.began)


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
  config: Config, prepared: Prepared, run: Run, done: Done = Done()
) -> grain.DatasetIterator:
  """Iterates over this process's parts of a run's training batches.

  Args:
    config: whose run it is.
    prepared: the data set.
    run: whose plan says where the rows lie.
    done: of the data, which is left out.
  """
  return batches(
    run,
    prepared,
    "train",
    local_batch(config),
    seed=config.seed,
    epochs=None,
    done=done,
    shuffle_blocks=config.data.shuffle_blocks,
  )


def fed(
  data: grain.DatasetIterator, run: Run, steps: int
) -> Iterator[dict[str, Any]]:
  """Iterates over the next `steps` batches on the run's mesh, one ahead.

  Yields:
    A batch as `run.step` takes it.
  """

  def one():
    batch = next(data)
    batch.pop("mask")
    return run.place(batch)

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
