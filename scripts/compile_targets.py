"""Accelerators that programs are compiled for where there are none.

A target is the name of a GPU, or a TPU's kind and the shape of its slice. Its
devices are descriptions: `jax.jit(f).lower(shapes).compile()` works on a mesh
of them, running does not. `prepare` is for before JAX starts.
"""

import importlib.machinery
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from recjax.errors import UserError

# What XLA asks of a GPU, as openxla/xla has it in
# xla/backends/gpu/target_config/specs: h100_sxm, h200, a100_sxm_80. Without the
# version of CUB, whose sorts need a device to compile: XLA's own sort is taken.
_EVERY_GPU = {
  "threads_per_block_limit": 1_024,
  "threads_per_warp": 32,
  "shared_memory_per_block": 49_152,
  "threads_per_core_limit": 2_048,
  "block_dim_limit_x": 2_147_483_647,
  "block_dim_limit_y": 65_535,
  "block_dim_limit_z": 65_535,
  "registers_per_core_limit": 65_536,
  "registers_per_block_limit": 65_536,
}
_H100 = {
  "name": "NVIDIA H100 80GB HBM3",
  "capability": 9,
  "shared_memory_per_core": 233_472,
  "shared_memory_per_block_optin": 232_448,
  "core_count": 132,
  "fpus_per_core": 128,
  "memory_bandwidth": 3_352_320_000_000,
  "l2_cache_size": 52_428_800,
  "clock_rate_ghz": 1.98,
  "device_memory_size": 84_942_979_072,
}
GPUS = {
  "h100": _H100,
  "h200": _H100
  | {
    "name": "NVIDIA H200 141GB HBM3e",
    "memory_bandwidth": 4_800_000_000_000,
    "device_memory_size": 151_397_597_184,
  },
  "a100": {
    "name": "NVIDIA A100-SXM4-80GB",
    "capability": 8,
    "shared_memory_per_core": 167_936,
    "shared_memory_per_block_optin": 166_912,
    "core_count": 108,
    "fpus_per_core": 64,
    "memory_bandwidth": 2_039_040_000_000,
    "l2_cache_size": 41_943_040,
    "clock_rate_ghz": 1.41,
    "device_memory_size": 85_100_068_864,
  },
}
_NODE_GPUS = 8  # of the planner's dgx_ presets
TPUS = ("v5e", "v5p", "v6e")  # the planner's presets, tpu_v5e, ...
CHOICES = f"{', '.join(GPUS)}, or a TPU's slice such as v5e:2x4, v5p:2x2x2"

# Where scripts/test.sh puts the compilers. Beside JAX they would be found by
# every process, which says aloud that their accelerator is not there.
COMPILERS = pathlib.Path(sys.prefix) / "compilers"
_INSTALL = "install recjax[compile]"


class Target(NamedTuple):
  """What programs are compiled for."""

  name: str  # "h100", or "v5e:2x4"
  devices: int  # n

  @property
  def gpu(self) -> bool:
    """Whether it is one of GPUS."""
    return self.name in GPUS

  @property
  def preset(self) -> str:
    """The planner's name of these machines."""
    if not self.gpu:
      return f"tpu_{self.name.partition(':')[0]}"
    return self.name if self.devices == 1 else f"dgx_{self.name}"


def parse(name: str, devices: int = 0) -> Target:
  """Returns the target of that name.

  Args:
    name: of CHOICES.
    devices: of GPUs; 0 = 1, and for a TPU what its slice has.

  Raises:
    UserError: there is no such target, or not with so many devices.
  """
  if name in GPUS:
    if devices > _NODE_GPUS and devices % _NODE_GPUS:
      raise UserError(
        f"--devices: {devices} GPUs are no whole nodes of {_NODE_GPUS}"
      )
    return Target(name, devices or 1)
  found = re.fullmatch(rf"({'|'.join(TPUS)}):(\d+(?:x\d+){{1,2}})", name)
  if not found:
    raise UserError(f"--target: {name!r} is none of {CHOICES}")
  chips = math.prod(map(int, found[2].split("x")))
  if devices not in (0, chips):
    raise UserError(
      f"--devices: {devices} asked for, but {name} has {chips}; leave it out"
    )
  return Target(name, chips)


def missing(target: Target) -> str:
  """Says what is not installed that the target needs; "" where nothing is."""
  package, name = "libtpu", "libtpu"
  if target.gpu:
    package, name = "jax_cuda12_plugin", "jax-cuda12-plugin"
  places = [*sys.path, str(COMPILERS)]
  if importlib.machinery.PathFinder.find_spec(package, places):
    return ""
  return f"{name} is not here: {_INSTALL}"


def environment() -> dict[str, str]:
  """Returns what must be set before JAX is imported.

  The compilers then look for no accelerator, and JAX runs on the CPU.
  """
  # Both would time kernels on a device.
  flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
  return {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # it is about compiling
    # What is compiled is to be as users have it; tests turn most of it off.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    # libtpu asks no cloud what machine this is, and lets other processes load
    # it at the same time, as none uses a TPU.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
  }


def prepare() -> None:
  """Sets this process's `environment`, and lets it find the compilers."""
  os.environ |= environment()
  sys.path.append(str(COMPILERS))


def devices(target: Target) -> Sequence[Any]:
  """Returns descriptions of the target's devices, node by node.

  Raises:
    UserError: its compiler is not installed, or knows no such slice.
  """
  if lacks := missing(target):
    raise UserError(f"--target: {target.name}: {lacks}")
  import jax
  from jax.experimental import topologies

  if target.gpu:
    nodes = -(-target.devices // _NODE_GPUS)
    return topologies.get_topology_desc(
      target.name,
      platform="cuda",
      topology=f"1x{nodes}x{target.devices // nodes}",
      target_config=gpu_config(target.name),
    ).devices
  try:
    found = topologies.get_topology_desc(target.name, platform="tpu").devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f"--target: {target.name}: {e}") from None
  return found


def gpu_config(name: str) -> str:
  """Returns XLA's GpuTargetConfigProto of a GPU, as text."""
  about = _EVERY_GPU | GPUS[name]
  named, capability = about.pop("name"), about.pop("capability")
  numbers = "\n".join(f"  {k}: {v}" for k, v in about.items())
  return f"""gpu_device_info {{
{numbers}
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{named}"
"""
