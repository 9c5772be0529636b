"""How fast rows in files of a folder are read at random; see calibrate.py.

  python scripts/calibrate_ssd.py FOLDER [--mb 2048]

A file is written, dropped from the page cache, mapped for reads at random, and
pages of it are copied, as embedding/host_store.py copies frozen rows: by eight
threads for the rate, by one, page after page, for the latency. Without
MADV_RANDOM the kernel reads ahead what nobody asks for: a quarter of the rate
on a virtual machine's disk, and forty times the latency.
"""

import argparse
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from recjax.planner.topology import PAGE_BYTES

THREADS = 8  # as many as the host store has
_BLOCK = 1 << 24
_PART = 32  # one page in so many is read
_IN_MEMORY = 10e9  # bytes/s: more at random than an SSD has


def measure(directory: str, mb: int = 2_048) -> dict[str, float]:
  """Measures a Topology's fields of SSDs; the file is gone afterwards.

  Args:
    directory: on the SSD.
    mb: of the file, in MiB.
  """
  rng = np.random.default_rng(0)
  pages = (mb << 20) // PAGE_BYTES
  with tempfile.TemporaryFile(dir=directory) as f:
    for _ in range(-(-pages * PAGE_BYTES // _BLOCK)):
      f.write(rng.bytes(_BLOCK))
    f.flush()
    order = rng.permutation(pages)[: pages // _PART]
    few = max(len(order) // 100, 1)
    latency = seconds(f, order[:few], 1) / few
    rate = len(order) * PAGE_BYTES / seconds(f, order, THREADS)
  note = ": from memory, not from an SSD?" if rate > _IN_MEMORY else ""
  print(f"{'SSD':16} {rate:.3g} B/s, a page {1e6 * latency:.3g} us{note}")
  return {"ssd_read": rate, "ssd_latency": latency}


def seconds(f, order: np.ndarray, threads: int) -> float:
  """Times copies of a file's pages that no cache holds."""
  os.fsync(f.fileno())
  os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  whole = mmap.mmap(f.fileno(), 0)
  whole.madvise(mmap.MADV_RANDOM)
  mapped = np.frombuffer(whole, f"V{PAGE_BYTES}")
  out = np.empty(len(order), mapped.dtype)
  parts = np.array_split(np.arange(len(order)), threads)
  copy = lambda at: np.take(mapped, order[at], out=out[at[0] : at[-1] + 1])
  with ThreadPoolExecutor(threads) as pool:
    begin = time.perf_counter()
    list(pool.map(copy, parts))
    return time.perf_counter() - begin


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder")
  parser.add_argument("--mb", type=int, default=2_048, help="of the file")
  args = parser.parse_args()
  measure(args.folder, args.mb)


if __name__ == "__main__":
  main()
