"""The layers that the models share.

Dimensions as in schema.py; A is the vectors of a sample: the activations of
all features, and the bottom MLP's output where there is one.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from recjax.models.cost import Inputs


def _narrowed_on_cpus(x, w):  # [b, n_in], [n_in, n_out] -> [b, n_out]
  """Returns x @ w; XLA:CPU takes w's gradient 1.3 times as fast transposed.

  The barrier keeps it from folding the transpose away. On GPUs the gradient's
  transpose would be a kernel.
  """
  w = lax.optimization_barrier(w.T)
  return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


class Linear(nnx.Module):
  """Computes x W + b; W and b start normal as in facebookresearch/dlrm.

  std(W) = sqrt(2 / (fan_in + fan_out)), std(b) = sqrt(1 / fan_out).
  """

  def __init__(self, n_in: int, n_out: int, rngs: nnx.Rngs, bias: bool = True):
    std = np.sqrt(2 / (n_in + n_out), dtype=np.float32)
    self.kernel = nnx.Param(std * rngs.params.normal((n_in, n_out)))
    if bias:
      std = np.sqrt(1 / n_out, dtype=np.float32)
      self.bias = nnx.Param(std * rngs.params.normal((n_out,)))
    else:
      self.bias = None

  def __call__(
    self,
    x: jax.Array,  # [b, n_in]
  ) -> jax.Array:  # [b, n_out]
    w = self.kernel[...].astype(x.dtype)
    if w.shape[0] > w.shape[1]:
      y = lax.platform_dependent(
        x, w, cpu=_narrowed_on_cpus, default=jnp.matmul
      )
    else:
      y = x @ w
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None]


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0), whose derivative asks for the result alone.

  jax.nn.relu's asks for x, which then must be kept, and which keeps XLA from
  ending a product with the max (on an H100 a kernel less a layer).
  """
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_derivative(primals, tangents):
  (x,), (t,) = primals, tangents
  y = lax.optimization_barrier(relu(x))  # or XLA asks x > 0 after all
  return y, jnp.where(y > 0, t, 0)


class Mlp(nnx.Module):
  """Linear layers, each followed by ReLU; `widths` includes the input's."""

  def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
    self.width = widths[-1]
    self.layers = named(
      Linear(n_in, n_out, rngs) for n_in, n_out in itertools.pairwise(widths)
    )

  def __call__(
    self,
    x: jax.Array,  # [b, widths[0]]
  ) -> jax.Array:  # [b, widths[-1]]
    for layer in self.layers.values():
      x = relu(layer(x))
    return x


class Projections(nnx.Module):
  """Brings every feature's activations to width `dim`, side by side.

  Those of another width go through a linear layer, one a feature: the mixed
  dimensions of Ginart et al., arXiv:1909.11810. It has no bias, as there, so
  that an empty bag and a padded position stay zero. Where all have width `dim`
  there are no parameters.
  """

  def __init__(self, inputs: Inputs, dim: int, rngs: nnx.Rngs):
    self.features = tuple(inputs)
    self.projected = frozenset(f for f, (_, d) in inputs.items() if d != dim)
    # The prefix keeps a feature called `items` apart from nnx.Dict's method.
    self.layers = nnx.Dict(
      {
        f"of_{feature}": Linear(d, dim, rngs, bias=False)
        for feature, (_, d) in inputs.items()
        if feature in self.projected
      }
    )

  def __call__(
    self,
    activations: Mapping[str, jax.Array],  # feature -> [b, h, d] float32
    dtype: DTypeLike,
  ) -> jax.Array:  # [b, A, dim] of `dtype`, without the bottom MLP's output
    # Concatenated as float32 and only then rounded: XLA sees that adjacent
    # slices of one array are that array, but not through a conversion.
    parts = [self._project(f, activations[f], dtype) for f in self.features]
    return jnp.concatenate(parts, axis=1).astype(dtype)

  def _project(self, feature: str, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    if feature not in self.projected:
      return x
    b, h, d = x.shape
    x = self.layers[f"of_{feature}"](x.reshape(b * h, d).astype(dtype))
    return x.reshape(b, h, -1).astype(jnp.float32)


def named(layers: Iterable[nnx.Module]) -> nnx.Dict:
  """Returns the layers as layer_0, layer_1, ...

  Not a list, whose integer keys would not survive a checkpoint.
  """
  return nnx.Dict({f"layer_{i}": layer for i, layer in enumerate(layers)})


@jax.custom_vjp
def dot_interaction(vectors: jax.Array) -> jax.Array:
  """Takes the dot products of the pairs i > j of a sample's vectors.

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
