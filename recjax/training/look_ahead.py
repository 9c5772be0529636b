"""Visitors of a step: fetched one batch ahead, trained, and written back.

While the devices compute batch t, the host does what batch t + 1 needs:

  visit     find which stored rows it uses (embedding/visits.py)
  fetch     gather their rows and slot variables, and put them onto the owners'
            devices
  step      trains them as a small sharded tier. Rows that batch t updated are
            taken from its visitors, which the owners still hold: the store may
            have been read before they were written
  return    write the updated visitors into the store

Fetches and returns are jobs of the store's queue: fetch(t + 1) comes after
return(t - 1), so that only the rows of batch t are to be forwarded, and before
return(t). A batch that was not fetched ahead, or too early, is fetched anew,
after all that was returned: slower, never wrong.

Where a batch uses more stored rows than the visitors' tier has room for, the
step compiled for twice the room runs, on all processes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recjax.embedding import tables as tables_lib
from recjax.embedding import visits
from recjax.embedding.coalesce import NONE
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.host_store import HostStore
from recjax.embedding.tables import TierArrays
from recjax.mesh import batch_sharding, owners_here
from recjax.schema import AXES


class Beside(NamedTuple):
  """What a step needs of a group's visitors beside their rows, on the mesh."""

  stored: jax.Array  # [V, n] int32: their local rows in the store
  forwarded: jax.Array  # [V, n] int32: places in `before`, NONE = fetched
  before: TierArrays  # [V', n, ...]: the visitors of the step before, updated


class Fetched(NamedTuple):
  """A batch's visitors, by group."""

  lists: visits.Lists  # local rows, of this process's owners
  arrays: dict[str, TierArrays]  # [V, n, ...] on the mesh
  stored: dict[str, jax.Array]
  forwarded: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Visit:
  """The stored rows of a batch, on their way."""

  serial: int
  raw: Any  # [B, S] int32 ids as they came
  ids: jax.Array  # [B, S] int32, translated, on the mesh
  room: dict[str, tuple[int, int]]  # V by group, and rows asked of an owner
  need: dict[str, jax.Array] | None  # as `visits.Asked` has it
  after: int  # serial of the batch that is trained before, as it seems; -1
  seen: int  # steps whose visitors the store has back when it is read
  fetched: Future  # of Fetched; None where the room was too small


class LookAhead:
  """The visits of a run: all that changes from one batch to the next."""

  def __init__(
    self, embedding: Embedding, mesh: Mesh, store: HostStore, on_host: bool
  ):
    """Begins before the first batch.

    Args:
      embedding: whose rows visit; the room is its visitors' tiers'.
      mesh: of the plan.
      store: of this process's owners.
      on_host: whether NumPy finds out what visits, or the devices do.
    """
    self.embedding, self.mesh, self.store = embedding, mesh, store
    self.on_host = on_host
    devices = mesh.devices.flat
    self._devices = [(o, devices[o]) for o in owners_here(mesh)]
    self._place = NamedSharding(mesh, PartitionSpec(None, AXES))
    self._steps = 0  # trained so far
    self._newest: Visit | None = None  # that was asked for
    self._last: Visit | None = None  # that was trained
    self._serials = itertools.count()
    self._updated: dict[str, TierArrays] = {}  # its visitors
    self._nobody: dict[str, TierArrays] = {}
    self._returns: list[Future] = []
    self._programs: dict[Any, Callable] = {}

  # ---- Visit

  def visit(self, ids) -> Visit:
    """Begins to fetch the stored rows of a batch's ids.

    Args:
      ids: [B, S] int32, of NumPy or on the mesh.
    """
    visitors = {g.name: g.group.visitors for g in self.embedding.visited}
    room = {k: (t.shard_rows, t.capacity) for k, t in visitors.items()}
    after = self._newest
    if self.on_host:
      translated, lists = visits.on_host(np.asarray(ids), self.embedding)
      need = {k: (max(map(len, of)), 0) for k, of in lists.items()}
      mine = {k: [of[o] for o, _ in self._devices] for k, of in lists.items()}
      placed = jax.device_put(translated, batch_sharding(self.mesh))
      room = self._enough(room, need)
      self._newest = self._begin(ids, placed, room, mine, after)
    else:
      self._newest = self._ask(ids, room, after)
    return self._newest

  def _ask(self, ids, room, after: Visit | None) -> Visit:
    """Lets the devices find out what visits."""
    key = tuple(sorted(room.items()))
    if key not in self._programs:
      self._programs[key] = visits.make_on_devices(
        self.embedding, self.mesh, room
      )
    asked = self._programs[key](ids)
    return self._begin(ids, asked.ids, room, asked, after)

  def _begin(self, raw, ids, room, found, after) -> Visit:
    """Puts the fetch into the queue. found: lists, or visits.Asked."""
    fetch = functools.partial(self._fetch, found, room, after)
    return Visit(
      next(self._serials),
      raw,
      ids,
      room,
      found.need if isinstance(found, visits.Asked) else None,
      after.serial if after else -1,
      self._steps,
      self.store.submit(fetch),
    )

  def _enough(self, room, need) -> dict[str, tuple[int, int]]:
    """Doubles rooms until the need [rows, rows asked] fits."""
    found = {}
    for g in self.embedding.visited:
      most = sum(-(-t.rows // t.owners) for t in g.group.stored)
      sizes = []
      for size, wanted in zip(room[g.name], need[g.name], strict=True):
        while size < min(wanted, most):
          size = min(2 * size, most)
        sizes.append(size)
      found[g.name] = tuple(sizes)
    return found

  # ---- Fetch: in the queue

  def _fetch(self, found, room, after: Visit | None) -> Fetched | None:
    if isinstance(found, visits.Asked):
      need = jax.device_get(found.need)
      if any(np.any(need[k] > room[k]) for k in room):
        return None
      lists = {k: self._lists_of(x) for k, x in found.rows.items()}
    else:
      lists = found
    before = after and after.fetched.result()
    arrays, stored, forwarded = {}, {}, {}
    for g in self.embedding.visited:
      v, of = room[g.name][0], lists[g.name]
      arrays[g.name] = self._gather(g, of, v)
      stored[g.name] = self._padded(of, v)
      forwarded[g.name] = self._padded(self._matches(before, g.name, of), v)
    return Fetched(lists, arrays, stored, forwarded)

  def _lists_of(self, rows: jax.Array) -> list[np.ndarray]:
    """Returns the rows of this process's owners, without padding."""
    shards = {
      s.device: np.asarray(s.data)[:, 0] for s in rows.addressable_shards
    }
    mine = [shards[d] for _, d in self._devices]
    return [x[: np.searchsorted(x, NONE)] for x in mine]

  def _gather(self, g: EmbeddingGroup, lists, v: int) -> TierArrays:
    """Gathers each owner's visitors, and puts them onto its device."""
    stored, parts = self.store.groups[g.name], []
    for k, (_, device) in enumerate(self._devices):
      # New ones each time: a device that is a CPU may keep them as they are.
      out = jax.tree.map(
        lambda x: np.empty((v, *x.shape[1:]), x.dtype), stored.parts[0]
      )
      records = stored.records_of(k, lists[k])

      def read(at, records=records, out=out):
        stored.read(records[at], jax.tree.map(lambda x: x[at], out))

      self.store.spread(read, len(records))
      put = lambda x, d=device: jax.device_put(x[:, None], d)
      parts.append(jax.tree.map(put, out))
    return jax.tree.map(self._joined, *parts)

  def _joined(self, *shards) -> jax.Array:  # [V, 1, ...] -> [V, n, ...]
    v, _, *tail = shards[0].shape
    shape = (v, self.embedding.plan.devices, *tail)
    return jax.make_array_from_single_device_arrays(
      shape, self._place, list(shards)
    )

  def _padded(self, lists, v: int) -> jax.Array:
    """Puts each owner's list [<= v] onto its device, padded with NONE."""
    parts = []
    for (_, device), x in zip(self._devices, lists, strict=True):
      padded = np.full((v, 1), NONE)
      padded[: len(x), 0] = x
      parts.append(jax.device_put(padded, device))
    return self._joined(*parts)

  def _matches(self, before: Fetched | None, group: str, lists):
    """Returns where each row was a visitor before; NONE = nowhere."""
    if before is None:
      return [np.full(len(x), NONE) for x in lists]
    pairs = zip(before.lists[group], lists, strict=True)
    return [visits.forwarded(a, b) for a, b in pairs]

  # ---- Step

  def ready(self, visit: Visit, late: int = 1) -> tuple[Visit, Fetched]:
    """Waits for a visit; begins anew where its room was too small.

    Where the store was read too early, it is read again: before it had all
    visitors back but those of the last `late` steps.
    """
    fetched = visit.fetched.result()
    while fetched is None:
      need = {
        k: tuple(map(int, x)) for k, x in jax.device_get(visit.need).items()
      }
      room = self._enough(visit.room, need)
      visit = self._ask(visit.raw, room, self._last)
      fetched = visit.fetched.result()
    if visit.seen + late < self._steps:
      visit = self._begin(
        visit.raw, visit.ids, visit.room, fetched.lists, self._last
      )
      fetched = visit.fetched.result()
    return visit, fetched

  def beside(self, visit: Visit, fetched: Fetched) -> dict[str, Beside]:
    """Returns what the step after the last one needs beside the rows."""
    forwarded = fetched.forwarded
    if visit.after != (self._last.serial if self._last else -1):
      last = self._last and self._last.fetched.result()
      forwarded = {
        k: self._padded(self._matches(last, k, of), visit.room[k][0])
        for k, of in fetched.lists.items()
      }
    return {
      k: Beside(
        fetched.stored[k],
        forwarded[k],
        self._updated.get(k) or self._nobody_before(k),
      )
      for k in fetched.arrays
    }

  def _nobody_before(self, group: str) -> TierArrays:
    """Returns visitors before the first step, to whom nothing points."""
    if group not in self._nobody:
      (g,) = (g for g in self.embedding.visited if g.name == group)
      shapes = tables_lib.tier_shapes(g, g.group.visitors)

      def zeros(x):
        shard = np.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype)
        shards = [jax.device_put(shard, d) for _, d in self._devices]
        return self._joined(*shards)

      self._nobody[group] = jax.tree.map(zeros, shapes)
    return self._nobody[group]

  def returned(self, visit: Visit, updated: dict[str, TierArrays]) -> None:
    """Gives the visitors of a step back to the store, when they are there."""
    for x in jax.tree.leaves(updated):
      x.copy_to_host_async()
    self._steps, self._last, self._updated = self._steps + 1, visit, updated
    lists = visit.fetched.result().lists
    done = self.store.submit(functools.partial(self._return, lists, updated))
    self._returns = [f for f in self._returns if not f.done() or f.result()]
    self._returns.append(done)

  def _return(self, lists, updated: dict[str, TierArrays]) -> None:
    for group, arrays in updated.items():
      stored = self.store.groups[group]
      for k, (_, device) in enumerate(self._devices):
        values = jax.tree.map(
          lambda x, d=device: np.asarray(_shard(x, d))[:, 0], arrays
        )
        records = stored.records_of(k, lists[group][k])

        def write(at, records=records, values=values):
          stored.write(records[at], jax.tree.map(lambda x: x[at], values))

        self.store.spread(write, len(records))

  def flush(self) -> None:
    """Waits until the store has all visitors back."""
    for f in self._returns:
      f.result()
    self._returns = []


def _shard(x: jax.Array, device: jax.Device) -> jax.Array:
  """Returns a device's part of an array."""
  return next(s.data for s in x.addressable_shards if s.device == device)
