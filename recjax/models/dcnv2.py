"""DCNv2: a low-rank cross network, then an MLP; MLPerf's DLRM-DCNv2.

x <- x0 * (W (V x) + b) + x, with x0 all vectors of the sample side by side:
Wang et al., arXiv:2008.13535, equation 1 with W = U V^T of section 3.3;
torchrec's `LowRankCrossNet`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from recjax import config
from recjax.models import cost as cost_lib
from recjax.models.cost import DenseCost, Inputs
from recjax.models.layers import Linear, Mlp, Projections, named


class DCNv2(nnx.Module):
  """Crosses all vectors of a sample with themselves, layer by layer.

  Masks are not used: a padded position is a vector of zeros.
  """

  def __init__(
    self,
    model: config.Model,
    dense_inputs: int,
    inputs: Inputs,
    dim: int,
    rngs: nnx.Rngs,
  ):
    self.dtype = jnp.dtype(model.compute_dtype)
    width = cost_lib.vectors(dense_inputs, inputs) * dim
    rank, crosses = model.cross_rank, range(model.cross_layers)
    if dense_inputs:
      self.bottom = Mlp((dense_inputs, *model.bottom, dim), rngs)
    self.down = named(Linear(width, rank, rngs, bias=False) for _ in crosses)
    self.up = named(Linear(rank, width, rngs) for _ in crosses)
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
    x0 = vectors.reshape(vectors.shape[0], -1)
    if dense.shape[1]:
      bottom = self.bottom(dense.astype(self.dtype))
      x0 = jnp.concatenate([bottom, x0], axis=1)
    x = x0
    for name in self.down:
      x = x0 * self.up[name](self.down[name](x)) + x
    return self.logit(self.top(x).astype(jnp.float32))[:, 0]


def cost(
  model: config.Model, dense_inputs: int, inputs: Inputs, dim: int
) -> DenseCost:
  """Returns what `DCNv2` of these arguments costs a sample."""
  width = cost_lib.vectors(dense_inputs, inputs) * dim
  total = cost_lib.projections(inputs, dim) + DenseCost(floats=width)
  if dense_inputs:
    total += cost_lib.mlp((dense_inputs, *model.bottom, dim))
  for _ in range(model.cross_layers):
    total += cost_lib.linear(width, model.cross_rank, bias=False)
    total += cost_lib.linear(model.cross_rank, width)
    total += DenseCost(floats=width)  # x after the layer
  return total + cost_lib.mlp((width, *model.top, 1))
