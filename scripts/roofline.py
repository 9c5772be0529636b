"""How fast a step could be: what this machine computes and moves at best.

A step's dense part takes at least its FLOPs at the rate of a large product in
float32; its lookups read their rows, and the update reads and writes every
distinct row once more, at least at the rate of one long copy. bench_step.py
prints both beside what it measures.
"""

import time
from concurrent import futures

import numpy as np

_WIDTH = 2_048  # of the matrices
_COPIED = 256 << 20  # bytes


def _best(run, repeats: int = 9) -> float:
  run()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - begin)
  return min(seconds)


def flops_per_second() -> float:
  """Returns the float32 rate of JAX's best of some products."""
  import jax
  import jax.numpy as jnp

  multiply, x = jax.jit(jnp.matmul), jnp.ones((_WIDTH, _WIDTH))
  seconds = _best(lambda: multiply(x, x).block_until_ready())
  return 2 * _WIDTH**3 / seconds


def bytes_per_second(cores: int) -> float:
  """Returns the rate of copies of long arrays, read and written, by threads."""
  arrays = [np.ones(_COPIED // 4 // cores, np.float32) for _ in range(cores)]
  out = [np.empty_like(x) for x in arrays]
  with futures.ThreadPoolExecutor(cores) as pool:
    copy = lambda: list(pool.map(np.copyto, out, arrays))
    return 2 * sum(x.nbytes for x in arrays) / _best(copy)


def floors(args, ids: np.ndarray) -> tuple[float, float]:
  """Returns (FLOPs of the dense part, bytes of rows) of a step.

  Args:
    args: of bench_step.py.
    ids: [batch, S] of one step, rows of their tables.
  """
  from bench_contenders import DENSE, by_table
  from criteo_tables import names
  from synthetic_step import LARGE

  from recjax.models import build as models

  inputs = dict.fromkeys(names(len(args.rows)), (1, args.dim))
  cost = models.cost(LARGE, DENSE, inputs, args.dim)
  distinct = sum(len(np.unique(x)) for x in by_table(ids, args))
  row_bytes = 4 * args.dim
  # Forward, and backward by weights and by activations.
  return 3 * cost.flops * len(ids), row_bytes * (ids.size + 2 * distinct)
