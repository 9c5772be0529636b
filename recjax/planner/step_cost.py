"""What a training step costs under any placement: bytes, seconds, memory.

The model of the step in embedding/lookup.py and embedding/exchange.py, as it runs: numpy only.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from recjax.planner import formulas
from recjax.planner.topology import Topology


@dataclasses.dataclass(frozen=True)
class Dense:
  """The dense part of a model."""

  params: int = 0
  flops: int = 0  # of a sample's forward pass
  floats: int = 0  # activations of a sample


def dense_model(
  name: str,
  bottom: tuple[int, ...],
  top: tuple[int, ...],
  dense_inputs: int,
  activations: int,
  dim: int,
  cross_layers: int = 0,
  cross_rank: int = 0,
) -> Dense:
  """Parameters, multiply-adds (two FLOPs) and activations of models/dlrm.py."""
  layers = []
  if dense_inputs:
    layers += _pairs((dense_inputs, *bottom, dim))
  vectors = activations + (dense_inputs > 0)
  width, extra, unbiased = vectors * dim, 0, 0
  if name == "dlrm":
    pairs = vectors * (vectors - 1) // 2
    extra = vectors * vectors * dim  # all pairs, as one product
    floats = width + vectors * vectors
    layers += _pairs((dim * (dense_inputs > 0) + pairs, *top, 1))
  else:
    cross = [(width, cross_rank), (cross_rank, width)] * cross_layers
    layers += cross + _pairs((width, *top, 1))
    unbiased = cross_rank * cross_layers  # the projections down
    floats = width * (1 + cross_layers)
  products = sum(a * b for a, b in layers)
  return Dense(
    params=products + sum(b for _, b in layers) - unbiased,
    flops=2 * (products + extra),
    floats=floats + sum(b for _, b in layers),
  )


def _pairs(widths):
  return list(itertools.pairwise(widths))


@dataclasses.dataclass(frozen=True)
class Work:
  """What every placement shares: a step's batch, the rows' sizes, the model."""

  devices: int  # n
  batch_size: int  # B
  lookups: int  # S, of a sample at most
  dim: int  # d
  row_bytes: int  # of a row's weights, in memory
  slot_bytes: int  # of its optimizer slots
  wire_bytes: int  # of a row's weights or gradient, on the wire
  dense: Dense = Dense()
  compute: str = "float32"
  train: bool = True  # False: the forward pass only
  node_devices: int = 0  # g; 0 = one node

  @property
  def local(self) -> int:
    """b"""
    return self.batch_size // self.devices

  @property
  def nodes(self) -> int:
    """N"""
    return self.devices // (self.node_devices or self.devices)

  @property
  def ids(self) -> int:
    """L, lookups of a device and step."""
    return self.local * self.lookups

  @property
  def stored(self) -> int:
    """Bytes of a row where it lives."""
    return self.row_bytes + self.slot_bytes


class Pooled(NamedTuple):
  """What pooling tables at their owners asks of a step."""

  ids: float  # that a device sends to the owners, itself included
  vectors: float  # that it gets back
  owner_ids: float  # that the busiest owner gets of all devices
  owner_vectors: float  # that the owner of the most sends to all
  distinct: float  # rows that the busiest owner updates
  calls: tuple[int, int]  # collectives one after the other: of ids, of vectors


@dataclasses.dataclass(frozen=True)
class Load:
  """What a placement asks of a step: rows of a device, numbers or arrays."""

  hot: Any = 0.0  # replicated
  warm: Any = 0.0  # of the exchange buffer, n C; g C where nodes have copies
  cold: Any = 0.0
  # None where the hot rows' gradients are all-reduced, else the touched hot
  # rows that a device shares with all.
  gathered: Any = None
  # Rows N C_far that a device exchanges with other nodes for its own node, of
  # which it is one owner's proxy; None where all peers ask the owners.
  far_warm: Any = None
  far_cold: Any = None
  copies: bool = False  # every node has its own copy of the warm rows
  pooled: Pooled | None = None


def _owned(work: Work, load: Load):
  """Rows that an owner (reads warm, updates warm, reads and updates cold)."""
  warm = load.warm if load.far_warm is None else load.far_warm
  cold = load.cold if load.far_cold is None else load.far_cold
  return warm / (work.nodes if load.copies else 1), warm, cold


def messages(work: Work, load: Load):
  """What the collectives of a step carry for warm and cold rows.

  Returns:
    (kind, level, bytes of a device's buffer, its own part included) of each:
    kind "ids", "rows" or "gradients"; level "all" devices, "within" a node,
    or between nodes, "across" by all-to-all or "copies" by all-gather.
  """
  train = float(work.train)
  size = (
    ("ids", formulas.ID_BYTES),
    ("rows", work.wire_bytes),
    ("gradients", train * work.wire_bytes),
  )
  out = []
  for near, far, copies in (
    (load.warm, load.far_warm, load.copies),
    (load.cold, load.far_cold, False),
  ):
    level = "all" if far is None else "within"
    out += [(kind, level, near * of) for kind, of in size]
    if copies:  # only gradients leave the node, each with its slot
      out.append(("ids", "copies", far * train * formulas.ID_BYTES))
      out.append(("gradients", "copies", far * train * work.wire_bytes))
    elif far is not None:
      out += [(kind, "across", far * of) for kind, of in size]
  return out


def _sent(work: Work, load: Load, share: dict):
  """Bytes by kind, where this share of a level's message leaves."""
  between = (work.nodes - 1) / work.nodes
  sent = dict.fromkeys(("ids", "rows", "gradients"), 0.0)
  for kind, level, size in messages(work, load):
    sent[kind] = sent[kind] + size * share.get(level, between)
  return sent


def network_bytes(work: Work, load: Load):
  """Bytes that a device sends to other nodes in a step, by kind.

  Of those of `sent_bytes`. Replicas' gradients meet within the node first.

  Returns:
    {"ids", "rows", "gradients", "hot gradients"}.
  """
  n, nodes, train = work.devices, work.nodes, float(work.train)
  g = n // nodes
  sent = _sent(work, load, {"all": (n - g) / n, "within": 0.0})
  if load.gathered is None:
    shared = load.hot * 4.0 * (work.dim + 1)
    shared = formulas.all_reduced_bytes(shared, nodes)[1] / g
  else:
    shared = formulas.gathered_bytes(load.gathered, work.wire_bytes, nodes)[1]
  sent |= _pooled_sent(work, load.pooled, (n - g) / n)
  return sent | {"hot gradients": train * shared}


def _pooled_sent(work: Work, pooled: Pooled | None, share: float):
  """Bytes by kind, where this share of what goes to and fro leaves."""
  if pooled is None:
    return {}
  vectors = pooled.vectors * work.wire_bytes * share
  return {
    "pooled ids": pooled.ids * formulas.ID_BYTES * share,
    "pooled vectors": vectors,
    "pooled gradients": work.train * vectors,
  }


def sent_bytes(work: Work, load: Load):
  """Bytes that a device sends in a step for its rows, links and host.

  Returns:
    {"ids", "rows", "gradients", "hot gradients", "host"}, and where tables are
    pooled {"pooled ids", "pooled vectors", "pooled gradients"}.
  """
  n, nodes, train = work.devices, work.nodes, float(work.train)
  g, hot, wide = n // nodes, load.hot, 4 * work.dim
  sent = _sent(work, load, {"all": (n - 1) / n, "within": (g - 1) / g})
  cold = _owned(work, load)[2]
  if load.gathered is None:
    shared = formulas.all_reduced_bytes(hot * 4.0 * (work.dim + 1), n)[1]
  else:
    shared = formulas.gathered_bytes(load.gathered, work.wire_bytes, n)[1]
  sent = sent | {
    "hot gradients": train * shared,
    # The optimizer runs on the host: the row up; its gradient and slots down.
    "host": cold * (8 + work.row_bytes + train * (8 + wide)),
  }
  return sent | _pooled_sent(work, load.pooled, (n - 1) / n)


def step_seconds(work: Work, t: Topology, load: Load):
  """Seconds of a step by term; one after the other, nothing overlaps.

  Each term is latency + bytes / rate. A lookup's own row is gathered from the
  hot replica and from the exchange buffer, which the caches hold for the most
  part, an owner's rows from its shard; backward, the same places are added to.
  The counts of passes are those of the bytes that XLA says the compiled parts
  access (`cost_analysis`, jax 0.10), divided by what is passed over.

  Returns:
    {"route", "gather", "all-to-all", "all-reduce", "host link", "host rows",
    "dense", "optimizer", "launch"}.
  """
  n, ids, d = work.devices, work.ids, work.dim
  hot, warm, cold, gathered = load.hot, load.warm, load.cold, load.gathered
  train = float(work.train)
  wide = 4 * d  # bytes of a row in float32
  some = (warm > 0) | (cold > 0)
  read_warm, own_warm, own_cold = _owned(work, load)
  owned = own_warm + own_cold
  # Rows that a device unites, hands out and sums for the peers of its node.
  united = warm * (load.far_warm is not None)
  united = united + cold * (load.far_cold is not None)
  replicas = np.asarray(hot) > 0
  tiers = replicas + 1.0 * (warm > 0) + 1.0 * (cold > 0)
  sent = sent_bytes(work, load)

  sorted_keys = ids + train * (n > 1) * owned + united
  read = replicas * ids * work.row_bytes + some * ids * wide + united * wide
  back = some if gathered is None else some | replicas
  added = train * back * ids * wide
  # Sums of what peers sent, at the owner and in the node.
  added = added + train * ((n > 1) * owned + united) * wide
  far = read_warm * work.row_bytes

  trips = 0.0
  one = dataclasses.replace(t, node_devices=1, torus=0)  # a device of each node
  for _, level, size in messages(work, load):
    if level == "copies":
      part = formulas.all_gather_seconds(size / work.nodes, work.nodes, one)
    elif level == "across":
      part = formulas.all_to_all_seconds(size, work.nodes, one)
    else:
      peers = n if level == "all" else work.node_devices
      part = formulas.all_to_all_seconds(size, peers, t)
    trips = trips + part

  # Rows and slots are read and written; between, in order, with gradients.
  optimizer = 2.0 * own_warm * work.stored / t.gather
  optimizer = optimizer + own_warm * (wide + 2 * work.stored) / t.stream
  reduced = train * 4.0 * work.dense.params
  shared = 0.0
  if gathered is None:  # XLA combines it with that of the dense gradients
    reduced = reduced + train * 4.0 * (d + 1) * hot
    # Zeros, the sum, and rows and slots read and written, all of the tier.
    whole = hot * (3.0 * 4 * (d + 1) + 2 * work.stored)
    optimizer = optimizer + whole / t.stream
    added = added + train * replicas * ids * (wide + 4)
  else:
    everyone = n * gathered
    size = train * gathered * (work.wire_bytes + formulas.ID_BYTES)
    shared = formulas.all_gather_seconds(size, n, t)
    sorted_keys = sorted_keys + train * (n > 1) * everyone
    added = added + train * (n > 1) * everyone * wide
    stored = everyone * work.stored
    optimizer = optimizer + stored / t.cached_gather + stored / t.cached_add
    optimizer = optimizer + everyone * (wide + 2 * work.stored) / t.stream

  host_rows = own_cold * (work.row_bytes + train * 2.0 * work.stored)
  terms = {
    "route": sorted_keys / t.sort,
    "gather": read / t.cached_gather + added / t.cached_add + far / t.gather,
    "all-to-all": trips,
    "all-reduce": shared + formulas.all_reduce_seconds(reduced, n, t),
    "host link": sent["host"] / t.host_link
    + (cold > 0) * (1 + train) * t.host_latency,
    "host rows": host_rows / (t.host_gather / min(n, t.host_devices)),
    "dense": _dense_seconds(work, t) + 0.0 * hot,
    "optimizer": train * optimizer,
    "launch": t.launch + tiers * (1 + train) * t.tier_latency,
  }
  if load.pooled is not None:
    for term, seconds in _pooled_seconds(work, t, load.pooled).items():
      terms[term] = terms[term] + seconds
  return terms


def _dense_seconds(work: Work, t: Topology) -> float:
  """Products at their rate, and all else in passes over memory.

  A pass forward reads and writes the activations, backward twice that; each
  lookup's row is written and read once, and so is its gradient. The parameters
  are read once forward, five times more (re-layouts, gradients written)
  backward, and seven times by their optimizer (Adagrad).
  """
  matmul = t.matmul_bfloat16 if work.compute == "bfloat16" else t.matmul_float32
  passes, params = (3, 13) if work.train else (1, 1)
  lookups = work.ids / max(work.local, 1)
  floats = passes * work.dense.floats + (1 + work.train) * lookups * work.dim
  moved = 2 * work.local * 4.0 * floats
  moved += params * 4.0 * work.dense.params
  return passes * work.local * work.dense.flops / matmul + moved / t.stream


def _pooled_seconds(work: Work, t: Topology, pooled: Pooled):
  """What pooling adds to a step; its terms are those of the busiest owner.

  It gets as many bytes as in an all-to-all in which all owners are as busy;
  layers beyond the first all-to-all are shifts, each with its latency.
  """
  n, train, wide = work.devices, float(work.train), 4 * work.dim
  ids, vectors = pooled.owner_ids, pooled.owner_vectors
  trips, of_ids = 0.0, (ids * formulas.ID_BYTES, pooled.calls[0])
  of_vectors = (vectors * work.wire_bytes, pooled.calls[1])
  latency = formulas.all_to_all_seconds(1e-9, n, t)
  for size, calls in (of_ids, of_vectors) + work.train * (of_vectors,):
    trips += formulas.all_to_all_seconds(size, n, t) + (calls - 1) * latency
  # Rows are added to vectors, a vector's gradient to rows.
  added = (1 + train) * ids * wide
  moved = (1 + train) * (vectors + pooled.vectors) * wide
  updated = train * pooled.distinct
  return {
    "route": train * ids / t.sort,
    "gather": added / t.cached_add
    + moved / t.stream
    + ids * work.row_bytes / t.gather,
    "all-to-all": trips,
    "optimizer": 2.0 * updated * work.stored / t.gather
    + updated * (wide + 2 * work.stored) / t.stream,
  }


def device_bytes(
  work: Work, hot, warm_slots, buffers, pooled: Pooled | None = None
) -> dict[str, float]:
  """Memory of a device by kind.

  Args:
    work: the step.
    hot: replicated rows; warm_slots: rows of the device's shard.
    buffers: rows n C of all exchange buffers.
    pooled: where tables are.
  """
  wide, ids = 4 * work.dim, work.ids
  extra = {}
  if pooled is not None:
    # Slots before and after they travel; keys sorted and summed gradients;
    # vectors and their gradients, before and after they travel.
    rows = min(pooled.owner_ids, warm_slots)
    extra["pooled"] = (
      pooled.owner_ids * (2 * formulas.ID_BYTES + work.train * 20)
      + work.train * rows * wide
      + pooled.owner_vectors * (1 + work.train) * (wide + 2 * work.wire_bytes)
    )
  return extra | {
    "replicas": hot * work.stored,
    "tables": warm_slots * work.row_bytes,
    "slots": warm_slots * work.slot_bytes,
    "gradients": work.train * hot * 4 * (work.dim + 1),
    # Rows and gradients, before and after the exchange, and ids.
    "buffers": buffers
    * (2 * formulas.ID_BYTES + 2 * work.wire_bytes + 2 * wide),
    # A lookup's keys, positions, row and gradient; the model's activations.
    "activations": ids * (24 + 2 * wide)
    + 4 * work.local * work.dense.floats * (2 if work.train else 1),
    "dense": 4 * work.dense.params * (4 if work.train else 1),
  }
