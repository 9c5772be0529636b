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
from jax.sharding import Mesh

from recjax.embedding import tables as tables_lib
from recjax.embedding import visits
from recjax.embedding.embedding import Embedding
from recjax.embedding.host_store import HostStore
from recjax.embedding.optimizers import TierArrays
from recjax.mesh import batch_sharding
from recjax.training.transfer import Devices

Room = dict[str, tuple[int, int]]  # V by group, and rows asked of an owner


class Fetched(NamedTuple):
  """A batch's visitors, by group."""

  lists: visits.Lists  # local rows, of this process's owners
  arrays: dict[str, TierArrays]  # [V, n, ...] on the mesh
  stored: dict[str, jax.Array]
  forwarded: dict[str, jax.Array]


class Seen(NamedTuple):
  """What the host finds out of a batch's ids."""

  ids: np.ndarray  # [B, S] int32, translated
  lists: visits.Lists  # of this process's owners
  room: Room

  @property
  def rows(self) -> dict[str, int]:
    """V by group."""
    return {k: v for k, (v, _) in self.room.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Visit:
  """The stored rows of a batch, on their way."""

  serial: int
  raw: Any  # [B, S] int32 ids as they came
  ids: jax.Array  # [B, S] int32, translated, on the mesh
  room: Room
  need: dict[str, jax.Array] | None  # as `visits.Asked` has it
  after: int  # serial of the batch that is trained before, as it seems; -1
  # Steps whose visitors the store has back when it is read, and its version.
  seen: tuple[int, int]
  fetched: Future  # of Fetched; None where the room was too small

  @property
  def rows(self) -> dict[str, int]:
    """V by group."""
    return {k: v for k, (v, _) in self.room.items()}


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
    visitors = {g.name: g.group.visitors for g in embedding.visited}
    self._room = {k: (t.shard_rows, t.capacity) for k, t in visitors.items()}
    self._devices = Devices(mesh)
    self._steps = 0  # trained so far
    self._version = store.version  # of the store that they were trained with
    self._newest: Visit | None = None  # that was asked for
    self._last: Visit | None = None  # that was trained
    self._serials = itertools.count()
    self._updated: dict[str, TierArrays] = {}  # its visitors
    self._nobody: dict[str, TierArrays] = {}
    self._programs: dict[Any, Callable] = {}

  # ---- Visit

  def see(self, ids: np.ndarray) -> Seen:
    """Finds out which stored rows a batch's ids [B, S] int32 use.

    Changes nothing: any thread may call it.
    """
    translated, lists = visits.on_host(ids, self.embedding)
    need = {k: (max(map(len, of)), 0) for k, of in lists.items()}
    here = self._devices.owners
    mine = {k: [of[o] for o in here] for k, of in lists.items()}
    return Seen(translated, mine, self._enough(self._room, need))

  def visit(self, ids) -> Visit:
    """Begins to fetch the stored rows of a batch's ids.

    Args:
      ids: what was seen of them; or [B, S] int32 on the mesh.
    """
    after = self._newest
    if self.on_host:
      seen = ids if isinstance(ids, Seen) else self.see(jax.device_get(ids))
      placed = jax.device_put(seen.ids, batch_sharding(self.mesh))
      visit = self._begin(None, placed, seen.room, seen.lists, after)
      self._grow(visit.room)
    else:
      visit = self._ask(ids, self._room, after)
    self._newest = visit
    return visit

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
      (self._steps, self.store.version),
      self.store.submit(fetch),
    )

  def _enough(self, room: Room, need: Room) -> Room:
    """Doubles all rooms until the need [rows, rows asked] fits.

    Of one group alone, there would be more sizes to compile a step for.
    """
    most = {
      g.name: sum(-(-t.rows // t.owners) for t in g.group.stored)
      for g in self.embedding.visited
    }
    times, short = 1, True
    while short:
      found = {
        k: tuple(min(times * size, max(size, most[k])) for size in of)
        for k, of in room.items()
      }
      short = any(
        size < min(wanted, most[k])
        for k, of in found.items()
        for size, wanted in zip(of, need[k], strict=True)
      )
      times *= 2
    return found

  def _grow(self, room: Room) -> None:
    """Gives the batches to come no less: a step is compiled for each room."""
    self._room = {
      k: tuple(map(max, self._room[k], of)) for k, of in room.items()
    }

  # ---- Fetch: in the queue

  def _fetch(self, found, room, after: Visit | None) -> Fetched | None:
    if isinstance(found, visits.Asked):
      need = jax.device_get(found.need)
      if any(np.any(need[k] > room[k]) for k in room):
        return None
      lists = {k: self._devices.lists(x) for k, x in found.rows.items()}
    else:
      lists = found
    before = after and after.fetched.result()
    arrays, stored = {}, {}
    for k, of in lists.items():
      arrays[k] = self._devices.fetch(self.store, k, of, room[k][0])
      stored[k] = self._devices.put_lists(of, room[k][0])
    return Fetched(lists, arrays, stored, self._matches(before, lists, room))

  def _matches(
    self, before: Fetched | None, lists: visits.Lists, room
  ) -> dict[str, jax.Array]:
    """Returns where each visitor was before, [V, n] int32; NONE = nowhere."""
    found = {}
    for k, of in lists.items():
      was = before.lists[k] if before else [x[:0] for x in of]
      at = [visits.forwarded(a, b) for a, b in zip(was, of, strict=True)]
      found[k] = self._devices.put_lists(at, room[k][0])
    return found

  # ---- Step

  def ready(self, visit: Visit, late: int = 1) -> tuple[Visit, Fetched]:
    """Waits for a visit; begins anew where its room was too small.

    Where the store was read too early, it is read again: before it was filled
    anew, or had all visitors back but those of the last `late` steps.
    """
    if self._version != self.store.version:  # no row is newer than its own
      self._version, self._last, self._updated = self.store.version, None, {}
    fetched = visit.fetched.result()
    while fetched is None:
      need = {
        k: tuple(map(int, x)) for k, x in jax.device_get(visit.need).items()
      }
      room = self._enough(visit.room, need)
      self._grow(room)
      visit = self._ask(visit.raw, room, self._last)
      fetched = visit.fetched.result()
    steps, version = visit.seen
    if version != self._version or steps + late < self._steps:
      visit = self._begin(
        visit.raw, visit.ids, visit.room, fetched.lists, self._last
      )
      fetched = visit.fetched.result()
    return visit, fetched

  def beside(self, visit: Visit, fetched: Fetched) -> dict[str, visits.Beside]:
    """Returns what the step after the last one needs beside the rows."""
    forwarded = fetched.forwarded
    if visit.after != (self._last.serial if self._last else -1):
      last = self._last and self._last.fetched.result()
      forwarded = self._matches(last, fetched.lists, visit.room)
    return {
      k: visits.Beside(
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
      zeros = lambda x: np.zeros((x.shape[0], *x.shape[2:]), x.dtype)
      self._nobody[group] = jax.tree.map(
        lambda x: self._devices.put([zeros(x)] * len(self._devices.owners)),
        shapes,
      )
    return self._nobody[group]

  def returned(self, visit: Visit, updated: dict[str, TierArrays]) -> None:
    """Gives the visitors of a step back to the store, when they are there."""
    self._steps, self._last, self._updated = self._steps + 1, visit, updated
    lists = visit.fetched.result().lists
    self.store.write(functools.partial(self._return, lists, updated))

  def _return(self, lists, updated: dict[str, TierArrays]) -> None:
    for x in jax.tree.leaves(updated):
      x.copy_to_host_async()  # all at once
    for group, arrays in updated.items():
      self._devices.write_back(self.store, group, lists[group], arrays)
