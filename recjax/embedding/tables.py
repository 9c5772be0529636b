"""The tables: one row space in three tiers, a pytree outside Flax.

A sharded tier of K rows is stored as [ceil(K / n), n, d], its second axis over
the mesh: flattened it is the rank order, and the cyclic ownership is its
sharding. Where every node has a copy of the warm rows, n is the devices of a
node and the copies are replicas of the array. It is indexed as it is, never
reshaped: a reshape around an update would copy the shard.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import compute_on as compute_on_lib
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recjax.embedding.optimizers import Optimizer
from recjax.mesh import AXIS, DEVICES
from recjax.plan.plan import Plan

# The function form, which took over the name after jax 0.10.
_compute_on: Callable = getattr(
  compute_on_lib, "compute_on2", compute_on_lib.compute_on
)

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class Tier(NamedTuple):
  """rows [K, d] (hot) or [ceil(K/n), n, d]; slots the same or without d."""

  rows: jax.Array
  slots: dict[str, jax.Array]


class Tables(NamedTuple):
  """The row space in rank order; a tier without rows is None.

  Where tables are pooled at owners, warm rows are in the order of plan/positions.py.
  """

  hot: Tier | None
  warm: Tier | None
  cold: Tier | None


def owners_of(plan: Plan, tier: str) -> tuple[int, str | tuple[str, str]]:
  """(devices that share out a tier's rows, cyclic in rank; their axes)."""
  if tier == "warm" and plan.warm_copies == "node":
    return plan.warm_owners, DEVICES
  return plan.devices, AXIS


def specs(plan: Plan, optimizer: Optimizer) -> Tables:
  """PartitionSpecs of the tables, as `shard_map` wants them."""

  def tier(present, spec):
    return Tier(spec, dict.fromkeys(optimizer.slots, spec)) if present else None

  def sharded(name):
    spec = PartitionSpec(None, owners_of(plan, name)[1])
    return tier(getattr(plan, name), spec)

  return Tables(
    tier(plan.hot, PartitionSpec()), sharded("warm"), sharded("cold")
  )


def shardings(plan: Plan, optimizer: Optimizer, mesh: Mesh) -> Tables:
  """NamedShardings of the tables: the cold tier's are in host memory."""
  device = mesh.devices.flat[0].default_memory().kind
  kinds = Tables(device, device, "pinned_host")
  return Tables(
    *(
      jax.tree.map(lambda s, k=kind: NamedSharding(mesh, s, memory_kind=k), t)
      for kind, t in zip(kinds, specs(plan, optimizer), strict=True)
    )
  )


def on_host(f: Callable, out_space=HOST) -> Callable:
  """f, run on the host on operands in host memory, inside a jitted step.

  Every operand, index and constant array must be in host memory already; the
  result goes to `out_space`.
  """
  return _compute_on(f, compute_type="device_host", out_memory_spaces=out_space)


def gather(x, index):  # [s, 1, ...], [m, 2] int32 -> [m, ...]
  """Rows x[slot, 0] of a shard; a slot past the end gives some row."""
  tail = x.shape[2:]
  dims = lax.GatherDimensionNumbers(
    offset_dims=tuple(range(1, 1 + len(tail))),
    collapsed_slice_dims=(0, 1),
    start_index_map=(0, 1),
  )
  # XLA clamps the index; JAX's own clamp would put constants on the device.
  mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
  return lax.gather(x, index, dims, (1, 1, *tail), mode=mode)


def scatter(x, index, rows):  # [s, 1, ...], [m, 2] int32, [m, ...]
  """x with x[slot, 0] = row; slots are distinct, those past the end dropped."""
  dims = lax.ScatterDimensionNumbers(
    update_window_dims=tuple(range(1, rows.ndim)),
    inserted_window_dims=(0, 1),
    scatter_dims_to_operand_dims=(0, 1),
  )
  mode = lax.GatherScatterMode.FILL_OR_DROP
  return lax.scatter(x, index, rows, dims, unique_indices=True, mode=mode)


# ---- Random numbers that belong to a row


def mix(x):  # uint32 -> uint32, any shape
  """A bijective finalizer with full avalanche (C. Wellons' lowbias32)."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def row_bits(ranks, dim: int, key):  # ranks [...] int32 -> [..., d] uint32
  """Random bits that depend on the key, the row's rank and the column only.

  So the same rows start with, and round to, the same numbers on every mesh
  and under every plan. `key` is a uint32.
  """
  seed = mix(ranks.astype(jnp.uint32) + mix(jnp.asarray(key, jnp.uint32)))
  column = mix(lax.iota(jnp.uint32, dim) + np.uint32(0x9E3779B9))
  return mix(seed[..., None] ^ column.reshape((1,) * ranks.ndim + (dim,)))


def initial_rows(ranks, dim: int, scale: float, seed):
  """Uniform in +-scale. ranks [...] int32 -> [..., d] float32."""
  bits = row_bits(ranks, dim, seed)
  unit = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-23) - 1.0
  return unit * scale


# ---- Whole tables


def init(
  plan: Plan,
  optimizer: Optimizer,
  mesh: Mesh,
  scale: float,
  seed: int,
  warm_ranks: np.ndarray | None = None,
) -> Tables:
  """Rows uniform in +-scale by (seed, rank, column), slots 0.

  Every shard is computed where it belongs, without a temporary copy.
  `warm_ranks` [warm] int32 are those of the warm positions, where they are not
  in order; a position without a row, -1, gets zeros.
  """

  def tier(ranks, seed):
    slots = {
      name: jnp.zeros(
        (*ranks.shape, plan.dim) if wide else ranks.shape, jnp.float32
      )
      for name, wide in optimizer.slots.items()
    }
    rows = initial_rows(ranks, plan.dim, scale, seed).astype(plan.dtype)
    return Tier(rows, slots)

  def sharded(first, name, slots):
    owners, _ = owners_of(plan, name)

    def make(owner, seed):
      slot = lax.broadcasted_iota(jnp.int32, (slots, 1), 0)
      return tier(slot * owners + owner.reshape(1, 1) + first, seed)

    return make

  def owner(name):
    return lax.axis_index(owners_of(plan, name)[1]).astype(jnp.int32)

  def make(seed, warm_ranks):  # of a device's shard
    hot = warm = cold = None
    if plan.hot:
      hot = tier(lax.iota(jnp.int32, plan.hot), seed)
    if warm_ranks is not None:
      warm = tier(warm_ranks, seed)
      rows = jnp.where(warm_ranks[..., None] < 0, 0, warm.rows)
      warm = warm._replace(rows=rows)
    elif plan.warm:
      warm = sharded(plan.hot, "warm", plan.warm_slots)(owner("warm"), seed)
    if plan.cold:
      first = plan.warm_end - plan.spare
      make_cold = on_host(sharded(first, "cold", plan.cold_slots))
      cold = make_cold(*jax.device_put((owner("cold"), seed), HOST))
    return Tables(hot, warm, cold)

  place = PartitionSpec(None, AXIS)
  if warm_ranks is not None:
    padding = plan.warm_slots * plan.devices - len(warm_ranks)
    ranks = np.pad(warm_ranks, (0, padding), constant_values=-1)
    ranks = ranks.reshape(-1, plan.devices)
    warm_ranks = jax.make_array_from_callback(
      ranks.shape, NamedSharding(mesh, place), lambda i: ranks[i]
    )
  make = jax.shard_map(
    make,
    mesh=mesh,
    in_specs=(PartitionSpec(), place),
    out_specs=specs(plan, optimizer),
    check_vma=False,
  )
  make = jax.jit(make, out_shardings=shardings(plan, optimizer, mesh))
  return make(np.uint32(seed), warm_ranks)


def _blocks(plan: Plan, block_rows: int) -> Iterator[tuple[str, int, int]]:
  """(tier, first slot, slots) of every block with rows, in rank order.

  A block of a sharded tier is `slots` rows of each of its n owners, so slots
  [s, s + k) are the tier's ranks [s n, (s + k) n).
  """
  for name, count, width in (
    ("hot", plan.hot, 1),
    ("warm", plan.warm, owners_of(plan, "warm")[0]),
    ("cold", plan.cold, owners_of(plan, "cold")[0]),
  ):
    total = -(-count // width)
    step = max(1, block_rows // width)
    for start in range(0, total, step):
      yield name, start, min(step, total - start)


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def first_rank(plan: Plan, tier: str) -> int:
  return {"hot": 0, "warm": plan.hot, "cold": plan.warm_end}[tier]


@functools.cache
def _block_writer(plan: Plan, optimizer_slots, mesh: Mesh, tier: str):
  """Jitted (tier, block, start) -> tier, in place."""
  optimizer = Optimizer(dict(optimizer_slots), lambda *_: None)
  spec = getattr(specs(plan, optimizer), tier)
  out = getattr(shardings(plan, optimizer, mesh), tier)

  def write(tier_, block, start):
    def put(x, new, start):
      return lax.dynamic_update_slice_in_dim(x, new, start, 0)

    if tier != "cold":
      return jax.tree.map(lambda x, new: put(x, new, start), tier_, block)
    block, start = jax.device_put((block, start), HOST)

    def put_all(tier_, block, start):
      # dynamic_update_slice wants every start index in host memory.
      zero = start - start
      return jax.tree.map(
        lambda x, new: lax.dynamic_update_slice(
          x, new, (start,) + (zero,) * (x.ndim - 1)
        ),
        tier_,
        block,
      )

    return on_host(put_all)(tier_, block, start)

  write = jax.shard_map(
    write,
    mesh=mesh,
    in_specs=(spec, spec, PartitionSpec()),
    out_specs=spec,
    check_vma=False,
  )
  return jax.jit(write, donate_argnums=0, out_shardings=out)


def fill(
  tables: Tables,
  plan: Plan,
  optimizer: Optimizer,
  mesh: Mesh,
  block_rows: int,
  rows: Callable[[int, int], Tier],
) -> Tables:
  """Writes every row, in rank order, a block at a time, in place.

  Args:
    tables: donated.
    rows: (first, stop) -> Tier of numpy arrays, [first, stop) of them; asked
      for in ascending, adjoining ranges of about `block_rows` that cover all.
  """
  slots = tuple(sorted(optimizer.slots.items()))
  place = specs(plan, optimizer)
  tiers = tables._asdict()
  for name, start, count in _blocks(plan, block_rows):
    n = 1 if name == "hot" else owners_of(plan, name)[0]
    tier_first = first_rank(plan, name)
    first = min(tier_first + start * n, plan.rows)
    stop = min(first + count * n, tier_first + getattr(plan, name))
    block = rows(first, stop)
    if name != "hot":
      block = jax.tree.map(
        lambda x, n=n, count=count: _padded(x, count * n).reshape(
          count, n, *x.shape[1:]
        ),
        block,
      )
    spec = getattr(place, name)
    block = jax.tree.map(
      lambda x, s: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, s), lambda i, x=x: x[i]
      ),
      block,
      spec,
    )
    write = _block_writer(plan, slots, mesh, name)
    tiers[name] = write(tiers[name], block, np.int32(start))
  return Tables(**tiers)
