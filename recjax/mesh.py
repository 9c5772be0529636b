"""The device mesh and the few shardings that recjax uses.

A mesh has two levels, nodes and the devices of a node: fast links join the
devices, a network the nodes. schema.AXES names both: a collective or a
sharding over them sees n devices in a row, node by node.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recjax.errors import UserError
from recjax.nodes import check_nodes
from recjax.schema import AXES


def simulate_devices(devices: int, processes: int = 1) -> None:
  """Asks for `devices` CPU devices, this process's part of them.

  Call before JAX's backend starts. Has no effect where JAX finds an
  accelerator.

  Raises:
    UserError: the devices cannot be shared out evenly.
  """
  if devices % processes:
    raise UserError(
      f"mesh.devices: {devices} devices cannot be shared by {processes} "
      f"processes; give a multiple of {processes}, or 0 for all"
    )
  if devices > 0:
    jax.config.update("jax_num_cpu_devices", devices // processes)


def make_mesh(devices: int, node_devices: int = 0) -> Mesh:
  """A mesh [nodes, devices of a node], as many of each process.

  A process's devices are neighbours, so that its part of a batch is one piece.
  The axes are Auto: what must be placed is placed by hand, in `shard_map` or
  by an explicit sharding.

  Args:
    devices: of all nodes; 0 = all that JAX finds.
    node_devices: of a node; 0 = one node holds them all.

  Raises:
    UserError: there are fewer devices, or they cannot be shared out evenly.
  """
  found = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  if devices > len(found):
    raise UserError(
      f"mesh.devices: {devices} asked for, but JAX finds {len(found)} "
      f"{found[0].platform} device(s); set --config.mesh.devices={len(found)}"
      " or fewer, or 0 for all"
    )
  devices = devices or len(found)
  check_nodes(devices, node_devices)
  used = []
  for _, group in itertools.groupby(found, lambda d: d.process_index):
    used += list(group)[: devices // jax.process_count()]
  return mesh_of(used, node_devices)


def mesh_of(devices: Sequence[Any], node_devices: int = 0) -> Mesh:
  """The mesh of these devices, node by node, here or described only."""
  nodes = np.array(devices).reshape(-1, node_devices or len(devices))
  return Mesh(nodes, AXES, axis_types=(AxisType.Auto,) * 2)


def owners_here(mesh: Mesh) -> list[int]:
  """The places in the mesh of this process's devices, ascending."""
  here = jax.process_index()
  return [i for i, d in enumerate(mesh.devices.flat) if d.process_index == here]


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(AXES))
