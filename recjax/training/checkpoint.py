"""Checkpoints: asynchronous, atomic, restored onto any mesh and any plan.

A step's folder holds three Orbax items: `dense` (params, optimizer state),
`tables` (each tier as the mesh holds it: flattened, rank order) and `meta`
(what the run was: plan, model, vocabulary, data position, checksums). Tables
are restored by streaming blocks of ranks from the stored tiers into the new
ones: beside the new tables that takes the stored hot tiers and some eight
blocks of `_BLOCK_BYTES` (0.2 GB), whatever the tables' size.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from recjax import distributed
from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.host_store import StoredRows
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.tables import Tables
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.mesh import replicated
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.training import checkpoint_reader, checksums, stored_checkpoint
from recjax.training.checkpoint_reader import StoredItem
from recjax.training.state import Identity, Run, TrainState

VERSION = 3  # of what is stored; others are not read
_BLOCK_BYTES = 16 << 20  # rows streamed at a time while restoring
_SAVE_SECONDS = 24 * 3600  # for one save, at most
_LEAST_CHUNK_BYTES = 1 << 20  # of a stored shard


# ---- Save


def manager(
  directory: pathlib.Path, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
  """Orbax's manager of `directory`; saves are asynchronous and atomic."""
  options = ocp.CheckpointManagerOptions(
    max_to_keep=None if read_only else keep,
    read_only=read_only,
    create=not read_only,
    step_prefix=None,
    async_options=ocp.AsyncOptions(
      timeout_secs=_SAVE_SECONDS,
      # stored_checkpoint.py begins to write while the others are begun.
      create_directories_asynchronously=False,
    ),
  )
  return ocp.CheckpointManager(
    directory.absolute(),
    options=options,
    item_names=("dense", "tables", "stored", "meta"),
  )


def _tree(tables: Tables) -> dict[str, Any]:
  """Returns the tables as nested dicts: group, tier, array."""
  return {
    group: {
      tier: {"rows": arrays.rows, **arrays.slots}
      for tier, arrays in tiers.items()
    }
    for group, tiers in tables.items()
  }


@dataclasses.dataclass(frozen=True)
class About:
  """What is stored beside the arrays."""

  identity: Identity
  position: dict  # where the data iterator stands, JSON
  seed: int
  checksums: dict[str, int]  # of `checksums.make_checksums`


def save(to: ocp.CheckpointManager, step: int, run: Run, about: About) -> None:
  """Starts to save a run's state; returns when it may be donated again.

  Orbax copies what is in device memory to host memory first: while a save is
  under way the host holds one more copy of that. Rows of the host store are
  written by blocks.
  """
  to.wait_until_finished()
  state, plan, store = run.state, run.spec.embedding.plan, run.store
  tree = _tree(state.tables)
  # A block is read from every shard at once, in whole chunks; replicas, of any
  # number of rows, are stored in one piece.
  chunk_bytes = max(_BLOCK_BYTES // plan.devices, _LEAST_CHUNK_BYTES)
  chunks = {
    g.name: {
      t.name: jax.tree.map(
        lambda _, t=t: (
          ocp.SaveArgs(chunk_byte_size=chunk_bytes)
          if t.axes
          else ocp.SaveArgs()
        ),
        tree[g.name][t.name],
      )
      for t in g.resident
    }
    for g in plan.groups
  }
  dense = {"params": state.params, "opt_state": state.opt_state}
  sums = about.checksums | {"dense": checksums.of_dense(dense)}
  meta = {
    "version": VERSION,
    "plan": plan.to_json(),
    "identity": dataclasses.asdict(about.identity),
    "position": about.position,
    "seed": about.seed,
    "checksums": {k: int(v) for k, v in sums.items()},
    "stored": {"processes": jax.process_count() if store else 0},
  }
  meta["digest"] = _digest(meta)
  items = {
    "dense": ocp.args.StandardSave(dense),
    "tables": ocp.args.PyTreeSave(tree, save_args=chunks),
    "meta": ocp.args.JsonSave(meta),
  }
  if store:
    store.flush()
    items["stored"] = stored_checkpoint.make_save(store)
  to.save(step, args=ocp.args.Composite(**items))


def _digest(meta: dict) -> str:
  """Returns the hash of what `meta` says, whatever the order of its keys."""
  text = json.dumps(meta, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


# ---- Restore


def newest(directory: pathlib.Path) -> int | None:
  """The newest finished step in `directory`; None where there is none."""
  if not directory.is_dir():
    return None
  with manager(directory, read_only=True) as m:
    return m.latest_step()


def read_meta(directory: pathlib.Path, step: int) -> dict:
  """The `meta` item of a step.

  Raises:
    UserError: there is no such step, or it is damaged.
  """
  with manager(directory, read_only=True) as m:
    steps = sorted(m.all_steps())
    if step not in steps:
      raise UserError(
        f"checkpoint.step: there is no checkpoint {step} in {directory}; "
        f"there are {steps}"
      )
    try:
      restored = m.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
      )
      meta = restored["meta"]
      digest = meta.pop("digest", None)
      version = meta.get("version", 1) if "plan" in meta else VERSION
      if version == VERSION:
        Plan.from_json(meta["plan"])
        Identity(**meta["identity"])
        meta["checksums"]["dense"]
        if digest != _digest(meta):
          raise ValueError("its meta data is not what was written")
    except Exception as e:
      raise _damaged(directory, step, e) from e
  if version != VERSION:
    raise UserError(
      f"checkpoint {step} in {directory} has version {version}, this recjax "
      f"reads version {VERSION}: use the recjax that wrote it, or another "
      "--workdir"
    )
  return meta


def _damaged(directory, step, what) -> UserError:
  text = str(what).strip().splitlines() or [type(what).__name__]
  return UserError(
    f"checkpoint {step} in {directory} is damaged: {text[0][:300]}. Delete "
    f"{directory / str(step)} to go on from the one before, or choose one "
    "with --config.checkpoint.step"
  )


def check_identity(directory, step, meta: dict, want: Identity) -> None:
  """Raises UserError where the checkpoint is of something else."""
  got = Identity(**meta["identity"])
  for field, value in want.model.items():
    if got.model.get(field) != value:
      raise UserError(
        f"checkpoint {step} in {directory} is of another model: {field} is "
        f"{got.model.get(field)!r} there and {value!r} in this config; "
        "restore it with the config it was trained with, or use another "
        "--workdir"
      )
  if got.vocabulary != want.vocabulary:
    raise UserError(
      f"checkpoint {step} in {directory} was trained with another vocabulary "
      f"({got.vocabulary[:12]}, {got.rows} rows; this data set has "
      f"{want.vocabulary[:12]}, {want.rows} rows): its rows mean other ids. "
      "Prepare the data that it was trained on, or use another --workdir"
    )


def restore(
  directory: pathlib.Path,
  step: int,
  meta: dict,
  run: Run,
  profile: Profile | None = None,
) -> TrainState:
  """Restores the state at `step` onto a run's mesh and plan.

  Reads the slot variables of the run's sparse optimizers, none for serving.

  Args:
    directory: of the checkpoints.
    step: to restore.
    meta: of `read_meta`.
    run: whose initial state is donated.
    profile: of all rows; needed where a plan has table-wise tables.

  Raises:
    UserError: the checkpoint is damaged.
  """
  folder = directory.absolute() / str(step)
  try:
    checkpoint_reader.check_readable(folder / "dense")
    dense = _restore_dense(directory, step, run.state)
    found, want = checksums.of_dense(dense), meta["checksums"]["dense"]
    if int(found) != want:
      raise ValueError(f"its dense part's checksum is {found}, not {want}")
    tables = _restore_rows(folder, meta, run, profile)
  except Exception as e:
    raise _damaged(directory, step, e) from e
  count = jax.device_put(np.int32(step), replicated(run.mesh))
  return TrainState(count, dense["params"], dense["opt_state"], tables)


def _restore_dense(directory: pathlib.Path, step: int, state: TrainState):
  """Restores {"params", "opt_state"}, placed as those of `state`."""
  like = {"params": state.params, "opt_state": state.opt_state}
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  with manager(directory, read_only=True) as m:
    args = ocp.args.Composite(dense=ocp.args.StandardRestore(like))
    return m.restore(step, args=args)["dense"]


def _restore_rows(
  folder: pathlib.Path, meta: dict, run: Run, profile: Profile | None
) -> Tables:
  """Streams the rows into the run's tables and host store, and checks them."""
  plan, embedding = Plan.from_json(meta["plan"]), run.spec.embedding
  now, then = {}, {}
  if profile is not None:
    now = positions.of_groups(embedding.plan, profile)
    then = positions.of_groups(plan, profile)
  stored, processes = None, meta["stored"]["processes"]
  if processes:
    stored = StoredItem(folder / "stored", processes)
  items = checkpoint_reader.Items(folder / "tables", stored)
  found = {
    g.name: checkpoint_reader.StoredGroup(
      items, plan.group(g.name), ["rows", *g.optimizer.slots]
    )
    for g in embedding.groups
  }

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
    run.state.tables,
    embedding,
    run.mesh,
    block_rows(embedding),
    lambda group, first, stop: rows(group, np.arange(first, stop)),
  )
  everywhere = _sums(found)
  if run.store:
    run.store.flush()
    for g in embedding.visited:
      _restore_stored(run.store.groups[g.name], _row_bytes(g), rows)
    run.store.version += 1
  _check_sums(found, everywhere, meta)
  return tables


def _restore_stored(stored: StoredRows, width: int, rows) -> None:
  """Streams this process's rows of a group into its host store.

  Args:
    stored: of the group.
    width: bytes of a row with its slot variables.
    rows: (group, positions) -> their values.
  """
  step = max(1, _BLOCK_BYTES // width)
  for first in range(0, stored.records, step):
    records = np.arange(first, min(first + step, stored.records))
    records = records[stored.holds_row(records)]
    if len(records):
      stored.write(records, rows(stored.name, stored.positions(records)))


def _sums(found: dict[str, checkpoint_reader.StoredGroup]) -> dict[str, int]:
  return {k: v for of in found.values() for k, v in of.sums().items()}


def _check_sums(found, everywhere: dict[str, int], meta: dict) -> None:
  """Raises ValueError where an array is not what was written.

  Args:
    found: what read the rows of each group.
    everywhere: sums of what all processes read, whatever their owners.
    meta: of the checkpoint.
  """
  want = {}
  for of in found.values():
    want |= of.wanted(meta["checksums"])
  got = _sums(found)
  mine = [got.get(k, 0) - everywhere.get(k, 0) for k in want]
  totals = distributed.sum_over_processes(np.array(mine, np.int64) & 0xFFFFFFFF)
  for key, total in zip(want, totals.tolist(), strict=True):
    total = (everywhere.get(key, 0) + total) & 0xFFFFFFFF
    if total != want[key]:
      raise ValueError(
        f"the checksum of {key} is {total}, {want[key]} was written"
      )


def block_rows(embedding: Embedding) -> int:
  """Returns how many rows are read and written at a time, about."""
  return max(1, _BLOCK_BYTES // max(map(_row_bytes, embedding.groups)))


def _row_bytes(g: EmbeddingGroup) -> int:
  """Returns the bytes of a row with its slot variables, in float32."""
  wide = (True, *g.optimizer.slots.values())
  return sum(4 * (g.dim if w else 1) for w in wide)
