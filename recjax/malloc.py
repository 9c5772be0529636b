"""How the C library's malloc treats freed memory."""

import ctypes


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
