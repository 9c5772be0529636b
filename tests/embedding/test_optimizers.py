"""Each optimizer against numpy written from the papers' formulas."""

import jax
import numpy as np
import pytest

from recjax.embedding import optimizers

ROWS, DIM, STEPS, RATE = 5, 4, 6, 0.3
EPS = 1e-8


def sgd(w, slots, g, t):
  return w - RATE * g, {}


def adagrad(w, slots, g, t):
  acc = slots["acc"] + g**2
  return w - RATE * g / (np.sqrt(acc) + EPS), {"acc": acc}


def rowwise_adagrad(w, slots, g, t):
  acc, new = np.empty(ROWS), np.empty_like(w)
  for i in range(ROWS):
    acc[i] = slots["acc"][i] + sum(x * x for x in g[i]) / DIM
    new[i] = w[i] - RATE * g[i] / (np.sqrt(acc[i]) + EPS)
  return new, {"acc": acc}


def adam(w, slots, g, t):  # Kingma and Ba 2015, algorithm 1
  m = 0.9 * slots["m"] + 0.1 * g
  v = 0.999 * slots["v"] + 0.001 * g**2
  m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
  return w - RATE * m_hat / (np.sqrt(v_hat) + EPS), {"m": m, "v": v}


WANTED = {
  "sgd": sgd,
  "adagrad": adagrad,
  "rowwise_adagrad": rowwise_adagrad,
  "adam": adam,
}


def test_each_optimizer_is_tested():
  assert WANTED.keys() == optimizers.OPTIMIZERS.keys()


@pytest.mark.parametrize("name", WANTED)
def test_steps_equal_numpy(name):
  optimizer = optimizers.OPTIMIZERS[name](RATE)
  rng = np.random.default_rng(0)
  w = rng.normal(size=(ROWS, DIM))
  slots = {
    k: np.zeros((ROWS, DIM) if wide else ROWS)
    for k, wide in optimizer.slots.items()
  }
  to_float32 = lambda tree: jax.tree.map(lambda x: x.astype(np.float32), tree)
  got = to_float32((w, slots))
  update = jax.jit(optimizer.update)
  for step in range(STEPS):
    # Of very different sizes; a gradient of 0 must not divide by 0.
    g = rng.normal(size=(ROWS, DIM)) * 10.0 ** np.arange(-3, ROWS - 3)[:, None]
    g[step % ROWS, 0] = 0
    g[0] = 0 if step == 0 else g[0]
    w, slots = WANTED[name](w, slots, g, step + 1)
    got = update(*got, g.astype(np.float32), np.int32(step))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
      got,
      (w, slots),
    )
    assert got[0].dtype == np.float32
    assert all(s.dtype == np.float32 for s in got[1].values())


@pytest.mark.parametrize("name", WANTED)
def test_rows_are_updated_alone(name):
  """So that any part of the touched rows may be updated at a time."""
  optimizer = optimizers.OPTIMIZERS[name](RATE)
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.uniform(0.1, 1, shape).astype(np.float32)
  w, g = draw(ROWS, DIM), draw(ROWS, DIM)
  slots = {
    k: draw(ROWS, DIM) if wide else draw(ROWS)
    for k, wide in optimizer.slots.items()
  }
  update = jax.jit(optimizer.update)
  whole = update(w, slots, g, np.int32(3))
  some = np.array([3, 1])
  part = lambda tree: jax.tree.map(lambda x: np.asarray(x)[some], tree)
  got = update(part(w), part(slots), part(g), np.int32(3))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, part(whole)
  )


@pytest.mark.parametrize(
  ("name", "dim", "want"),
  [
    ("sgd", 16, 0),
    ("rowwise_adagrad", 16, 4),
    ("adagrad", 16, 64),
    ("adam", 16, 128),
    ("adam", 1, 8),
  ],
)
def test_slot_bytes(name, dim, want):
  assert optimizers.slot_bytes(name, dim) == want
