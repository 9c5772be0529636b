"""What machines hold, and how to use it. No JAX: a plan is made anywhere."""

import ctypes
import os

# Part of a memory that tables and slots may fill where no budget is given; the
# rest is for activations, buffers, the dense part and the system.
_TABLE_SHARE = 0.6


def memory_budgets(
  device_mb: int, host_mb: int, devices: int, device_limit: int | None = None
) -> tuple[int, int]:
  """Bytes for tables and slots: (a device, all hosts' part of this host).

  0 MB reads the budget from the machine: `device_limit` is the accelerator's
  own memory in bytes; without one (CPU), the `devices` simulated devices
  share one half of what the host can give and the cold tier gets the other.
  """
  ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  ram = int(ram * _TABLE_SHARE)
  if device_limit is None:
    device, host = ram // 2 // devices, ram // 2
  else:
    device, host = int(device_limit * _TABLE_SHARE), ram
  return device_mb << 20 or device, host_mb << 20 or host


def keep_freed_memory() -> None:
  """Tells glibc to reuse large freed buffers; call before JAX starts.

  By default glibc maps arrays above 32 MB anew each time, so that XLA:CPU's
  temporary buffer costs its page faults every step: 188 instead of 137 ms for
  DLRM's dense part at batch 8,192 on two cores (scripts/bench_step.py,
  --malloc default against tuned). Has no effect elsewhere.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    libc.mallopt(-8, 1)  # M_ARENA_MAX: or every thread keeps its own
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
