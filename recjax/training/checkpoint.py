"""Checkpoints: asynchronous, atomic, restored onto any mesh and any plan.

A step's folder holds three Orbax items: `dense` (params, optimizer state),
`tables` (each tier as the mesh holds it: flattened, rank order) and `meta`
(what the run was: plan, model, vocabulary, data position, checksums). Tables
are restored by streaming blocks of ranks from the stored tiers into the new
ones: beside the new tables that takes the stored hot tier and some eight
blocks of `_BLOCK_BYTES` (0.2 GB), whatever the tables' size.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from recjax.embedding import tables as tables_lib
from recjax.embedding.tables import DEVICE, HOST, Tables, Tier
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.mesh import replicated
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.training.step import Model, TrainState

_BLOCK_BYTES = 16 << 20  # rows streamed at a time while restoring
_LEAST_CHUNK_BYTES = 1 << 20  # of a stored shard


# ---- Checksums


def _words(x):  # any shape, 2- or 4-byte dtype -> the same shape, uint32
  kind = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
  return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _sum_of_words(x: np.ndarray) -> int:
  """The wrapping sum of an array's bits: any one damaged word changes it."""
  words = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
  return int(words.sum(dtype=np.uint64)) & 0xFFFFFFFF


@jax.jit
def _dense_sum(tree):  # 2- or 4-byte leaves -> uint32
  return sum(jnp.sum(_words(x)) for x in jax.tree.leaves(tree))


def make_checksums(model: Model, mesh: Mesh):
  """Jitted Tables -> {'rows': uint32, slot: uint32}, over all R ranks."""
  plan = model.plan
  specs = tables_lib.specs(plan, model.sparse_optimizer)

  def tier_sum(tier: Tier, valid):  # valid [K] bool
    def one(x):
      words = _words(x)
      mask = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
      return jnp.sum(jnp.where(mask, words, words - words), dtype=jnp.uint32)

    return {
      "rows": one(tier.rows),
      **{k: one(v) for k, v in tier.slots.items()},
    }

  def checksums(tables: Tables):
    total = {}
    for name, count, slots in (
      ("warm", plan.warm, plan.warm_slots),
      ("cold", plan.cold, plan.cold_slots),
    ):
      tier = getattr(tables, name)
      if tier is None:
        continue
      n, axes = tables_lib.owners_of(plan, name)
      owner = lax.axis_index(axes).astype(jnp.int32)
      rank = lax.broadcasted_iota(jnp.int32, (slots, 1), 0) * n + owner
      valid = rank < count
      if name == "cold":
        sums = tables_lib.on_host(tier_sum, DEVICE)(
          tier, jax.device_put(valid, HOST)
        )
      else:
        sums = tier_sum(tier, valid)
      sums = lax.psum(sums, axes)  # of copies once
      total = {k: total.get(k, jnp.uint32(0)) + v for k, v in sums.items()}
    if tables.hot is not None:
      sums = tier_sum(tables.hot, jnp.ones(plan.hot, bool))
      total = {k: total.get(k, jnp.uint32(0)) + v for k, v in sums.items()}
    return total

  sharded = jax.shard_map(
    checksums,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, out_shardings=replicated(mesh))


# ---- Save


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a checkpoint must share with the run that restores it."""

  model: dict  # JSON: everything that shapes the parameters and the rows
  vocabulary: str  # fingerprint
  rows: int


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


def _tree(tables: Tables) -> dict:
  """Tables as nested dicts, absent tiers left out."""
  return {
    name: {"rows": tier.rows, **tier.slots}
    for name, tier in tables._asdict().items()
    if tier is not None
  }


def save(
  to: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  plan: Plan,
  identity: Identity,
  position: dict,
  seed: int,
  checksums: dict,
) -> None:
  """Starts to save; returns when the state may be donated again.

  Orbax copies the state to host memory first: while a save is under way the
  host holds one more copy of the device and host tiers.

  Args:
    position: where the data iterator stands, JSON-able.
    checksums: of `make_checksums`.
  """
  tree = _tree(state.tables)
  # A block is read from every shard at once, in whole chunks.
  chunk_bytes = max(_BLOCK_BYTES // plan.devices, _LEAST_CHUNK_BYTES)
  chunks = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree
  )
  if "hot" in tree:  # of any length: stored in one piece
    chunks["hot"] = jax.tree.map(lambda _: ocp.SaveArgs(), tree["hot"])
  dense = {"params": state.params, "opt_state": state.opt_state}
  checksums = checksums | {"dense": _dense_sum(dense)}
  meta = {
    "plan": plan.to_json(),
    "identity": dataclasses.asdict(identity),
    "position": position,
    "seed": seed,
    "checksums": {k: int(v) for k, v in checksums.items()},
  }
  to.save(
    step,
    args=ocp.args.Composite(
      dense=ocp.args.StandardSave(dense),
      tables=ocp.args.PyTreeSave(tree, save_args=chunks),
      meta=ocp.args.JsonSave(meta),
    ),
  )


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
      Plan.from_json(meta["plan"])
      Identity(**meta["identity"])
      return meta
    except Exception as e:
      raise _damaged(directory, step, e) from e


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


def _open(path: pathlib.Path, name: str) -> ts.TensorStore:
  """An array of an Orbax item, to read."""
  store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
  return ts.open({"driver": "zarr", "kvstore": store}, read=True).result()


def _check_readable(path: pathlib.Path) -> None:
  """Raises where an array of an Orbax item is damaged.

  Orbax reads all arrays at once, and where one fails the others print their
  tracebacks when its event loop is gone.
  """
  store = {"driver": "ocdbt", "base": f"file://{path}/"}
  suffix = "/.zarray"
  for key in ts.KvStore.open(store).result().list().result():
    if key.decode().endswith(suffix):
      _open(path, key.decode().removesuffix(suffix)).read().result()


class _Stored:
  """The stored tiers as one row space in the order of positions."""

  def __init__(self, path: pathlib.Path, plan: Plan, names: list[str]):
    self._plan = plan
    self._sums = dict.fromkeys(names, 0)
    self._arrays = {
      # The hot tier is stored in one piece, which every read would decode.
      (tier, name): _open(path, f"{tier}.{name}")
      if tier != "hot"
      else _open(path, f"{tier}.{name}").read().result()
      for tier, count in (
        ("hot", plan.hot),
        ("warm", plan.warm),
        ("cold", plan.cold),
      )
      if count
      for name in names
    }

  def read(self, name: str, at: np.ndarray) -> np.ndarray:
    """Positions `at` [m] of the rows or of a slot; zeros for -1."""
    p, parts = self._plan, []
    for tier in ("hot", "warm", "cold"):
      start = tables_lib.first_rank(p, tier)
      n, _ = tables_lib.owners_of(p, tier)
      mine = np.flatnonzero((at >= start) & (at < start + getattr(p, tier)))
      if not len(mine):
        continue
      x, index = self._arrays[tier, name], at[mine] - start
      a, b = int(index[0]), int(index[-1]) + 1
      if tier == "hot":
        part = x[index]
      elif np.array_equal(index, np.arange(a, b)):  # by far the faster
        part = x[a // n : -(-b // n)].read().result()
        part = part.reshape(-1, *part.shape[2:])[a - a // n * n :][: b - a]
      else:
        part = x[index // n, index % n].read().result()
      parts.append((mine, part))
    if len(parts) == 1 and len(parts[0][0]) == len(at):
      rows = parts[0][1]
    else:
      x = next(v for (_, k), v in self._arrays.items() if k == name)
      tail = x.shape[1:] if isinstance(x, np.ndarray) else x.shape[2:]
      rows = np.zeros((len(at), *tail), np.dtype(x.dtype.name))
      for mine, part in parts:
        rows[mine] = part
    self._sums[name] += _sum_of_words(rows)
    return rows

  def sums(self) -> dict:
    return {k: v & 0xFFFFFFFF for k, v in self._sums.items()}


def restore(
  directory: pathlib.Path,
  step: int,
  meta: dict,
  state: TrainState,
  model: Model,
  mesh: Mesh,
  profile: Profile | None = None,
) -> TrainState:
  """The state at `step`, placed as `state` is; `state` is donated.

  Reads the slots of the model's sparse optimizer, none for serving.

  Args:
    state: an initial state on the mesh and plan to restore onto.
    profile: of the rows; needed where a plan pools tables.

  Raises:
    UserError: the checkpoint is damaged.
  """
  stored_plan = Plan.from_json(meta["plan"])
  names = ["rows", *model.sparse_optimizer.slots]
  row_bytes = sum(
    np.dtype(np.float32).itemsize * (model.plan.dim if wide else 1)
    for wide in (True, *model.sparse_optimizer.slots.values())
  )
  folder = directory.absolute() / str(step)
  now = positions.of(model.plan, profile)
  then = positions.of(stored_plan, profile)
  try:
    _check_readable(folder / "dense")
    with manager(directory, read_only=True) as m:
      like = {"params": state.params, "opt_state": state.opt_state}
      like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        like,
      )
      dense = m.restore(
        step,
        args=ocp.args.Composite(dense=ocp.args.StandardRestore(like)),
      )["dense"]
    stored = _Stored(folder / "tables", stored_plan, names)

    def rows(first, stop):
      ranks = now.ranks_of(first, stop) if now else np.arange(first, stop)
      at = then.positions_of(ranks) if then else ranks
      read = functools.partial(stored.read, at=at)
      return Tier(read("rows"), {k: read(k) for k in names[1:]})

    tables = tables_lib.fill(
      state.tables,
      model.plan,
      model.sparse_optimizer,
      mesh,
      max(1, _BLOCK_BYTES // row_bytes),
      rows,
    )
    sums = stored.sums() | {"dense": int(_dense_sum(dense))}
    want = {name: meta["checksums"][name] for name in sums}
    if sums != want:
      raise ValueError(f"its checksums are {sums}, not {want}")
  except Exception as e:
    raise _damaged(directory, step, e) from e
  count = jax.device_put(np.int32(step), replicated(mesh))
  return TrainState(count, dense["params"], dense["opt_state"], tables)
