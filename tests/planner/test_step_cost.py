"""Terms of a step: sizes counted from the model and the runtime's shapes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.models.cost import DenseCost
from recjax.models.dlrm import dot_interaction
from recjax.planner import communication, host_path, presets, step_cost, traffic
from recjax.planner.traffic import Part, StepShape, Traffic

SHAPE = StepShape(
  devices=8,
  batch_size=8_192,
  lookups=26,
  dim=16,
  row_bytes=64,
  slot_bytes=4,
  wire_bytes=64,
  dense=DenseCost(1_000, 2_000, 300),
)


def seconds_of(shape, t, asked):
  return step_cost.step_seconds([Part(shape, asked)], t)


def sent_by(shape, asked):
  return traffic.sent_bytes([Part(shape, asked)])


def sent_between_nodes(shape, asked):
  return traffic.network_bytes([Part(shape, asked)])


BOTTOM, TOP = (13, 64, 32, 16), (16 + 36, 64, 32, 1)


def dlrm(params, dense, activations):
  """Two MLPs and all pairs of nine vectors, as models/dlrm.py has them."""

  def mlp(layers, x):
    for w, bias in layers[:-1]:
      x = jax.nn.relu(x @ w + bias[None])
    w, bias = layers[-1]
    return x @ w + bias[None]

  bottom = jax.nn.relu(mlp(params[0], dense))
  vectors = jnp.concatenate([bottom[:, None], activations], axis=1)
  pairs = dot_interaction(vectors)
  return mlp(params[1], jnp.concatenate([bottom, pairs], axis=1))


@pytest.mark.parametrize("batch", [128, 1_024])
def test_the_dense_part_passes_over_what_xla_counts(batch):
  pairs = [p for widths in (BOTTOM, TOP) for p in itertools.pairwise(widths)]
  products, outs = sum(a * b for a, b in pairs), sum(b for _, b in pairs)
  dense = DenseCost(
    products + outs, 2 * (products + 81 * 16), 9 * 16 + 81 + outs
  )
  params = [
    [(np.zeros(x, "f4"), np.zeros(x[1], "f4")) for x in itertools.pairwise(w)]
    for w in (BOTTOM, TOP)
  ]
  optimizer = optax.adagrad(0.1)

  def step(params, state, dense, activations):
    loss = lambda *x: jnp.sum(dlrm(x[0], dense, x[1]))
    grads, rows = jax.grad(loss, argnums=(0, 1))(params, activations)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, rows

  inputs = np.zeros((batch, 13), np.float32), np.zeros((batch, 8, 16), "f4")
  compiled = jax.jit(step).lower(params, optimizer.init(params), *inputs)
  counted = compiled.compile().cost_analysis()["bytes accessed"]
  # A machine whose products take no time, with a byte a second.
  t = dataclasses.replace(presets.cpu(1), stream=1.0, matmul_float32=1e30)
  shape = dataclasses.replace(
    SHAPE, devices=1, batch_size=batch, lookups=8, dense=dense
  )
  predicted = seconds_of(shape, t, Traffic())["dense"]
  assert predicted == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize("name", ["cpu", "dgx_h200", "tpu_v6e"])
@pytest.mark.parametrize("train", [True, False])
def test_costs_rise_with_rows(name, train):
  shape = dataclasses.replace(SHAPE, train=train)
  t = presets.get(name, 8)

  def cost(hot, warm, cold):
    asked = Traffic(hot, warm, cold, visitors=cold / 8)
    return sum(seconds_of(shape, t, asked).values())

  base = cost(0.0, 8.0, 8.0)
  assert cost(0.0, 8e3, 8.0) > base
  # No row is cheaper for living elsewhere; in training visitors are merged.
  assert cost(0.0, 8.0, 8e3) >= cost(0.0, 8e3, 8.0) * (1 - 1e-12)
  assert not train or cost(0.0, 8.0, 8e3) > cost(0.0, 8e3, 8.0)
  if train:
    assert cost(1e6, 8.0, 8.0) > cost(1e3, 8.0, 8.0) > base
  assert cost(0.0, 0.0, 0.0) < base


def test_serving_needs_less():
  t = presets.get("dgx_h200", 8)
  served = dataclasses.replace(SHAPE, train=False)
  asked = Traffic(100.0, 8e3, 8e3, visitors=2e6, pages=2e3)
  train, serve = (seconds_of(w, t, asked) for w in (SHAPE, served))
  assert serve["host rows"] > 0
  for term in train:
    assert serve[term] <= train[term]
  assert serve["all-reduce"] == serve["optimizer"] == 0
  sent = sent_by(served, asked)
  assert sent["gradients"] == sent["hot gradients"] == 0
  # Nothing is written back, neither rows nor pages.
  parts = [Part(w, asked) for w in (SHAPE, served)]
  train, serve = (host_path.seconds([part], t) for part in parts)
  for term in ("SSD", "host memory"):
    assert 2 * serve[term] == pytest.approx(train[term])
  assert sent["host"] == 2e6 * (SHAPE.stored_bytes + 8)


def test_stored_rows_come_and_go_beside_the_step():
  """By hand: what the host path takes, and the part that the step hides."""
  t = dataclasses.replace(
    presets.get("dgx_h200", 8),
    host_gather=8e9,
    host_link=1e9,
    host_latency=1e-3,
    ssd_read=8e8,
    ssd_latency=1e-4,
  )
  asked = Traffic(0.0, 8.0, 8e3, visitors=1e3, pages=50.0)
  found = host_path.seconds([Part(SHAPE, asked)], t)
  row = SHAPE.row_bytes + SHAPE.slot_bytes
  assert found == pytest.approx(
    {
      "SSD": 2 * 50 * 4096 / 1e8 + 2e-4,  # eight devices share the SSDs
      "host memory": 2 * 1e3 * row / 1e9,
      "host link": 1e3 * (2 * row + 8) / 1e9 + 2e-3,
    }
  )
  assert sent_by(SHAPE, asked)["host"] == 1e3 * (2 * row + 8)
  terms, way = seconds_of(SHAPE, t, asked), sum(found.values())
  step = sum(step_cost.device_seconds([Part(SHAPE, asked)], t).values())
  assert step < way
  assert sum(terms.values()) == pytest.approx(way)
  assert terms["host rows"] == pytest.approx(way - step)
  # A longer step hides it; two groups' ways add up before they are compared,
  # with one wait for pages.
  slow = dataclasses.replace(t, launch=way)
  assert seconds_of(SHAPE, slow, asked)["host rows"] == 0
  none = Part(SHAPE, Traffic(0.0, 8.0))
  hidden = dataclasses.replace(t, launch=1.5 * way)
  parts = [Part(SHAPE, asked), Part(SHAPE, asked)]
  both = step_cost.step_seconds(parts, hidden)["host rows"]
  assert 0 < both < 0.5 * way
  together = host_path.seconds(parts, hidden)
  assert together["SSD"] == pytest.approx(2 * found["SSD"] - 2e-4)
  parts = [Part(SHAPE, asked), none]
  assert step_cost.step_seconds(parts, hidden)["host rows"] == 0


def test_visitors_take_three_times_their_rows_of_a_device():
  sizes = {"hot": 0, "warm_shard": 0, "buffers": 0.0}
  found = step_cost.device_bytes(SHAPE, **sizes, visitors=1e3)
  none = step_cost.device_bytes(SHAPE, **sizes)
  assert found["visitors"] == 1e3 * (3 * SHAPE.stored_bytes + 16)
  assert none == found | {"visitors": 0.0}
  served = dataclasses.replace(SHAPE, train=False)
  found = step_cost.device_bytes(served, **sizes, visitors=1e3)
  assert found["visitors"] == 1e3 * (2 * SHAPE.stored_bytes + 16)


def test_one_device_sends_only_to_its_host():
  shape = dataclasses.replace(SHAPE, devices=1)
  sent = sent_by(shape, Traffic(10.0, 100.0, 100.0, visitors=100.0))
  assert sent.pop("host") > 0
  assert set(sent.values()) == {0.0}


def test_arrays_and_numbers_agree():
  t = presets.get("dgx_h100", 8)
  hot, warm, cold = np.array([[0.0, 5, 9], [0, 8, 64], [16, 0, 8]])
  shape = dataclasses.replace(SHAPE, node_devices=4)
  for gathered, inter in itertools.product((None, hot / 2), (None, warm / 2)):
    asked = Traffic(hot, warm, cold, gathered, inter, None, inter is not None)
    every = seconds_of(shape, t, asked)
    for i in range(3):
      one = {
        k: float(x[i]) if isinstance(x, np.ndarray) else x
        for k, x in dataclasses.asdict(asked).items()
      }
      one = seconds_of(shape, t, Traffic(**one))
      for term, seconds in every.items():
        got = np.broadcast_to(seconds, 3)[i]
        assert got == pytest.approx(one[term], rel=1e-12), term


def test_stages_send_what_the_formulas_say():
  """A row that each of g devices and their node touch with some chance."""
  shape = dataclasses.replace(SHAPE, node_devices=4)
  pi, pi_node = 100.0, 250.0  # of many rows together
  w = shape.wire_bytes
  intra, inter = pi, pi_node / 4  # n C and N C_node
  two_stage = Traffic(0.0, intra, intra, None, inter, inter)
  two = sum(communication.two_stage_bytes(2 * pi_node, w, 2, 4))
  sent = sent_between_nodes(shape, two_stage)
  assert sum(sent.values()) == pytest.approx(two)
  within = sum(communication.coalesced_bytes(2 * pi, w, 4))
  total = sent_by(shape, two_stage)
  total.pop("host")
  assert sum(total.values()) == pytest.approx(two + within)
  # Flat: half of the rows are the other node's.
  flat = sent_between_nodes(shape, Traffic(0.0, intra))
  assert sum(flat.values()) == pytest.approx(pi * (2 * w + 4) / 2)
  # Copies: each node's sums go to every other node.
  copies = Traffic(0.0, intra, 0.0, None, 2 * inter, None, True)
  sent = sent_between_nodes(shape, copies)
  assert sum(sent.values()) == pytest.approx(pi_node / 4 * (w + 4))
  serving = dataclasses.replace(shape, train=False)
  assert sum(sent_between_nodes(serving, copies).values()) == 0
  # Replicas' gradients: of all, and of those touched.
  hot = sent_between_nodes(shape, Traffic(8.0))["hot gradients"]
  assert hot == pytest.approx(2 * 8 * 4 * 17 / 2 / 4)
  hot = sent_between_nodes(shape, Traffic(8.0, gathered=3.0))["hot gradients"]
  assert hot == pytest.approx(3 * (w + 4))


@pytest.mark.parametrize("name", ["dgx_h200", "tpu_v5e"])
def test_a_slow_network_asks_for_stages(name):
  shape = dataclasses.replace(SHAPE, node_devices=4, dense=DenseCost())
  t = dataclasses.replace(presets.get(name, 8), node_devices=4)
  flat = Traffic(0.0, 1e5)
  two_stage = Traffic(0.0, 1e5, 0.0, None, 3e4, None)
  copies = Traffic(0.0, 1e5, 0.0, None, 6e4, None, True)
  for asked in (flat, two_stage, copies):
    slow, fast = (
      sum(
        seconds_of(shape, dataclasses.replace(t, network=rate), asked).values()
      )
      for rate in (1e9, 1e13)
    )
    sent = sum(sent_between_nodes(shape, asked).values())
    assert slow - fast <= sent / 1e9 * (1 + 1e-9)
    assert slow > fast
  slow = dataclasses.replace(t, network=1e9)
  seconds = [
    sum(seconds_of(shape, slow, x).values()) for x in (flat, two_stage)
  ]
  assert seconds[1] < seconds[0]


def test_touched_rows_or_all_of_them():
  """Few touched replicas: share those; all of them touched: all-reduce."""
  t = presets.get("dgx_h200", 8)
  cost = lambda g: sum(seconds_of(SHAPE, t, Traffic(1e6, 8e3, 0.0, g)).values())
  assert cost(1e3) < cost(None) < cost(1e6)


@pytest.mark.parametrize("train", [True, False])
def test_a_tier_that_has_rows_takes_its_operations(train):
  shape = dataclasses.replace(SHAPE, train=train)
  t = dataclasses.replace(presets.cpu(8), launch=1.0, tier_latency=0.25)
  hot = np.array([0.0, 0.0, 9.0, 9.0])
  warm = np.array([0.0, 7.0, 0.0, 7.0])
  for cold in (0.0, 5.0):
    tiers = np.array([0, 1, 1, 2]) + (cold > 0)
    launch = seconds_of(shape, t, Traffic(hot, warm, cold))["launch"]
    np.testing.assert_allclose(launch, 1 + tiers * (0.5 if train else 0.25))


def test_groups_share_the_launch_and_the_latencies_of_requests():
  """Bytes add up; the ids of a level are one message, the launch is one."""
  t = presets.get("dgx_h200", 8)
  narrow = dataclasses.replace(SHAPE, dim=4, row_bytes=16, wire_bytes=16)
  parts = [
    Part(SHAPE, Traffic(10.0, 800.0, 80.0, visitors=10.0)),
    Part(
      dataclasses.replace(narrow, dense=DenseCost()),
      Traffic(0.0, 80.0, 800.0, visitors=100.0),
    ),
  ]
  together, alone = step_cost.step_seconds(parts, t), 0.0
  for part in parts:
    alone += sum(step_cost.step_seconds([part], t).values())
  once = t.launch + t.link_latency
  assert sum(together.values()) == pytest.approx(alone - once)
  further = sum(step_cost.further_seconds(parts[1], t).values())
  first = sum(step_cost.step_seconds(parts[:1], t).values())
  assert together["host rows"] == 0  # hidden by either
  assert sum(together.values()) == pytest.approx(first + further)
  ids = [m for m in traffic.messages(parts) if m.kind == "ids"]
  assert [(m.level, m.size) for m in ids] == [("all", 4 * 1_760)]
  for bytes_of in (traffic.sent_bytes, traffic.network_bytes):
    each = [bytes_of([part]) for part in parts]
    assert bytes_of(parts) == pytest.approx(traffic.total(each))


# ---- Memory


def memory(**kw):
  counts = {"hot": 40.0, "warm_shard": 50.0, "buffers": 0.0} | kw
  return step_cost.device_bytes(SHAPE, **counts)


def test_replicas_gradients_are_a_tier_or_what_all_devices_share():
  n, row = SHAPE.devices, 4 * SHAPE.dim
  assert memory()["gradients"] == 40 * (row + 4)
  assert memory(gathered=3.0)["gradients"] == n * 3 * (24 + row)


def test_tiles_pad_what_is_worked_on_and_not_what_is_stored():
  plain, tiled = memory(gathered=3.0), memory(gathered=3.0, tiled=True)
  padded = 4 * 128 * -(-SHAPE.dim // 128)
  assert tiled["gradients"] == SHAPE.devices * 3 * (24 + padded)
  for kind in ("replicas", "tables", "slot variables", "dense"):
    assert tiled[kind] == plain[kind]


def test_bags_are_summed_at_once_but_where_xla_works_in_tiles():
  row, wire = 4 * SHAPE.dim, SHAPE.wire_bytes
  at = lambda kind, **kw: memory(buffers=6.0, **kw)[kind]
  # Then the rows are gone when their gradients come.
  more = at("buffers") - at("buffers", longest_bag=7)
  assert more == 6 * (wire + row)
  assert at("activations") == at("activations", longest_bag=7)
  tiled = {"tiled": True}
  assert at("buffers", **tiled) == at("buffers", **tiled, longest_bag=7)
  more = at("activations", **tiled, longest_bag=7) - at("activations", **tiled)
  assert more == SHAPE.local * 7 * 4 * 128 * -(-SHAPE.dim // 128)
