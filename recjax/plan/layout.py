"""Which device and local row a rank lives at; padding of shards; turns.

A tier's rows are cyclic in rank: rank r of it is local row r // n of owner
r % n. Where tables are table-wise, each owner first takes its tables' rows, and
the others take turns among the owners that have room, in rank order.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np


def _bit_length(x) -> np.ndarray:
  """Bits of integers below 2^53, as int.bit_length counts them."""
  return np.frexp(np.asarray(x, np.float64))[1]


def shard_rows(rows, devices: int):
  """A device's part of a tier's rows, padded by less than 1/256.

  The padded size has a large power of two as a factor, so that a checkpoint
  can store a shard in equal chunks.

  Args:
    rows: of the tier; a number or an array.
    devices: that share them out.
  """
  each = -(-rows // devices)
  if isinstance(each, np.ndarray):
    unit = 1 << np.maximum(0, _bit_length(each) - 9).astype(np.int64)
  else:
    unit = 1 << max(0, int(each).bit_length() - 9)
  return -(-each // unit) * unit


def most_sharded(rows: int, hot, fit: int, devices: int):
  """Rows that may be warm where `fit` rows fit a device and `hot` are hot."""
  room = np.asarray(fit - hot, np.int64)
  unit = 1 << np.maximum(0, _bit_length(room) - 9).astype(np.int64)
  return np.minimum(rows - hot, room // unit * unit * devices)


# ---- Turns


def room(warm: int, devices: int) -> np.ndarray:  # [n] int64
  """Positions of the warm tier that each owner holds."""
  return (warm - np.arange(devices) + devices - 1) // devices


def turns(room: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Lets owners take one row after the other, each while it has room.

  Args:
    room: [n] rows that an owner can still take.

  Returns:
    (starts [J + 1] int64, J arrays of owners): rows [starts[j], starts[j + 1])
    go to the j-th owners in turn.
  """
  levels = np.unique(np.append(room, 0))
  members = [np.flatnonzero(room > level) for level in levels[:-1]]
  sizes = np.diff(levels) * [len(m) for m in members]
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), members


def take_turns(
  starts: np.ndarray, members: Sequence[np.ndarray], first: int, count: int
) -> np.ndarray:
  """The owners of rows first, first + 1, ...: [count] int16; see `turns`."""
  owner = np.empty(count, np.int16)
  for j, of in enumerate(members):
    a, b = max(int(starts[j]), first), min(int(starts[j + 1]), first + count)
    if a < b:
      of = np.roll(of, (int(starts[j]) - a) % len(of)).astype(np.int16)
      owner[a - first : b - first] = np.tile(of, -(-(b - a) // len(of)))[
        : b - a
      ]
  return owner


def layers(counts: Iterable[int]) -> list[tuple[int, int, tuple[int, ...]]]:
  """Splits columns by who has them, owner o having the first counts[o].

  Returns:
    (start, stop, owners that have columns [start, stop)), by rising start.
  """
  counts = tuple(counts)
  return [
    (a, z, tuple(o for o, c in enumerate(counts) if c >= z))
    for a, z in itertools.pairwise(sorted({0, *counts}))
  ]
