"""The dense models: DLRM and DCNv2, (dense, activations) -> logits.

Flax NNX defines them; outside this file a model is a plain dict of float32
arrays and a pure function. Tables are no part of it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from recjax import config
from recjax.errors import UserError

Params = dict[str, Any]  # nested dicts of float32 arrays
Apply = Callable[[Params, jax.Array, jax.Array], jax.Array]


def build(
  model: config.Model, dense_inputs: int, activations: int, dim: int, seed: int
) -> tuple[Params, Apply]:
  """Initial parameters and the forward pass of the configured model.

  Args:
    model: the config's `model`.
    dense_inputs: D; 0 = none, and then no bottom MLP.
    activations: A, the vectors of width `dim` that a sample looks up.
    dim: d.
    seed: of the initial parameters.

  Returns:
    params: a nested dict of float32 arrays.
    apply: (params, dense [b, D] float32, activations [b, A, d]) -> logits [b]
      float32. Pure; it traces under jit, grad and shard_map.

  Raises:
    UserError: DLRM with fewer than two vectors to interact.
  """
  cls = {"dlrm": DLRM, "dcnv2": DCNv2}[model.name]
  module = cls(model, dense_inputs, activations, dim, nnx.Rngs(seed))
  graph, state = nnx.split(module)

  def apply(params, dense, activations):
    return nnx.merge(graph, params)(dense, activations)

  return nnx.to_pure_dict(state), apply


class DLRM(nnx.Module):
  """Dot interaction: Naumov et al., arXiv:1906.00091 (facebookresearch/dlrm).

  The bottom MLP's output and the activations are dotted pairwise; the pairs
  and the bottom's output go through the top MLP.
  """

  def __init__(self, model, dense_inputs, activations, dim, rngs):
    vectors = activations + (dense_inputs > 0)
    if vectors < 2:
      raise UserError(
        "model.name: 'dlrm' interacts pairs of vectors, and this data has "
        f"{vectors}; use --config.model.name=dcnv2 or data with more features"
      )
    self.dtype = jnp.dtype(model.compute_dtype)
    pairs = vectors * (vectors - 1) // 2
    if dense_inputs:
      self.bottom = Mlp((dense_inputs, *model.bottom, dim), rngs)
    self.top = Mlp((dim * (dense_inputs > 0) + pairs, *model.top), rngs)
    self.logit = Linear(self.top.width, 1, rngs)

  def __call__(
    self,
    dense,  # [b, D]
    activations,  # [b, A, d]
  ):
    vectors = activations.astype(self.dtype)
    if dense.shape[1]:
      bottom = self.bottom(dense.astype(self.dtype))
      vectors = jnp.concatenate([bottom[:, None], vectors], axis=1)
      x = jnp.concatenate([bottom, dot_interaction(vectors)], axis=1)
    else:
      x = dot_interaction(vectors)
    return self.logit(self.top(x).astype(jnp.float32))[:, 0]


class DCNv2(nnx.Module):
  """Low-rank cross network, then an MLP: MLPerf's DLRM-DCNv2.

  x <- x0 * (W (V x) + b) + x, with x0 all vectors of the sample side by side:
  Wang et al., arXiv:2008.13535, equation 1 with W = U V^T of section 3.3;
  torchrec's `LowRankCrossNet`.
  """

  def __init__(self, model, dense_inputs, activations, dim, rngs):
    self.dtype = jnp.dtype(model.compute_dtype)
    width = (activations + (dense_inputs > 0)) * dim
    rank = model.cross_rank
    if dense_inputs:
      self.bottom = Mlp((dense_inputs, *model.bottom, dim), rngs)
    self.down = _layers(
      Linear(width, rank, rngs, bias=False) for _ in range(model.cross_layers)
    )
    self.up = _layers(
      Linear(rank, width, rngs) for _ in range(model.cross_layers)
    )
    self.top = Mlp((width, *model.top), rngs)
    self.logit = Linear(self.top.width, 1, rngs)

  def __call__(
    self,
    dense,  # [b, D]
    activations,  # [b, A, d]
  ):
    x0 = activations.astype(self.dtype).reshape(activations.shape[0], -1)
    if dense.shape[1]:
      bottom = self.bottom(dense.astype(self.dtype))
      x0 = jnp.concatenate([bottom, x0], axis=1)
    x = x0
    for name in self.down:
      x = x0 * self.up[name](self.down[name](x)) + x
    return self.logit(self.top(x).astype(jnp.float32))[:, 0]


class Mlp(nnx.Module):
  """Linear layers, each followed by ReLU; `widths` includes the input's."""

  def __init__(self, widths, rngs):
    self.width = widths[-1]
    self.layers = _layers(
      Linear(n_in, n_out, rngs) for n_in, n_out in itertools.pairwise(widths)
    )

  def __call__(self, x):  # [b, widths[0]] -> [b, widths[-1]]
    for layer in self.layers.values():
      x = jax.nn.relu(layer(x))
    return x


class Linear(nnx.Module):
  """x W + b; W and b are normal as in facebookresearch/dlrm.

  std(W) = sqrt(2 / (fan_in + fan_out)), std(b) = sqrt(1 / fan_out).
  """

  def __init__(self, n_in, n_out, rngs, bias=True):
    std = np.sqrt(2 / (n_in + n_out), dtype=np.float32)
    self.kernel = nnx.Param(std * rngs.params.normal((n_in, n_out)))
    if bias:
      std = np.sqrt(1 / n_out, dtype=np.float32)
      self.bias = nnx.Param(std * rngs.params.normal((n_out,)))
    else:
      self.bias = None

  def __call__(self, x):  # [b, n_in] -> [b, n_out]
    w = self.kernel[...].astype(x.dtype)
    if w.shape[0] > w.shape[1]:
      # The barriers keep XLA:CPU from folding the transposes away: it takes
      # the gradient of a narrowing layer 1.3 times as fast as [n_out, n_in].
      w = lax.optimization_barrier(w.T)
      y = lax.dot_general(x, w, (((1,), (1,)), ((), ())))
    else:
      y = x @ w
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None]


def _layers(layers):
  # Named, not listed: a list's integer keys would not survive a checkpoint.
  return nnx.Dict({f"layer_{i}": layer for i, layer in enumerate(layers)})


@jax.custom_vjp
def dot_interaction(vectors):
  """Dot products of the pairs i > j of a sample's vectors.

  Args:
    vectors: [b, A, d].

  Returns:
    [b, A (A - 1) / 2], in the order (1,0), (2,0), (2,1), (3,0), ...
  """
  b, a, _ = vectors.shape
  products = jnp.einsum("bid,bjd->bij", vectors, vectors).reshape(b, a * a)
  i, j = np.tril_indices(a, -1)
  return _columns(products, i * a + j)


def _interaction_forward(vectors):
  return dot_interaction(vectors), vectors


def _interaction_backward(
  vectors,  # [b, A, d]
  grads,  # [b, A (A - 1) / 2]
):
  # d/dv_i = sum_j g_ij v_j with g symmetric and 0 on the diagonal. Gathering
  # g so saves the scatter-add and the second product that autodiff would do.
  b, a, _ = vectors.shape
  pairs = grads.shape[1]
  i, j = np.tril_indices(a, -1)
  pair = np.full((a, a), pairs)
  pair[i, j] = pair[j, i] = np.arange(pairs)
  grads = jnp.pad(grads, ((0, 0), (0, 1)))
  grads = _columns(grads, pair.reshape(-1)).reshape(b, a, a)
  return (jnp.einsum("bij,bjd->bid", grads, vectors),)


dot_interaction.defvjp(_interaction_forward, _interaction_backward)


def _columns(x, index):
  return x.at[:, index.astype(np.int32)].get(mode="promise_in_bounds")
