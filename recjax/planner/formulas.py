"""What a step costs: pure formulas, numpy only.

`p` is the probability that a sample touches a row, rows in rank order; samples
are independent unless said otherwise. w is the bytes of a row on the wire, c
those of an id, n the devices, b the local batch. The formulas are those of
"What a row costs": a row is touched by m samples with pi(m) = 1 - (1-p)^m.
Functions of rows and cuts take arrays as well as numbers.
"""

import math

import numpy as np

from recjax.planner.topology import Topology

ID_BYTES = 4

# ---- Distinct rows


def bag_probability(r, sizes):
  """p = 1 - sum_h P(h) (1-r)^h: a bag of independent lookups holds the row.

  A lookup is the row with probability r. Duplicates within a bag count once.

  Args:
    r: [R] float64.
    sizes: h of every bag, or [H + 1] P(a bag has h lookups), h = 0 ... H.
  """
  r = np.asarray(r, np.float64)
  if np.ndim(sizes) == 0:
    return touch_probability(r, sizes)
  return sum(x * touch_probability(r, h) for h, x in enumerate(sizes) if h)


def touch_probability(p: np.ndarray, samples: int) -> np.ndarray:
  """pi_i(m) = 1 - (1 - p_i)^m: m independent samples touch the row.

  Args:
    p: [R] float64, the probability that one sample does.
    samples: m.

  Returns:
    [R] float64.
  """
  with np.errstate(divide="ignore"):  # p = 1
    return -np.expm1(samples * np.log1p(-p))


def variance_bound(pi: np.ndarray, rows=1) -> float:
  """Of the number of distinct rows: at most sum pi (1 - pi).

  Lookups that fill a batch compete, so the indicators 'row i is touched' are
  negatively associated (Joag-Dev and Proschan, 1983) and covariances are <= 0.
  """
  return float(np.sum(rows * pi * (1 - pi)))


def overflow_bound(
  mean: float, capacity: float, variance: float | None = None
) -> float:
  """P(a buffer's distinct rows > capacity) is at most this.

  Bernstein's inequality, which holds for negatively associated Bernoullis:
  P(X >= mean + t) <= exp(-t^2 / (2 (variance + t / 3))), with any bound on the
  variance; None = the mean.
  """
  t = capacity - mean
  variance = mean if variance is None else variance
  return 1.0 if t <= 0 else math.exp(-t * t / (2 * (variance + t / 3)))


def capacity(
  mean: float, overflow_probability: float, variance: float | None = None
) -> int:
  """Rows that a buffer needs so that it overflows with at most that chance.

  `overflow_bound` solved for the capacity.
  """
  variance = mean if variance is None else variance
  return math.ceil(_capacity(mean, overflow_probability, variance))


def _capacity(mean, overflow_probability, variance):
  log = -math.log(overflow_probability)
  return mean + log / 3 + np.sqrt(log * log / 9 + 2 * variance * log)


def buffer_rows(
  mean, variance, top, rows, devices, lookups, overflow_probability
):
  """Rows n C of a tier's exchange buffer, from its expected distinct rows.

  Owners are cyclic in rank, so none has more of the mean than its n-th part
  and one row; nor of the variance, sum pi (1 - pi), whose summands rise, then
  fall with the rank: its n-th part and twice the largest, 1/4. C is at most
  an owner's rows and the batch's lookups.

  Args:
    mean: expected distinct rows of the tier that a device touches.
    variance: bound on theirs, `variance_bound`.
    top: pi(b) of the tier's hottest row.
    rows: of the tier.
    devices: n.
    lookups: L, of a device and step.
    overflow_probability: of one buffer; None = the mean, without padding.
  """
  if overflow_probability is None:
    # A tier with rows is exchanged, however seldom they are used.
    return np.where(rows > 0, np.maximum(mean, 1e-9), 0.0)
  c = _capacity(
    mean / devices + (top if devices > 1 else 0.0),
    overflow_probability,
    variance / devices + (0.5 if devices > 1 else 0.0),
  )
  c = np.minimum(np.ceil(c), np.minimum(np.ceil(rows / devices), lookups))
  return np.where(rows > 0, devices * c, 0.0)


# ---- Bytes that a device sends in a step, (forward, backward)


def uncoalesced_bytes(p, b, w, n, c=ID_BYTES):
  """A sharded row that travels once for every sample that uses it."""
  part = b * p * (n - 1) / n
  return part * (w + c), part * w


def coalesced_bytes(pi, w, n, c=ID_BYTES):
  """A sharded row that travels once a device and step; pi = pi(b)."""
  part = pi * (n - 1) / n
  return part * (w + c), part * w


def pooled_bytes(bags, b, hotness, w, n, c=ID_BYTES, owners=1):
  """A table pooled at its owner: ids there, one vector a bag and owner back.

  Args:
    bags: probability that a sample's bag is not empty.
    b: local batch.
    hotness: h, lookups of a bag.
    w, n, c: bytes of a vector, devices, bytes of an id.
    owners: the table's shards by rows; each returns a partial sum.
  """
  part = b * bags * (n - 1) / n
  vectors = min(owners, hotness)
  return part * (hotness * c + vectors * w), part * vectors * w


def all_reduced_bytes(w, n):
  """A replicated row whose gradient is all-reduced, touched or not.

  2 w (n-1)/n: reduce-scatter and all-gather (Rabenseifner; Thakur et al.,
  Optimization of Collective Communication Operations in MPICH, 2005).
  """
  return 0.0 * w, 2 * w * (n - 1) / n


def gathered_bytes(pi, w, n, c=ID_BYTES):
  """A replicated row whose gradient goes to all, if touched; pi = pi(b)."""
  return 0.0 * pi, (n - 1) * pi * (w + c)


def host_bytes(pi_global, w, slot, n, c=ID_BYTES):
  """(up, down) a device's host link, for a row of host memory.

  With the optimizer on the device: the row and its slots up, the same and the
  id down, once a step whatever the number of devices; pi_global = pi(B).
  """
  return pi_global * (w + slot) / n, pi_global * (w + slot + c) / n


def two_stage_bytes(pi_node, w, nodes, devices_per_node, c=ID_BYTES):
  """Bytes between nodes a device, where a node's devices coalesce first.

  A row crosses the network once a node: pi_node = pi(g b) of a node's g
  devices, spread over them. The flat exchange is `coalesced_bytes` with
  (nodes - 1)/nodes for (n - 1)/n.
  """
  part = pi_node * (nodes - 1) / nodes / devices_per_node
  return part * (w + c), part * w


# ---- Seconds of a collective


def all_to_all_seconds(size, n: int, t: Topology):
  """`size` bytes a device, its own part included.

  Within and between nodes at the same time; messages are posted at once, so
  one latency a level. On a torus of k dimensions with n devices and rate W a
  device, the bisection has 2 n^((k-1)/k) links of W / 2k, and half of half
  the bytes cross it: size k n^(1/k) / (4 W).
  """
  if n == 1:
    return 0.0 * size
  g, nodes = min(n, t.node_devices), t.nodes(n)
  within = size * (g - 1) / n / t.link
  if t.torus:
    across = size * t.torus * g ** (1 / t.torus) / (4 * t.link) * g / n
    within = np.maximum(within, across)
  between = size * (n - g) / n / t.network
  latency = (g > 1) * t.link_latency + (nodes > 1) * t.network_latency
  return np.maximum(within, between) + latency * (size > 0)


def all_reduce_seconds(size, n: int, t: Topology):
  """`size` bytes of summands a device.

  Reduce-scatter in the node, all-reduce of the parts between nodes, all-gather
  in the node; 2 log2 latencies between nodes (Thakur et al. 2005).
  """
  if n == 1:
    return 0.0 * size
  g, nodes = min(n, t.node_devices), t.nodes(n)
  seconds = 2 * size * (g - 1) / g / t.ring
  seconds += 2 * size / g * (nodes - 1) / nodes / t.network
  latency = (g > 1) * t.ring_latency
  latency += 2 * math.ceil(math.log2(nodes)) * t.network_latency
  return seconds + latency * (size > 0)


def all_gather_seconds(size, n: int, t: Topology):
  """`size` bytes a device, gathered by all: (n - 1) size bytes arrive."""
  if n == 1:
    return 0.0 * size
  g, nodes = min(n, t.node_devices), t.nodes(n)
  # Between nodes each device fetches its peers' parts, then shares them.
  seconds = size * (nodes - 1) / t.network + size * (n - nodes) / t.ring
  latency = (g > 1) * t.ring_latency
  latency += math.ceil(math.log2(nodes)) * t.network_latency
  return seconds + latency * (size > 0)
