"""Compiles a run's programs and says what is wrong with them.

What compile_for.py prints, and what tests assert of accelerators that are not
there: tables are updated in place, and nothing but the tables grows with them.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from recjax.errors import UserError
from recjax.plan.plan import Group, Plan
from recjax.planner import compiled_collectives
from recjax.training import compiled as compiled_lib
from recjax.training import programs as programs_lib
from recjax.training.programs import Program
from recjax.training.state import StepSpec

MB = 1e6
HOST_TEMP = 64 * MB  # that a program may need of the host
_SMALL = 1 * MB  # arrays below may have a dense parameter's shape
_FEWER = 8  # times as few sharded rows, to see what grows
_GROWTH = 0.01  # of the tables' own: padding, and what rounds up


class Setup(NamedTuple):
  """What the programs of a run are lowered from."""

  spec: StepSpec
  mesh: Mesh
  params: Any  # of the dense part, arrays or shapes
  inputs: int  # D, dense inputs of a sample


def reports(setup: Setup, growth: bool = True) -> Iterator[dict[str, Any]]:
  """Compiles all programs, and yields the report of each as JSON has it.

  Args:
    setup: of the run.
    growth: compiles the train step again with fewer rows.
  """
  for program in programs_lib.lower_all(*setup):
    found = report(program, setup.spec.embedding.plan)
    if growth and program.name == programs_lib.TRAIN:
      found["growth"] = _growth(setup, found)
    yield found


def report(program: Program, plan: Plan) -> dict[str, Any]:
  """Compiles a program; returns what it holds, copies, launches and sends.

  Raises:
    UserError: it does not fit the device's memory.
  """
  begin = time.perf_counter()
  try:
    compiled = program.lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    said = str(e).splitlines()[0]
    raise UserError(f"{program.name} does not fit: {said}") from None
  seconds = time.perf_counter() - begin
  text, memory = compiled.as_text(), compiled_lib.memory(compiled)
  arrays = jax.tree.leaves(program.tables)
  large = {
    compiled_lib.shard_shape(x)
    for x in arrays
    if compiled_lib.shard_bytes(x) >= _SMALL
  }
  launches = compiled_lib.launches(text)
  aliased = compiled_lib.aliased_arguments(text)
  return {
    "program": program.name,
    "compile_seconds": seconds,
    "memory": memory._asdict() | {"total": memory.total},
    "tables": sum(map(compiled_lib.shard_bytes, arrays)),
    "in_place": len(program.in_place),
    "not_aliased": [x for x in program.in_place if x not in aliased],
    "copies": compiled_lib.copies(text, large),
    "kernels": launches.once,
    "kernels_repeated": launches.repeated,
    "collectives": _collectives(text, plan),
  }


def _collectives(text: str, plan: Plan) -> list[dict[str, Any]]:
  """The collectives by kind and scope: how many, and what a device sends."""
  found: dict[tuple[str, str, bool], dict[str, Any]] = {}
  for c in compiled_collectives.of_step(text, plan.devices):
    key = c.kind, compiled_lib.scope_of(c.scope), c.repeated
    one = found.setdefault(
      key,
      dict(zip(("kind", "scope", "repeated"), key, strict=True))
      | {"count": 0, "sent": 0.0},
    )
    one["count"] += 1
    one["sent"] += c.sent(plan.devices)
  return list(found.values())


# ---- What grows


def _growth(setup: Setup, large: dict[str, Any]) -> dict[str, float]:
  """Compiles the train step with fewer rows and the same buffers.

  Returns:
    {"tables": bytes of a device's tables less those of fewer rows, "temp",
    "host_temp": the same of temporary memory}.
  """
  embedding = setup.spec.embedding
  plan = fewer_rows(embedding.plan, _FEWER)
  groups = tuple(
    g._replace(group=group)
    for g, group in zip(embedding.groups, plan.groups, strict=True)
  )
  smaller = embedding._replace(plan=plan, groups=groups)
  spec = setup.spec._replace(embedding=smaller)
  small = report(programs_lib.train_step(spec, *setup[1:]), plan)
  differ = lambda key: large["memory"][key] - small["memory"][key]
  return {
    "tables": large["tables"] - small["tables"],
    "temp": differ("temp"),
    "host_temp": differ("host_temp"),
  }


def fewer_rows(plan: Plan, times: int) -> Plan:
  """The plan with so many times fewer rows, where buffers don't need them.

  Replicas whose gradients are all-reduced keep theirs: the sum is as large.
  """
  groups = (_fewer_rows(g, times) for g in plan.groups)
  return dataclasses.replace(plan, groups=tuple(groups))


def _fewer_rows(group: Group, times: int) -> Group:
  first, tiers = 0, []
  for t in group.tiers:
    if t.axes or group.hot_sync == "all_gather":
      least = max(t.capacity, t.node_capacity, 1)
      shard = min(t.shard_rows, max(t.shard_rows // times, least))
      rows = min(t.rows, shard * t.owners)
      t = dataclasses.replace(t, rows=rows, shard_rows=shard)
    tiers.append(dataclasses.replace(t, first=first))
    first += t.rows
  return dataclasses.replace(group, tiers=tuple(tiers))


# ---- What is wrong


def broken(found: dict[str, Any], device_memory: float) -> list[str]:
  """Returns the invariants that a report shows broken, each in a line.

  Args:
    found: a report.
    device_memory: bytes that a device has.
  """
  name, memory = found["program"], found["memory"]
  lines = []
  if memory["total"] > device_memory:
    lines.append(
      f"{name}: {memory['total'] / MB:,.0f} MB of a device, which has "
      f"{device_memory / MB:,.0f}"
    )
  if found["not_aliased"]:
    arguments = ", ".join(map(str, found["not_aliased"]))
    lines.append(
      f"{name}: argument(s) {arguments} are tables and not updated in place"
    )
  for what in found["copies"]:
    lines.append(f"{name}: a table is copied by {what}")
  if memory["host_temp"] > HOST_TEMP:
    lines.append(
      f"{name}: {memory['host_temp'] / MB:,.0f} MB of temporary host memory, "
      f"at most {HOST_TEMP / MB:,.0f} expected"
    )
  grown = found.get("growth")
  if grown:
    most = max(_GROWTH * grown["tables"], _SMALL)
    for key, where in (("temp", "device"), ("host_temp", "host")):
      if grown[key] > most:
        lines.append(
          f"{name}: {grown[key] / MB:,.1f} MB more of temporary {where} memory "
          f"for {grown['tables'] / MB:,.1f} MB more of tables"
        )
  return lines
