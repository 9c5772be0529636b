"""What is to be planned: a group of tables on a machine, and what cuts cost."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.models.cost import DenseCost
from recjax.planner import (
  buffer_sizes,
  frequency_buckets,
  presets,
  step_cost,
  stored_rows,
)
from recjax.planner import traffic as traffic_lib
from recjax.planner.buffer_sizes import DistinctRows
from recjax.planner.frequency_buckets import BucketedProfile, CumulativeSum
from recjax.planner.host_path import NO_PATHS, Paths
from recjax.planner.topology import Topology
from recjax.planner.traffic import Part, StepShape, Traffic
from recjax.planner.transport import FLAT, Transport

# How the gradients of hot rows meet; what embedding/lookup.py has.
HOT_SYNCS = ("all_reduce", "all_gather")


@dataclasses.dataclass(frozen=True, eq=False)
class Cuts:
  """The cut points of a group, and how its rows travel.

  Ranks below `hot` are replicated, ranks below `warm_end` sharded in device
  memory, those below `cold_end` in host memory, the others on the hosts' SSDs.
  Cut points are numbers or arrays.
  """

  hot: Any
  warm_end: Any
  hot_sync: str = "all_reduce"
  transport: Transport = FLAT
  cold_end: Any = None  # None: no row is on an SSD

  @property
  def warm(self) -> Any:
    """Rows between the cut points."""
    return self.warm_end - self.hot

  @property
  def cold_rows(self) -> Any:
    """Rows in host memory, of cuts that say where those end."""
    return self.cold_end - self.warm_end

  def frozen(self, rows: int) -> Any:
    """Rows of `rows` that are on SSDs."""
    return 0 * self.warm_end if self.cold_end is None else rows - self.cold_end


class _Sums(NamedTuple):
  """P(a device, or a node, touches a row in a step), and its sums."""

  pi: np.ndarray  # [K], of a row of each bucket
  mean: CumulativeSum  # of pi
  variance: CumulativeSum  # of pi (1 - pi)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """A group of tables to be planned; `evaluate` is the cost of a placement."""

  profile: BucketedProfile
  shape: StepShape
  topology: Topology
  overflow_probability: float | None = 1e-2  # None: no padding of buffers
  objective: str = "time"  # or "bytes"
  # Whether other groups pay for the launch and the shared collectives' latency.
  further: bool = False
  rest: Paths = NO_PATHS  # what the other groups do in the step

  @functools.cached_property
  def of_device(self) -> _Sums:
    """How the local batch of a device touches rows."""
    return self._sums(self.shape.local)

  @functools.cached_property
  def of_node(self) -> _Sums:
    """How the samples of a node's devices touch rows."""
    return self._sums(self.shape.local * self.shape.devices // self.shape.nodes)

  @functools.cached_property
  def of_batch(self) -> _Sums:
    """How the global batch touches rows."""
    return self._sums(self.shape.batch_size)

  @functools.cached_property
  def pages_of_row(self) -> np.ndarray:
    """[K] pages that the global batch reads for a frozen row of a bucket."""
    return stored_rows.pages_of_row(self.of_batch.pi, self.shape.files)

  @functools.cached_property
  def _pages(self) -> CumulativeSum:
    return self.profile.cumulative(self.pages_of_row)

  def _sums(self, samples: int) -> _Sums:
    pi = self.profile.touched(samples)
    cumulative = self.profile.cumulative
    return _Sums(pi, cumulative(pi), cumulative(pi * (1 - pi)))

  def _distinct_rows(self, sums: _Sums, start, stop) -> DistinctRows:
    return DistinctRows(
      sums.mean.between(start, stop),
      sums.variance.between(start, stop),
      self.profile.at(sums.pi, start),
      stop - start,
    )

  # ---- Rows of the buffers

  def distinct(self, start, stop):
    """Expected rows of ranks [start, stop) that a device touches in a step."""
    return self.of_device.mean.between(start, stop)

  def buffers(self, start, stop, owners: int = 0, two_stage: bool = False):
    """Rows of a device's exchange buffer of the tier [start, stop).

    See `buffers_of`.
    """
    distinct = self._distinct_rows(self.of_device, start, stop)
    return self.buffers_of(distinct, owners, two_stage)

  def buffers_of(
    self, distinct: DistinctRows, owners: int = 0, two_stage: bool = False
  ):
    """Rows of a device's exchange buffer of any rows.

    Args:
      distinct: how many of the rows a device touches.
      owners: of the rows; 0 = all devices.
      two_stage: whether a second stage between nodes follows.

    Returns:
      owners x C.
    """
    return buffer_sizes.buffer_rows(
      distinct,
      owners or self.shape.devices,
      self.shape.local_lookups,
      self._overflow_probability(two_stage),
    )

  def _overflow_probability(self, two_stage: bool) -> float | None:
    """That of one buffer: of a tier, device and peer."""
    n, nodes = self.shape.devices, self.shape.nodes
    if self.overflow_probability is None:
      return None
    return self.overflow_probability / (2 * n * (n + two_stage * nodes))

  def inter_node_rows(self, start, stop, intra_node, owners: int):
    """Rows N C_node between nodes of the tier [start, stop).

    A proxy unites what the g devices of its node ask of an owner.

    Args:
      start, stop: ranks of the tier.
      intra_node: rows of the buffer that each device asks its proxies with.
      owners: of the tier.
    """
    g = self.shape.devices // self.shape.nodes
    rows = buffer_sizes.buffer_rows(
      self._distinct_rows(self.of_node, start, stop),
      owners,
      self.shape.local_lookups * g,
      self._overflow_probability(True),
    )
    return np.minimum(rows, g * intra_node) * (self.shape.nodes / owners)

  def visitors(self, start, stop):
    """Rows V of ranks [start, stop) that a batch brings to each owner.

    So many that those of no owner are more in a step, but for
    `overflow_probability`: then the step compiled for the next size runs.
    """
    each, n = self.overflow_probability, self.shape.devices
    rows = buffer_sizes.buffer_rows(
      self._distinct_rows(self.of_batch, start, stop),
      n,
      self.shape.batch_size * self.shape.lookups,
      None if each is None else each / n,
    )
    return rows / n

  def pages(self, start, stop):
    """Pages of frozen rows [start, stop) that a step reads for an owner."""
    pages = np.maximum(self._pages.between(start, stop), 1e-9)
    return np.where(stop > start, pages / self.shape.devices, 0.0)

  def gathered(self, hot, hot_sync: str):
    """Touched hot rows that a device shares with all; None: all-reduced."""
    if hot_sync == "all_reduce":
      return None
    mean, variance = (x(hot) for x in self.of_device[1:])
    each = self.overflow_probability
    if each is None:
      return mean
    rows = buffer_sizes.buffer_rows(
      DistinctRows(mean, variance, 0.0, hot),
      1,
      self.shape.local_lookups,
      each / self.shape.devices,
    )
    return np.minimum(rows, hot)

  # ---- The cost of cuts

  def paths(self, traffic: Traffic) -> Paths:
    """Seconds on the devices and on the hosts; of bytes, all in the first."""
    part = Part(self.shape, traffic)
    if self.objective == "bytes":
      return Paths(sum(traffic_lib.sent_bytes([part]).values()))
    return step_cost.seconds_of_paths(
      [part], self.topology, further=self.further
    )

  def evaluate(self, traffic: Traffic):
    """What is minimised, with the other groups': seconds or bytes of a step."""
    return self.paths(traffic).beside(self.rest).cost

  def traffic(self, cuts: Cuts, capacity: int = 0) -> Traffic:
    """What cuts ask of a step; `capacity` is every buffer's, where > 0."""
    transport = cuts.transport
    found = []
    for start, stop, owners, united in (
      (
        cuts.hot,
        cuts.warm_end,
        transport.warm_owners(self.shape),
        transport.two_stage or transport.copies,
      ),
      (
        cuts.warm_end,
        self.profile.rows,
        self.shape.devices,
        transport.two_stage,
      ),
    ):
      intra_node = self.buffers(start, stop, owners, united)
      if capacity:
        most = np.minimum(
          -(-(stop - start) // owners), self.shape.local_lookups
        )
        intra_node = owners * np.minimum(capacity, most)
      inter_node = None
      if united:
        inter_node = self.inter_node_rows(start, stop, intra_node, owners)
        if capacity:
          inter_node = np.minimum(inter_node, capacity * self.shape.nodes)
      found.append((intra_node, inter_node))
    (warm, inter_node_warm), (cold, inter_node_cold) = found
    visitors = self.visitors(cuts.warm_end, self.profile.rows)
    # No device, and no node, asks an owner for more rows than visit it.
    cold = np.minimum(cold, self.shape.devices * visitors)
    if inter_node_cold is not None:
      inter_node_cold = np.minimum(inter_node_cold, self.shape.nodes * visitors)
    frozen = cuts.frozen(self.profile.rows)
    return Traffic(
      cuts.hot,
      warm,
      cold,
      self.gathered(cuts.hot, cuts.hot_sync),
      inter_node_warm,
      inter_node_cold,
      transport.copies,
      visitors=visitors,
      pages=self.pages(self.profile.rows - frozen, self.profile.rows),
    )

  @property
  def tiled(self) -> bool:
    """Whether XLA works in tiles, as for TPUs; see step_cost.device_bytes."""
    return self.topology.torus > 0

  @property
  def longest_bag(self) -> int:
    """Lookups of a sample in the table that has most."""
    return max(t.hotness for t in self.profile.tables)

  def cost(self, cuts: Cuts):
    """Seconds or bytes of a step with these cuts; numbers or arrays."""
    return self.evaluate(self.traffic(cuts))


def joint_paths(
  problems: Sequence[Problem], traffics: Sequence[Traffic]
) -> Paths:
  """Seconds or bytes of a step of all groups, by the first one's objective.

  On the devices and on the hosts, see `Problem.paths`.
  """
  parts = [
    Part(p.shape, traffic)
    for p, traffic in zip(problems, traffics, strict=True)
  ]
  if problems[0].objective == "bytes":
    return Paths(sum(traffic_lib.sent_bytes(parts).values()))
  return step_cost.seconds_of_paths(parts, problems[0].topology)


def joint_cost(problems: Sequence[Problem], traffics: Sequence[Traffic]):
  """What is minimised of `joint_paths`."""
  return joint_paths(problems, traffics).cost


def make_problem(
  profile: Profile | BucketedProfile,
  *,
  devices: int,
  batch_size: int,
  lookups: int,
  dim: int,
  dtype: str,
  slot_bytes: int,
  overflow_probability: float | None = 1e-2,
  topology: Topology | None = None,
  exchange_dtype: str = "float32",
  dense: DenseCost | None = None,
  compute_dtype: str = "float32",
  objective: str = "time",
  train: bool = True,
) -> Problem:
  """Makes the problem of a group of tables.

  Args:
    profile: the row space, hottest first.
    devices: n.
    batch_size: B, global.
    lookups: S, lookups of a sample in the group's tables at most.
    dim, dtype, slot_bytes: of a row and its slot variables.
    overflow_probability: that any buffer of any device overflows in a step and
      a second round is due; by Bernstein's bound, which is above the truth.
      None = the expected rows, without padding.
    topology: how fast the machines are; None = simulated CPU devices.
    exchange_dtype: of rows and gradients on the wire.
    dense, compute_dtype: the model's dense part; None = in another problem.
    objective: "time" or "bytes", what is minimised.
    train: False plans the forward pass only.

  Raises:
    UserError: the batch does not divide.
  """
  if batch_size % devices:
    raise UserError(
      f"train.batch_size: {batch_size} samples cannot be divided over "
      f"{devices} devices; the nearest multiple is "
      f"{max(1, round(batch_size / devices)) * devices}"
    )
  topology = topology or presets.cpu(devices)
  if isinstance(profile, Profile):
    profile = frequency_buckets.of_profile(profile)
  alike = devices % topology.node_devices == 0  # else there is one stage
  shape = StepShape(
    devices=devices,
    batch_size=batch_size,
    lookups=lookups,
    dim=dim,
    row_bytes=dim * _itemsize(dtype),
    slot_bytes=slot_bytes if train else 0,
    wire_bytes=dim * _itemsize(exchange_dtype),
    dense=dense or DenseCost(),
    compute=compute_dtype,
    train=train,
    node_devices=topology.node_devices if alike else 0,
  )
  return Problem(profile, shape, topology, overflow_probability, objective)


def _itemsize(dtype: str) -> int:
  return 4 if dtype == "float32" else 2
