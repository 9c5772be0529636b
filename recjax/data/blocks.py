"""Blocks of samples on disk: a tensorflow-datasets builder in ArrayRecord.

An example holds thousands of samples as a few arrays in raw bytes, so that
reading one is a copy. `tfds.builder_from_directory` reads it anywhere; neither
writing nor reading needs TensorFlow. Here what the arrays are comes from the
schema: tensorflow-datasets would import the module that features.json names.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from recjax.errors import UserError
from recjax.schema import Schema

_NAME = "recjax_blocks"
_FILE_BYTES = 1 << 28  # about, before compression


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
  if len(schema.labels) > 1:
    arrays["labels"] = ((None, len(schema.labels)), np.float32)
  if schema.sample_weighted:
    arrays["sample_weight"] = ((None,), np.float32)
  return arrays


def write(
  parts: Iterable[tuple[str, dict[str, np.ndarray]]],
  schema: Schema,
  block_samples: int,
  directory: str,
) -> dict[str, int]:
  """Writes the blocks of 'train' and 'test' into a new directory.

  Args:
    parts: (split, arrays of samples), in time order; see `features`.
    schema: of the samples.
    block_samples: of a block; the last block of a split may have fewer.
    directory: must not exist.

  Returns:
    Samples of each split.
  """
  os.makedirs(directory)
  info = _info(schema, directory)
  writers = {
    name: _SplitWriter(info, schema, name, block_samples)
    for name in ("train", "test")
  }
  for name, part in parts:
    writers[name].add(part)
  splits = [writer.close() for writer in writers.values()]
  info.set_splits(tfds.core.SplitDict(splits))
  info.write_to_directory(directory)
  return {name: writer.samples for name, writer in writers.items()}


def file_samples(schema: Schema, block_samples: int) -> int:
  """Counts the samples of each file of a split but the last."""
  shapes = [shape[1:] for shape, _ in features(schema).values()]
  block_bytes = 4 * block_samples * sum(np.prod(s, dtype=int) for s in shapes)
  return block_samples * max(1, _FILE_BYTES // block_bytes)


def write_file(
  parts: Iterable[dict[str, np.ndarray]],
  schema: Schema,
  block_samples: int,
  directory: str,
  of: tuple[str, int],
) -> tuple[int, int]:
  """Writes one of the files that `write` would.

  Args:
    parts: the samples of the file; see `file_samples`.
    schema: of the samples.
    block_samples: of a block.
    directory: where the file is written.
    of: its split, and its number in there.

  Returns:
    Its blocks, and their bytes.
  """
  info = _info(schema, directory)
  writer = _SplitWriter(info, schema, of[0], block_samples, first_file=of[1])
  for part in parts:
    writer.add(part)
  writer.close()
  return sum(writer.lengths), writer.bytes


def describe(
  schema: Schema,
  directory: str,
  written: Mapping[str, Sequence[tuple[int, int]]],
) -> None:
  """Completes a directory of files that `write_file` wrote.

  Args:
    schema: of the samples.
    directory: of the files.
    written: what that returned for each file of each split.
  """
  info = _info(schema, directory)
  splits = []
  for name, of in written.items():
    writer = _SplitWriter(info, schema, name, 1)
    writer.lengths = [blocks for blocks, _ in of]
    writer.bytes = sum(size for _, size in of)
    splits.append(writer.close())
  info.set_splits(tfds.core.SplitDict(splits))
  info.write_to_directory(directory)


def _info(schema: Schema, directory: str) -> tfds.core.DatasetInfo:
  """What tensorflow-datasets has to know to read the blocks."""
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name=_NAME,
      version=tfds.core.Version("1.0.0"),
      data_dir=directory,
      module_name="recjax.data.blocks",
    ),
    description="Blocks of samples, in time order; ids are ranks, -1 = none.",
    features=_encoding(schema),
    disable_shuffling=True,
  )
  info.set_file_format("array_record")
  return info


def _encoding(schema: Schema) -> tfds.features.FeaturesDict:
  """How tensorflow-datasets packs a block."""
  return tfds.features.FeaturesDict(
    {
      name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
      for name, (shape, dtype) in features(schema).items()
    }
  )


class _SplitWriter:
  """Packs the samples of a split into blocks, and these into files.

  As tfds.core.SequentialWriter, whose bytes differ from run to run.
  """

  def __init__(
    self,
    info: tfds.core.DatasetInfo,
    schema: Schema,
    split: str,
    block_samples: int,
    first_file: int = 0,
  ):
    self.info, self.split, self.block_samples = info, split, block_samples
    self.first_file = first_file
    self.arrays = features(schema)
    self.serializer = tfds.core.example_serializer.ExampleSerializer(
      info.features.get_serialized_info()
    )
    self.file_blocks = file_samples(schema, block_samples) // block_samples
    self.template = tfds.core.ShardedFileTemplate(
      data_dir=info.data_dir,
      dataset_name=_NAME,
      split=split,
      filetype_suffix="array_record",
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    self.waiting: list[dict[str, np.ndarray]] = []  # in no block yet
    self.samples = self.bytes = 0
    self.lengths: list[int] = []  # blocks of each file
    self.writer: ArrayRecordWriter | None = None

  def add(self, part: dict[str, np.ndarray]) -> None:
    """Takes samples; writes the blocks that are full then."""
    self.waiting.append({a: part[a] for a in self.arrays})
    samples = sum(len(p["label"]) for p in self.waiting)
    self._pack(samples - samples % self.block_samples)

  def close(self) -> tfds.core.splits.SplitInfo:
    """Writes what waits, as a last block; says what there is."""
    self._pack(sum(len(p["label"]) for p in self.waiting))
    self._close_file()
    return tfds.core.splits.SplitInfo(
      name=self.split,
      shard_lengths=self.lengths,
      num_bytes=self.bytes,
      filename_template=self.template,
    )

  def _pack(self, samples: int) -> None:
    """Writes the first of the samples that wait."""
    if not samples:
      return
    joined = {
      a: np.concatenate([p[a] for p in self.waiting]) for a in self.arrays
    }
    for i in range(0, samples, self.block_samples):
      stop = min(i + self.block_samples, samples)
      block = {a: x[i:stop] for a, x in joined.items()}
      self._write(self.info.features.encode_example(block))
    self.waiting = [{a: x[samples:] for a, x in joined.items()}]
    self.samples += samples

  def _write(self, block: dict) -> None:
    # The arrays are a map, whose order differs between runs if it may.
    example = self.serializer.get_tf_example(block).SerializeToString(
      deterministic=True
    )
    if self.writer is None or self.lengths[-1] == self.file_blocks:
      self._close_file()
      path = self.template.sharded_filepath(
        shard_index=self.first_file + len(self.lengths), num_shards=None
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


class Blocks:
  """Reads blocks of a split at random.

  Attributes:
    sizes: [blocks] int64, samples of each.
  """

  def __init__(
    self,
    directory: str,
    schema: Schema,
    split: str,
    *,
    samples: int,
    block_samples: int,
  ):
    """Opens the files.

    Args:
      directory: that `write` wrote.
      schema: of the samples.
      split: 'train' or 'test'.
      samples: of the split.
      block_samples: of all blocks but the last.

    Raises:
      UserError: the files are missing or damaged; reading blocks raises it too.
    """
    self.directory, self._encoding = directory, _encoding(schema)
    with self._reading():
      n = -(-samples // block_samples)
      begins = f"{_NAME}-{split}.array_record-"
      names = sorted(x for x in os.listdir(directory) if x.startswith(begins))
      self.source = ArrayRecordDataSource(
        [pathlib.Path(directory, name) for name in names]
      )
      if len(self.source) != n:
        raise ValueError(
          f"{len(self.source)} blocks of {split} where {samples:,} samples are "
          f"{n}"
        )
      # Only now: there is no room for as many as a forged number asks for.
      self.sizes = np.full(n, block_samples, np.int64)
      self.sizes[-1] = samples - block_samples * (n - 1)

  def __getitem__(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
    """Reads the samples of these blocks, one block after the other."""
    wanted = [int(i) for i in indices]
    with self._reading():
      blocks = [
        self._encoding.deserialize_example_np(x)
        for x in self.source.__getitems__(wanted)
      ]
      for i, block in zip(wanted, blocks, strict=True):
        if any(len(x) != self.sizes[i] for x in block.values()):
          raise ValueError(f"block {i} has not {self.sizes[i]:,} samples")
      joined = {a: np.concatenate([b[a] for b in blocks]) for a in blocks[0]}
    if "dense" not in joined:
      joined["dense"] = np.empty((len(joined["label"]), 0), np.float32)
    return joined

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """Turns what a damaged file leads to into a UserError."""
    try:
      yield
    except Exception as e:  # of protobuf, ArrayRecord, numpy: no common type
      raise UserError(
        f"{self.directory} is damaged ({type(e).__name__}: {e}): delete the"
        " prepared data set and prepare again"
      ) from e
