import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers_models import EQUAL, MIXED
from jax.extend import core as jax_core

from recjax import config
from recjax.models import build, cost
from recjax.models.cost import DenseCost

KAGGLE = {f"C{i + 1}": (1, 16) for i in range(26)}


def product_flops(jaxpr) -> int:
  """Two FLOPs for each multiply-add of the products in a jaxpr."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      total += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    inner = [product_flops(x) for x in jax_core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == "cond":  # one of the branches runs: a platform's
      assert len(set(inner)) == 1
      inner = inner[:1]
    total += sum(inner)
  return total


@pytest.mark.slow
@pytest.mark.parametrize("name", build.MODELS)
@pytest.mark.parametrize("dense_inputs", [13, 0])
@pytest.mark.parametrize(
  "inputs", [EQUAL, MIXED, KAGGLE], ids=["equal", "mixed", "kaggle"]
)
def test_a_model_states_its_cost(name, dense_inputs, inputs):
  model = config.Model(name=name, cross_rank=8)
  params, apply = build.build(model, dense_inputs, inputs, 16, 0)
  stated = build.cost(model, dense_inputs, inputs, 16)
  assert stated.params == sum(x.size for x in jax.tree.leaves(params))
  dense = np.zeros((1, dense_inputs), np.float32)
  rows = {f: np.zeros((1, h, d), np.float32) for f, (h, d) in inputs.items()}
  arguments = params, dense, rows, {}
  assert stated.flops == product_flops(jax.make_jaxpr(apply)(*arguments).jaxpr)
  counted = jax.jit(apply).lower(*arguments).compile().cost_analysis()
  assert stated.flops == pytest.approx(counted["flops"], rel=0.05)


def test_numbers_are_what_they_were():
  """Taken when the planner had this table of models by itself."""
  model = config.Model(name="dlrm")
  found = [build.cost(model, n, KAGGLE, 16) for n in (13, 0)]
  assert found == [
    DenseCost(params=475_985, flops=972_064, floats=2_778, inputs=416),
    DenseCost(params=298_497, flops=617_088, floats=1_861, inputs=416),
  ]
  model = config.Model(name="dcnv2", cross_rank=8)
  found = [build.cost(model, n, KAGGLE, 16) for n in (13, 0)]
  assert found == [
    DenseCost(params=531_297, flops=1_056_768, floats=4_665, inputs=416),
    DenseCost(params=366_305, flops=728_576, floats=3_705, inputs=416),
  ]


def test_projections_are_counted():
  assert cost.projections(KAGGLE, 16) == DenseCost(inputs=26 * 16)
  # Of C1 and of the two vectors of C3.
  expected = DenseCost(
    2 * 4 + 7 * 4, 2 * (2 * 4 + 2 * 7 * 4), 4 + 2 * 4, 2 + 3 * 4 + 2 * 7
  )
  assert cost.projections(MIXED, 4) == expected


def test_costs_need_no_jax():
  code = "import sys, recjax.models.cost; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
