"""Predicted memory of a device against the compiler's, for whole train steps.

  python scripts/bench_memory.py [--target h100 v5e:2x4] [--only mlperf]

Needs what compile_for.py needs, and no accelerator. A setting is a model, its
tables and its optimizer, on 8 devices. Of each are printed, in MB of a device:

  tables     rows and slot variables; the plan and the compiler agree
  beyond     everything else as compiled, and its ratio to the predicted
  all        the predicted total over the compiled one

and at the end the worst of both ratios.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import compile_targets
from criteo_tables import MULTI_HOT, terabyte_config
from machine import about

from recjax import files
from recjax.config import Config, TableRule

MB = 1e6
GPUS = 8  # where the target is a GPU


@dataclasses.dataclass(frozen=True)
class Setting:
  """Criteo's 26 tables, their rows capped, and what trains on them."""

  name: str
  dim: int
  optimizer: str
  batch: int
  cap: int  # rows of a table at most
  hot: float = 0.0  # share of all rows
  small_dim: int = 0  # of tables below 10,000 rows; 0 = dim
  multi_hot: bool = False
  model: str = "dlrm"

  def config(self) -> Config:
    """The run's config, without cold rows."""
    c = terabyte_config()
    c.data.rows = tuple(min(r, self.cap) for r in c.data.rows)
    c.data.hotness = MULTI_HOT if self.multi_hot else ()
    c.embedding.dim, c.embedding.optimizer = self.dim, self.optimizer
    if self.small_dim:
      rule = TableRule(below_rows=10_000, dim=self.small_dim)
      c.embedding.rules = (rule,)
    c.train.batch_size = self.batch
    if self.model != "dcnv2":
      c.model.name, c.model.compute_dtype = "dlrm", "float32"
      c.model.bottom, c.model.top = (512, 256, 64), (512, 256)
    c.plan.hot_rows = int(self.hot * sum(c.data.rows))
    c.plan.warm_rows = sum(c.data.rows) - c.plan.hot_rows
    c.plan.device_memory_mb = 1 << 20  # whatever it takes: nothing is allocated
    c.plan.table_wise = "none"
    return c


SETTINGS = (
  Setting("narrow", 16, "rowwise_adagrad", 4_096, 2_000_000),
  Setting("narrow, hot", 16, "adagrad", 65_536, 500_000, hot=1.0),
  Setting("mixed", 32, "adam", 16_384, 2_000_000, hot=0.05),
  Setting("wider", 64, "sgd", 32_768, 1_000_000),
  Setting("wider, hot", 128, "rowwise_adagrad", 8_192, 300_000, hot=1.0),
  Setting("lane", 128, "sgd", 4_096, 500_000),
  Setting("lane, mixed", 128, "adam", 16_384, 300_000, hot=0.1),
  Setting("lane, multi-hot", 128, "adagrad", 8_192, 500_000, multi_hot=True),
  Setting("wide", 256, "adagrad", 4_096, 300_000, hot=0.01),
  Setting("groups", 128, "adagrad", 16_384, 1_000_000, small_dim=32),
  Setting("groups, mixed", 64, "adam", 65_536, 300_000, hot=0.1, small_dim=16),
  Setting("mlperf", 128, "adagrad", 65_536, 2_000_000, model="dcnv2"),
  Setting(
    "mlperf, multi-hot", 128, "adagrad", 65_536, 2_000_000,
    multi_hot=True, model="dcnv2",
  ),
  Setting(
    "mlperf, small batch", 128, "adagrad", 8_192, 2_000_000, hot=0.01,
    model="dcnv2",
  ),
)  # fmt: skip


def measure(
  targets: list[str], settings: list[Setting]
) -> Iterator[dict[str, Any]]:
  """Compiles every setting's train step for every target."""
  import compile_for
  import compiled_programs

  from recjax.training import programs

  for name in targets:
    target = compile_targets.parse(name, GPUS if ":" not in name else 0)
    for setting in settings:
      plan, setup = compile_for.set_up(
        setting.config(), pathlib.Path("nowhere"), target
      )
      found = compiled_programs.report(programs.train_step(*setup), plan)
      predicted = dict(plan.prediction.memory)
      tables = sum(
        predicted[k] for k in ("replicas", "tables", "slot variables")
      )
      total = found["memory"]["total"]
      yield {
        "target": name,
        "setting": dataclasses.asdict(setting),
        "predicted": predicted,
        "memory": found["memory"],
        "tables": tables,
        "beyond": total - found["tables"],
        "beyond_predicted": sum(predicted.values()) - tables,
        "ratio": sum(predicted.values()) / total,
        "copies": len(found["copies"]),
        "compile_seconds": found["compile_seconds"],
      }


HEADER = (
  f"{'target':9} {'setting':20} {'dim':>4} {'optimizer':15} {'batch':>6} "
  f"{'hot':>4} {'tables':>8} {'beyond':>8} {'predicted':>9} {'ratio':>6} "
  f"{'all':>6}"
)


def line(x: dict[str, Any]) -> str:
  """Returns a setting's line of the table."""
  s = x["setting"]
  dim = f"{s['small_dim']}+" if s["small_dim"] else ""
  return (
    f"{x['target']:9} {s['name']:20} {dim + str(s['dim']):>4} "
    f"{s['optimizer']:15} {s['batch']:>6} {s['hot']:>4.0%} "
    f"{x['tables'] / MB:>8,.0f} {x['beyond'] / MB:>8,.1f} "
    f"{x['beyond_predicted'] / MB:>9,.1f} "
    f"{x['beyond_predicted'] / x['beyond']:>6.2f} {x['ratio']:>6.3f}"
    + (f"  ({x['copies']} copies of tables)" if x["copies"] else "")
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", nargs="+", default=["h100", "v5e:2x4"])
  parser.add_argument("--only", nargs="+", help="settings whose names hold it")
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args()
  settings = [
    s
    for s in SETTINGS
    if not args.only or any(name in s.name for name in args.only)
  ]
  compile_targets.prepare()
  import jax

  print(f"jax {jax.__version__}; MB of a device\n{HEADER}", flush=True)
  found = []
  for x in measure(args.target, settings):
    found.append(x)
    print(line(x), flush=True)
  away = lambda ratio: max(ratio, 1 / ratio)
  beyond = [x["beyond_predicted"] / x["beyond"] for x in found]
  total = [x["ratio"] for x in found]
  print(
    f"worst: {max(total, key=away):.3f} of the whole, "
    f"{max(beyond, key=away):.2f} of what is not tables"
  )
  if args.json:
    what = {"jax": jax.__version__, **about(), "steps": found}
    files.write(args.json, json.dumps(what, indent=1))


if __name__ == "__main__":
  main()
