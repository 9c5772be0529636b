"""Random numbers that belong to a row, whatever the mesh and the plan.

They are hashes of (key, rank, column): the same rows start with, and round to,
the same numbers wherever they live.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: spreads small integers


def mix(x):  # uint32 -> uint32, any shape
  """Hashes bijectively with full avalanche (C. Wellons' lowbias32)."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def group_seed(seed: int, group: int) -> int:
  """Returns the seed of the rows of a plan's group, a uint32.

  The first group's is the run's own; the others differ from it, as rows of
  equal ranks would else begin alike.
  """
  return (seed + group * _GOLDEN) % 2**32


def row_bits(ranks, dim: int, key):  # ranks [...] int32 -> [..., d] uint32
  """Returns random bits that depend on the key, the rank and the column only.

  `key` is a uint32.
  """
  seed = mix(ranks.astype(jnp.uint32) + mix(jnp.asarray(key, jnp.uint32)))
  column = mix(lax.iota(jnp.uint32, dim) + np.uint32(_GOLDEN))
  return mix(seed[..., None] ^ column.reshape((1,) * ranks.ndim + (dim,)))


def initial_rows(ranks, dim: int, scale: float, seed):
  """Draws rows uniform in +-scale. ranks [...] int32 -> [..., d] float32."""
  bits = row_bits(ranks, dim, seed)
  unit = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-23) - 1.0
  return unit * scale


def stochastic_round(x, bits):  # float32, uint32 -> bfloat16
  """Rounds up with the probability that makes the result unbiased."""
  raw = lax.bitcast_convert_type(x, jnp.uint32)
  raw = (raw + (bits & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
  return lax.bitcast_convert_type(raw, jnp.float32).astype(jnp.bfloat16)
