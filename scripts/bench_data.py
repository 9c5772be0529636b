"""Rows/s of preparing Criteo logs and samples/s of reading the result.

    python scripts/bench_data.py [--samples 1000000] [--log FILE] [--repeats 3]

Without --log it writes a synthetic one first. Targets on two cores: prepare
100,000 rows/s, read 1,000,000 samples/s.
"""

import argparse
import os
import tempfile
import time

import machine

from recjax.config import Config, Data, Synthetic
from recjax.data import batches, prepare, synthetic


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--samples", type=int, default=1_000_000)
  parser.add_argument("--log", default="", help="a Criteo log, or a glob")
  parser.add_argument("--batch_size", type=int, default=2_048)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  print(f"machine: {machine.cpu()}, {len(os.sched_getaffinity(0))} cores")

  with tempfile.TemporaryDirectory() as tmp:
    log = args.log
    if not log:
      data = Data(synthetic=Synthetic(samples=args.samples))
      start = time.perf_counter()
      synthetic.write(data, os.path.join(tmp, "logs"), lambda _: None)
      _print("write", args.samples, time.perf_counter() - start)
      log = os.path.join(tmp, "logs", "*.tsv")
    for i in range(args.repeats):
      config = Config(data=Data(train=log))
      start = time.perf_counter()
      prepared = prepare.prepare(
        config, os.path.join(tmp, f"prepared{i}"), lambda _: None
      )
      rows = sum(prepared.samples.values())
      _print("prepare", rows, time.perf_counter() - start)
    epochs = max(1, 3_000_000 // prepared.samples["train"])
    for _ in range(args.repeats):
      start = time.perf_counter()
      samples = sum(
        len(batch["label"])
        for batch in batches.dataset(
          prepared, "train", args.batch_size, epochs=epochs
        )
      )
      _print("read", samples, time.perf_counter() - start)


def _print(what: str, rows: int, seconds: float) -> None:
  print(
    f"{what:8} {rows:>11,} rows {seconds:7.2f} s {rows / seconds:>11,.0f}/s"
  )


if __name__ == "__main__":
  main()
