"""Collectives: what leaves a device, in no more bytes than it is worth."""

import jax.numpy as jnp
import numpy as np
from jax import lax


def _as_bits(x, send):
  """Sends bfloat16 as its bits: XLA:CPU would send it as float32."""
  if x.dtype != jnp.bfloat16:
    return send(x)
  bits = send(lax.bitcast_convert_type(x, jnp.uint16))
  return lax.bitcast_convert_type(bits, x.dtype)


def all_to_all(x, axis, size: int):  # [size, ...] -> [size, ...]
  """Sends x[p] to peer p of the axis, and returns what the peers sent."""
  if size == 1:
    return x
  return _as_bits(x, lambda x: lax.all_to_all(x, axis, 0, 0))


def all_gather(x, axis, size: int):  # [C, ...] -> [size C, ...]
  """Returns the parts of all peers of the axis, one after the other."""
  if size == 1:
    return x
  return _as_bits(x, lambda x: lax.all_gather(x, axis, tiled=True))


def shift(x, axis, pairs):  # [...] -> [...]
  """Sends x along (from, to) pairs; zeros where nothing arrives."""
  return _as_bits(x, lambda x: lax.ppermute(x, axis, pairs))


def all_to_all_joined(parts, axis, peers: int):  # of [peers, k] each
  """Returns what the peers sent, of parts that travel in one all-to-all."""
  got = all_to_all(
    jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], axis, peers
  )
  return jnp.split(got, np.cumsum([x.shape[1] for x in parts])[:-1], axis=1)
