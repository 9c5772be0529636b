"""The device mesh and the few shardings that recjax uses."""

import itertools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recjax.errors import UserError

AXIS = "data"


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


def make_mesh(devices: int) -> Mesh:
  """A one-axis mesh of `devices` devices (0 = all), as many of each process.

  A process's devices are neighbours, so that its part of a batch is one piece.
  The axis is Auto: what must be placed is placed by hand, in `shard_map` or
  by an explicit sharding.

  Raises:
    UserError: there are fewer devices.
  """
  found = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  if devices > len(found):
    raise UserError(
      f"mesh.devices: {devices} asked for, but JAX finds {len(found)} "
      f"{found[0].platform} device(s); set --config.mesh.devices={len(found)}"
      " or fewer, or 0 for all"
    )
  each = (devices or len(found)) // jax.process_count()
  used = []
  for _, group in itertools.groupby(found, lambda d: d.process_index):
    used += list(group)[:each]
  return Mesh(np.array(used), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(AXIS))
