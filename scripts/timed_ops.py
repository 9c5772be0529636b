"""Times single operations on a device, for bench_ops.py."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_ROUNDS = 6  # of calls; the first is not counted


class TimedOps:
  """Times operations, prints a line each and keeps what it found.

  Calls follow one another without waiting, so that starting them costs nothing
  where they take more than about 0.1 ms.
  """

  def __init__(self, args: argparse.Namespace):
    self.args, self.found = args, []
    self.rng = np.random.default_rng(0)

  def add(
    self,
    name: str,
    f: Callable,
    *operands: jax.Array,
    moved: float = 0,
    flops: float = 0,
    donate: bool = False,
  ) -> jax.Array:
    """Times f.

    Args:
      name: what is printed.
      f: of the operands.
      *operands: on the device, or each call would send them.
      moved: bytes that it must read and write.
      flops: multiplications and additions.
      donate: gives the first operand up; f returns its successor.

    Returns:
      The first operand, or its last successor.
    """
    run = jax.jit(f, donate_argnums=0 if donate else ())
    run = run.lower(*operands).compile()
    first, *rest = operands
    times = []
    for _ in range(_ROUNDS):
      start = time.perf_counter()
      out = None
      for _ in range(self.args.repeats):
        out = run(first, *rest)
        if donate:
          first = out
      jax.block_until_ready(out)
      times.append((time.perf_counter() - start) / self.args.repeats)
    memory = run.memory_analysis()
    radix = "DeviceRadixSort" in run.as_text()
    self.note(
      name,
      times[1:],
      moved,
      flops=flops,
      temp_mb=memory.temp_size_in_bytes / 1e6,
      kernels="radix sort of CUB" if radix else "",
    )
    return first

  def note(
    self, name: str, times: list[float], moved: float, **more: Any
  ) -> None:
    """Prints and keeps the times of an operation, in seconds."""
    seconds = float(np.median(times))
    row = {
      "name": name,
      "ms": 1e3 * seconds,
      "best_ms": 1e3 * min(times),
      "gb_per_s": 1e-9 * moved / seconds,
      **more,
    }
    self.found.append(row)
    line = f"{name:56} {row['ms']:9.4f} ms {row['gb_per_s']:7.0f} GB/s"
    if "temp_mb" in row:
      line += f" temp {row['temp_mb']:6.0f} MB {row['kernels']}"
    if row.get("flops"):
      line += f" {1e-12 * row['flops'] / seconds:.1f} TFLOP/s"
    print(line, flush=True)
