"""Reading the arrays of a checkpoint, block by block."""

import pathlib

import numpy as np
import tensorstore as ts

from recjax.plan.plan import Group, Tier


def _open(path: pathlib.Path, name: str) -> ts.TensorStore:
  """Opens an array of an Orbax item, to read."""
  store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
  return ts.open({"driver": "zarr", "kvstore": store}, read=True).result()


def check_readable(path: pathlib.Path) -> None:
  """Raises where an array of an Orbax item is damaged.

  Orbax reads all arrays at once, and where one fails the others print their
  tracebacks when its event loop is gone.
  """
  store = {"driver": "ocdbt", "base": f"file://{path}/"}
  suffix = "/.zarray"
  for key in ts.KvStore.open(store).result().list().result():
    if key.decode().endswith(suffix):
      _open(path, key.decode().removesuffix(suffix)).read().result()


def _sum_of_words(x: np.ndarray) -> int:
  """Returns the wrapping sum of an array's bits: damage changes it."""
  words = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
  return int(words.sum(dtype=np.uint64)) & 0xFFFFFFFF


class StoredGroup:
  """The stored tiers of a group as one row space, in the order of positions."""

  def __init__(self, path: pathlib.Path, group: Group, names: list[str]):
    """Opens the arrays.

    Args:
      path: of the Orbax item.
      group: as it was stored.
      names: of the arrays: "rows" and slot variables.
    """
    self.names, self._group = names, group
    self._sums = dict.fromkeys(names, 0)
    self._arrays = {
      (tier.name, name): self._array(path, tier, name)
      for tier in group.tiers
      for name in names
    }

  def _array(self, path, tier: Tier, name: str):
    array = _open(path, f"{self._group.name}.{tier.name}.{name}")
    # Replicas are stored in one piece, which every read would decode.
    return array if tier.axes else array.read().result()

  def read(self, name: str, at: np.ndarray) -> np.ndarray:
    """Returns an array's values at positions `at` [m]; zeros for -1."""
    parts = []
    for tier in self._group.tiers:
      mine = np.flatnonzero((at >= tier.first) & (at < tier.stop))
      if len(mine):
        parts.append((mine, self._part(tier, name, at[mine] - tier.first)))
    if len(parts) == 1 and len(parts[0][0]) == len(at):
      values = parts[0][1]
    else:
      tier = self._group.tiers[0]
      x = self._arrays[tier.name, name]
      tail = x.shape[2 if tier.axes else 1 :]
      values = np.zeros((len(at), *tail), np.dtype(x.dtype.name))
      for mine, part in parts:
        values[mine] = part
    self._sums[name] += _sum_of_words(values)
    return values

  def _part(self, tier: Tier, name: str, index: np.ndarray) -> np.ndarray:
    """Returns a tier's values at `index` [m], counted in the tier."""
    x, n = self._arrays[tier.name, name], tier.owners
    if not tier.axes:
      return x[index]
    a, b = int(index[0]), int(index[-1]) + 1
    if np.array_equal(index, np.arange(a, b)):  # by far the faster
      part = x[a // n : -(-b // n)].read().result()
      return part.reshape(-1, *part.shape[2:])[a - a // n * n :][: b - a]
    return x[index // n, index % n].read().result()

  def sums(self) -> dict[str, int]:
    """Returns the wrapping sum of the words of each array, as far as read."""
    return {k: v & 0xFFFFFFFF for k, v in self._sums.items()}
