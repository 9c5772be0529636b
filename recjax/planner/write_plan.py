"""Config and prepared data -> a plan, and its page beside other placements."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from recjax import config as config_lib
from recjax.config import Config
from recjax.data import prepare
from recjax.data.blocks import Blocks
from recjax.data.prepare import Prepared
from recjax.errors import UserError
from recjax.plan.plan import Plan, describe
from recjax.planner import (
  baselines,
  cut_points,
  frequency_buckets,
  presets,
  step_cost,
  topology,
)
from recjax.planner import report as report_lib
from recjax.planner import solve as solve_lib
from recjax.planner.cut_points import Problem, Transport
from recjax.planner.frequency_buckets import Spectrum, Table
from recjax.planner.topology import Topology

_CRITEO_DENSE = 13  # numeric inputs of a Criteo log
_SAMPLED = 16  # blocks that correlation is measured on
_TABLE_SHARE = 0.9  # of a memory that a topology names, after the step's


def run(
  config: Config,
  prepared: Prepared | None,
  workdir: pathlib.Path,
  report: Callable[[str], None],
  *,
  devices: int,
  hosts: int,
  kind: str = "cpu",
  device_limit: int | None = None,
  slot_bytes: int,
  serving: bool = False,
) -> tuple[Plan, Callable[[], None]]:
  """Plans as configured; writes plan.json and plan.html.

  For serving: serving_plan.json and serving_plan.html. Returns the plan, and
  what draws the page again, with what a run has measured by then.

  Args:
    prepared: counted data; None = data.rows and plan.exponent.
    devices: n; hosts: machines they sit in, where no topology is named.
    kind: what JAX calls a device here; device_limit: its memory, None = CPU.
    slot_bytes: of a row.
    serving: for the forward pass only, of rows without slots.

  Raises:
    UserError: no budget that works, or no such topology.
  """
  c = config.plan
  if c.hot_sync and c.hot_sync not in cut_points.HOT_SYNCS:
    raise UserError(
      f"plan.hot_sync: {c.hot_sync!r} cannot run yet; use "
      f"{' or '.join(cut_points.HOT_SYNCS)}"
    )
  if c.topology:
    t = presets.get(c.topology, devices)
    hosts = t.hosts(devices)
  else:
    t = presets.of_device(kind, devices, hosts)
  if config.mesh.node_devices:
    config_lib.check_nodes(devices, config.mesh.node_devices)
    t = dataclasses.replace(t, node_devices=config.mesh.node_devices)
  problem = problem_of(config, prepared, t, devices, slot_bytes, not serving)
  if c.topology:
    device_bytes, host_bytes = budgets(problem)
    device_bytes = c.device_memory_mb << 20 or device_bytes
    host_bytes = c.host_memory_mb << 20 or host_bytes
  else:
    device_bytes, host_bytes = topology.memory_budgets(
      c.device_memory_mb, c.host_memory_mb, -(-devices // hosts), device_limit
    )
  if problem.spectrum.assumed:
    report(problem.spectrum.assumed)
  ways = transports(config, problem)
  pooled = pooled_tables(c.pooled, problem, prepared)
  if pooled and cut_points.FLAT not in ways:
    raise UserError(
      f"plan.pooled: {c.pooled}: pooled tables need the flat exchange of warm "
      "rows sharded over all devices; leave plan.exchange and "
      "plan.warm_copies empty, or plan.pooled"
    )
  result = solve_lib.solve(
    problem,
    hosts=hosts,
    device_bytes=device_bytes,
    host_bytes=host_bytes,
    hot_rows=c.hot_rows,
    warm_rows=c.warm_rows,
    capacity=c.capacity,
    syncs=(c.hot_sync,) if c.hot_sync else cut_points.HOT_SYNCS,
    ways=ways,
    pooled=pooled,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  placed = baselines.compare(problem, result, device_bytes, hosts * host_bytes)
  name = "serving_plan" if serving else "plan"

  def draw():
    measured = None if serving else measured_seconds(workdir, result)
    page = report_lib.page(result, problem, placed, device_bytes, measured)
    write(workdir / f"{name}.html", page)

  write(workdir / f"{name}.json", result.to_json())
  draw()
  report(describe(result))
  report(baselines.describe(placed))
  if c.topology:
    pooled = tuple(name for name, _ in result.pooled)
    report(describe_batches(batch_sizes(problem, pooled)))
  return result, draw


def transports(config: Config, problem: Problem) -> tuple[Transport, ...]:
  """Those that the config leaves to choose from.

  Raises:
    UserError: it asks for one that needs several nodes, and there is one.
  """
  ways = cut_points.transports(problem.work)
  for field in Transport._fields:
    wanted = getattr(config.plan, field)
    if wanted and wanted != getattr(cut_points.FLAT, field):
      if problem.work.nodes == 1:
        raise UserError(
          f"plan.{field}: {wanted!r} needs several nodes, and the "
          f"{problem.work.devices} device(s) make one; set mesh.node_devices "
          "to a divisor of them"
        )
      ways = cut_points.TRANSPORTS
  return tuple(
    way
    for way in ways
    if all(
      getattr(config.plan, f) in ("", getattr(way, f)) for f in way._fields
    )
  )


def measured_seconds(workdir: pathlib.Path, plan: Plan) -> float | None:
  """Of a step: the median that an earlier run of this workdir logged."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return None
  rates = []
  for line in path.read_text().splitlines():
    try:
      rates.append(json.loads(line)["samples_per_second"])
    except (ValueError, KeyError):  # cut off, or of the test split
      continue
  return plan.batch_size / float(np.median(rates)) if rates else None


def write(path: pathlib.Path, text: str) -> None:
  part = path.with_name(path.name + ".part")
  part.write_text(text)
  part.rename(path)


def pooled_tables(
  wanted: str, problem: Problem, prepared: Prepared | None
) -> tuple[str, ...] | None:
  """The tables that plan.pooled names by themselves or a feature; None = any.

  Raises:
    UserError: there is no such table, or an owner cannot pool it.
  """
  if wanted in ("", "none"):
    return () if wanted else None
  tables = {t.name: t for t in problem.spectrum.tables}
  features = prepared.schema.features if prepared else ()
  table_of = {f.name: f.table for f in features} | {t: t for t in tables}
  found = []
  for name in map(str.strip, wanted.split(",")):
    if name not in table_of:
      raise UserError(
        f"plan.pooled: there is no table or feature {name!r}; there are "
        f"{', '.join(table_of)}. Or use none"
      )
    if not tables[table_of[name]].bags:
      users = [f.name for f in features if f.table == table_of[name]]
      raise UserError(
        f"plan.pooled: {name}: owners pool only sums and means without "
        f"weights, and not all features of table {table_of[name]} "
        f"({', '.join(users) or name}) are; leave it out"
      )
    found.append(table_of[name])
  return tuple(dict.fromkeys(found))


def problem_of(
  config: Config,
  prepared: Prepared | None,
  t: Topology,
  devices: int,
  slot_bytes: int,
  train: bool = True,
) -> Problem:
  """What is to be planned, from the config and what was counted."""
  e, m = config.embedding, config.model
  if prepared is None:
    hotness = config.data.hotness or (1,) * len(config.data.rows)
    if len(hotness) != len(config.data.rows):
      raise UserError(
        f"data.hotness: {len(hotness)} numbers for the "
        f"{len(config.data.rows)} tables of data.rows"
      )
    bags = int(not config.data.weighted)
    tables = tuple(
      Table(f"C{i + 1}", *x, bags)
      for i, x in enumerate(zip(config.data.rows, hotness, strict=True))
    )
    s = frequency_buckets.power_law(tables, config.plan.exponent)
    columns, inputs, activations = sum(hotness), _CRITEO_DENSE, len(tables)
  else:
    schema = prepared.schema
    columns, inputs = schema.columns, len(schema.dense)
    activations = sum(f.activations for f in schema.features)
    users = [
      [f for f in schema.features if f.table == name]
      for name in prepared.profile.tables
    ]
    hotness = tuple(sum(f.hotness for f in of) for of in users)
    plain = lambda f: f.pooling != "none" and not f.weighted
    bags = tuple(len(of) if all(map(plain, of)) else 0 for of in users)
    s = frequency_buckets.of_profile(prepared.profile, hotness, bags=bags)
    local = max(config.train.batch_size // devices, 1)
    s = dataclasses.replace(s, measured=measure(prepared, s, local))
  return solve_lib.make_problem(
    s,
    devices=devices,
    batch_size=config.train.batch_size,
    lookups=columns,
    dim=e.dim,
    dtype=e.dtype,
    slot_bytes=slot_bytes,
    overflow_probability=config.plan.overflow_probability,
    topology=t,
    exchange_dtype=e.exchange_dtype,
    dense=step_cost.dense_model(
      m.name,
      m.bottom,
      m.top,
      inputs,
      activations,
      e.dim,
      m.cross_layers,
      m.cross_rank,
    ),
    compute_dtype=m.compute_dtype,
    objective=config.plan.objective,
    train=train,
  )


def measure(
  prepared: Prepared, s: Spectrum, local: int
) -> frequency_buckets.Measured | None:
  """Distinct rows of batches as training draws them: from shuffled blocks.

  Of sizes b / 4, b and 4 b, as far as the samples read reach.
  """
  blocks = Blocks(
    os.path.join(prepared.directory, prepare.BLOCKS),
    "train",
    prepared.samples["train"],
    prepared.settings["data.block_samples"],
  )
  rng = np.random.default_rng(0)
  chosen = rng.permutation(len(blocks.sizes))[:_SAMPLED]
  ids = blocks[np.sort(chosen)]["ids"]
  ids = ids[rng.permutation(len(ids))]
  sizes = {max(local // 4, 1), local, 4 * local}
  batches = {
    size: [
      ids[i * size : (i + 1) * size] for i in range(min(8, len(ids) // size))
    ]
    for size in sizes
    if size <= len(ids)
  }
  return frequency_buckets.measure(s, batches) if batches else None


def budgets(problem: Problem) -> tuple[int, int]:
  """Bytes for tables and slots of a (device, host) that a topology describes.

  What a step needs beside them, with all rows exchanged, is taken off first.
  """
  t, work = problem.topology, problem.work
  buffers = float(problem.buffers(0, problem.spectrum.rows))
  step = sum(step_cost.device_bytes(work, 0, 0, buffers).values())
  device = max(_TABLE_SHARE * t.device_memory - step, 0)
  return int(device), int(_TABLE_SHARE * t.host_memory)


def batch_sizes(
  problem: Problem, pooled: tuple[str, ...] = ()
) -> dict[int, Plan]:
  """Global batch size -> plan: powers of two times n, as far as they fit.

  `pooled` are the tables that owners pool at every size. Activations and
  buffers of larger batches leave less for tables.
  """
  n, t = problem.work.devices, problem.topology
  plans = {}
  for power in range(4, 24):
    size = n * -(-(1 << power) // n)
    work = dataclasses.replace(problem.work, batch_size=size)
    of_size = dataclasses.replace(problem, work=work)
    device, host = budgets(of_size)
    try:
      plans[size] = solve_lib.solve(
        of_size,
        hosts=t.hosts(n),
        device_bytes=device,
        host_bytes=host,
        pooled=pooled,
      )
    except UserError:
      continue
  return plans


def describe_batches(plans: dict[int, Plan]) -> str:
  """The fastest batch size and its neighbours, to print."""
  if not plans:
    return "no batch size fits"
  rate = {b: b / p.step_seconds for b, p in plans.items()}
  best = max(rate, key=lambda b: rate[b])
  enough = min(b for b in rate if rate[b] >= 0.9 * rate[best])
  return (
    f"most samples/s: {rate[best]:,.0f} with batches of {best:,}; 90% of it "
    f"from {enough:,} on ({rate[enough]:,.0f})"
  )
