"""Terms of a step: sizes counted from the model and the runtime's shapes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax import config
from recjax.models import dlrm
from recjax.planner import formulas, presets, step_cost
from recjax.planner.step_cost import Dense, Load, Work

WORK = Work(
  devices=8,
  batch_size=8_192,
  lookups=26,
  dim=16,
  row_bytes=64,
  slot_bytes=4,
  wire_bytes=64,
  dense=Dense(1_000, 2_000, 300),
)


@pytest.mark.parametrize("name", ["dlrm", "dcnv2"])
@pytest.mark.parametrize("inputs", [13, 0])
def test_the_dense_part_is_counted(name, inputs):
  model = config.Model(name=name, cross_rank=8)
  params, apply = dlrm.build(model, inputs, 5, 16, 0)
  dense = step_cost.dense_model(
    name, model.bottom, model.top, inputs, 5, 16, model.cross_layers, 8
  )
  size = sum(x.size for x in jax.tree.leaves(params))
  assert dense.params == size
  shapes = (np.zeros((1, inputs), np.float32), np.zeros((1, 5, 16), np.float32))
  flops = jax.jit(apply).lower(params, *shapes).compile().cost_analysis()
  assert dense.flops == pytest.approx(flops["flops"], rel=0.05)


@pytest.mark.parametrize("batch", [128, 1_024])
def test_the_dense_part_passes_over_what_xla_counts(batch):
  model = config.Model(bottom=(64, 32), top=(64, 32))
  params, apply = dlrm.build(model, 13, 8, 16, 0)
  optimizer = optax.adagrad(0.1)

  def step(params, state, dense, activations):
    loss = lambda *x: jnp.sum(apply(x[0], dense, x[1]))
    grads, rows = jax.grad(loss, argnums=(0, 1))(params, activations)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, rows

  inputs = np.zeros((batch, 13), np.float32), np.zeros((batch, 8, 16), "f4")
  compiled = jax.jit(step).lower(params, optimizer.init(params), *inputs)
  counted = compiled.compile().cost_analysis()["bytes accessed"]
  # A machine whose products take no time, with a byte a second.
  t = dataclasses.replace(presets.cpu(1), stream=1.0, matmul_float32=1e30)
  dense = step_cost.dense_model("dlrm", (64, 32), (64, 32), 13, 8, 16)
  work = dataclasses.replace(
    WORK, devices=1, batch_size=batch, lookups=8, dense=dense
  )
  predicted = step_cost.step_seconds(work, t, Load())["dense"]
  assert predicted == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize("name", ["cpu", "dgx_h200", "tpu_v6e"])
@pytest.mark.parametrize("train", [True, False])
def test_costs_rise_with_rows(name, train):
  work = dataclasses.replace(WORK, train=train)
  t = presets.get(name, 8)
  cost = lambda *x: sum(step_cost.step_seconds(work, t, Load(*x)).values())
  base = cost(0.0, 8.0, 8.0)
  assert cost(0.0, 8e3, 8.0) > base
  assert cost(0.0, 8.0, 8e3) > cost(0.0, 8e3, 8.0)  # the host is slower
  if train:
    assert cost(1e6, 8.0, 8.0) > cost(1e3, 8.0, 8.0) > base
  assert cost(0.0, 0.0, 0.0) < base


def test_serving_needs_less():
  t = presets.get("dgx_h200", 8)
  served = dataclasses.replace(WORK, train=False)
  load = Load(100.0, 8e3, 8e3)
  train, serve = (step_cost.step_seconds(w, t, load) for w in (WORK, served))
  for term in train:
    assert serve[term] <= train[term]
  assert serve["all-reduce"] == serve["optimizer"] == 0
  sent = step_cost.sent_bytes(served, load)
  assert sent["gradients"] == sent["hot gradients"] == 0


def test_one_device_sends_only_to_its_host():
  work = dataclasses.replace(WORK, devices=1)
  sent = step_cost.sent_bytes(work, Load(10.0, 100.0, 100.0))
  assert sent.pop("host") > 0
  assert set(sent.values()) == {0.0}


def test_arrays_and_numbers_agree():
  t = presets.get("dgx_h100", 8)
  hot, warm, cold = np.array([[0.0, 5, 9], [0, 8, 64], [16, 0, 8]])
  work = dataclasses.replace(WORK, node_devices=4)
  for gathered, far in itertools.product((None, hot / 2), (None, warm / 2)):
    load = Load(hot, warm, cold, gathered, far, None, far is not None)
    every = step_cost.step_seconds(work, t, load)
    for i in range(3):
      one = {
        k: x if x is None or x is True or x is False else float(x[i])
        for k, x in dataclasses.asdict(load).items()
      }
      one = step_cost.step_seconds(work, t, Load(**one))
      for term, seconds in every.items():
        got = np.broadcast_to(seconds, 3)[i]
        assert got == pytest.approx(one[term], rel=1e-12), term


def test_stages_send_what_the_formulas_say():
  """A row that each of g devices and their node touch with some chance."""
  work = dataclasses.replace(WORK, node_devices=4)
  pi, pi_node = 100.0, 250.0  # of many rows together
  w = work.wire_bytes
  near, far = pi, pi_node / 4  # n C and N C_far
  staged = Load(0.0, near, near, None, far, far)
  two = sum(formulas.two_stage_bytes(2 * pi_node, w, 2, 4))
  sent = step_cost.network_bytes(work, staged)
  assert sum(sent.values()) == pytest.approx(two)
  within = sum(formulas.coalesced_bytes(2 * pi, w, 4))
  total = step_cost.sent_bytes(work, staged)
  total.pop("host")
  assert sum(total.values()) == pytest.approx(two + within)
  # Flat: half of the rows are the other node's.
  flat = step_cost.network_bytes(work, Load(0.0, near))
  assert sum(flat.values()) == pytest.approx(pi * (2 * w + 4) / 2)
  # Copies: each node's sums go to every other node.
  copies = Load(0.0, near, 0.0, None, 2 * far, None, True)
  sent = step_cost.network_bytes(work, copies)
  assert sum(sent.values()) == pytest.approx(pi_node / 4 * (w + 4))
  serving = dataclasses.replace(work, train=False)
  assert sum(step_cost.network_bytes(serving, copies).values()) == 0
  # Replicas' gradients: of all, and of those touched.
  hot = step_cost.network_bytes(work, Load(8.0))["hot gradients"]
  assert hot == pytest.approx(2 * 8 * 4 * 17 / 2 / 4)
  hot = step_cost.network_bytes(work, Load(8.0, gathered=3.0))["hot gradients"]
  assert hot == pytest.approx(3 * (w + 4))


@pytest.mark.parametrize("name", ["dgx_h200", "tpu_v5e"])
def test_a_slow_network_asks_for_stages(name):
  work = dataclasses.replace(WORK, node_devices=4, dense=Dense())
  t = dataclasses.replace(presets.get(name, 8), node_devices=4)
  flat = Load(0.0, 1e5)
  staged = Load(0.0, 1e5, 0.0, None, 3e4, None)
  copies = Load(0.0, 1e5, 0.0, None, 6e4, None, True)
  for load in (flat, staged, copies):
    slow, fast = (
      sum(
        step_cost.step_seconds(
          work, dataclasses.replace(t, network=rate), load
        ).values()
      )
      for rate in (1e9, 1e13)
    )
    sent = sum(step_cost.network_bytes(work, load).values())
    assert slow - fast <= sent / 1e9 * (1 + 1e-9)
    assert slow > fast
  slow = dataclasses.replace(t, network=1e9)
  seconds = [
    sum(step_cost.step_seconds(work, slow, x).values()) for x in (flat, staged)
  ]
  assert seconds[1] < seconds[0]


def test_touched_rows_or_all_of_them():
  """Few touched replicas: share those; all of them touched: all-reduce."""
  t = presets.get("dgx_h200", 8)
  cost = lambda g: sum(
    step_cost.step_seconds(WORK, t, Load(1e6, 8e3, 0.0, g)).values()
  )
  assert cost(1e3) < cost(None) < cost(1e6)


@pytest.mark.parametrize("train", [True, False])
def test_a_tier_that_has_rows_takes_its_operations(train):
  work = dataclasses.replace(WORK, train=train)
  t = dataclasses.replace(presets.cpu(8), launch=1.0, tier_latency=0.25)
  hot = np.array([0.0, 0.0, 9.0, 9.0])
  warm = np.array([0.0, 7.0, 0.0, 7.0])
  for cold in (0.0, 5.0):
    tiers = np.array([0, 1, 1, 2]) + (cold > 0)
    launch = step_cost.step_seconds(work, t, Load(hot, warm, cold))["launch"]
    np.testing.assert_allclose(launch, 1 + tiers * (0.5 if train else 0.25))
