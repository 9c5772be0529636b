"""Config and prepared data -> a plan, and its page beside other placements."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from recjax import files, nodes
from recjax.config import Config
from recjax.data.prepared import Prepared
from recjax.errors import UserError
from recjax.models.cost import DenseCost
from recjax.plan.plan import MOST_ADDRESSES, Plan
from recjax.planner import (
  baselines,
  batch_sizes,
  describe,
  presets,
  solve,
  topology,
  workload,
)
from recjax.planner import report as report_lib
from recjax.planner import transport as transport_lib
from recjax.planner.memory_budgets import Budgets
from recjax.planner.problem import HOT_SYNCS, Problem
from recjax.planner.topology import Topology
from recjax.planner.traffic import StepShape
from recjax.planner.transport import FLAT, Transport
from recjax.planner.workload import Machine
from recjax.schema import TableGroup

ASSUMED_DENSE = 13  # numeric inputs of a Criteo log, where there is no data


def run(
  config: Config,
  prepared: Prepared | None,
  workdir: pathlib.Path,
  report: Callable[[str], None],
  *,
  groups: tuple[TableGroup, ...],
  slot_bytes: tuple[int, ...],
  dense: DenseCost,
  devices: int,
  hosts: int,
  kind: str = "cpu",
  device_limit: int | None = None,
  serving: bool = False,
) -> tuple[Plan, Callable[[], None]]:
  """Plans as configured; writes plan.json and plan.html.

  For serving: serving_plan.json and serving_plan.html, where it may.

  Args:
    config: what to plan for, and cuts to keep.
    prepared: counted data; None = data.rows and plan.exponent, whose tables
      are C1, C2, ...
    workdir: of the files.
    report: prints a text.
    groups: the tables that share a row space.
    slot_bytes: of a row's slot variables, a group.
    dense: what the dense part of the model costs.
    devices: n.
    hosts: machines they sit in, where no topology is named.
    kind: what JAX calls a device here.
    device_limit: its memory in bytes; None = CPU.
    serving: for the forward pass only, of rows without slot variables.

  Returns:
    (the plan, what draws the page again with what a run has measured by then).

  Raises:
    UserError: no budget that works, or no such topology.
  """
  c = config.plan
  if c.hot_sync and c.hot_sync not in HOT_SYNCS:
    raise UserError(
      f"plan.hot_sync: {c.hot_sync!r} cannot run yet; use "
      f"{' or '.join(HOT_SYNCS)}"
    )
  t, hosts = _topology(config, devices, hosts, kind)
  problems = workload.problems_of(
    config,
    prepared,
    groups,
    Machine(t, devices),
    slot_bytes=slot_bytes,
    dense=dense,
    train=not serving,
  )
  budgets = _budgets(config, problems, hosts, device_limit)
  assumed = [p.profile.assumed for p in problems if p.profile.assumed]
  for what in dict.fromkeys(assumed):
    report(what)
  plan = _solved(config, prepared, problems, groups, budgets)
  _check_addresses(plan)
  placed = baselines.compare(
    problems, plan, budgets.device_bytes, budgets.all_hosts
  )
  name = "serving_plan" if serving else "plan"

  def draw() -> None:
    measured = None if serving else measured_seconds(workdir, plan)
    page = report_lib.page(
      plan, problems, placed, budgets.device_bytes, measured
    )
    files.write(workdir / f"{name}.html", page)

  if not serving or os.access(workdir, os.W_OK):  # evaluating only reads
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(workdir / f"{name}.json", plan.to_json())
    draw()
  report(describe.describe(plan))
  _say_not_table_wise(config, plan, prepared, problems, report)
  report(baselines.describe(placed))
  if c.topology:
    others = _other_batches(plan, problems, groups, budgets)
    report(batch_sizes.describe(others))
  return plan, draw


def _check_addresses(plan: Plan) -> None:
  """Raises UserError where a group has more than int32 counts."""
  for g in plan.groups:
    if g.addresses > MOST_ADDRESSES:
      raise UserError(
        f"embedding: group {g.name} (tables {', '.join(g.tables)}) has "
        f"{g.rows:,} rows, {g.addresses:,} with the padding of shards; at most "
        f"{MOST_ADDRESSES:,} fit a group, whose ranks are int32: give some of "
        "the tables another dim or optimizer by embedding.rules, or raise "
        "data.min_count"
      )


def _solved(
  config: Config,
  prepared: Prepared | None,
  problems: Sequence[Problem],
  groups: Sequence[TableGroup],
  budgets: Budgets,
) -> Plan:
  """The plan of least cost that keeps what the config gives."""
  c = config.plan
  transports, table_wise = _choices(config, problems, prepared)
  given = max(c.hot_rows, c.warm_rows, c.cold_rows) >= 0
  return solve.solve(
    problems,
    groups,
    hosts=budgets.hosts,
    device_bytes=budgets.device_bytes,
    host_bytes=budgets.host_bytes,
    ssd_bytes=budgets.ssd_bytes,
    hot_rows=c.hot_rows,
    warm_rows=c.warm_rows,
    cold_rows=c.cold_rows,
    order=workload.order_of(prepared, groups) if given else None,
    capacity=c.capacity,
    hot_syncs=(c.hot_sync,) if c.hot_sync else HOT_SYNCS,
    transports=transports,
    table_wise=table_wise,
  )


def _say_not_table_wise(
  config: Config,
  plan: Plan,
  prepared: Prepared | None,
  problems: Sequence[Problem],
  report: Callable[[str], None],
) -> None:
  """Says which tables plan.table_wise names in vain, if any."""
  named = table_wise_tables(config.plan.table_wise, problems, prepared) or ()
  have = dict(describe.table_wise(plan))
  if others := [name for name in named if name not in have]:
    why = "a table without warm rows leaves an owner nothing to pool"
    if plan.devices == 1:
      why = "one device owns all tables"
    report(f"plan.table_wise: {', '.join(others)}: no effect, since {why}")


def _other_batches(
  plan: Plan,
  problems: Sequence[Problem],
  groups: Sequence[TableGroup],
  budgets: Budgets,
) -> dict[int, Plan]:
  """Plans for other batch sizes, with the same table-wise tables."""
  names = tuple(name for name, _ in describe.table_wise(plan))
  same: tuple[Transport, ...] = ()
  if len(groups) > 1:  # planning those takes a second a size, with all
    same = tuple({transport_lib.of_group(g): None for g in plan.groups})
  return batch_sizes.plans(problems, groups, names, same, budgets.ssd_bytes)


def _topology(
  config: Config, devices: int, hosts: int, kind: str
) -> tuple[Topology, int]:
  """The machines as configured, and how many hosts they are."""
  name, g = config.plan.topology, config.mesh.node_devices
  if name:
    t = presets.get(name, devices)
    hosts = t.hosts(devices)
  else:
    t = presets.of_device(kind, devices, hosts)
  if g:
    nodes.check_nodes(devices, g)
    t = dataclasses.replace(t, node_devices=g)
  return t, hosts


def _budgets(
  config: Config,
  problems: Sequence[Problem],
  hosts: int,
  device_limit: int | None,
) -> Budgets:
  """As configured; else what the topology, or this machine, leaves."""
  c = config.plan
  if c.ssd_memory_mb and not c.host_store_dir and not c.topology:
    raise UserError(
      f"plan.ssd_memory_mb: {c.ssd_memory_mb} MB of an SSD need "
      "plan.host_store_dir, a folder on it"
    )
  ssd = topology.ssd_budget(c.ssd_memory_mb, c.host_store_dir)
  device_mb, host_mb = c.device_memory_mb, c.host_memory_mb
  if c.topology:
    device, host = workload.budgets(problems)
    return Budgets(device_mb << 20 or device, host_mb << 20 or host, hosts, ssd)
  local = -(-problems[0].shape.devices // hosts)
  device, host = topology.memory_budgets(
    device_mb, host_mb, local, device_limit
  )
  return Budgets(device, host, hosts, ssd)


def _choices(
  config: Config, problems: Sequence[Problem], prepared: Prepared | None
) -> tuple[tuple[Transport, ...], tuple[str, ...] | None]:
  """The transports and the table-wise tables that the config leaves."""
  wanted = config.plan.table_wise
  found = transports(config, problems[0].shape)
  names = table_wise_tables(wanted, problems, prepared)
  if names and FLAT not in found:
    raise UserError(
      f"plan.table_wise: {wanted}: table-wise tables need the flat exchange of "
      "warm rows sharded over all devices; leave plan.exchange and "
      "plan.warm_copies empty, or plan.table_wise"
    )
  return found, names


def transports(config: Config, shape: StepShape) -> tuple[Transport, ...]:
  """The transports that the config leaves to choose from.

  Raises:
    UserError: it asks for one that needs several nodes, and there is one.
  """
  found = transport_lib.available(shape)
  for field in Transport._fields:
    wanted = getattr(config.plan, field)
    if wanted and wanted != getattr(FLAT, field):
      if shape.nodes == 1:
        raise UserError(
          f"plan.{field}: {wanted!r} needs several nodes, and the "
          f"{shape.devices} device(s) make one; set mesh.node_devices to a "
          "divisor of them"
        )
      found = transport_lib.TRANSPORTS
  return tuple(
    t
    for t in found
    if all(getattr(config.plan, f) in ("", getattr(t, f)) for f in t._fields)
  )


def table_wise_tables(
  wanted: str, problems: Sequence[Problem], prepared: Prepared | None
) -> tuple[str, ...] | None:
  """The tables that plan.table_wise names, by themselves or by a feature.

  Args:
    wanted: the field's value.
    problems: of all groups, which know their tables.
    prepared: whose features may be named.

  Returns:
    The tables' names; None where they are to be planned.

  Raises:
    UserError: there is no such table, or an owner cannot pool it.
  """
  if wanted in ("", "none"):
    return () if wanted else None
  tables = {t.name: t for p in problems for t in p.profile.tables}
  features = prepared.schema.features if prepared else ()
  table_of = {f.name: f.table for f in features} | {t: t for t in tables}
  found = []
  for name in map(str.strip, wanted.split(",")):
    if name not in table_of:
      raise UserError(
        f"plan.table_wise: there is no table or feature {name!r}; there are "
        f"{', '.join(table_of)}. Or use none"
      )
    if not tables[table_of[name]].bags:
      users = [f.name for f in features if f.table == table_of[name]]
      raise UserError(
        f"plan.table_wise: {name}: owners pool only sums and means without "
        f"weights, and not all features of table {table_of[name]} "
        f"({', '.join(users) or name}) are; leave it out"
      )
    found.append(table_of[name])
  return tuple(dict.fromkeys(found))


def measured_seconds(workdir: pathlib.Path, plan: Plan) -> float | None:
  """Seconds of a step: the median that an earlier run here logged."""
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    return None
  rates = []
  for line in path.read_bytes().splitlines():
    try:
      rates.append(float(files.parse_json(line)["samples_per_second"]))
    except (ValueError, KeyError, TypeError):  # cut off, or of the test split
      continue
  rates = [x for x in rates if 0 < x < np.inf]
  return plan.batch_size / float(np.median(rates)) if rates else None
