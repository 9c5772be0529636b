"""What rows and collectives cost on the links: bytes and seconds.

`p` is the probability that a sample touches a row, rows in rank order; samples
are independent unless said otherwise. w is the bytes of a row on the wire, c
those of an id, n the devices, b the local batch. A row is touched by m samples
with probability pi(m) = 1 - (1-p)^m. Functions of rows and cuts take arrays as
well as numbers.
"""

import math

import numpy as np

from recjax.planner.topology import Topology

ID_BYTES = 4

# ---- Bytes that a device sends in a step: (forward, backward)


def uncoalesced_bytes(p, b, w, n, c=ID_BYTES):
  """Bytes of a sharded row that travels once for every sample that uses it."""
  part = b * p * (n - 1) / n
  return part * (w + c), part * w


def coalesced_bytes(pi, w, n, c=ID_BYTES):
  """Bytes of a sharded row that travels once a device and step; pi = pi(b)."""
  part = pi * (n - 1) / n
  return part * (w + c), part * w


def table_wise_bytes(bags, b, hotness, w, n, *, c=ID_BYTES, owners=1):
  """Bytes of a table-wise table: ids to the owner, a vector a bag back.

  Args:
    bags: probability that a sample's bag is not empty.
    b: local batch.
    hotness: h, lookups of a bag.
    w: bytes of a vector.
    n: devices.
    c: bytes of an id.
    owners: the table's shards by rows; each returns a partial sum.
  """
  part = b * bags * (n - 1) / n
  vectors = min(owners, hotness)
  return part * (hotness * c + vectors * w), part * vectors * w


def all_reduced_bytes(w, n):
  """Bytes of a replicated row whose gradient is all-reduced, touched or not.

  2 w (n-1)/n: reduce-scatter and all-gather (Rabenseifner; Thakur et al.,
  Optimization of Collective Communication Operations in MPICH, 2005).
  """
  return 0.0 * w, 2 * w * (n - 1) / n


def gathered_bytes(pi, w, n, c=ID_BYTES):
  """Bytes of a replicated row whose gradient goes to all, if touched.

  pi = pi(b).
  """
  return 0.0 * pi, (n - 1) * pi * (w + c)


def two_stage_bytes(pi_node, w, nodes, devices_per_node, c=ID_BYTES):
  """Bytes between nodes, a device's, where a node's devices coalesce first.

  A row crosses the network once a node: pi_node = pi(g b) of a node's g
  devices, spread over them. The flat exchange is `coalesced_bytes` with
  (nodes - 1)/nodes for (n - 1)/n.
  """
  part = pi_node * (nodes - 1) / nodes / devices_per_node
  return part * (w + c), part * w


# ---- Seconds of a collective


def all_to_all_seconds(size, n: int, t: Topology):
  """Seconds of an all-to-all of `size` bytes a device, its own part included.

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
  """Seconds of an all-reduce of `size` bytes of summands a device.

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
  """Seconds of an all-gather of `size` bytes a device.

  (n - 1) size bytes arrive at each.
  """
  if n == 1:
    return 0.0 * size
  g, nodes = min(n, t.node_devices), t.nodes(n)
  # Between nodes each device fetches its peers' parts, then shares them.
  seconds = size * (nodes - 1) / t.network + size * (n - nodes) / t.ring
  latency = (g > 1) * t.ring_latency
  latency += math.ceil(math.log2(nodes)) * t.network_latency
  return seconds + latency * (size > 0)
