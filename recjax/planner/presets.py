"""Topologies of common machines, each number with its public source.

Data sheets give peaks. What a program achieves is a share of them; the shares
are below. `scripts/calibrate.py` replaces all of it by measurements.
"""

import dataclasses
import os

from recjax.errors import UserError
from recjax.planner import topology
from recjax.planner.topology import PAGE_BYTES, Topology

GB, TB, US = 1e9, 1e12, 1e-6

# Rows of 512 bytes at random: FBGEMM's train step on an H100 (10 tables x
# 1.68 M rows x 128 float32, 1,048,570 ids, SGD) takes 0.96 ms for about 2 GB
# (read, gradient in, read and write the row): 2 of 3.35 TB/s.
# NVIDIA/recsys-examples, dynamicemb benchmark results.
_GATHER = 0.6
# Assumption: what is not in the cache, the result of a gather or the gradients
# that are added, streams; XLA's gathers and scatters are no hand-made kernels.
_CACHED = 0.6
_STREAM = 0.8  # assumption: STREAM-like kernels
_LINK = 0.75  # assumption: all-to-all of megabytes, NCCL or ICI
_MATMUL = 0.4  # assumption: MLPs of widths 256 to 1,024
# Onesweep (Adinets and Merrill, arXiv:2206.01784): 29.4 G 32-bit keys/s on an
# A100 for 256 M keys. 64-bit keys: twice the passes of twice the bytes; a
# million keys do not fill the device: half of that again. By bandwidth.
_SORT_A100 = 29.4e9 / 4 / 2
_LAUNCH = 200 * US  # assumption: a hundred kernels
_TIER = 10 * US  # assumption: a few kernels
# DGX data sheets: up to 8 NVMe drives of 3.84 TB, each good for about a million
# reads of 4 KiB a second. Assumption: what is read through a mapped file is a
# quarter of one drive's, the host's threads each waiting for a page at a time.
_NVME = 250_000 * PAGE_BYTES
_NVME_LATENCY = 100 * US  # assumption: a read of flash and a page fault
# cloud.google.com/tpu/docs/setup-persistent-disk: network disks. Assumption: a
# balanced one's limit, 80,000 reads a second of a large VM.
_NETWORK_DISK = 80_000 * PAGE_BYTES
_NETWORK_DISK_LATENCY = 1_000 * US  # assumption


def _gpu(
  name: str,
  nodes_of: int,
  *,
  memory: float,
  bandwidth: float,
  float32: float,
  bfloat16: float,
  link: float,
  pcie: float,
  network: float,
  host_memory: float,
  host_bandwidth: float,
) -> Topology:
  """Turns the peaks of a data sheet into a Topology."""
  return Topology(
    name=name,
    node_devices=nodes_of,
    host_devices=nodes_of,
    torus=0,
    link=_LINK * link,
    link_latency=15 * US,  # assumption: NCCL, small messages on NVSwitch
    ring=_LINK * link,
    ring_latency=30 * US,  # assumption: NCCL, small messages on NVSwitch
    network=_LINK * network,
    network_latency=30 * US,  # assumption: NCCL over InfiniBand
    device_memory=memory,
    stream=_STREAM * bandwidth,
    gather=_GATHER * bandwidth,
    cached_gather=_CACHED * bandwidth,
    cached_add=_CACHED * bandwidth,
    sort=_SORT_A100 * bandwidth / (2.039 * TB),
    matmul_float32=_MATMUL * float32,
    matmul_bfloat16=_MATMUL * bfloat16,
    launch=_LAUNCH,
    tier_latency=_TIER,
    host_memory=host_memory,
    host_gather=0.25 * host_bandwidth,  # assumption: rows at random, NUMA
    host_link=_LINK * pcie,
    host_latency=50 * US,  # assumption: a transfer is started and awaited
    ssd_read=_NVME,
    ssd_latency=_NVME_LATENCY,
    source=_SHEET,
  )


def _tpu(
  name: str,
  devices: int,
  *,
  torus: int,
  hosts: int,
  memory: float,
  bandwidth: float,
  bfloat16: float,
  ici: float,
  nic: float,
  ram: float,
  page: str,
) -> Topology:
  """Turns the peaks of a page of Cloud TPU's documentation into a Topology."""
  return Topology(
    name=name,
    node_devices=devices,
    host_devices=hosts,
    torus=torus,
    link=_LINK * ici / 2,  # the pages count both directions
    link_latency=5 * US,  # assumption
    ring=_LINK * ici / 2,
    ring_latency=20 * US,  # assumption: around the torus and back
    network=_LINK * nic / hosts,  # the host's cards, shared
    network_latency=50 * US,  # assumption: data-center network
    device_memory=memory,
    stream=_STREAM * bandwidth,
    gather=0.1 * bandwidth,  # assumption: TensorCore gather, no SparseCore
    cached_gather=0.1 * bandwidth,  # the same: no cache
    cached_add=0.1 * bandwidth,
    sort=0.2e9,  # assumption: XLA's bitonic sort
    matmul_float32=_MATMUL * bfloat16 / 6,  # float32 = six bfloat16 passes
    matmul_bfloat16=_MATMUL * bfloat16,
    launch=_LAUNCH,
    tier_latency=_TIER,
    host_memory=ram,
    host_gather=20 * GB,  # assumption
    host_link=_LINK * 31.5 * GB,  # PCIe Gen4 x16; v6e's page says Gen5
    host_latency=100 * US,  # assumption
    ssd_read=_NETWORK_DISK,
    ssd_latency=_NETWORK_DISK_LATENCY,
    source=f"docs.cloud.google.com/tpu/docs/{page}",
  )


# NVIDIA A100 data sheet (80 GB SXM): 80 GB, 2,039 GB/s; float32 19.5, TF32 156,
# BF16 312 TFLOPS; NVLink 600 GB/s both ways; PCIe Gen4 64 GB/s both ways.
# DGX A100 data sheet (640 GB): 8 GPUs, 2 TB of memory, 2 x AMD 7742 (8 channels
# of DDR4-3200 each: 204.8 GB/s), 8 x 200 Gb/s ConnectX for compute.
_A100 = {
  "memory": 80 * GB,
  "bandwidth": 2.039 * TB,
  "float32": 19.5e12,
  "bfloat16": 312e12,
  "link": 300 * GB,
  "pcie": 31.5 * GB,
  "network": 25 * GB,
  "host_memory": 2 * TB,
  "host_bandwidth": 409.6 * GB,
}
# NVIDIA H100 data sheet (SXM): 80 GB, 3.35 TB/s; float32 67, BF16 989 TFLOPS
# without sparsity; NVLink 900 GB/s both ways; PCIe Gen5 128 GB/s both ways.
# DGX H100 data sheet: 8 GPUs, 2 TB of memory, 2 x Xeon 8480C (8 channels of
# DDR5-4800 each: 307.2 GB/s), 8 x 400 Gb/s ConnectX-7.
_H100 = {
  "memory": 80 * GB,
  "bandwidth": 3.35 * TB,
  "float32": 67e12,
  "bfloat16": 989e12,
  "link": 450 * GB,
  "pcie": 63 * GB,
  "network": 50 * GB,
  "host_memory": 2 * TB,
  "host_bandwidth": 614.4 * GB,
}
# NVIDIA H200 data sheet (SXM): as the H100, with 141 GB at 4.8 TB/s. DGX H200
# data sheet: as the DGX H100.
_H200 = _H100 | {"memory": 141 * GB, "bandwidth": 4.8 * TB}
_SHEET = (
  "NVIDIA data sheets of the GPU and the DGX; shares in planner/presets.py"
)

PRESETS = {
  t.name: t
  for t in (
    _gpu("dgx_a100", 8, **_A100),
    _gpu("dgx_h100", 8, **_H100),
    _gpu("dgx_h200", 8, **_H200),
    _gpu("a100", 1, **(_A100 | {"host_memory": 256 * GB})),
    _gpu("h100", 1, **(_H100 | {"host_memory": 256 * GB})),
    _gpu("h200", 1, **(_H200 | {"host_memory": 256 * GB})),
    # Pod of 256, 2D torus, 8 chips a host; 16 GB at 819 GB/s, 197 TFLOPS, ICI
    # 400 GB/s both ways, 512 GiB a host, 2 x 100 Gb/s a host.
    _tpu(
      "tpu_v5e", 256, torus=2, hosts=8, memory=16 * GB, bandwidth=819 * GB,
      bfloat16=197e12, ici=400 * GB, nic=25 * GB, ram=512 * 2**30, page="v5e",
    ),
    # Pod of 8,960, 3D torus, 4 chips a host; 95 GB at 2,765 GB/s, 459 TFLOPS,
    # ICI 4,800 Gb/s. ct5p-hightpu-4t: 448 GB; 200 Gb/s a host (assumption).
    _tpu(
      "tpu_v5p", 8_960, torus=3, hosts=4, memory=95 * GB, bandwidth=2_765 * GB,
      bfloat16=459e12, ici=1_200 * GB, nic=25 * GB, ram=448 * GB, page="v5p",
    ),
    # Pod of 256, 2D torus, 8 chips a host; 32 GB at 1,638 GB/s, 918 TFLOPS,
    # ICI 800 GB/s both ways, 1,536 GiB a host, 4 x 200 Gb/s a host.
    _tpu(
      "tpu_v6e", 256, torus=2, hosts=8, memory=32 * GB, bandwidth=1_638 * GB,
      bfloat16=918e12, ici=800 * GB, nic=100 * GB, ram=1_536 * 2**30,
      page="v6e",
    ),
  )
}  # fmt: skip


def cpu(devices: int) -> Topology:
  """Describes simulated devices that share this machine's cores.

  By scripts/calibrate.py with eight of them on two cores: the mean of two runs,
  launch of two later ones whose smallest step is a batch of 512. But for the
  host: planner/cut_points.py wants its rows no cheaper than the devices', which
  the same memory holds here. Assumed to grow with cores. What an operation
  takes before it does anything is the devices' together.
  """
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  n = max(devices, 1)
  each = (os.cpu_count() or 2) / 2 / n  # of two cores' rates
  latency = 18 * US / each
  return Topology(
    name="cpu",
    node_devices=n,
    host_devices=n,
    torus=0,
    link=7.7 * GB * each,
    link_latency=latency,
    ring=25 * GB * each,
    ring_latency=latency,
    network=1 * GB * each,  # assumption: the loopback, gloo
    network_latency=latency,
    device_memory=ram / 2 / n,
    stream=26 * GB * each,
    gather=5.6 * GB * each,
    cached_gather=16 * GB * each,
    cached_add=30 * GB * each,
    sort=29e6 * each,
    matmul_float32=180e9 * each,
    matmul_bfloat16=180e9 * each,
    launch=0.43e-3 / each,
    tier_latency=35 * US / each,
    host_memory=ram / 2,
    host_gather=4.5 * GB * each * n,  # 5 to 6 measured
    host_link=32 * GB * each,
    host_latency=14 * US / each,
    ssd_read=0.21 * GB,  # two runs of scripts/calibrate_ssd.py, 1 GiB
    ssd_latency=90 * US,
    source="two cores of an AMD EPYC (Zen 4), jax 0.10, rounded",
  )


def get(name: str, devices: int) -> Topology:
  """The preset of that name, else the topology in the file of that name.

  Raises:
    UserError: there is neither.
  """
  if name == "cpu":
    return cpu(devices)
  if name in PRESETS:
    return PRESETS[name]
  if not name.endswith(".json") and not os.path.exists(name):
    raise UserError(
      f"plan.topology: {name!r} is neither a file nor one of cpu, "
      f"{', '.join(PRESETS)}"
    )
  return topology.load(name)


def of_device(kind: str, devices: int, hosts: int) -> Topology:
  """The preset nearest to what JAX calls the device ('NVIDIA H200', ...)."""
  lower = kind.lower()
  for name, words in {
    "h200": ("h200",),
    "h100": ("h100", "h800", "gh200"),
    "a100": ("a100",),
    "tpu_v6e": ("v6",),
    "tpu_v5p": ("v5p", "tpu v5"),
    "tpu_v5e": ("v5e", "v5 lite"),
  }.items():
    if any(w in lower for w in words):
      if "v5 lite" in lower:
        name = "tpu_v5e"
      t = PRESETS[f"dgx_{name}" if f"dgx_{name}" in PRESETS else name]
      each = -(-devices // hosts)
      if t.torus == 0:  # a node has the devices that are there
        return dataclasses.replace(t, node_devices=each, host_devices=each)
      return t
  return cpu(devices)
