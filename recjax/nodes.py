"""Nodes: devices that fast links join."""

from recjax.errors import UserError


def check_nodes(devices: int, node_devices: int) -> None:
  """Raises UserError where devices do not make whole nodes; 0 = one node."""
  if node_devices and devices % node_devices:
    fit = [g for g in range(1, devices + 1) if devices % g == 0]
    raise UserError(
      f"mesh.node_devices: {devices} devices cannot be shared out to nodes of "
      f"{node_devices}; use one of {', '.join(map(str, fit))}, or 0 for what "
      "the topology says"
    )
