import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec

from recjax import config
from recjax.errors import UserError
from recjax.models import dlrm

B, A, DIM = 6, 5, 4


def small(name, **kwargs):
  # Widening and narrowing layers.
  return config.Model(
    name=name, bottom=(9, 7), top=(3, 8), cross_rank=3, **kwargs
  )


def inputs(dense_inputs, activations=A, dim=DIM, seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(B, dense_inputs)).astype(np.float32),
    rng.normal(size=(B, activations, dim)).astype(np.float32),
  )


def linear(p, x):
  return x @ p["kernel"] + p.get("bias", 0.0)


def mlp(p, x):
  for i in range(len(p["layers"])):
    x = np.maximum(linear(p["layers"][f"layer_{i}"], x), 0)
  return x


def numpy_dlrm(p, dense, activations):
  out = []
  for x, vectors in zip(dense, activations, strict=True):
    vectors, features = list(vectors), []
    if len(x):
      bottom = mlp(p["bottom"], x)
      vectors.insert(0, bottom)
      features.extend(bottom)
    for i in range(len(vectors)):
      for j in range(i):
        features.append(vectors[i] @ vectors[j])
    out.append(linear(p["logit"], mlp(p["top"], np.array(features)))[0])
  return np.array(out)


def numpy_dcnv2(p, dense, activations):
  out = []
  for x, vectors in zip(dense, activations, strict=True):
    vectors = [mlp(p["bottom"], x), *vectors] if len(x) else vectors
    x0 = xl = np.concatenate(vectors)
    for i in range(len(p["up"])):
      v, w = p["down"][f"layer_{i}"], p["up"][f"layer_{i}"]
      xl = x0 * (w["kernel"].T @ (v["kernel"].T @ xl) + w["bias"]) + xl
    out.append(linear(p["logit"], mlp(p["top"], xl))[0])
  return np.array(out)


REFERENCE = {"dlrm": numpy_dlrm, "dcnv2": numpy_dcnv2}
both = pytest.mark.parametrize("name", REFERENCE)
dense_or_not = pytest.mark.parametrize("dense_inputs", [0, 3])


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@both
@dense_or_not
def test_logits_equal_numpy(name, dense_inputs):
  params, apply = dlrm.build(small(name), dense_inputs, A, DIM, seed=1)
  dense, activations = inputs(dense_inputs)
  logits = jax.jit(apply)(params, dense, activations)
  assert logits.shape == (B,) and logits.dtype == jnp.float32
  expected = REFERENCE[name](*double((params, dense, activations)))
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@both
@dense_or_not
def test_gradients_equal_finite_differences(name, dense_inputs):
  params, apply = dlrm.build(small(name), dense_inputs, A, DIM, seed=2)
  dense, activations = inputs(dense_inputs, seed=2)
  weights = np.linspace(-1, 1, B)

  def loss(params, activations):
    return jnp.sum(apply(params, dense, activations) * weights)

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, activations)
  at = np.asarray(ravel_pytree((params, activations))[0], np.float64)
  rng, eps = np.random.default_rng(3), 1e-6
  reference = REFERENCE[name]
  structure = jax.tree.structure((params, activations))
  leaves = jax.tree.leaves((params, activations))
  ends = np.cumsum([x.size for x in leaves])[:-1]

  def loss64(flat):
    parts = zip(np.split(flat, ends), leaves, strict=True)
    p, a = jax.tree.unflatten(structure, [x.reshape(y.shape) for x, y in parts])
    return reference(p, dense.astype(np.float64), a) @ weights

  flat_grads = np.asarray(ravel_pytree(grads)[0])
  for _ in range(5):  # along random directions
    direction = rng.normal(size=at.size)
    slope = (loss64(at + eps * direction) - loss64(at - eps * direction)) / (
      2 * eps
    )
    np.testing.assert_allclose(flat_grads @ direction, slope, rtol=1e-3)


def test_interaction_gradient_equals_autodiff():
  vectors = jax.random.normal(jax.random.key(0), (B, A, DIM))
  i, j = np.tril_indices(A, -1)
  cotangent = jax.random.normal(jax.random.key(1), (B, len(i)))

  def plain(v):
    return jnp.einsum("bid,bjd->bij", v, v)[:, i, j]

  for f in (dlrm.dot_interaction, jax.jit(dlrm.dot_interaction)):
    out, vjp = jax.vjp(f, vectors)
    expected, expected_vjp = jax.vjp(plain, vectors)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      vjp(cotangent)[0], expected_vjp(cotangent)[0], rtol=1e-5, atol=1e-5
    )


@both
def test_bfloat16_is_close_to_float32(name):
  dense, activations = inputs(3)
  params, apply = dlrm.build(small(name), 3, A, DIM, seed=4)
  _, apply16 = dlrm.build(
    small(name, compute_dtype="bfloat16"), 3, A, DIM, seed=4
  )

  def loss(params, activations, apply):
    return jnp.sum(apply(params, dense, activations))

  logits, logits16 = (f(params, dense, activations) for f in (apply, apply16))
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


def test_kaggle_parameters():
  params, _ = dlrm.build(config.Model(), 13, 26, 16, seed=0)
  # (13+1)512 + (512+1)256 + (256+1)64 + (64+1)16, then 16 + 27*26/2 inputs:
  # (367+1)512 + (512+1)256 + (256+1)
  assert sum(x.size for x in jax.tree.leaves(params)) == 475_985
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  first = params["top"]["layers"]["layer_0"]
  assert np.std(first["kernel"]) == pytest.approx(
    (2 / (367 + 512)) ** 0.5, 0.01
  )
  assert np.std(first["bias"]) == pytest.approx((1 / 512) ** 0.5, 0.15)


@both
def test_seed_decides_the_parameters(name):
  def leaves(seed):
    return jax.tree.leaves(dlrm.build(small(name), 3, A, DIM, seed)[0])

  one, again, other = leaves(0), leaves(0), leaves(1)
  for x, y, z in zip(one, again, other, strict=True):
    np.testing.assert_array_equal(x, y)
    assert np.all(x != z)


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_shard_map(name, check_vma):
  n = 2
  mesh = jax.make_mesh(
    (n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n]
  )
  params, apply = dlrm.build(small(name), 3, A, DIM, seed=5)
  dense, activations = inputs(3)

  def loss(params, dense, activations):
    return jnp.sum(apply(params, dense, activations) ** 2)

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
  expected = jax.grad(loss, argnums=(0, 2))(params, dense, activations)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.jit(sharded)(params, dense, activations),
    expected,
  )


def test_nothing_to_interact_is_an_error():
  with pytest.raises(UserError, match=r"model.name: 'dlrm'.*has 1;.*dcnv2"):
    dlrm.build(small("dlrm"), 0, 1, DIM, seed=0)
