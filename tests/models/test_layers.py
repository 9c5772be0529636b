import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_models import small

from recjax.models import build
from recjax.models.layers import Projections, dot_interaction

B, A, DIM = 6, 5, 4


def test_interaction_gradient_equals_autodiff():
  vectors = jax.random.normal(jax.random.key(0), (B, A, DIM))
  i, j = np.tril_indices(A, -1)
  cotangent = jax.random.normal(jax.random.key(1), (B, len(i)))

  def plain(v):
    return jnp.einsum("bid,bjd->bij", v, v)[:, i, j]

  for f in (dot_interaction, jax.jit(dot_interaction)):
    out, vjp = jax.vjp(f, vectors)
    expected, expected_vjp = jax.vjp(plain, vectors)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      vjp(cotangent)[0], expected_vjp(cotangent)[0], rtol=1e-5, atol=1e-5
    )


def test_projections_keep_zero_and_what_fits():
  inputs = {"narrow": (2, 3), "same": (1, DIM), "wide": (1, 9)}
  project = Projections(inputs, DIM, nnx.Rngs(0))
  rows = {f: np.ones((B, h, d), np.float32) for f, (h, d) in inputs.items()}
  rows["narrow"][0] = 0  # an empty bag, or padding
  out = project(rows, jnp.float32)
  assert out.shape == (B, 4, DIM)
  np.testing.assert_array_equal(out[0, :2], 0)
  np.testing.assert_array_equal(out[:, 2], rows["same"][:, 0])
  kernel = project.layers["of_wide"].kernel[...]
  assert kernel.shape == (9, DIM)
  np.testing.assert_allclose(out[0, 3], kernel.sum(axis=0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", build.MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_of_one_array_cost_what_the_array_costs(name, dtype):
  """XLA undoes the slices, forward and backward: the same instructions."""
  columns = 7
  split = {f"C{i}": (1, DIM) for i in range(columns)}
  whole = {"all": (columns, DIM)}
  dense = np.ones((B, 3), np.float32)
  rows = np.ones((B, columns, DIM), np.float32)

  def instructions(inputs):
    model = small(name, compute_dtype=dtype)
    params, apply = build.build(model, 3, inputs, DIM, seed=0)

    def gradients(params, dense, rows):
      parts = jnp.split(rows, len(inputs), axis=1)
      activations = dict(zip(inputs, parts, strict=True))

      def loss(params, activations):
        return jnp.sum(apply(params, dense, activations, {}) ** 2)

      grads, of_rows = jax.grad(loss, argnums=(0, 1))(params, activations)
      return grads, jnp.concatenate([of_rows[f] for f in inputs], axis=1)

    program = jax.jit(gradients).lower(params, dense, rows).compile()
    text = program.as_text()
    assert text is not None
    return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", text))

  assert instructions(split) == instructions(whole)
