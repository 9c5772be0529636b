"""Rows of a checkpoint, streamed by blocks into tables and the host store.

Whatever tier, mesh and owner a row had: it is read by its rank and goes where
it lives now. Rows in device memory are read by every process, those of the
host store by the process that owns them.
"""

import functools
import pathlib
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from recjax import distributed
from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.host_store import HostStore, StoredRows
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.snapshot import Bits
from recjax.embedding.tables import Tables
from recjax.frequency import Profile
from recjax.plan import positions
from recjax.plan.plan import Group, Plan
from recjax.training import checkpoint_reader
from recjax.training.checkpoint_reader import Items, StoredGroup, StoredItem

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
  items: Items, meta: dict, into: Into, profile: Profile | None
) -> Tables:
  """Streams all rows to where they live now, and checks them.

  Args:
    items: of the checkpoint.
    meta: of the checkpoint.
    into: the tables and the store; both hold anything where this raises.
    profile: of all rows; needed where a plan has table-wise tables.

  Returns:
    The tables.

  Raises:
    OSError, ValueError: something is damaged.
  """
  plan, embedding = Plan.from_json(meta["plan"]), into.embedding
  now, then = {}, {}
  if profile is not None:
    now = positions.of_groups(embedding.plan, profile)
    then = positions.of_groups(plan, profile)
  found = _groups(items, plan, embedding)

  def rows(group: str, at: np.ndarray) -> TierArrays:  # positions now [m]
    if group in now:
      a, b = int(at[0]), int(at[-1]) + 1
      at = now[group].ranks_of(a, b)[at - a]
    at = then[group].positions_of(at) if group in then else at
    read = functools.partial(found[group].read, at=at)
    return TierArrays(
      read("rows"), {k: read(k) for k in found[group].names if k != "rows"}
    )

  tables = tables_lib.fill(
    into.tables,
    embedding,
    into.mesh,
    block_rows(embedding),
    lambda group, first, stop: rows(group, np.arange(first, stop)),
  )
  everywhere = _sums(found)
  if into.store:
    into.store.flush()
    for g in embedding.visited:
      _fill(into.store.groups[g.name], _row_bytes(g), rows)
    into.store.version += 1
  _check_sums(found, everywhere, meta["checksums"])
  return tables


def check(items: Items, meta: dict, embedding: Embedding) -> None:
  """Reads all rows, and checks them; of all processes, on this one.

  Raises:
    OSError, ValueError: something is damaged.
  """
  plan = Plan.from_json(meta["plan"])
  found = _groups(items, plan, embedding)
  for g in embedding.groups:
    stop, step = plan.group(g.name).tiers[-1].stop, BLOCK_BYTES // _row_bytes(g)
    for first in range(0, stop, step):
      for name in found[g.name].names:
        found[g.name].read(name, np.arange(first, min(first + step, stop)))
  want = _wanted(found, meta["checksums"])
  got = _sums(found)
  _compare({k: got.get(k, 0) for k in want}, want)


def _groups(
  items: Items, plan: Plan, embedding: Embedding
) -> dict[str, StoredGroup]:
  """Opens the rows of each group, with the slot variables of a run's."""
  return {
    g.name: StoredGroup(items, plan.group(g.name), ["rows", *g.optimizer.slots])
    for g in embedding.groups
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
  _compare(
    {k: (everywhere.get(k, 0) + x) & 0xFFFFFFFF for k, x in totals.items()},
    want,
  )


def _wanted(
  found: dict[str, StoredGroup], resident: dict[str, int]
) -> dict[str, int]:
  """Returns what the sums must be; resident: of tiers in device memory."""
  return {k: v for of in found.values() for k, v in of.wanted(resident).items()}


def _compare(got: dict[str, int], want: dict[str, int]) -> None:
  for key, total in want.items():
    if got[key] != total:
      raise ValueError(
        f"the checksum of {key} is {got[key]}, {total} was written"
      )


# ---- Sizes


def block_rows(embedding: Embedding) -> int:
  """Returns how many rows are read and written at a time, about."""
  return max(1, BLOCK_BYTES // max(map(_row_bytes, embedding.groups)))


def _row_bytes(g: EmbeddingGroup) -> int:
  """Returns the bytes of a row with its slot variables, in float32."""
  wide = (True, *g.optimizer.slots.values())
  return sum(4 * (g.dim if w else 1) for w in wide)
