"""Milliseconds of the operations that a step's tables are made of.

  python scripts/bench_ops.py [--parts keys sums] [--json out.json]
  python scripts/bench_ops.py --rows 1000 --ids 100 --many 200 --stream 1000 \
      --matmul 64 --repeats 2   # a check on a CPU

Sorts, gathers, scatters and sums as recjax/embedding has them, beside other
ways to do the same, and what the device can do at best (a stream, a matrix
product, transfers). --ids keys, or --many, are drawn from a power law over the
table's rows; they name U distinct rows. GB/s count what an operation must read
and write at least.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import ops_of_keys
import ops_of_rows
from jax.sharding import SingleDeviceSharding
from timed_ops import TimedOps

from recjax import files


def ceilings(ops: TimedOps) -> None:
  """Times what the device can do at best."""
  n, m = ops.args.stream, ops.args.matmul
  x = jnp.arange(n, dtype=jnp.float32)
  ops.add("stream: x + 1", lambda x: x + 1, x, moved=8 * n)
  a = jax.random.normal(jax.random.key(0), (m, m), jnp.bfloat16)
  ops.add("matmul bfloat16", jnp.dot, a, a, flops=2 * m**3)
  a = a.astype(jnp.float32)
  ops.add("matmul float32, default precision", jnp.dot, a, a, flops=2 * m**3)


def transfers(ops: TimedOps) -> None:
  """Times transfers between the host's pinned memory and the device's."""
  n, device = ops.args.stream // 2, jax.devices()[0]
  pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
  kind = device.default_memory().kind
  here = SingleDeviceSharding(device, memory_kind=kind)
  floats = jnp.arange(n, dtype=jnp.float32)
  for name, x, to in (
    ("pinned host -> device", jax.device_put(floats, pinned), here),
    ("device -> pinned host", floats, pinned),
  ):
    times = []
    for _ in range(6):
      start = time.perf_counter()
      jax.block_until_ready(jax.device_put(x, to))
      times.append(time.perf_counter() - start)
    ops.note(name, times[1:], 4 * n)


PARTS = {
  "ceilings": ceilings,
  "keys": ops_of_keys.sorts,
  "coalescing": ops_of_keys.coalescing,
  "rows": ops_of_rows.rows_of_tables,
  "sums": ops_of_rows.sums,
  "bags": ops_of_rows.bags,
  "transfers": transfers,
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--rows", type=int, default=16_800_000, help="of the table")
  add("--ids", type=int, default=1_048_570)
  add("--many", type=int, default=14_024_704, help="keys of the larger sorts")
  add("--dim", type=int, default=128)
  add("--exponent", type=float, default=1.05)
  add("--repeats", type=int, default=20)
  add("--stream", type=int, default=1 << 28, help="floats of a stream")
  add("--matmul", type=int, default=8_192, help="width of a product")
  add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  add("--json", help="file to write")
  args = parser.parse_args()
  device = jax.devices()[0].device_kind
  print(f"{device}, jax {jax.__version__}, {vars(args)}", flush=True)
  ops = TimedOps(args)
  for name in args.parts:
    PARTS[name](ops)
    if args.json:
      found = {"device": device, "jax": jax.__version__, "args": vars(args)}
      found["operations"] = ops.found
      files.write(args.json, json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
