"""What calibrate.py times: the operations that a train step is made of."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from synthetic_step import times_of

from recjax.data import power_law
from recjax.embedding.coalesce import coalesce
from recjax.embedding.embedding import make_embedding
from recjax.embedding.host_store import HostStore
from recjax.embedding.optimizers import TierArrays, sgd
from recjax.embedding.tables import gather
from recjax.plan.plan import COLD, Group, Plan, Tier
from recjax.schema import AXES, Feature

DIM = 32  # of the rows: 128 bytes
ROWS = 1 << 18  # of a device's table, times times_of(mesh)
CACHED = 1 << 12  # of one that caches hold
COUNTS = [1 << k for k in (10, 13, 15)]  # of rows or keys, times the same
HOST = (HOST_GATHER, HOST_LINK) = "host gather", "host link"
SHARDED = PartitionSpec(AXES)
TABLE = PartitionSpec(None, AXES)  # [rows, n, DIM], as the tiers are


class Bench:
  """Times functions of shards on a mesh."""

  def __init__(self, mesh: Mesh, repeats: int):
    self.mesh, self.repeats = mesh, repeats
    self.n, self.times = mesh.devices.size, times_of(mesh)
    self.cpu = self.times == 1
    if not self.cpu:  # past the caches
      self.times *= 4
    self.rows = ROWS * self.times
    self.rng = np.random.default_rng(0)

  def floats(self, *shape, spec=SHARDED, dtype=np.float32):
    """Puts normal numbers onto the mesh."""
    x = self.rng.standard_normal(shape, np.float32).astype(dtype)
    return jax.device_put(x, NamedSharding(self.mesh, spec))

  def ids(self, size: int, rows: int):  # [n size] int32 below rows
    """Puts uniform ids onto the mesh."""
    x = self.rng.integers(0, rows, self.n * size, np.int32)
    return jax.device_put(x, NamedSharding(self.mesh, SHARDED))

  def requests(self, size: int):  # [n size] int32
    """Draws local rows that n peers ask each owner for.

    Each peer asks for distinct rows. They are used by a power law of exponent
    1, so that peers ask for the same ones in part, which caches then hold.
    """
    parts = []
    for _ in range(self.n * self.n):
      rows = power_law.ranks(self.rng, 16 * size, self.rows, 1.0)
      first = np.sort(np.unique(rows, return_index=True)[1])
      parts.append(rows[first][: -(-size // self.n)].astype(np.int32))
    x = np.stack(parts).reshape(self.n, -1)[:, :size].reshape(-1)
    return jax.device_put(x, NamedSharding(self.mesh, SHARDED))

  def call(self, f: Callable, *args) -> Callable[[], object]:
    """Compiles f, which maps every device's shards to a shard, with args."""
    run = jax.shard_map(
      f,
      mesh=self.mesh,
      in_specs=tuple(x.sharding.spec for x in args),
      out_specs=SHARDED,
      check_vma=False,
    )
    run = jax.jit(run).lower(*args).compile()
    return lambda: jax.block_until_ready(run(*args))

  def seconds(self, calls: Sequence[Callable]) -> np.ndarray:
    """Returns the median of each by the clock.

    In rounds, so that noise hits all alike. One more call comes first, as
    another has left the caches.
    """
    out = np.zeros((self.repeats, len(calls)))
    for i, j in np.ndindex(out.shape):
      calls[j]()
      start = time.perf_counter()
      calls[j]()
      out[i, j] = time.perf_counter() - start
    return np.median(out, axis=0)


def pairs(local):  # [m] int32 -> [m, 2]
  """Returns the index of local rows in a shard [rows, 1, d]."""
  return jnp.stack([local, jnp.zeros_like(local)], axis=1)


class Operation(NamedTuple):
  """One of a step's, to be timed at several sizes."""

  name: str
  unit: str
  amounts: list[float]  # units, a size each
  calls: list[Callable]


def operation(
  bench: Bench,
  name: str,
  unit: str,
  sizes: Sequence[int],
  *,
  amount: Callable[[int], float],
  call: Callable[[int], Callable],
) -> Operation:
  """Compiles an operation at sizes that are times larger on accelerators."""
  sizes = [bench.times * s for s in sizes]
  amounts = [float(amount(s)) for s in sizes]
  return Operation(name, unit, amounts, [call(s) for s in sizes])


def of_the_host(bench: Bench) -> list[Operation]:
  """Reads stored rows at random, and puts buffers onto the devices."""
  n, rows = bench.n, bench.rows * bench.n
  tier = Tier(COLD, 0, rows, n, AXES, bench.rows, "host")
  group = Group("g", ("t",), DIM, "float32", "sgd", (tier,), visitors=tier)
  embedding = make_embedding(
    Plan(n, n, (group,)), (Feature("t", "t"),), {"g": sgd(0.1)}
  )
  store = HostStore(embedding, range(n))
  stored, everything = store.groups["g"], np.arange(rows)
  stored.write_rows(everything, np.ones((rows, DIM), np.float32))

  def read(size: int) -> Callable[[], object]:
    at = np.sort(bench.rng.choice(rows, n * size, replace=False))
    out = TierArrays(np.empty((len(at), DIM), np.float32), {})
    part = lambda s: stored.read(at[s], TierArrays(out.rows[s], {}))
    return lambda: store.spread(part, len(at))

  def put(size: int) -> Callable[[], object]:
    x = bench.rng.standard_normal((n * size, DIM), np.float32)
    place = NamedSharding(bench.mesh, SHARDED)
    # Once more: a device that is a CPU may take the host's buffer as it is.
    return lambda: jax.block_until_ready(jax.device_put(np.copy(x), place))

  size_of = lambda s: 4 * DIM * s
  return [
    operation(
      bench,
      HOST_GATHER,
      "B",
      COUNTS,
      amount=lambda s: size_of(s) * n,  # of the host, all devices together
      call=read,
    ),
    operation(bench, HOST_LINK, "B", COUNTS, amount=size_of, call=put),
  ]


def of_tables(bench: Bench) -> list[Operation]:
  """Compiles gathers and sums of rows, and the sort of their ids."""
  n = bench.n
  table = bench.floats(bench.rows, n, DIM, spec=TABLE)
  few = bench.floats(CACHED * n, DIM)
  size_of = lambda s: 4 * DIM * s

  def read(table, local):
    return gather(table, pairs(local))

  def read_few(table, local):
    return table.at[local].get(mode="fill", fill_value=0)

  def add_few(table, local, grads):
    return jnp.zeros_like(table).at[local].add(grads, mode="drop")

  return [
    operation(
      bench,
      "gather",
      "B",
      COUNTS,
      amount=size_of,
      call=lambda s: bench.call(read, table, bench.requests(s)),
    ),
    operation(
      bench,
      "cached gather",
      "B",
      COUNTS,
      amount=size_of,
      call=lambda s: bench.call(read_few, few, bench.ids(s, CACHED)),
    ),
    operation(
      bench,
      "cached add",
      "B",
      COUNTS,
      amount=size_of,
      call=lambda s: bench.call(
        add_few, few, bench.ids(s, CACHED), bench.floats(n * s, DIM)
      ),
    ),
    operation(
      bench,
      "sort",
      "keys",
      COUNTS,
      amount=float,
      call=lambda s: bench.call(
        lambda i: sum(coalesce(i)), bench.ids(s, 1 << 20)
      ),
    ),
  ]


def of_the_dense_part(bench: Bench) -> list[Operation]:
  """Compiles a pass over memory and matrix products."""
  n = bench.n
  found = [
    operation(
      bench,
      "stream",
      "B",
      [1 << k for k in (18, 20, 22)],
      amount=lambda s: 8 * s,  # read and written
      call=lambda s: bench.call(lambda x: x + 1, bench.floats(n * s)),
    )
  ]
  for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
    found.append(
      operation(
        bench,
        f"matmul {dtype}",
        "FLOP",
        [64, 256, 1_024],
        amount=lambda s: 2 * s * 512 * 512,
        call=lambda s, dtype=dtype: bench.call(
          jnp.dot,
          bench.floats(n * s, 512, dtype=dtype),
          bench.floats(512, 512, spec=PartitionSpec(), dtype=dtype),
        ),
      )
    )
  return found


def collectives(bench: Bench) -> list[Operation]:
  """Compiles the exchanges between devices; none where there is one."""
  n = bench.n
  if n == 1:
    return []
  sizes = [1 << k for k in (6, 12, 15)]
  swap = lambda x: lax.all_to_all(x, AXES, 0, 0)
  add = lambda x: lax.psum(x, AXES)
  return [
    operation(
      bench,
      "all-to-all",
      "B",
      sizes,
      amount=lambda s: 4 * s * (n - 1),  # sent by a device
      call=lambda s: bench.call(swap, bench.floats(n * n, s)),
    ),
    operation(
      bench,
      "all-reduce",
      "B",
      sizes,
      amount=lambda s: 8 * s * (n - 1),  # sent by a device, in a ring
      call=lambda s: bench.call(add, bench.floats(n * n * s)),
    ),
  ]
