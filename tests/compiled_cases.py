"""Small runs over tables that are never created, compiled for a target.

  python tests/compiled_cases.py v5e:2x2 warm mixed

prints the reports of scripts/compiled_programs.py as JSON: {case: [report]}. In
a process of its own, with the environment of scripts/compile_targets.py: a
compiler for TPUs or GPUs would change what the tests' process does.
"""

import json
import sys

import compile_targets
import compiled_programs
import dense_reference as dense
import helpers
import optax

from recjax.embedding.embedding import make_embedding
from recjax.mesh import mesh_of
from recjax.plan.plan import Plan
from recjax.schema import Feature
from recjax.training.state import StepSpec

HOT, ROWS = 64, 4_000_000
TABLES = ("a", "b", "c")


def case_of(
  dim: int, optimizer: str, dtype: str = "float32", rows: int = ROWS
) -> dense.Case:
  """One group, of three tables."""
  part = dense.Part("g", TABLES, rows, dim, optimizer, dtype)
  return dense.Case((part,), tuple(Feature(x, x) for x in TABLES))


TWO = dense.Case(
  (
    dense.Part("wide", ("a", "b"), ROWS, 128, "adam"),
    dense.Part("row", ("c",), ROWS, 32, "rowwise_adagrad"),
  ),
  (Feature("a", "a", 2), Feature("c", "c", 3, "mean"), Feature("b", "b")),
)
# Hot rows, whose gradients are all-reduced unless all rows are hot; the case.
# Of "cold", three quarters of the rows are stored.
CASES = {
  "warm": (0, case_of(128, "adagrad")),
  "mixed": (HOT, case_of(128, "rowwise_adagrad")),
  "hot": (ROWS, case_of(128, "sgd")),
  "narrow": (HOT, case_of(32, "adam")),
  "two groups": (HOT, TWO),
  "dim 64": (0, case_of(64, "sgd")),
  "dim 256": (0, case_of(256, "sgd")),
  "cold": (HOT, case_of(128, "adagrad")),
  "bfloat16": (0, case_of(128, "sgd", "bfloat16")),
  # 2.56e9 numbers on each of four devices: more than int32 counts.
  "beyond int32": (0, case_of(128, "sgd", "bfloat16", 80_000_000)),
}


def setup_of(target: compile_targets.Target, name: str):
  """What the programs of a case are lowered from."""
  hot, case = CASES[name]
  stored = {"visitors": 512, "frozen": ROWS // 4} if name == "cold" else {}
  groups = tuple(
    helpers.make_group(
      target.devices,
      hot=hot,
      warm=(part.rows // 4 if stored else part.rows) - hot,
      capacity=8,
      hot_sync="all_gather" if hot == part.rows else "all_reduce",
      **part._asdict(),
      **stored,
    )
    for part in case.parts
  )
  plan = Plan(target.devices, dense.BATCH, groups)
  embedding = make_embedding(
    plan,
    case.features,
    {p.name: dense.OPTIMIZERS[p.optimizer]() for p in case.parts},
  )
  spec = StepSpec(dense.apply_of(case), embedding, optax.adagrad(0.1))
  mesh = mesh_of(compile_targets.devices(target))
  return compiled_programs.Setup(
    spec, mesh, dense.init_params(case), dense.DENSE
  )


def main(target: str, *names: str) -> None:
  """Prints what compiling these cases shows."""
  machine = compile_targets.parse(target, 4 if ":" not in target else 0)
  found = {
    name: list(compiled_programs.reports(setup_of(machine, name)))
    for name in names
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
