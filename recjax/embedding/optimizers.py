"""Sparse optimizers: a slot layout and a pure update on touched rows.

An update sees only the rows that a step touched, each once, with its summed
gradient, in float32; a row that is not touched keeps its slots as they are
(which makes Adam the lazy one). Extension is one more `Optimizer` value.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TierArrays(NamedTuple):
  """Rows of a tier and their slot variables.

  rows [K, d] of replicas, or [ceil(K / n), n, d]; a slot variable the same, or
  without d.
  """

  rows: jax.Array
  slots: dict[str, jax.Array]  # slot variables by name


class Optimizer(NamedTuple):
  """slots: name -> True where a slot has the row's width d, False where a row
  has one number. All slots start at 0 and are float32.

  update(rows, slots, grads, step) -> (rows, slots); rows and grads
  [m, d] float32, slots [m] or [m, d], step [] int32 counts from 0.
  """

  slots: Mapping[str, bool]
  update: Callable


def sgd(learning_rate: float) -> Optimizer:
  def update(rows, slots, grads, step):
    return rows - learning_rate * grads, slots

  return Optimizer({}, update)


def rowwise_adagrad(learning_rate: float, eps: float = 1e-8) -> Optimizer:
  """Adagrad with one accumulator a row, the mean of its squared gradients.

  As FBGEMM's EXACT_ROWWISE_ADAGRAD: a += mean_d(g^2), w -= lr g/(sqrt(a)+eps).
  """

  def update(rows, slots, grads, step):
    acc = slots["acc"] + jnp.mean(grads * grads, axis=-1)
    scale = learning_rate / (jnp.sqrt(acc) + eps)
    return rows - scale[:, None] * grads, {"acc": acc}

  return Optimizer({"acc": False}, update)


def adagrad(learning_rate: float, eps: float = 1e-8) -> Optimizer:
  """Duchi et al. 2011: a += g^2, w -= lr g / (sqrt(a) + eps)."""

  def update(rows, slots, grads, step):
    acc = slots["acc"] + grads * grads
    rows = rows - learning_rate * grads / (jnp.sqrt(acc) + eps)
    return rows, {"acc": acc}

  return Optimizer({"acc": True}, update)


def adam(
  learning_rate: float,
  beta1: float = 0.9,
  beta2: float = 0.999,
  eps: float = 1e-8,
) -> Optimizer:
  """Lazy Adam: moments of untouched rows stay; bias correction by step."""

  def update(rows, slots, grads, step):
    t = (step + 1).astype(jnp.float32)
    m = beta1 * slots["m"] + (1 - beta1) * grads
    v = beta2 * slots["v"] + (1 - beta2) * grads * grads
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    rows = rows - learning_rate * m_hat / (jnp.sqrt(v_hat) + eps)
    return rows, {"m": m, "v": v}

  return Optimizer({"m": True, "v": True}, update)


OPTIMIZERS = {
  "sgd": sgd,
  "rowwise_adagrad": rowwise_adagrad,
  "adagrad": adagrad,
  "adam": adam,
}


def slot_bytes(name: str, dim: int) -> int:
  """Bytes of a row's slots."""
  slots = OPTIMIZERS[name](0.0).slots
  return sum(4 * (dim if wide else 1) for wide in slots.values())
