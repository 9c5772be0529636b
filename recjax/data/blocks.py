"""Blocks of samples: a tensorflow-datasets builder in ArrayRecord.

An example holds thousands of samples as a few arrays in raw bytes, so that
reading one is a copy. `tfds.builder_from_directory` reads it anywhere; neither
writing nor reading needs TensorFlow.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from recjax.errors import UserError
from recjax.schema import Schema

_SHARD_BYTES = 1 << 28  # about, before compression


def features(schema: Schema) -> dict[str, tuple[tuple, type]]:
  """Shape and type of each array of a block of k samples (None = k)."""
  arrays: dict[str, tuple[tuple, type]] = {
    "label": ((None,), np.float32),
    "ids": ((None, schema.columns), np.int32),
  }
  if schema.dense:  # tensorflow-datasets cannot read an array of no columns
    arrays["dense"] = ((None, len(schema.dense)), np.float32)
  if schema.weighted:
    arrays["weights"] = ((None, schema.columns), np.float32)
  return arrays


def write(
  parts: Iterable[tuple[str, dict[str, np.ndarray]]],
  schema: Schema,
  block_samples: int,
  directory: str,
) -> dict[str, int]:
  """Writes 'train' and 'test' into a new directory; returns samples of each.

  Args:
    parts: (split, arrays of samples), in time order; see `features`.
    schema: of the samples.
    block_samples: of a block; the last block of a split may have fewer.
    directory: must not exist.
  """
  os.makedirs(directory)
  arrays = features(schema)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="recjax_blocks",
    version=tfds.core.Version("1.0.0"),
    data_dir=directory,
    module_name="recjax.data.blocks",
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description="Blocks of samples, in time order; ids are ranks, -1 = none.",
    features=tfds.features.FeaturesDict(
      {
        name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
        for name, (shape, dtype) in arrays.items()
      }
    ),
    disable_shuffling=True,
  )
  info.set_file_format("array_record")
  serializer = tfds.core.example_serializer.ExampleSerializer(
    info.features.get_serialized_info()
  )
  width = 4 * sum(np.prod(s[1:], dtype=int) for s, _ in arrays.values())
  shard_blocks = max(1, _SHARD_BYTES // (width * block_samples))
  names = ("train", "test")
  shards = {name: _Shards(directory, name, shard_blocks) for name in names}
  rest: dict[str, list[dict]] = {name: [] for name in names}
  samples = dict.fromkeys(names, 0)

  def flush(name, last=False):
    waiting = sum(len(part["label"]) for part in rest[name])
    if waiting < block_samples and not (last and waiting):
      return
    joined = {a: np.concatenate([p[a] for p in rest[name]]) for a in arrays}
    full = waiting if last else waiting - waiting % block_samples
    for i in range(0, full, block_samples):
      block = {
        a: x[i : min(i + block_samples, full)] for a, x in joined.items()
      }
      example = serializer.get_tf_example(info.features.encode_example(block))
      # The arrays are a map, whose order differs between runs if it may.
      shards[name].write(example.SerializeToString(deterministic=True))
    rest[name] = [{a: x[full:] for a, x in joined.items()}]
    samples[name] += full

  for name, part in parts:
    rest[name].append({a: part[a] for a in arrays})
    flush(name)
  for name in names:
    flush(name, last=True)
  splits = [shards[name].close() for name in names]
  info.set_splits(tfds.core.SplitDict(splits))
  info.write_to_directory(directory)
  return samples


class _Shards:
  """The files of a split, each of so many blocks.

  As tfds.core.SequentialWriter, whose bytes differ from run to run.
  """

  def __init__(self, directory: str, split: str, blocks: int):
    self.split, self.blocks = split, blocks
    self.template = tfds.core.ShardedFileTemplate(
      data_dir=directory,
      dataset_name="recjax_blocks",
      split=split,
      filetype_suffix="array_record",
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    self.lengths, self.bytes = [], 0
    self.writer: ArrayRecordWriter | None = None

  def write(self, example: bytes) -> None:
    if self.writer is None or self.lengths[-1] == self.blocks:
      self._close_file()
      path = self.template.sharded_filepath(
        shard_index=len(self.lengths), num_shards=None
      )
      self.writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
      self.lengths.append(0)
    self.writer.write(example)
    self.lengths[-1] += 1
    self.bytes += len(example)

  def _close_file(self) -> None:
    if self.writer is not None:
      self.writer.close()
      self.writer = None

  def close(self) -> tfds.core.splits.SplitInfo:
    self._close_file()
    return tfds.core.splits.SplitInfo(
      name=self.split,
      shard_lengths=self.lengths,
      num_bytes=self.bytes,
      filename_template=self.template,
    )


class Blocks:
  """The blocks of a split, read at random; and their sizes.

  Raises:
    UserError: the files are missing or damaged.
  """

  def __init__(
    self, directory: str, split: str, samples: int, block_samples: int
  ):
    self.directory = directory
    with self._reading():
      builder = tfds.builder_from_directory(directory)
      self.source = builder.as_data_source(split)
    n = len(self.source)
    self.sizes = np.full(n, block_samples, np.int64)  # samples of each block
    self.sizes[-1] = samples - block_samples * (n - 1)

  def __getitem__(self, indices) -> dict[str, np.ndarray]:
    """The samples of these blocks, one block after the other."""
    with self._reading():
      blocks = self.source.__getitems__([int(i) for i in indices])
      joined = {a: np.concatenate([b[a] for b in blocks]) for a in blocks[0]}
    if "dense" not in joined:
      joined["dense"] = np.empty((len(joined["label"]), 0), np.float32)
    return joined

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:  # of protobuf, ArrayRecord, numpy: no common type
      raise UserError(
        f"{self.directory} is damaged ({type(e).__name__}: {e}): delete the"
        " prepared data set and prepare again"
      ) from e
