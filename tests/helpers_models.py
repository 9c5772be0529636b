"""What the tests of every model share: small sizes, inputs, and the checks.

A model's reference takes one sample after the other, in NumPy and float64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from recjax import config
from recjax.models import build

BATCH, DIM = 6, 4
EQUAL = {"C1": (1, DIM), "C2": (3, DIM), "C3": (1, DIM)}
# Narrower and wider vectors, and a name that a dict has for a method.
MIXED = {"C1": (1, 2), "items": (3, DIM), "C3": (2, 7)}


def small(name: str, **kwargs) -> config.Model:
  """Returns a model with widening and narrowing layers."""
  return config.Model(
    name=name, bottom=(9, 7), top=(3, 8), cross_rank=3, **kwargs
  )


def example(dense_inputs: int, inputs=EQUAL, seed: int = 0):
  """Returns (dense [b, D], {feature: [b, h, d]}) of normal numbers."""
  rng = np.random.default_rng(seed)
  dense = rng.normal(size=(BATCH, dense_inputs)).astype(np.float32)
  return dense, {
    feature: rng.normal(size=(BATCH, h, d)).astype(np.float32)
    for feature, (h, d) in inputs.items()
  }


def double(tree):
  """Returns the tree with its arrays in float64."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def linear(p, x):
  """x W + b, of a layer's parameters."""
  return x @ p["kernel"] + p.get("bias", 0.0)


def mlp(p, x):
  """Linear layers with ReLU after each; those of a model with none."""
  layers = p.get("layers", {})
  for i in range(len(layers)):
    x = np.maximum(linear(layers[f"layer_{i}"], x), 0)
  return x


def vectors(p, dense, activations) -> list:
  """A sample's vectors: the bottom MLP's output, if any, then [h, d] arrays."""
  found = [mlp(p["bottom"], dense)] if len(dense) else []
  for feature, x in activations.items():
    projection = p.get("project", {}).get("layers", {}).get(f"of_{feature}")
    found.extend(x if projection is None else linear(projection, x))
  return found


def reference_logits(reference: Callable, inputs, params, dense, activations):
  """The reference's logits [b], sample by sample."""
  logits = []
  for i in range(len(dense)):
    # In the order of the inputs: a dict that went through jax.tree is sorted.
    sample = {f: activations[f][i] for f in inputs}
    logits.append(reference(params, dense[i], sample))
  return np.array(logits)


def check_logits(name: str, reference: Callable, dense_inputs: int, inputs):
  """Asserts that the logits equal the reference's."""
  params, apply = build.build(small(name), dense_inputs, inputs, DIM, seed=1)
  dense, activations = example(dense_inputs, inputs)
  logits = jax.jit(apply)(params, dense, activations, {})
  assert logits.shape == (BATCH,) and logits.dtype == jnp.float32
  arguments = double((params, dense, activations))
  expected = reference_logits(reference, inputs, *arguments)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def check_gradients(name: str, reference: Callable, dense_inputs: int, inputs):
  """Asserts that gradients equal the reference's finite differences."""
  params, apply = build.build(small(name), dense_inputs, inputs, DIM, seed=2)
  dense, activations = example(dense_inputs, inputs, seed=2)
  weights = np.linspace(-1, 1, BATCH)

  def loss(params, activations):
    return jnp.sum(apply(params, dense, activations, {}) * weights)

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, activations)
  at, structure = jax.tree.flatten(double((params, activations)))
  rng, eps = np.random.default_rng(3), 1e-6

  def loss_at(step, direction):
    moved = [x + step * d for x, d in zip(at, direction, strict=True)]
    p, a = jax.tree.unflatten(structure, moved)
    return reference_logits(reference, inputs, p, double(dense), a) @ weights

  flat_grads = np.asarray(ravel_pytree(grads)[0])
  for _ in range(5):  # along random directions
    direction = [rng.normal(size=x.shape) for x in at]
    slope = (loss_at(eps, direction) - loss_at(-eps, direction)) / (2 * eps)
    found = flat_grads @ np.concatenate([d.ravel() for d in direction])
    np.testing.assert_allclose(found, slope, rtol=1e-3)


def check_frozen(name: str, frozen: dict, logits: list, row_gradients: list):
  """Asserts that a model is what it was when the numbers were taken.

  Args:
    name: of the model.
    frozen: path of a parameter -> (shape, its first number, sum of absolute
      values), with seed 1.
    logits: of six samples.
    row_gradients: of the sum of the squared logits with respect to each of
      the five vectors: sum of absolute values.
  """
  params, apply = build.build(small(name), 3, EQUAL, DIM, seed=1)
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }
  assert {path: x.shape for path, x in found.items()} == {
    path: shape for path, (shape, *_) in frozen.items()
  }
  for path, (_, first, total) in frozen.items():
    numbers = [found[path].flat[0], np.abs(double(found[path])).sum()]
    np.testing.assert_allclose(numbers, [first, total], 1e-6, err_msg=path)
  rng = np.random.default_rng(0)
  dense = rng.normal(size=(6, 3)).astype(np.float32)
  rows = rng.normal(size=(6, 5, DIM)).astype(np.float32)
  activations = dict(zip(EQUAL, np.split(rows, [1, 4], axis=1), strict=True))
  found_logits = jax.jit(apply)(params, dense, activations, {})
  np.testing.assert_allclose(found_logits, logits, rtol=1e-5)

  def loss(activations):
    return jnp.sum(apply(params, dense, activations, {}) ** 2)

  grads = jax.jit(jax.grad(loss))(activations)
  grads = np.concatenate([grads[f] for f in EQUAL], axis=1)
  np.testing.assert_allclose(np.abs(grads).sum((0, 2)), row_gradients, 1e-5)
