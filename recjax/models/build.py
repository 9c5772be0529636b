"""The configured model: its parameters, its forward pass and its cost.

Flax NNX defines the models; outside this room a model is a plain dict of
float32 arrays and a pure function. Tables are no part of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from recjax import config
from recjax.models import dcnv2, dlrm
from recjax.models.cost import DenseCost, Inputs

Params = dict[str, Any]  # nested dicts of float32 arrays
Arrays = Mapping[str, jax.Array]  # by feature
Apply = Callable[[Params, jax.Array, Arrays, Arrays], jax.Array]

# A model: its module and its cost, each a function of the same arguments.
MODELS = {
  "dlrm": (dlrm.DLRM, dlrm.cost),
  "dcnv2": (dcnv2.DCNv2, dcnv2.cost),
}


def build(
  model: config.Model, dense_inputs: int, inputs: Inputs, dim: int, seed: int
) -> tuple[Params, Apply]:
  """Builds the configured model.

  Args:
    model: the config's `model`.
    dense_inputs: D; 0 = none, and then no bottom MLP.
    inputs: feature -> (h, d), in the order in which the model takes them: the
      vectors that a sample has of the feature, and their width.
    dim: the width of the model's vectors. A linear layer without bias brings
      activations of another width to it.
    seed: of the initial parameters.

  Returns:
    params: a nested dict of float32 arrays.
    apply: (params, dense [b, D] float32, activations, masks) -> logits [b]
      float32, with activations {feature: [b, h, d] float32} of all features and
      masks {feature: [b, h] bool} of those that are sequences (pooling 'none'),
      False where a position is padding. Pure; it traces under jit, grad and
      shard_map.

  Raises:
    UserError: DLRM with fewer than two vectors to interact.
  """
  module_class, _ = MODELS[model.name]
  module = module_class(model, dense_inputs, inputs, dim, nnx.Rngs(seed))
  graph, state = nnx.split(module)

  def apply(
    params: Params, dense: jax.Array, activations: Arrays, masks: Arrays
  ) -> jax.Array:
    return nnx.merge(graph, params)(dense, activations, masks)

  return nnx.to_pure_dict(state), apply


def cost(
  model: config.Model, dense_inputs: int, inputs: Inputs, dim: int
) -> DenseCost:
  """Returns what `build` with these arguments costs; its own arguments."""
  _, cost_of = MODELS[model.name]
  return cost_of(model, dense_inputs, inputs, dim)
