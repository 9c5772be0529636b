import jax
import numpy as np
import pytest
from helpers_models import (
  DIM,
  EQUAL,
  MIXED,
  check_frozen,
  check_gradients,
  check_logits,
  linear,
  mlp,
  small,
  vectors,
)

from recjax import config
from recjax.errors import UserError
from recjax.models import build


def reference(p, dense, activations):
  v = vectors(p, dense, activations)
  features = list(v[0]) if len(dense) else []
  for i in range(len(v)):
    for j in range(i):
      features.append(v[i] @ v[j])
  return linear(p["logit"], mlp(p["top"], np.array(features)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("dense_inputs", [0, 3])
def test_logits_and_gradients_equal_numpy(dense_inputs, inputs):
  check_logits("dlrm", reference, dense_inputs, inputs)
  check_gradients("dlrm", reference, dense_inputs, inputs)


def test_numbers_are_what_they_were():
  """Taken before activations came by feature; jax 0.10.2 and 0.12.0."""
  frozen = {
    "bottom/layers/layer_0/bias": ((9,), -0.081306681, 2.1189021),
    "bottom/layers/layer_0/kernel": ((3, 9), 0.21716252, 8.98920858),
    "bottom/layers/layer_1/bias": ((7,), -0.38274774, 2.62603737),
    "bottom/layers/layer_1/kernel": ((9, 7), 0.0513902195, 16.2673428),
    "bottom/layers/layer_2/bias": ((4,), -0.841470301, 1.51757249),
    "bottom/layers/layer_2/kernel": ((7, 4), 0.191518143, 9.25728665),
    "logit/bias": ((1,), 0.626015186, 0.626015186),
    "logit/kernel": ((8, 1), 0.902871609, 3.73031151),
    "top/layers/layer_0/bias": ((3,), 0.460491687, 1.35578346),
    "top/layers/layer_0/kernel": ((19, 3), 0.246116698, 13.5019352),
    "top/layers/layer_1/bias": ((8,), 0.0925954059, 2.85654487),
    "top/layers/layer_1/kernel": ((3, 8), 0.225354031, 8.55571774),
  }
  logits = [0.57580471, 0.27097332, 1.105728, 1.1346512, 0.3888619, 0.37450224]
  row_gradients = [4.4835901, 4.9894624, 2.9450188, 4.0662594, 4.6676121]
  check_frozen("dlrm", frozen, logits, row_gradients)


def test_kaggle_parameters():
  inputs = {f"C{i + 1}": (1, 16) for i in range(26)}
  params, _ = build.build(config.Model(), 13, inputs, 16, seed=0)
  # (13+1)512 + (512+1)256 + (256+1)64 + (64+1)16, then 16 + 27*26/2 inputs:
  # (367+1)512 + (512+1)256 + (256+1)
  assert sum(x.size for x in jax.tree.leaves(params)) == 475_985
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  first = params["top"]["layers"]["layer_0"]
  assert np.std(first["kernel"]) == pytest.approx(
    (2 / (367 + 512)) ** 0.5, 0.01
  )
  assert np.std(first["bias"]) == pytest.approx((1 / 512) ** 0.5, 0.15)


def test_nothing_to_interact_is_an_error():
  with pytest.raises(UserError, match=r"model.name: 'dlrm'.*has 1;.*dcnv2"):
    build.build(small("dlrm"), 0, {"C1": (1, DIM)}, DIM, seed=0)
