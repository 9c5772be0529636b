"""The device mesh and the few shardings that recjax uses."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recjax.errors import UserError

AXIS = "data"


def simulate_devices(devices: int) -> None:
  """Asks for `devices` CPU devices; call before JAX's backend starts.

  Has no effect where JAX finds an accelerator.
  """
  if devices > 0:
    jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(devices: int) -> Mesh:
  """A one-axis mesh of the first `devices` devices (0 = all).

  The axis is Auto: what must be placed is placed by hand, in `shard_map` or
  by an explicit sharding.

  Raises:
    UserError: there are fewer devices.
  """
  found = jax.devices()
  if devices > len(found):
    raise UserError(
      f"mesh.devices: {devices} asked for, but JAX finds {len(found)} "
      f"{found[0].platform} device(s); set --config.mesh.devices={len(found)}"
      " or fewer, or 0 for all"
    )
  devices = devices or len(found)
  return jax.make_mesh(
    (devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=found[:devices]
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(AXIS))
