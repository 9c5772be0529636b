"""Which tables their owners pool, and what each owner then holds.

A pooled table has one owner: the others send it their bags' ids and get one
vector a bag back (recjax/pooled.py), which wins for long bags that seldom
share rows. The owner's shard has room for a part of the warm tier only; rows
of the table that it cannot hold travel one by one, as all others do.
"""

import numpy as np


def room(warm: int, devices: int) -> np.ndarray:  # [n] int64
  """Positions of the warm tier that each owner holds."""
  return (warm - np.arange(devices) + devices - 1) // devices


def turns(room: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Owners take one row after the other, each while it has room.

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


def take_turns(starts, members, first: int, count: int) -> np.ndarray:
  """[count] int64: the owners of rows first, first + 1, ...; see `turns`."""
  owner = np.empty(count, np.int64)
  for j, of in enumerate(members):
    a, b = max(int(starts[j]), first), min(int(starts[j + 1]), first + count)
    if a < b:
      owner[a - first : b - first] = of[np.arange(a - starts[j],
                                                  b - starts[j]) % len(of)]  # fmt: skip
  return owner
