"""What a training step costs under any placement: seconds and memory.

The model of the step in embedding/lookup.py and embedding/exchange.py, as it
runs: numpy only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from recjax.planner import communication, host_path, traffic
from recjax.planner.host_path import Paths
from recjax.planner.topology import Topology
from recjax.planner.traffic import Part, StepShape, TableWise

Seconds = dict[str, Any]  # by term; numbers or arrays


def step_seconds(parts: Sequence[Part], t: Topology) -> Seconds:
  """Seconds of a step by term, which add up to the step's.

  While the devices are at a step, the hosts write the stored rows of the step
  before and gather those of the next: "host rows" is what that takes longer
  than the devices' terms do, the part that is not hidden.

  Args:
    parts: of every group of tables.
    t: rates and latencies.

  Returns:
    The terms of `device_seconds`, and "host rows".
  """
  terms = device_seconds(parts, t)
  paths = Paths(_sum(terms), _sum(host_path.seconds(parts, t)))
  return terms | {"host rows": paths.longer - paths.device}


def seconds_of_paths(
  parts: Sequence[Part], t: Topology, *, further: bool = False
) -> Paths:
  """Seconds of a step on the devices and on the hosts.

  Args:
    parts: of groups of tables.
    t: rates and latencies.
    further: for one group, what it adds to a step that other groups pay for:
      without the launch and the latencies of what all do together.
  """
  if further:
    own = host_path.seconds_of_group(parts[0], t)
    return Paths(_sum(further_seconds(parts[0], t)), _sum(own))
  return Paths(
    _sum(device_seconds(parts, t)), _sum(host_path.seconds(parts, t))
  )


def _sum(terms: Seconds) -> Any:
  return sum(terms.values())


def device_seconds(parts: Sequence[Part], t: Topology) -> Seconds:
  """Seconds of a device by term; one after the other, nothing overlaps.

  Each term is latency + bytes / rate. A lookup's own row is gathered from the
  hot replica and from the exchange buffer, which the caches hold for the most
  part, an owner's rows from its shard; backward, the same places are added to.
  The counts of passes are those of the bytes that XLA says the compiled parts
  access (`cost_analysis`, jax 0.10), divided by what is passed over.

  Args:
    parts: of every group of tables.
    t: rates and latencies.

  Returns:
    {"route", "gather", "all-to-all", "all-reduce", "dense", "optimizer",
    "launch"}.
  """
  terms = traffic.total(_group_seconds(part, t) for part in parts)
  for term, seconds in _shared_seconds(parts, t).items():
    terms[term] = terms[term] + seconds
  return terms


def further_seconds(part: Part, t: Topology) -> Seconds:
  """Seconds of a device that a group adds to what other groups pay for.

  As `device_seconds`, without the launch and without the latencies of the
  collectives that all groups share.
  """
  free = dataclasses.replace(
    t, launch=0.0, link_latency=0.0, network_latency=0.0, ring_latency=0.0
  )
  terms = _group_seconds(part, t)
  for term, seconds in _shared_seconds([part], free).items():
    terms[term] = terms[term] + seconds
  return terms


def _shared_seconds(parts: Sequence[Part], t: Topology) -> Seconds:
  """What the groups do together: requests, the all-reduce, the launch."""
  exchanged = 0.0
  for message in traffic.messages(parts):
    if message.kind == "ids" and message.level != "copies":
      exchanged = exchanged + _message_seconds(message, parts[0].shape, t)
  reduced = 0.0
  for part in parts:
    reduced = reduced + part.shape.train * 4.0 * part.shape.dense.params
    if part.traffic.gathered is None:  # XLA combines it with the dense ones
      reduced = reduced + part.shape.train * traffic.summed_bytes(part)
  return {
    "all-to-all": exchanged,
    "all-reduce": communication.all_reduce_seconds(
      reduced, parts[0].shape.devices, t
    ),
    "launch": t.launch,
  }


def _message_seconds(
  message: traffic.Message, shape: StepShape, t: Topology
) -> Any:
  one = dataclasses.replace(t, node_devices=1, torus=0)  # a device of each node
  nodes = shape.nodes
  if message.level == "copies":
    return communication.all_gather_seconds(message.size / nodes, nodes, one)
  if message.level == "across":
    return communication.all_to_all_seconds(message.size, nodes, one)
  peers = shape.devices if message.level == "all" else shape.node_devices
  return communication.all_to_all_seconds(message.size, peers, t)


# ---- A group's own


def _group_seconds(part: Part, t: Topology) -> Seconds:
  """Seconds by term of what a group does alone."""
  shape, asked = part
  train, wide = float(shape.train), 4 * shape.dim
  owned = traffic.owned(part)
  replicas = np.asarray(asked.hot) > 0
  tiers = replicas + 1.0 * (asked.warm > 0) + 1.0 * (asked.cold > 0)
  exchanged = 0.0
  for message in traffic.messages([part]):
    if message.kind != "ids" or message.level == "copies":
      exchanged = exchanged + _message_seconds(message, shape, t)

  # Rows and slot variables are read and written; between, in order, with
  # gradients. Visitors as warm rows: of a large batch they fill no cache, and
  # no row gets cheaper for the device by living elsewhere.
  updated = owned.updated_warm + owned.cold
  optimizer = 2.0 * updated * shape.stored_bytes / t.gather
  optimizer = optimizer + updated * (wide + 2 * shape.stored_bytes) / t.stream
  own = {
    **_gather_seconds(part, t),
    "all-to-all": exchanged,
    "all-reduce": 0.0,
    "dense": _dense_seconds(shape, t) + 0.0 * asked.hot,
    "optimizer": train * optimizer,
    "launch": tiers * (1 + train) * t.tier_latency,
  }
  more = [_replica_seconds(part, t)]
  if asked.table_wise is not None:
    more.append(_table_wise_seconds(shape, t, asked.table_wise))
  for terms in more:
    for term, seconds in terms.items():
      own[term] = own[term] + seconds
  return own


def _gather_seconds(part: Part, t: Topology) -> Seconds:
  """Sorting ids; reading rows forward and adding gradients backward."""
  shape, asked = part
  n, lookups = shape.devices, shape.local_lookups
  train, wide = float(shape.train), 4 * shape.dim
  owned = traffic.owned(part)
  there = owned.updated_warm + owned.cold
  # Rows that a device unites, hands out and sums for the peers of its node.
  united = asked.warm * (asked.inter_node_warm is not None)
  united = united + asked.cold * (asked.inter_node_cold is not None)
  replicas = np.asarray(asked.hot) > 0
  some = (asked.warm > 0) | (asked.cold > 0)

  keys = lookups + train * (n > 1) * there + united
  read = replicas * lookups * shape.row_bytes + some * lookups * wide
  read = read + united * wide
  back = some if asked.gathered is None else some | replicas
  # Sums of lookups, and of what peers sent, at the owner and in the node.
  added = train * back * lookups * wide
  added = added + train * ((n > 1) * there + united) * wide
  # A visitor of the batch before is taken from where it was then; the others
  # as they came.
  merged = train * asked.visitors * shape.stored_bytes
  return {
    "route": keys / t.sort,
    "gather": read / t.cached_gather
    + added / t.cached_add
    + (owned.read_warm + owned.cold) * shape.row_bytes / t.gather
    + merged * (1 / t.gather + 2 / t.stream),
  }


def _replica_seconds(part: Part, t: Topology) -> Seconds:
  """How the gradients of hot rows meet, and the update of every replica."""
  shape, asked = part
  n, hot, gathered = shape.devices, asked.hot, asked.gathered
  train, wide = float(shape.train), 4 * shape.dim
  if gathered is None:
    replicas = np.asarray(hot) > 0
    # Zeros, the sum, and rows and slot variables read and written, all of the
    # tier.
    whole = hot * (3.0 * 4 * (shape.dim + 1) + 2 * shape.stored_bytes)
    added = train * replicas * shape.local_lookups * (wide + 4)
    return {
      "gather": added / t.cached_add,
      "optimizer": train * whole / t.stream,
    }
  everyone = n * gathered
  size = train * gathered * (shape.wire_bytes + communication.ID_BYTES)
  stored = everyone * shape.stored_bytes
  optimizer = stored / t.cached_gather + stored / t.cached_add
  optimizer = optimizer + everyone * (wide + 2 * shape.stored_bytes) / t.stream
  return {
    "route": train * (n > 1) * everyone / t.sort,
    "gather": train * (n > 1) * everyone * wide / t.cached_add,
    "all-reduce": communication.all_gather_seconds(size, n, t),
    "optimizer": train * optimizer,
  }


def _dense_seconds(shape: StepShape, t: Topology) -> float:
  """Products at their rate, and all else in passes over memory.

  A pass forward reads and writes the activations, backward twice that; each
  lookup's row is written and read once, and so is its gradient. The parameters
  are read once forward, five times more (re-layouts, gradients written)
  backward, and seven times by their optimizer (Adagrad).
  """
  dense = shape.dense
  matmul = (
    t.matmul_bfloat16 if shape.compute == "bfloat16" else t.matmul_float32
  )
  passes, params = (3, 13) if shape.train else (1, 1)
  lookups = shape.local_lookups / max(shape.local, 1)
  floats = passes * dense.floats + (1 + shape.train) * lookups * shape.dim
  moved = 2 * shape.local * 4.0 * floats
  moved += params * 4.0 * dense.params
  return passes * shape.local * dense.flops / matmul + moved / t.stream


def _table_wise_seconds(
  shape: StepShape, t: Topology, asked: TableWise
) -> Seconds:
  """What table-wise tables add to a step: the terms of the busiest owner.

  It gets as many bytes as in an all-to-all in which all owners are as busy;
  layers beyond the first all-to-all are shifts, each with its latency.
  """
  n, train, wide = shape.devices, float(shape.train), 4 * shape.dim
  ids, vectors = asked.owner_ids, asked.owner_vectors
  of_ids = ids * communication.ID_BYTES, asked.calls[0]
  of_vectors = vectors * shape.wire_bytes, asked.calls[1]
  latency = communication.all_to_all_seconds(1e-9, n, t)
  exchanged = 0.0
  for size, calls in (of_ids, of_vectors) + shape.train * (of_vectors,):
    exchanged += communication.all_to_all_seconds(size, n, t)
    exchanged += (calls - 1) * latency
  # Rows are added to vectors, a vector's gradient to rows.
  added = (1 + train) * ids * wide
  moved = (1 + train) * (vectors + asked.vectors) * wide
  updated = train * asked.distinct
  return {
    "route": train * ids / t.sort,
    "gather": added / t.cached_add
    + moved / t.stream
    + ids * shape.row_bytes / t.gather,
    "all-to-all": exchanged,
    "optimizer": 2.0 * updated * shape.stored_bytes / t.gather
    + updated * (wide + 2 * shape.stored_bytes) / t.stream,
  }


# ---- Memory


_TILE = 128  # numbers


def device_bytes(
  shape: StepShape,
  *,
  hot: float,
  warm_shard: float,
  buffers: float,
  visitors: float = 0.0,
  gathered: float | None = None,
  table_wise: TableWise | None = None,
  tiled: bool = False,
  longest_bag: int = 1,
) -> dict[str, float]:
  """Bytes of a device's memory for a group, by kind.

  Args:
    shape: of the step.
    hot: replicated rows.
    warm_shard: rows of the device's warm shard.
    buffers: rows n C of all exchange buffers.
    visitors: stored rows V that a batch brings.
    gathered: touched hot rows that a device shares with all; None where the
      hot rows' gradients are all-reduced.
    table_wise: what table-wise tables ask, where there are any.
    tiled: whether XLA works in tiles of 128 numbers and holds a bag's rows
      before they are summed, as for TPUs; else it sums them as it gathers them.
    longest_bag: of the group's features, in lookups.
  """
  lookups, bags = shape.local_lookups, longest_bag > 1
  padding = -shape.dim % _TILE / shape.dim if tiled else 0.0
  held = longest_bag if tiled and bags else 0  # a sample's rows, not yet summed
  # Rows that are summed at once are gone when their gradients come.
  both = 1 if bags and not tiled else 2
  wide = 4 * shape.dim * (1 + padding)
  size = 2 if shape.compute == "bfloat16" else 4
  inputs = 4 * shape.dense.inputs * (1 + padding) * (1 + shape.train)
  # All of the tier; else keys, positions and gradients of all devices.
  summed = hot * (wide + 4)
  if gathered is not None:
    summed = shape.devices * gathered * (24 + wide)
  extra = {}
  if table_wise is not None:
    # Local rows before and after they travel; keys sorted and summed gradients;
    # vectors and their gradients, before and after they travel.
    rows = min(table_wise.owner_ids, warm_shard)
    extra["table-wise"] = (
      table_wise.owner_ids * (2 * communication.ID_BYTES + shape.train * 20)
      + shape.train * rows * wide
      + table_wise.owner_vectors
      * ((1 + shape.train) * (wide + 2 * shape.wire_bytes))
    )
  return extra | {
    "replicas": hot * shape.stored_bytes,
    "tables": warm_shard * shape.row_bytes,
    "slot variables": warm_shard * shape.slot_bytes,
    # Of the next batch and of this one, with two numbers each; in training also
    # of the one before, on their way back.
    "visitors": visitors
    * ((2 + shape.train) * shape.stored_bytes + 4 * communication.ID_BYTES),
    "gradients": shape.train * summed,
    # Rows and gradients, before and after the exchange, and ids.
    "buffers": buffers
    * (2 * communication.ID_BYTES + both * (shape.wire_bytes + wide)),
    # A lookup's keys and positions; the vectors that the model takes, and their
    # gradients; what its layers leave for the backward pass.
    "activations": lookups * 24
    + shape.local * (held * wide + inputs + size * shape.dense.floats),
    # Parameters, as many slot variables (of Adagrad), and gradients.
    "dense": 4 * shape.dense.params * (3 if shape.train else 1),
  }
