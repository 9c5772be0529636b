"""Reading the arrays of a checkpoint, block by block."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from recjax import files
from recjax.plan.plan import Group, Tier
from recjax.training.row_checks import sum_of_rows

AT = "at"  # name of the array of changed rows' places in their tier


def _item(path: pathlib.Path) -> dict[str, Any]:
  """Returns where an Orbax item is, by its path: a URL ends at a `#` or `?`."""
  base = {"driver": "file", "path": f"{path}/"}
  return {"driver": "ocdbt", "base": base}


def _open(path: pathlib.Path, name: str) -> ts.TensorStore:
  """Opens an array of an Orbax item, to read."""
  store = _item(path) | {"path": f"{name}/"}
  return ts.open({"driver": "zarr", "kvstore": store}, read=True).result()


def _open_stored(path: pathlib.Path, name: str) -> ts.TensorStore:
  """Opens an array of stored rows, to read."""
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": f"{path / name}/"},
    "fill_missing_data_reads": False,
  }
  return ts.open(spec, read=True).result()


def check_readable(path: pathlib.Path) -> None:
  """Raises where an array of an Orbax item is damaged.

  Orbax reads all arrays at once, and where one fails the others print their
  tracebacks when its event loop is gone.
  """
  suffix = "/.zarray"
  for key in ts.KvStore.open(_item(path)).result().list().result():
    if key.decode().endswith(suffix):
      _open(path, key.decode().removesuffix(suffix)).read().result()


class _Part(NamedTuple):
  """What a process says of its part of an item."""

  sums: dict[str, int]
  rows: dict[str, int]  # of each tier, those that changed


def _part(path: pathlib.Path) -> _Part:
  try:
    found = files.read_json(path)
    whole = lambda x: {str(k): int(v) for k, v in x.items()}
    return _Part(whole(found["sums"]), whole(found["rows"]))
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ValueError(f"{path} is not what was written ({e!r})") from e


class StoredItem:
  """The stored rows of a checkpoint: where they are, and their checksums."""

  def __init__(self, path: pathlib.Path, processes: int):
    """Reads what each of the processes that wrote it says of its part.

    Raises:
      OSError, ValueError: a part is missing or damaged.
    """
    self.path = path
    self.parts = [_part(path / f"part.{i}.json") for i in range(processes)]

  def sum_of(self, array: str) -> int:
    """Returns the checksum of an array, "group.tier.name"."""
    return sum(p.sums.get(array, 0) for p in self.parts) & 0xFFFFFFFF


class Items(NamedTuple):
  """The items of a checkpoint that hold rows."""

  tables: pathlib.Path  # Orbax's, of the tiers in device memory
  stored: StoredItem | None  # of a full save; None where no rows are stored
  changed: StoredItem | None  # of a differential save: rows written since


class Changed(NamedTuple):
  """The rows of a tier that a process has found changed."""

  at: np.ndarray  # [k] int32: where in the tier, ascending
  arrays: dict[str, ts.TensorStore]  # [k, ...]


def changed(
  item: StoredItem, group: Group, tier: Tier, names: Sequence[str] = ()
) -> Iterator[Changed]:
  """Opens what each process that wrote an item found changed of a tier.

  Args:
    item: of a differential save.
    group, tier: as they were stored.
    names: of the arrays to open.

  Raises:
    ValueError: something is missing or damaged.
  """
  key = f"{group.name}.{tier.name}"
  for i, part in enumerate(item.parts):
    count = part.rows.get(key)
    if count is None:
      raise ValueError(f"{item.path} says nothing of {key} in its part {i}")
    if count:
      name = f"{key}.{AT}.{i}"
      at = _open_stored(item.path, name).read().result()
      total = sum_of_rows(at, np.arange(len(at)))
      if len(at) != count or total != part.sums.get(f"{key}.{AT}"):
        raise ValueError(f"{item.path / name} is not what was written")
      yield Changed(
        at, {x: _open_stored(item.path, f"{key}.{x}.{i}") for x in names}
      )


def _take(x: ts.TensorStore, index: np.ndarray) -> np.ndarray:
  """Returns x[index], of an index [m] that is mostly neighbours."""
  lo, hi = int(index.min()), int(index.max()) + 1
  if 2 * len(index) > hi - lo:
    return x[lo:hi].read().result()[index - lo]
  return x[index].read().result()


class StoredGroup:
  """The stored tiers of a group as one row space, in the order of positions."""

  def __init__(self, items: Items, group: Group, names: list[str]):
    """Opens the arrays.

    Args:
      items: of the checkpoint.
      group: as it was stored.
      names: of the arrays: "rows" and slot variables.
    """
    self.names, self._group, self._items = names, group, items
    self._sums: dict[str, int] = {}
    self._arrays = {
      (tier.name, name): self._array(tier, name)
      for tier in group.tiers
      for name in names
    }
    self._changed = {
      tier.name: list(changed(items.changed, group, tier, names))
      for tier in group.stored
      if items.changed is not None
    }

  def _key(self, tier: Tier, name: str) -> str:
    return f"{self._group.name}.{tier.name}.{name}"

  def _array(self, tier: Tier, name: str):
    key = self._key(tier, name)
    if tier in self._group.stored:
      if self._items.stored is None:
        raise ValueError(f"it holds no {key}")
      return _open_stored(self._items.stored.path, key)
    array = _open(self._items.tables, key)
    # Replicas are stored in one piece, which every read would decode.
    return array if tier.axes else array.read().result()

  def read(self, name: str, at: np.ndarray) -> np.ndarray:
    """Returns an array's values at positions `at` [m]; zeros for -1."""
    if np.any(np.diff(at) < 0):  # by far the faster in their order here
      order = np.argsort(at, kind="stable")
      found = self.read(name, at[order])
      values = np.empty_like(found)
      values[order] = found
      return values
    parts = []
    for tier in self._group.tiers:
      mine = np.flatnonzero((at >= tier.first) & (at < tier.stop))
      if len(mine):
        parts.append((mine, self._part(tier, name, at[mine] - tier.first)))
    if len(parts) == 1 and len(parts[0][0]) == len(at):
      return parts[0][1]
    tier = self._group.tiers[0]
    x = self._arrays[tier.name, name]
    tail = x.shape[2 if tier.axes else 1 :]
    values = np.zeros((len(at), *tail), np.dtype(x.dtype.name))
    for mine, part in parts:
      values[mine] = part
    return values

  def _part(self, tier: Tier, name: str, index: np.ndarray) -> np.ndarray:
    """Returns a tier's values at `index` [m], counted in the tier."""
    part = self._values(tier, self._arrays[tier.name, name], index)
    stored = tier in self._group.stored
    key = self._key(tier, name) if stored else f"{self._group.name}.{name}"
    self._add(key, part, tier.first + index)
    for change in self._changed.get(tier.name, ()):
      at = np.searchsorted(change.at, index)
      at = np.minimum(at, len(change.at) - 1)
      hit = np.flatnonzero(change.at[at] == index)
      if len(hit):
        values = _take(change.arrays[name], at[hit])
        self._add(f"{key} (changed)", values, tier.first + index[hit])
        part[hit] = values
    return part

  def _add(self, key: str, values: np.ndarray, at: np.ndarray) -> None:
    self._sums[key] = self._sums.get(key, 0) + sum_of_rows(values, at)

  def _values(self, tier: Tier, x, index: np.ndarray) -> np.ndarray:
    if not tier.axes:
      return x[index]
    n = x.shape[1]  # of a full save, which may have had other owners
    local, owner = np.divmod(index, n)
    a, b = int(local[0]), int(local[-1]) + 1
    lo, hi = int(owner.min()), int(owner.max()) + 1
    within = (local - a) * (hi - lo) + owner - lo
    # Neighbours, or a process's owners of the same mesh: by far the faster.
    if np.all(np.diff(index) > 0) and 2 * len(index) > (b - a) * (hi - lo):
      part = x[a:b, lo:hi].read().result()
      part = part.reshape(-1, *part.shape[2:])
      first, stop = int(within[0]), int(within[-1]) + 1
      alone = stop - first == len(within)
      return part[first:stop] if alone else part[within]
    return x[local, owner].read().result()

  def sums(self) -> dict[str, int]:
    """Returns the checksums of all that was read.

    By "group.array" of the tiers in device memory together, and by
    "group.tier.array" of each stored one, those that changed apart.
    """
    return {k: v & 0xFFFFFFFF for k, v in self._sums.items()}

  def wanted(self, sums: dict[str, int]) -> dict[str, int]:
    """Returns what `sums` must be; sums: of the tiers in device memory."""
    want = {}
    for name in self.names:
      key = f"{self._group.name}.{name}"
      if self._group.resident:
        want[key] = sums[key]
      for tier in self._group.stored:
        key = self._key(tier, name)
        assert self._items.stored is not None
        want[key] = self._items.stored.sum_of(key)
        if self._items.changed is not None:
          want[f"{key} (changed)"] = self._items.changed.sum_of(key)
    return want
