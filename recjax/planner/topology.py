"""What machines hold, and how fast they are. No JAX: a plan is made anywhere.

A cluster has two levels: devices of a node are joined by fast links, nodes by
a network. Presets are in planner/presets.py; `load` reads a measured topology
from a file.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from recjax import files
from recjax.errors import UserError

# Part of a memory that tables and slot variables may fill where no budget is
# given; the rest is for activations, buffers, the dense part and the system.
_TABLE_SHARE = 0.6
PAGE_BYTES = 4096  # what an SSD reads at least, and Linux maps


@dataclasses.dataclass(frozen=True)
class Topology:
  """Rates of one device unless said otherwise, achieved ones, in SI units."""

  name: str
  node_devices: int  # joined by the fast links
  host_devices: int  # that share a host's memory
  torus: int  # dimensions of the links' torus; 0 = a switch
  link: float  # bytes/s, one direction, all links of a device
  link_latency: float  # s, an all-to-all within a node
  ring: float  # bytes/s that a device sends in an all-reduce or all-gather
  ring_latency: float  # s, one of those within a node
  network: float  # bytes/s between nodes, one direction
  network_latency: float  # s, a message between nodes
  device_memory: float  # bytes
  stream: float  # bytes/s of device memory, in order
  gather: float  # bytes/s of rows at random, read or written
  cached_gather: float  # the same, read from a table that caches hold
  cached_add: float  # the same, added to such a table
  sort: float  # 64-bit keys/s
  matmul_float32: float  # FLOP/s
  matmul_bfloat16: float  # FLOP/s
  launch: float  # s, of a step whatever its size
  tier_latency: float  # s, of a tier that has rows, forward or backward
  host_memory: float  # bytes of a host
  host_gather: float  # bytes/s of rows at random, of a host
  host_link: float  # bytes/s between host and device, one direction
  host_latency: float  # s, a call to the host and back
  # Of a host's SSDs. Files of an older scripts/calibrate.py lack them: then
  # these are assumed, a cloud's network disk of 100,000 reads/s.
  ssd_read: float = 0.4e9  # bytes/s of pages at random, read or written
  ssd_latency: float = 1e-3  # s, a page
  source: str = ""

  def nodes(self, devices: int) -> int:
    """N, the nodes that so many devices make."""
    return -(-devices // self.node_devices)

  def hosts(self, devices: int) -> int:
    """The hosts that so many devices sit in."""
    return -(-devices // self.host_devices)


_LIMITS = {  # what no machine is below or above
  "node_devices": (1, 1 << 20),
  "host_devices": (1, 1 << 10),
  "torus": (0, 3),
  "link_latency": (0, 1),
  "ring_latency": (0, 1),
  "network_latency": (0, 1),
  "launch": (0, 10),
  "tier_latency": (0, 1),
  "host_latency": (0, 1),
  "ssd_latency": (0, 1),
  "device_memory": (1 << 20, 1 << 50),
  "host_memory": (1 << 20, 1 << 50),
  "matmul_float32": (1e6, 1e18),
  "matmul_bfloat16": (1e6, 1e18),
  "sort": (1e3, 1e14),
}
_RATE = (1e4, 1e15)  # bytes/s
_SSD = ("ssd_read", "ssd_latency")
_MAY_LACK = (*_SSD, "source")


def load(path: str | pathlib.Path) -> Topology:
  """The topology in a JSON file: an object with the fields of `Topology`.

  Raises:
    UserError: no such file, no JSON, a field is missing, unknown or absurd.
  """
  try:
    found = files.read_json(path)
  except OSError as e:
    raise UserError(f"plan.topology: {path}: {e.strerror}") from None
  except ValueError as e:
    raise UserError(f"plan.topology: {path} is no JSON: {e}") from None
  if not isinstance(found, dict):
    raise UserError(f"plan.topology: {path} holds no JSON object")
  fields = {f.name: f for f in dataclasses.fields(Topology)}
  missing = [n for n in fields if n not in found and n not in _MAY_LACK]
  if missing:
    raise UserError(
      f"plan.topology: {path} lacks {', '.join(missing)}; a file needs all of "
      f"{', '.join(fields)}, as scripts/calibrate.py writes it"
    )
  assumed = [n for n in _SSD if n not in found]
  unknown = [n for n in found if n not in fields]
  if unknown:
    raise UserError(
      f"plan.topology: {path} has the unknown field {unknown[0]}; the fields "
      f"are {', '.join(fields)}"
    )
  for name, value in found.items():
    found[name] = _checked(path, fields[name], value)
  if assumed:
    note = f"{', '.join(assumed)} assumed"
    found["source"] = "; ".join(filter(None, (found.get("source"), note)))
  return Topology(**found)


def _checked(path: str | pathlib.Path, field: dataclasses.Field, value: Any):
  """The value of a field; raises UserError where it is absurd."""
  name, kind = field.name, field.type
  if kind is str:
    if not isinstance(value, str):
      raise UserError(f"plan.topology: {path}: {name}: {value!r} is no text")
    return value
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  low, high = _LIMITS.get(name, _RATE)
  if not number or not math.isfinite(value) or not low <= value <= high:
    raise UserError(
      f"plan.topology: {path}: {name}: {value!r} is not a number from "
      f"{low:g} to {high:g}"
    )
  if kind is int and value != int(value):
    raise UserError(f"plan.topology: {path}: {name}: {value!r} is not whole")
  return int(value) if kind is int else float(value)


def save(topology: Topology, path: str | pathlib.Path) -> None:
  """Writes a topology as JSON, for `load` to read."""
  files.write(path, json.dumps(dataclasses.asdict(topology), indent=2) + "\n")


def ssd_budget(ssd_mb: int, directory: str) -> int:
  """Bytes for rows and slot variables in files of a folder of this host.

  Args:
    ssd_mb: the budget; 0 = a part of what is free in its file system.
    directory: the folder, which need not be there yet; "" = none.

  Raises:
    UserError: it is no folder, or not to be looked at.
  """
  if not directory:
    return ssd_mb << 20
  path = pathlib.Path(directory).absolute()
  try:
    while not path.exists():
      path = path.parent
    if not path.is_dir():
      raise UserError(f"plan.host_store_dir: {path} is no folder")
    found = os.statvfs(path)
  except OSError as e:
    raise UserError(f"plan.host_store_dir: {directory}: {e.strerror}") from None
  free = found.f_bavail * found.f_frsize
  return ssd_mb << 20 or int(free * _TABLE_SHARE)


def memory_budgets(
  device_mb: int, host_mb: int, devices: int, device_limit: int | None = None
) -> tuple[int, int]:
  """Bytes for tables and slot variables: (of a device, of this host).

  0 MB reads the budget from the machine: `device_limit` is the accelerator's
  own memory in bytes; without one (CPU), the `devices` simulated devices
  share one half of what the host can give and stored rows get the other.
  """
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  ram = int(ram * _TABLE_SHARE)
  if device_limit is None:
    device, host = ram // 2 // devices, ram // 2
  else:
    device, host = int(device_limit * _TABLE_SHARE), ram
  return device_mb << 20 or device, host_mb << 20 or host
