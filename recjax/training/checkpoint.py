"""Checkpoints: asynchronous, atomic, restored onto any mesh and any plan.

A step's folder holds four Orbax items: `dense` (params, optimizer state),
`tables` (each tier in device memory as the mesh holds it: flattened, rank
order), `stored` (the rows of the host store, stored_checkpoint.py) and `meta`
(what the run was: plan, model, vocabulary, data position, checksums).

A save needs one more copy of what is in device memory on the host, and of the
host store, which may be larger than what is free, blocks and the old values of
rows that are written meanwhile: 0.4 GB and two bits a row at most. A restore
streams blocks of ranks (restore_rows.py): beside the new tables that takes the
hot tiers and some eight blocks (0.2 GB), whatever the tables' size, and 4 bytes
for each row of a differential save.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from recjax import files
from recjax.data.shuffle import Done
from recjax.embedding.host_store import FullSave
from recjax.embedding.tables import Tables
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.mesh import replicated
from recjax.plan.plan import Plan
from recjax.training import (
  checkpoint_reader,
  checksums,
  restore_rows,
  stored_checkpoint,
)
from recjax.training.finite import Refusal
from recjax.training.row_sources import Carried
from recjax.training.state import At, Identity, Run, TrainState

VERSION = 4  # of what is stored; others are not read
_SAVE_SECONDS = 24 * 3600  # for one save, at most
_LEAST_CHUNK_BYTES = 1 << 20  # of a stored shard


# ---- Save


class Saver(ocp.CheckpointManager):
  """Orbax's manager of a folder; saves are asynchronous and atomic."""

  def __init__(self, directory: pathlib.Path, keep: int, read_only: bool):
    """Opens the folder; see `manager`."""
    directory = directory.absolute()
    # Of each step, the one of the full save that it needs: maybe its own.
    self.full: dict[int, int] = {}
    options = ocp.CheckpointManagerOptions(
      preservation_policy=None if read_only else _Newest(keep, self.full),
      read_only=read_only,
      create=not read_only,
      cleanup_tmp_directories=not read_only,  # of saves that were killed
      step_prefix=None,
      async_options=ocp.AsyncOptions(
        timeout_secs=_SAVE_SECONDS,
        # stored_checkpoint.py writes as soon as it is asked to.
        create_directories_asynchronously=False,
      ),
    )
    super().__init__(
      directory,
      options=options,
      item_names=("dense", "tables", "stored", "meta"),
    )
    if not read_only:
      for step in self.all_steps():
        self.full[step] = _full_step(directory, step)


def manager(
  directory: pathlib.Path, keep: int = 2, read_only: bool = False
) -> Saver:
  """Opens a folder of checkpoints.

  Args:
    directory: of the checkpoints.
    keep: the newest so many, and the full saves that they need.
    read_only: whether nothing is saved or deleted.
  """
  return Saver(directory, keep, read_only)


def _full_step(directory: pathlib.Path, step: int) -> int:
  """Returns which step's rows a step needs: its own where that is not known."""
  try:
    found = files.read_json(directory / str(step) / "meta" / "metadata")
    return int(found["stored"]["full"])
  except (OSError, ValueError, KeyError, TypeError):
    return step


class _Newest(PreservationPolicy):
  """Keeps the newest checkpoints, and the full saves that they need."""

  def __init__(self, keep: int, full: dict[int, int]):
    self._keep, self._full = keep, full

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Returns which of the checkpoints, oldest first, are kept."""
    del context
    steps = [c.step for c in checkpoints]
    kept = set(steps[-self._keep :])
    kept |= {self._full.get(step, step) for step in kept}
    return [step in kept for step in steps]


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
  at: At  # where the run stands
  checks: dict[str, checksums.Check]  # of `checksums.make_checksums`
  # [B] of the batch before, scored with this state: huge parameters are finite,
  # and nothing that they make is.
  logits: np.ndarray | None = None
  profile: Profile | None = None  # of all rows, to name the table of one


def save(
  to: Saver, step: int, run: Run, about: About, full_every: int = 1
) -> None:
  """Starts to save a run's state; returns when training may go on.

  Waits for the save before it. What a save needs of the host's memory is said
  above.

  Args:
    to: the folder.
    step: that was done.
    run: with the state after it.
    about: the rest.
    full_every: of so many saves one holds all rows of the host store; those
      between, the rows that were written since.

  Raises:
    UserError: a number is not finite, and nothing is saved; or the save before
      has failed. Whether stored rows are finite is seen while they are written:
      then the next call raises, or `wait_until_finished`.
  """
  to.wait_until_finished()
  state, plan, store = run.state, run.spec.embedding.plan, run.store
  dense = {"params": state.params, "opt_state": state.opt_state}
  refusal = Refusal(
    str(to.directory), to.latest_step(), step, plan, about.profile
  )
  sums = checksums.checked_sums(dense, about.checks, refusal)
  if about.logits is not None and not np.isfinite(about.logits).all():
    raise refusal.of("a logit of its batch")
  tree = _tree(state.tables)
  # A block is read from every shard at once, in whole chunks; replicas, of any
  # number of rows, are stored in one piece.
  chunk_bytes = max(
    restore_rows.BLOCK_BYTES // plan.devices, _LEAST_CHUNK_BYTES
  )
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
  meta = {
    "version": VERSION,
    "plan": plan.to_json(),
    "identity": dataclasses.asdict(about.identity),
    "at": {"done": about.at.done._asdict(), "began": about.at.began},
    "checksums": sums,
    "stored": {"processes": 0, "full": step, "since": 0},
  }
  items = {"dense": ocp.args.StandardSave(dense)}
  if jax.tree.leaves(tree):
    items["tables"] = ocp.args.PyTreeSave(tree, save_args=chunks)
  if store:
    if store.full and store.full.step not in to.all_steps():
      store.full = None  # somebody has deleted it
    items["stored"], meta["stored"] = stored_checkpoint.make_save(
      store, str(to.directory), step, full_every, refusal
    )
  to.full[step] = meta["stored"]["full"]
  meta["digest"] = files.hash_of_json(meta)
  try:
    items["meta"] = ocp.args.JsonSave(meta)
    to.save(step, args=ocp.args.Composite(**items))
  except BaseException:
    if store:
      items["stored"].close()
    raise


# ---- Restore


def newest(directory: pathlib.Path) -> int | None:
  """The newest finished step in `directory`; None where there is none."""
  if not directory.is_dir():
    return None
  with manager(directory, read_only=True) as m:
    return m.latest_step()


def steps(directory: pathlib.Path) -> list[int]:
  """Returns the finished steps in `directory`, ascending."""
  with manager(directory, read_only=True) as m:
    return sorted(m.all_steps())


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Renames the folder of a step, so that it is no checkpoint any more."""
  more = (f".{i}" for i in itertools.count(2))
  names = (f"{step}.damaged{x}" for x in itertools.chain([""], more))
  aside = next(directory / x for x in names if not (directory / x).exists())
  return (directory / str(step)).rename(aside)


def read_meta(directory: pathlib.Path, step: int) -> dict:
  """Returns the `meta` item of a step.

  Raises:
    UserError: there is no such step, or it is damaged.
  """
  there = steps(directory)
  if step not in there:
    raise UserError(
      f"checkpoint.step: there is no checkpoint {step} in {directory}; "
      f"there are {there}"
    )
  with manager(directory, read_only=True) as m:
    try:
      args = ocp.args.Composite(meta=ocp.args.JsonRestore())
      meta = m.restore(step, args=args)["meta"]
      digest = meta.pop("digest", None)
      version = meta.get("version", 1) if "plan" in meta else VERSION
      if version == VERSION:
        Plan.from_json(meta["plan"])
        Identity(**meta["identity"])
        at_of(step, meta)
        meta["checksums"]["dense"]
        if digest != files.hash_of_json(meta):
          raise ValueError("its meta data is not what was written")
    except Exception as e:
      raise damaged(directory, step, e) from e
  if version != VERSION:
    raise UserError(
      f"checkpoint {step} in {directory} has version {version}, this recjax "
      f"reads version {VERSION}: use the recjax that wrote it, or another "
      "--workdir"
    )
  return meta


def at_of(step: int, meta: dict) -> At:
  """Returns where the run of a step's `meta` stands."""
  at = meta["at"]
  return At(step, Done(**at["done"]), at["began"])


class DamagedError(UserError):
  """A checkpoint is not what was written; train.py adds which one is."""


def damaged(directory, step, what) -> DamagedError:
  text = str(what).strip().splitlines() or [type(what).__name__]
  return DamagedError(
    f"checkpoint {step} in {directory} is damaged: {text[0][:300]}"
  )


def restore(
  directory: pathlib.Path,
  step: int,
  meta: dict,
  run: Run,
  profile: Profile | None = None,
  *,
  carried: Carried | None = None,
) -> TrainState:
  """Restores the state at `step` onto a run's mesh and plan.

  Reads the slot variables of the run's sparse optimizers, none for serving.

  Args:
    directory: of the checkpoints.
    step: to restore.
    meta: of `read_meta`.
    run: whose initial state is donated.
    profile: of all rows; needed where a plan has table-wise tables.
    carried: where the checkpoint is of another vocabulary.

  Raises:
    UserError: the checkpoint is damaged.
  """
  try:
    dense, items = _open(directory, step, meta, run)
    into = restore_rows.Into(
      run.spec.embedding, run.mesh, run.state.tables, run.store
    )
    tables = restore_rows.restore(items, meta, into, profile, carried)
    if carried is None:
      _go_on(directory, meta, run, items)
  except Exception as e:
    raise damaged(directory, step, e) from e
  count = jax.device_put(np.int32(step), replicated(run.mesh))
  return TrainState(count, dense["params"], dense["opt_state"], tables)


def check_whole(directory: pathlib.Path, step: int, run: Run) -> None:
  """Reads all of a checkpoint that `restore` would; changes nothing.

  Raises:
    UserError: something is not what was written.
  """
  meta = read_meta(directory, step)
  try:
    _, items = _open(directory, step, meta, run)
    restore_rows.check(items, meta, run.spec.embedding)
  except Exception as e:
    raise damaged(directory, step, e) from e


def _open(directory: pathlib.Path, step: int, meta: dict, run: Run):
  """Returns (the dense part, restored and checked; the items with rows)."""
  folder = directory.absolute() / str(step)
  checkpoint_reader.check_readable(folder / "dense")
  dense = _restore_dense(directory, step, run.state)
  found, want = checksums.of_dense(dense)[0], meta["checksums"]["dense"]
  if int(found) != want:
    raise ValueError(f"its dense part's checksum is {found}, not {want}")
  full = full_meta(directory, step, meta)
  return dense, restore_rows.open_items(folder, meta, full)


def _restore_dense(directory: pathlib.Path, step: int, state: TrainState):
  """Restores {"params", "opt_state"}, placed as those of `state`."""
  like = {"params": state.params, "opt_state": state.opt_state}
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  args = ocp.args.Composite(dense=ocp.args.StandardRestore(like))
  with manager(directory, read_only=True) as m:
    return m.restore(step, args=args)["dense"]


def full_meta(directory: pathlib.Path, step: int, meta: dict) -> dict | None:
  """Returns the `meta` of the full save that a step needs beside its own."""
  full = meta["stored"]["full"]
  if full == step:
    return None
  try:
    found = read_meta(directory, full)
  except UserError as e:
    raise ValueError(f"it needs checkpoint {full}, but {e}") from e
  if found["stored"]["full"] != full:
    raise ValueError(f"it needs checkpoint {full}, which is not a full one")
  return found


def _go_on(directory: pathlib.Path, meta: dict, run: Run, items) -> None:
  """Lets the next saves refer to the full one that was restored."""
  plan, about = Plan.from_json(meta["plan"]), meta["stored"]
  layout_of = restore_rows.layout_of
  if run.store is None:
    return
  run.store.full = None
  if layout_of(run.spec.embedding.plan) == layout_of(plan):
    restore_rows.follow(run.store, items, plan)
    run.store.full = FullSave(
      str(directory.absolute()), about["full"], about["since"]
    )
