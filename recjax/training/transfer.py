"""Stored rows between the host store and the devices of this process."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recjax.embedding.coalesce import NONE
from recjax.embedding.host_store import HostStore
from recjax.embedding.optimizers import TierArrays
from recjax.mesh import owners_here
from recjax.schema import AXES


class Devices:
  """This process's devices, as owners of a mesh's rows."""

  def __init__(self, mesh: Mesh):
    self.owners = owners_here(mesh)
    self._of_mesh = mesh.devices.size
    self._devices = [mesh.devices.flat[o] for o in self.owners]
    self._place = NamedSharding(mesh, PartitionSpec(None, AXES))

  # ---- There

  def put(self, parts: Sequence[np.ndarray]) -> jax.Array:
    """Puts each owner's part [V, ...] onto its device: [V, n, ...]."""
    shards = [
      jax.device_put(x[:, None], d)
      for x, d in zip(parts, self._devices, strict=True)
    ]
    v, _, *tail = shards[0].shape
    return jax.make_array_from_single_device_arrays(
      (v, self._of_mesh, *tail), self._place, shards
    )

  def put_lists(self, lists: Sequence[np.ndarray], v: int) -> jax.Array:
    """Puts each owner's list [<= v] int32, padded with NONE: [v, n]."""
    padded = np.full((len(lists), v), NONE)
    for row, x in zip(padded, lists, strict=True):
      row[: len(x)] = x
    return self.put(padded)

  def fetch(
    self, store: HostStore, group: str, lists: Sequence[np.ndarray], v: int
  ) -> TierArrays:
    """Gathers the owners' stored rows, and puts them onto their devices.

    Args:
      store: that has them.
      group: its name.
      lists: of each owner the local rows, ascending, at most v.
      v: rows that a device has room for; those past its list are undefined.

    Returns:
      [v, n, ...] on the mesh.
    """
    stored = store.groups[group]
    # New buffers each time: a device that is a CPU may keep them as they are.
    # Copies to accelerators go through XLA's pool of pinned memory.
    make = lambda x: np.empty((len(lists), v, *x.shape[1:]), x.dtype)
    out = jax.tree.map(make, stored.parts[0])
    for k, local in enumerate(lists):
      records, mine = stored.records_of(k, local), _part(out, k)

      def read(at, records=records, mine=mine):
        stored.read(records[at], _part(mine, at))

      store.spread(read, len(records))
    return jax.tree.map(self.put, out)

  # ---- And back

  def lists(self, rows: jax.Array) -> list[np.ndarray]:
    """Returns each owner's list from [V, n], without its padding."""
    parts = (x[:, 0] for x in self._parts(rows))
    return [x[: np.searchsorted(x, NONE)] for x in parts]

  def write_back(
    self,
    store: HostStore,
    group: str,
    lists: Sequence[np.ndarray],
    arrays: TierArrays,
  ) -> None:
    """Writes the owners' rows [V, n, ...] into the store.

    Waits for them. lists: of each owner the local rows, ascending.
    """
    stored = store.groups[group]
    parts = jax.tree.map(self._parts, arrays)
    for k, local in enumerate(lists):
      records = stored.records_of(k, local)
      mine = TierArrays(
        parts.rows[k][:, 0], {n: x[k][:, 0] for n, x in parts.slots.items()}
      )

      def write(at, records=records, mine=mine):
        stored.write(records[at], _part(mine, at))

      store.spread(write, len(records))

  def _parts(self, x: jax.Array) -> list[np.ndarray]:  # [V, n, ...]
    """Returns each owner's part [V, 1, ...] in host memory."""
    of = {s.device: s.data for s in x.addressable_shards}
    return [np.asarray(of[d]) for d in self._devices]


def _part(arrays: TierArrays, at) -> TierArrays:
  return jax.tree.map(lambda x: x[at], arrays)
