"""DLRM: dot products of all pairs of vectors, then an MLP.

Naumov et al., arXiv:1906.00091; facebookresearch/dlrm.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from recjax import config
from recjax.errors import UserError
from recjax.models import cost as cost_lib
from recjax.models.cost import DenseCost, Inputs
from recjax.models.layers import Linear, Mlp, Projections, dot_interaction


class DLRM(nnx.Module):
  """Interacts the bottom MLP's output and the activations pairwise.

  The pairs and the bottom's output go through the top MLP. Masks are not
  used: a padded position is a vector of zeros, and so are its products.
  """

  def __init__(
    self,
    model: config.Model,
    dense_inputs: int,
    inputs: Inputs,
    dim: int,
    rngs: nnx.Rngs,
  ):
    vectors = cost_lib.vectors(dense_inputs, inputs)
    if vectors < 2:
      raise UserError(
        "model.name: 'dlrm' interacts pairs of vectors, and this data has "
        f"{vectors}; use --config.model.name=dcnv2 or data with more features"
      )
    self.dtype = jnp.dtype(model.compute_dtype)
    if dense_inputs:
      self.bottom = Mlp((dense_inputs, *model.bottom, dim), rngs)
    width = _top_width(dense_inputs, vectors, dim)
    self.top = Mlp((width, *model.top), rngs)
    self.logit = Linear(self.top.width, 1, rngs)
    self.project = Projections(inputs, dim, rngs)

  def __call__(
    self,
    dense: jax.Array,  # [b, D]
    activations: Mapping[str, jax.Array],  # feature -> [b, h, d]
    masks: Mapping[str, jax.Array],  # feature -> [b, h] bool
  ) -> jax.Array:  # [b] float32
    vectors = self.project(activations, self.dtype)
    if dense.shape[1]:
      bottom = self.bottom(dense.astype(self.dtype))
      vectors = jnp.concatenate([bottom[:, None], vectors], axis=1)
      x = jnp.concatenate([bottom, dot_interaction(vectors)], axis=1)
    else:
      x = dot_interaction(vectors)
    return self.logit(self.top(x).astype(jnp.float32))[:, 0]


def cost(
  model: config.Model, dense_inputs: int, inputs: Inputs, dim: int
) -> DenseCost:
  """Returns what `DLRM` of these arguments costs a sample."""
  vectors = cost_lib.vectors(dense_inputs, inputs)
  total = cost_lib.projections(inputs, dim)
  if dense_inputs:
    total += cost_lib.mlp((dense_inputs, *model.bottom, dim))
  # All pairs, as one product of the vectors with themselves.
  products = vectors * vectors
  total += DenseCost(flops=2 * products * dim, floats=vectors * dim + products)
  width = _top_width(dense_inputs, vectors, dim)
  return total + cost_lib.mlp((width, *model.top, 1))


def _top_width(dense_inputs: int, vectors: int, dim: int) -> int:
  bottom = dim if dense_inputs else 0
  return bottom + vectors * (vectors - 1) // 2
