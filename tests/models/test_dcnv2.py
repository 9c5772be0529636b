import numpy as np
import pytest
from helpers_models import (
  EQUAL,
  MIXED,
  check_frozen,
  check_gradients,
  check_logits,
  linear,
  mlp,
  vectors,
)


def reference(p, dense, activations):
  x = x0 = np.concatenate(vectors(p, dense, activations))
  for i in range(len(p["up"])):
    v, w = p["down"][f"layer_{i}"], p["up"][f"layer_{i}"]
    x = x0 * (w["kernel"].T @ (v["kernel"].T @ x) + w["bias"]) + x
  return linear(p["logit"], mlp(p["top"], x))[0]


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("dense_inputs", [0, 3])
def test_logits_and_gradients_equal_numpy(dense_inputs, inputs):
  check_logits("dcnv2", reference, dense_inputs, inputs)
  check_gradients("dcnv2", reference, dense_inputs, inputs)


def test_numbers_are_what_they_were():
  """Taken before activations came by feature; jax 0.10.2 and 0.12.0."""
  frozen = {
    "bottom/layers/layer_0/bias": ((9,), -0.081306681, 2.1189021),
    "bottom/layers/layer_0/kernel": ((3, 9), 0.21716252, 8.98920858),
    "bottom/layers/layer_1/bias": ((7,), -0.38274774, 2.62603737),
    "bottom/layers/layer_1/kernel": ((9, 7), 0.0513902195, 16.2673428),
    "bottom/layers/layer_2/bias": ((4,), -0.841470301, 1.51757249),
    "bottom/layers/layer_2/kernel": ((7, 4), 0.191518143, 9.25728665),
    "down/layer_0/kernel": ((24, 3), 0.222162396, 14.7226107),
    "down/layer_1/kernel": ((24, 3), 0.217077881, 15.3490158),
    "down/layer_2/kernel": ((24, 3), 0.143840045, 15.7943654),
    "logit/bias": ((1,), 2.28522801, 2.28522801),
    "logit/kernel": ((8, 1), 0.421736121, 3.37111284),
    "top/layers/layer_0/bias": ((3,), -0.464186907, 1.42002179),
    "top/layers/layer_0/kernel": ((24, 3), 0.0500597879, 13.2369424),
    "top/layers/layer_1/bias": ((8,), -0.171591789, 2.79227723),
    "top/layers/layer_1/kernel": ((3, 8), 0.0272993762, 7.6752528),
    "up/layer_0/bias": ((24,), 0.390954882, 4.16672927),
    "up/layer_0/kernel": ((3, 24), 0.0712799802, 15.1105896),
    "up/layer_1/bias": ((24,), 0.283801913, 3.12205484),
    "up/layer_1/kernel": ((3, 24), 0.170379758, 16.6965201),
    "up/layer_2/bias": ((24,), 0.394446045, 3.96845364),
    "up/layer_2/kernel": ((3, 24), 0.170270145, 15.785104),
  }
  logits = [1.8551435, 2.0702662, 2.1483846, 1.8721992, 2.3300145, 2.5796902]
  row_gradients = [15.08385, 16.97157, 14.01118, 15.26532, 19.5259]
  check_frozen("dcnv2", frozen, logits, row_gradients)
