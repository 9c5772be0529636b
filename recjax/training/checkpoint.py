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
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding, EmbeddingGroup
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.tables import Tables
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.mesh import replicated
from recjax.plan import positions
from recjax.plan.plan import Plan, Tier
from recjax.training import checkpoint_reader
from recjax.training.state import Identity, Run, TrainState

VERSION = 2  # of what is stored; others are not read
_BLOCK_BYTES = 16 << 20  # rows streamed at a time while restoring
_LEAST_CHUNK_BYTES = 1 << 20  # of a stored shard


# ---- Checksums


def _words(x):  # any shape, 2- or 4-byte dtype -> the same shape, uint32
  """Returns the bits of an array as numbers."""
  kind = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
  return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


@jax.jit
def _dense_sum(tree):  # 2- or 4-byte leaves -> uint32
  """Returns the wrapping sum of all bits: one damaged word changes it."""
  return sum(jnp.sum(_words(x)) for x in jax.tree.leaves(tree))


def make_checksums(embedding: Embedding, mesh: Mesh):
  """Makes the jitted Tables -> {"group.array": uint32}, over all rows.

  An array is "rows" or a slot variable; its sum is that of the words of all
  tiers, without those of padded shards.
  """

  def checksums(tables: Tables):
    total: dict[str, jax.Array] = {}
    for g in embedding.groups:
      for tier in g.group.resident:
        for name, x in _tier_sums(tables[g.name][tier.name], tier).items():
          key = f"{g.name}.{name}"
          total[key] = total.get(key, jnp.uint32(0)) + x
    return total

  sharded = jax.shard_map(
    checksums,
    mesh=mesh,
    in_specs=(tables_lib.specs(embedding),),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, out_shardings=replicated(mesh))


def _tier_sums(arrays: TierArrays, tier: Tier) -> dict[str, jax.Array]:
  """Sums the words of a tier's rows and slot variables over its owners."""

  def sums(arrays: TierArrays, valid):  # valid [shard rows, 1] or [rows] bool
    def one(x):
      words = _words(x)
      mask = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
      return jnp.sum(jnp.where(mask, words, words - words), dtype=jnp.uint32)

    slots = {name: one(x) for name, x in arrays.slots.items()}
    return {"rows": one(arrays.rows), **slots}

  if not tier.axes:
    return sums(arrays, jnp.ones(tier.rows, bool))
  owner = lax.axis_index(tier.axes).astype(jnp.int32)
  local = lax.broadcasted_iota(jnp.int32, (tier.shard_rows, 1), 0)
  valid = local * tier.owners + owner < tier.rows
  return lax.psum(sums(arrays, valid), tier.axes)  # of copies once


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
  )
  return ocp.CheckpointManager(
    directory.absolute(),
    options=options,
    item_names=("dense", "tables", "meta"),
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
  checksums: dict[str, int]  # of `make_checksums`


def save(
  to: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  plan: Plan,
  about: About,
) -> None:
  """Starts to save; returns when the state may be donated again.

  Orbax copies the state to host memory first: while a save is under way the
  host holds one more copy of the device and host tiers.
  """
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
  checksums = about.checksums | {"dense": _dense_sum(dense)}
  meta = {
    "version": VERSION,
    "plan": plan.to_json(),
    "identity": dataclasses.asdict(about.identity),
    "position": about.position,
    "seed": about.seed,
    "checksums": {k: int(v) for k, v in checksums.items()},
  }
  meta["digest"] = _digest(meta)
  to.save(
    step,
    args=ocp.args.Composite(
      dense=ocp.args.StandardSave(dense),
      tables=ocp.args.PyTreeSave(tree, save_args=chunks),
      meta=ocp.args.JsonSave(meta),
    ),
  )


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
    tables, sums = _restore_tables(folder / "tables", meta, run, profile)
    sums["dense"] = int(_dense_sum(dense))
    want = {name: meta["checksums"][name] for name in sums}
    if sums != want:
      raise ValueError(f"its checksums are {sums}, not {want}")
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


def _restore_tables(
  path: pathlib.Path, meta: dict, run: Run, profile: Profile | None
) -> tuple[Tables, dict[str, int]]:
  """Streams the stored rows into the run's tables; and their checksums."""
  plan, embedding = Plan.from_json(meta["plan"]), run.spec.embedding
  now, then = {}, {}
  if profile is not None:
    now = positions.of_groups(embedding.plan, profile)
    then = positions.of_groups(plan, profile)
  found = {
    g.name: checkpoint_reader.StoredGroup(
      path, plan.group(g.name), ["rows", *g.optimizer.slots]
    )
    for g in embedding.groups
  }

  def rows(group: str, first: int, stop: int) -> TierArrays:
    ranks = np.arange(first, stop)
    if group in now:
      ranks = now[group].ranks_of(first, stop)
    at = then[group].positions_of(ranks) if group in then else ranks
    read = functools.partial(found[group].read, at=at)
    return TierArrays(
      read("rows"), {k: read(k) for k in found[group].names if k != "rows"}
    )

  tables = tables_lib.fill(
    run.state.tables, embedding, run.mesh, block_rows(embedding), rows
  )
  sums = {
    f"{group}.{name}": total
    for group, of in found.items()
    for name, total in of.sums().items()
  }
  return tables, sums


def block_rows(embedding: Embedding) -> int:
  """Returns how many rows are read and written at a time, about."""
  return max(1, _BLOCK_BYTES // max(map(_row_bytes, embedding.groups)))


def _row_bytes(g: EmbeddingGroup) -> int:
  """Returns the bytes of a row with its slot variables, in float32."""
  wide = (True, *g.optimizer.slots.values())
  return sum(4 * (g.dim if w else 1) for w in wide)
