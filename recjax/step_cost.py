"""What a training step costs under any placement: bytes, seconds, memory.

The model of the step in lookup.py and exchange.py, as it runs: numpy only.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from recjax import cost
from recjax.topology import Topology


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
  """Parameters, multiply-adds (two FLOPs) and activations of models.py."""
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

  @property
  def local(self) -> int:
    """b"""
    return self.batch_size // self.devices

  @property
  def ids(self) -> int:
    """L, lookups of a device and step."""
    return self.local * self.lookups

  @property
  def stored(self) -> int:
    """Bytes of a row where it lives."""
    return self.row_bytes + self.slot_bytes


@dataclasses.dataclass(frozen=True)
class Load:
  """What a placement asks of a step: rows of a device, numbers or arrays."""

  hot: Any = 0.0  # replicated
  warm: Any = 0.0  # of the exchange buffer, n C
  cold: Any = 0.0
  # None where the hot rows' gradients are all-reduced, else the touched hot
  # rows that a device shares with all.
  gathered: Any = None


def sent_bytes(work: Work, load: Load):
  """Bytes that a device sends in a step for its rows, links and host.

  Returns:
    {"ids", "rows", "gradients", "hot gradients", "host"}.
  """
  n, train = work.devices, float(work.train)
  hot, warm, cold = load.hot, load.warm, load.cold
  far = (warm + cold) * (n - 1) / n
  wide = 4 * work.dim
  if load.gathered is None:
    shared = cost.all_reduced_bytes(hot * 4.0 * (work.dim + 1), n)[1]
  else:
    shared = cost.gathered_bytes(load.gathered, work.wire_bytes, n)[1]
  return {
    "ids": far * cost.ID_BYTES,
    "rows": far * work.wire_bytes,
    "gradients": train * far * work.wire_bytes,
    "hot gradients": train * shared,
    # The optimizer runs on the host: the row up; its gradient and slots down.
    "host": cold * (8 + work.row_bytes + train * (8 + wide)),
  }


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
  exchanged = warm + cold
  replicas = np.asarray(hot) > 0
  sent = sent_bytes(work, load)

  sorted_keys = ids + train * (n > 1) * exchanged
  read = replicas * ids * work.row_bytes + some * ids * wide
  back = some if gathered is None else some | replicas
  added = train * back * ids * wide
  added = added + train * (n > 1) * exchanged * wide  # peers' sums
  far = warm * work.row_bytes

  trips = 0.0
  for tier in (warm, cold):
    for size in (cost.ID_BYTES, work.wire_bytes, train * work.wire_bytes):
      trips = trips + cost.all_to_all_seconds(tier * size, n, t)

  # Rows and slots are read and written; between, in order, with gradients.
  optimizer = 2.0 * warm * work.stored / t.gather
  optimizer = optimizer + warm * (wide + 2 * work.stored) / t.stream
  reduced = train * 4.0 * work.dense.params
  shared = 0.0
  if gathered is None:  # XLA combines it with that of the dense gradients
    reduced = reduced + train * 4.0 * (d + 1) * hot
    # Zeros, the sum, and rows and slots read and written, all of the tier.
    whole = hot * (3.0 * 4 * (d + 1) + 4 * work.stored)
    optimizer = optimizer + whole / t.stream
    added = added + train * replicas * ids * (wide + 4)
  else:
    everyone = n * gathered
    size = train * gathered * (work.wire_bytes + cost.ID_BYTES)
    shared = cost.all_gather_seconds(size, n, t)
    sorted_keys = sorted_keys + train * (n > 1) * everyone
    added = added + train * (n > 1) * everyone * wide
    stored = everyone * work.stored
    optimizer = optimizer + stored / t.cached_gather + stored / t.cached_add
    optimizer = optimizer + everyone * (wide + 2 * work.stored) / t.stream

  host_rows = cold * (work.row_bytes + train * 2.0 * work.stored)
  return {
    "route": sorted_keys / t.sort,
    "gather": read / t.cached_gather + added / t.cached_add + far / t.gather,
    "all-to-all": trips,
    "all-reduce": shared + cost.all_reduce_seconds(reduced, n, t),
    "host link": sent["host"] / t.host_link
    + (cold > 0) * (1 + train) * t.host_latency,
    "host rows": host_rows / (t.host_gather / min(n, t.host_devices)),
    "dense": _dense_seconds(work, t) + 0.0 * hot,
    "optimizer": train * optimizer,
    "launch": t.launch + 0.0 * hot,
  }


def _dense_seconds(work: Work, t: Topology) -> float:
  """Products at their rate, and all else in passes over memory.

  A pass forward reads and writes the activations, backward twice that; the
  parameters are read once forward, five times more (re-layouts, gradients
  written) backward, and seven times by their optimizer (Adagrad).
  """
  matmul = t.matmul_bfloat16 if work.compute == "bfloat16" else t.matmul_float32
  passes, params = (3, 13) if work.train else (1, 1)
  lookups = work.ids / max(work.local, 1)
  moved = (
    2 * passes * work.local * 4.0 * (work.dense.floats + lookups * work.dim)
  )
  moved += params * 4.0 * work.dense.params
  return passes * work.local * work.dense.flops / matmul + moved / t.stream


def device_bytes(work: Work, hot, warm_slots, buffers) -> dict[str, float]:
  """Memory of a device by kind.

  Args:
    work: the step.
    hot: replicated rows; warm_slots: rows of the device's shard.
    buffers: rows n C of all exchange buffers.
  """
  wide, ids = 4 * work.dim, work.ids
  return {
    "replicas": hot * work.stored,
    "tables": warm_slots * work.row_bytes,
    "slots": warm_slots * work.slot_bytes,
    "gradients": work.train * hot * 4 * (work.dim + 1),
    # Rows and gradients, before and after the exchange, and ids.
    "buffers": buffers * (2 * cost.ID_BYTES + 2 * work.wire_bytes + 2 * wide),
    # A lookup's keys, positions, row and gradient; the model's activations.
    "activations": ids * (24 + 2 * wide)
    + 4 * work.local * work.dense.floats * (2 if work.train else 1),
    "dense": 4 * work.dense.params * (4 if work.train else 1),
  }
