"""What the dense part of a step costs a sample; no JAX.

A model's file adds up its own cost of the parts below, so that the planner
prices a model that it has never seen.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

# The activations that a model takes, in their order: feature -> (h, d), the
# vectors that it gives a sample and their width.
Inputs = Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class DenseCost:
  """The dense part of a model."""

  params: int = 0
  flops: int = 0  # of a sample's forward pass
  floats: int = 0  # activations of a sample
  inputs: int = 0  # floats of the vectors that it takes of a sample

  def __add__(self, other: "DenseCost") -> "DenseCost":
    """Returns the cost of both."""
    return DenseCost(
      self.params + other.params,
      self.flops + other.flops,
      self.floats + other.floats,
      self.inputs + other.inputs,
    )


def linear(n_in: int, n_out: int, bias: bool = True) -> DenseCost:
  """Returns the cost of `layers.Linear`; a multiply-add is two FLOPs."""
  product = n_in * n_out
  return DenseCost(product + bias * n_out, 2 * product, n_out)


def mlp(widths: Sequence[int]) -> DenseCost:
  """Returns the cost of linear layers between these widths."""
  layers = (linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
  return sum(layers, DenseCost())


def projections(inputs: Inputs, dim: int) -> DenseCost:
  """Returns the cost of `layers.Projections`.

  A feature's h vectors go through the same weights.
  """
  total = DenseCost(inputs=sum(h * d for h, d in inputs.values()))
  for h, d in inputs.values():
    if d != dim:
      one = linear(d, dim, bias=False)
      total += DenseCost(one.params, h * one.flops, h * one.floats)
  return total


def vectors(dense_inputs: int, inputs: Inputs) -> int:
  """Returns how many vectors a sample has: the dense inputs become one."""
  return (dense_inputs > 0) + sum(h for h, _ in inputs.values())
