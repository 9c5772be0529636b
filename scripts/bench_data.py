"""Rows/s of preparing logs in each format, samples/s of reading the result.

    python scripts/bench_data.py [--samples 1000000] [--log FILE] [--repeats 3]

Without --log it writes a synthetic one first: 40 columns. The same samples as
CSV, Parquet and JSON lines are prepared in turn with it, by a schema. Targets
on two cores: prepare 100,000 rows/s (CSV and Parquet 150,000), read 1,000,000
samples/s.
"""

import argparse
import json
import os
import tempfile
import time

import machine
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from recjax.config import Config, Data, Synthetic
from recjax.data import batches, criteo, log_files, prepare, synthetic
from recjax.log_schema import Id, Number, Schema


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
    configs = {"criteo": Config(data=Data(train=log)), **others(log, tmp)}
    for i in range(args.repeats):
      for name, config in reversed(configs.items()):
        start = time.perf_counter()
        prepared = prepare.prepare(
          config, os.path.join(tmp, f"{name}{i}"), lambda _: None
        )
        rows = sum(prepared.samples.values())
        _print(f"prepare {name}", rows, time.perf_counter() - start)
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


def others(log: str, folder: str) -> dict[str, Config]:
  """Writes a Criteo log in the formats whose columns have names."""
  numbers, ids = criteo.DENSE, criteo.CATEGORIES
  read = pa.csv.ReadOptions(column_names=["label", *numbers, *ids])
  parse = pa.csv.ParseOptions(delimiter="\t", quote_char=False)
  text = pa.csv.ConvertOptions(
    column_types=dict.fromkeys(ids, pa.string()), strings_can_be_null=True
  )
  paths = log_files.find(log, "--log")
  table = pa.concat_tables(pa.csv.read_csv(p, read, parse, text) for p in paths)
  formats = "csv", "jsonl", "parquet"
  at = {f: os.path.join(folder, f"log.{f}") for f in formats}
  plain = pa.csv.WriteOptions(quoting_style="none")
  pa.csv.write_csv(table, at["csv"], plain)
  pq.write_table(table, at["parquet"])
  with open(at["jsonl"], "w") as f:
    for batch in table.to_batches(1 << 16):
      f.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
  schema = Schema(
    labels=("label",),
    numbers=tuple(Number(n, transform="log1p") for n in numbers),
    features=tuple(Id(n) for n in ids),
  )
  return {
    f: Config(data=Data(format=f, train=path), schema=schema)
    for f, path in at.items()
  }


def _print(what: str, rows: int, seconds: float) -> None:
  print(
    f"{what:16} {rows:>11,} rows {seconds:7.2f} s {rows / seconds:>11,.0f}/s"
  )


if __name__ == "__main__":
  main()
