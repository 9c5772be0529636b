"""What holds for every model, and how it is built and called."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers_models import BATCH, DIM, EQUAL, MIXED, example, small
from jax.sharding import AxisType, PartitionSpec

from recjax import config
from recjax.models import build
from recjax.models.cost import DenseCost

every_model = pytest.mark.parametrize("name", build.MODELS)


def test_the_config_names_the_models():
  name = next(f for f in dataclasses.fields(config.Model) if f.name == "name")
  assert tuple(name.metadata["choices"]) == tuple(build.MODELS)


class SequenceMean(nnx.Module):
  """A model that reads the masks: its logit is the mean over real positions."""

  def __init__(self, model, dense_inputs, inputs, dim, rngs):
    self.scale = nnx.Param(jnp.ones(dim))
    self.sequences = tuple(f for f, (h, _) in inputs.items() if h > 1)

  def __call__(self, dense, activations, masks):
    total = jnp.zeros(dense.shape[0])
    for f in self.sequences:
      real = masks[f].astype(jnp.float32)
      rows = activations[f] @ self.scale[...]  # [b, h]
      total += (real * rows).sum(axis=1) / real.sum(axis=1)
    return total


def test_masks_of_padded_positions_arrive(monkeypatch):
  entry = (SequenceMean, lambda *_: DenseCost())
  monkeypatch.setitem(build.MODELS, "sequence_mean", entry)
  model = config.Model(name="sequence_mean")
  params, apply = build.build(model, 0, EQUAL, DIM, seed=0)
  dense, activations = example(0)
  lengths = np.array([1, 2, 3, 3, 2, 1])
  mask = np.arange(3) < lengths[:, None]  # [b, h]
  logits = jax.jit(apply)(params, dense, activations, {"C2": mask})
  expected = [
    x[:length].sum(axis=1).mean()
    for x, length in zip(activations["C2"], lengths, strict=True)
  ]
  np.testing.assert_allclose(logits, expected, rtol=1e-5)
  # And a changed padded position changes nothing.
  activations["C2"][~mask] = 1e3
  again = jax.jit(apply)(params, dense, activations, {"C2": mask})
  np.testing.assert_array_equal(logits, again)


@pytest.mark.slow
@every_model
def test_masks_may_be_ignored(name):
  params, apply = build.build(small(name), 3, MIXED, DIM, seed=0)
  dense, activations = example(3, MIXED)
  masks = {"items": np.arange(3) < np.full((BATCH, 1), 2)}
  apply = jax.jit(apply)
  np.testing.assert_array_equal(
    apply(params, dense, activations, masks),
    apply(params, dense, activations, {}),
  )


@every_model
def test_only_other_dims_are_projected(name):
  equal, _ = build.build(small(name), 3, EQUAL, DIM, seed=0)
  assert "project" not in equal
  mixed, _ = build.build(small(name), 3, MIXED, DIM, seed=0)
  shapes = jax.tree.map(jnp.shape, mixed.pop("project"))
  assert shapes == {
    "layers": {"of_C1": {"kernel": (2, DIM)}, "of_C3": {"kernel": (7, DIM)}}
  }
  # All other parameters are those of any inputs of as many vectors.
  same_count = {"all": (6, DIM)}
  expected, _ = build.build(small(name), 3, same_count, DIM, seed=0)
  jax.tree.map(np.testing.assert_array_equal, mixed, expected)


@every_model
def test_order_is_that_of_the_inputs(name):
  params, apply = build.build(small(name), 3, MIXED, DIM, seed=0)
  dense, activations = example(3, MIXED)
  parts = list(activations.values())
  orders = [MIXED, dict(reversed(MIXED.items()))]

  def logits(order):
    # Traced with the dict in this order; arguments of jit would be sorted.
    of = dict(zip(MIXED, parts, strict=True))
    return jax.jit(
      lambda: apply(params, dense, {f: of[f] for f in order}, {})
    )()

  np.testing.assert_array_equal(*map(logits, orders))


@pytest.mark.slow
@every_model
def test_bfloat16_is_close_to_float32(name):
  dense, activations = example(3, MIXED)
  params, apply = build.build(small(name), 3, MIXED, DIM, seed=4)
  model16 = small(name, compute_dtype="bfloat16")
  _, apply16 = build.build(model16, 3, MIXED, DIM, seed=4)

  def loss(params, activations, apply):
    return jnp.sum(apply(params, dense, activations, {}))

  logits, logits16 = (
    jax.jit(f)(params, dense, activations, {}) for f in (apply, apply16)
  )
  assert logits16.dtype == jnp.float32
  np.testing.assert_allclose(logits16, logits, atol=0.03 * np.abs(logits).max())
  assert np.any(logits16 != logits)
  grads, grads16 = (
    jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(
      params, activations, f
    )
    for f in (apply, apply16)
  )
  for x, y in zip(*map(jax.tree.leaves, (grads, grads16)), strict=True):
    assert y.dtype == jnp.float32
    assert np.linalg.norm(y - x) <= 0.05 * np.linalg.norm(x)


@every_model
def test_seed_decides_the_parameters(name):
  def leaves(seed):
    params, _ = build.build(small(name), 3, MIXED, DIM, seed)
    return jax.tree.leaves(params)

  one, again, other = leaves(0), leaves(0), leaves(1)
  for x, y, z in zip(one, again, other, strict=True):
    np.testing.assert_array_equal(x, y)
    assert np.all(x != z)


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_shard_map(name, check_vma):
  n = 2
  mesh = jax.make_mesh(
    (n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n]
  )
  params, apply = build.build(small(name), 3, MIXED, DIM, seed=5)
  dense, activations = example(3, MIXED)

  def loss(params, dense, activations):
    return jnp.sum(apply(params, dense, activations, {}) ** 2)

  def gradient(params, dense, activations):
    grads = jax.grad(loss, argnums=(0, 2))(params, dense, activations)
    # With checks, JAX itself sums the cotangents of replicated inputs.
    return grads if check_vma else (jax.lax.psum(grads[0], "data"), grads[1])

  data, whole = PartitionSpec("data"), PartitionSpec()
  sharded = jax.shard_map(
    gradient,
    mesh=mesh,
    in_specs=(whole, data, data),
    out_specs=(whole, data),
    check_vma=check_vma,
  )
  expected = jax.jit(jax.grad(loss, argnums=(0, 2)))(params, dense, activations)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.jit(sharded)(params, dense, activations),
    expected,
  )
