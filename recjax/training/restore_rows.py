"""Rows of a checkpoint, streamed by blocks into tables and the host store.

Whatever tier, mesh and owner a row had: it is read by its rank and goes where
it lives now (row_sources.py). One that was not there gets its first values.
Rows in device memory are read by every process, those of the host store by the
process that owns them.
"""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from recjax import distributed
from recjax.embedding import host_store
from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.host_store import HostStore, StoredRows
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.snapshot import Bits
from recjax.embedding.tables import Tables
from recjax.frequency import Profile
from recjax.plan.plan import Group, Plan
from recjax.training import checkpoint_reader, row_sources
from recjax.training.checkpoint_reader import Items, StoredGroup, StoredItem
from recjax.training.row_sources import Carried, Source

BLOCK_BYTES = 16 << 20  # rows streamed at a time while restoring


class Into(NamedTuple):
  """Where rows are restored to."""

  embedding: Embedding
  mesh: Mesh
  tables: Tables  # donated
  store: HostStore | None


def open_items(folder: pathlib.Path, meta: dict, full: dict | None) -> Items:
  """Opens the items of a checkpoint that hold rows.

  Args:
    folder: of the step.
    meta: of the step.
    full: of the full save that the step needs beside its own; None = none.

  Raises:
    OSError, ValueError: something is missing, damaged or of another plan.
  """
  about, plan = meta["stored"], Plan.from_json(meta["plan"])
  if not about["processes"]:
    return Items(folder / "tables", None, None)
  own = StoredItem(folder / "stored", about["processes"])
  if full is None:
    return Items(folder / "tables", own, None)
  base = folder.parent / str(about["full"])
  if layout_of(Plan.from_json(full["plan"])) != layout_of(plan):
    raise ValueError(f"it needs {base}, where other rows are stored")
  stored = StoredItem(base / "stored", full["stored"]["processes"])
  return Items(folder / "tables", stored, own)


def layout_of(plan: Plan) -> list:
  """Returns which positions a plan stores, and in which tiers."""
  return [
    (g.name, g.padding_rows, [(t.name, t.first, t.rows) for t in g.stored])
    for g in plan.groups
  ]


def restore(
  items: Items,
  meta: dict,
  into: Into,
  profile: Profile | None,
  carried: Carried | None = None,
) -> Tables:
  """Streams all rows to where they live now, and checks them.

  Args:
    items: of the checkpoint.
    meta: of the checkpoint.
    into: the tables and the store; both hold anything where this raises.
    profile: of all rows; needed where a plan has table-wise tables.
    carried: where the checkpoint is of another vocabulary.

  Returns:
    The tables.

  Raises:
    OSError, ValueError: something is damaged.
  """
  plan, embedding = Plan.from_json(meta["plan"]), into.embedding
  found = _groups(items, plan, embedding)
  sources = row_sources.sources(plan, embedding.plan, profile, carried)

  def rows(group: str, at: np.ndarray) -> TierArrays:  # positions now [m]
    of, source = embedding.group(group), sources[group]
    ranks = source.ranks(at)
    places = source.places(ranks)
    values = _read(found.get(group), of, places)
    if carried is None:
      return values
    return _with_fresh(values, of, ranks, places, carried.init_scale)

  tables = tables_lib.fill(
    into.tables,
    embedding,
    into.mesh,
    block_rows(embedding),
    lambda group, first, stop: rows(group, np.arange(first, stop)),
  )
  for g in embedding.groups:
    if carried is not None and g.name in found:
      _read_others(found[g.name], plan.group(g.name), g, sources[g.name])
  everywhere = _sums(found)
  if into.store:
    into.store.flush()
    for g in embedding.visited:
      _fill(into.store.groups[g.name], _row_bytes(g), rows)
    into.store.version += 1
  _check_sums(found, everywhere, meta["checksums"])
  return tables


# ---- Reading


def _read(
  found: StoredGroup | None, g: EmbeddingGroup, places: np.ndarray
) -> TierArrays:
  """Reads rows and slot variables at positions [m]; zeros for -1."""
  if found is None:  # a group that was not there
    shape = {True: (len(places), g.dim), False: (len(places),)}
    slots = {
      k: np.zeros(shape[wide], np.float32)
      for k, wide in g.optimizer.slots.items()
    }
    return TierArrays(np.zeros(shape[True], jnp.dtype(g.group.dtype)), slots)
  return TierArrays(
    found.read("rows", places),
    {k: found.read(k, places) for k in g.optimizer.slots},
  )


def _with_fresh(
  values: TierArrays,
  g: EmbeddingGroup,
  ranks: np.ndarray,
  places: np.ndarray,
  scale: float,
) -> TierArrays:
  """Gives rows [m] that were not there what they would first have."""
  fresh = (ranks >= 0) & (places < 0)
  if not fresh.any():
    return values
  make = host_store.first_rows(g.dim, scale, values.rows.dtype)
  # Of all: what is compiled has the shape of a block.
  made = np.asarray(make(ranks.astype(np.int32), np.uint32(g.seed)))
  return values._replace(rows=np.where(fresh[:, None], made, values.rows))


def _read_others(
  found: StoredGroup, then: Group, g: EmbeddingGroup, source: Source
) -> None:
  """Reads the rows that do not go on, as the checksums are of all."""
  goes_on, step = source.goes_on(then.rows), BLOCK_BYTES // _row_bytes(g)
  for first in range(0, then.rows, step):
    at = first + np.flatnonzero(~goes_on[first : first + step])
    if len(at):
      for name in found.names:
        found.read(name, at)


def check(items: Items, meta: dict, embedding: Embedding) -> None:
  """Reads all rows, and checks them; of all processes, on this one.

  Raises:
    OSError, ValueError: something is damaged.
  """
  plan = Plan.from_json(meta["plan"])
  found = _groups(items, plan, embedding)
  for group, of in found.items():
    step = BLOCK_BYTES // _row_bytes(embedding.group(group))
    stop = plan.group(group).rows
    for first in range(0, stop, step):
      for name in of.names:
        of.read(name, np.arange(first, min(first + step, stop)))
  want = _wanted(found, meta["checksums"])
  compare(_sums(found), want)


def _groups(
  items: Items, plan: Plan, embedding: Embedding
) -> dict[str, StoredGroup]:
  """Opens the rows of each group, with the slot variables of a run's."""
  there = {g.name for g in plan.groups}
  return {
    g.name: StoredGroup(items, plan.group(g.name), ["rows", *g.optimizer.slots])
    for g in embedding.groups
    if g.name in there
  }


def _fill(stored: StoredRows, width: int, rows) -> None:
  """Streams this process's rows of a group into its host store.

  Args:
    stored: of the group.
    width: bytes of a row with its slot variables.
    rows: (group, positions) -> their values.
  """
  step = max(1, BLOCK_BYTES // width)
  for first in range(0, stored.records, step):
    records = np.arange(first, min(first + step, stored.records))
    records = records[stored.holds_row(records)]
    if len(records):
      stored.write(records, rows(stored.name, stored.positions(records)))


def follow(store: HostStore, items: Items, plan: Plan) -> None:
  """Lets the store know what was written since the last full save.

  Args:
    store: which was restored, under a plan of the same `layout_of`.
    items: it was restored from.
    plan: of the checkpoint.
  """
  for name, stored in store.groups.items():
    stored.written = Bits(stored.records)
    for at in _changed(items, plan.group(name)):
      stored.written.add(stored.records_at(at))


def _changed(items: Items, group: Group):
  """Yields positions of a group's rows that a differential save holds."""
  if items.changed is not None:
    for tier in group.stored:
      for part in checkpoint_reader.changed(items.changed, group, tier):
        yield part.at.astype(np.int64) + tier.first


# ---- Checks


def _sums(found: dict[str, StoredGroup]) -> dict[str, int]:
  return {k: v for of in found.values() for k, v in of.sums().items()}


def _check_sums(
  found: dict[str, StoredGroup],
  everywhere: dict[str, int],
  resident: dict[str, int],
) -> None:
  """Raises ValueError where an array is not what was written.

  Args:
    found: what read the rows of each group.
    everywhere: sums of what all processes have read, whatever their owners.
    resident: what they must be, of tiers in device memory.
  """
  want, got = _wanted(found, resident), _sums(found)
  mine = [got.get(k, 0) - everywhere.get(k, 0) for k in want]
  totals = distributed.sum_over_processes(np.array(mine, np.int64) & 0xFFFFFFFF)
  totals = dict(zip(want, totals.tolist(), strict=True))
  compare(
    {k: (everywhere.get(k, 0) + x) & 0xFFFFFFFF for k, x in totals.items()},
    want,
  )


def _wanted(
  found: dict[str, StoredGroup], resident: dict[str, int]
) -> dict[str, int]:
  """Returns what the sums must be; resident: of tiers in device memory."""
  return {k: v for of in found.values() for k, v in of.wanted(resident).items()}


def compare(got: dict[str, int], want: dict[str, int]) -> None:
  """Raises ValueError where a sum is not what it must be."""
  for key, total in want.items():
    if got.get(key, 0) != total:
      raise ValueError(
        f"the checksum of {key} is {got.get(key, 0)}, {total} was written"
      )


# ---- Sizes


def block_rows(embedding: Embedding) -> int:
  """Returns how many rows are read and written at a time, about."""
  return max(1, BLOCK_BYTES // max(map(_row_bytes, embedding.groups)))


def _row_bytes(g: EmbeddingGroup) -> int:
  """Returns the bytes of a row with its slot variables, in float32."""
  wide = (True, *g.optimizer.slots.values())
  return sum(4 * (g.dim if w else 1) for w in wide)
