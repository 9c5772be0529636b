"""Profiles, budgets and topology -> Plan: where rows live, at what cost."""

import dataclasses
from collections.abc import Sequence

from recjax.plan.plan import Plan
from recjax.planner import (
  choose_tables,
  common_order,
  joint_cuts,
  make_plan,
  memory_budgets,
)
from recjax.planner import transport as transport_lib
from recjax.planner.common_order import CommonOrder
from recjax.planner.make_plan import Placed
from recjax.planner.memory_budgets import Budgets, Given
from recjax.planner.problem import (
  HOT_SYNCS,
  Problem,
  joint_cost,
  joint_paths,
)
from recjax.planner.stored_rows import Room
from recjax.planner.transport import FLAT, Transport
from recjax.schema import TableGroup


def solve(
  problems: Sequence[Problem],
  groups: Sequence[TableGroup],
  *,
  hosts: int,
  device_bytes: int,
  host_bytes: int,
  ssd_bytes: int = 0,
  hot_rows: int = -1,
  warm_rows: int = -1,
  cold_rows: int = -1,
  order: CommonOrder | None = None,
  capacity: int = 0,
  hot_syncs: tuple[str, ...] = HOT_SYNCS,
  transports: tuple[Transport, ...] = (),
  table_wise: tuple[str, ...] | None = None,
) -> Plan:
  """Chooses the cut points and the capacities of all groups.

  Args:
    problems: what is to be planned, a group each: with the same devices,
      batch, topology and objective, the dense part in the first.
    groups: the problems' tables.
    hosts: machines that the devices sit in.
    device_bytes: budget of a device for tables and slot variables.
    host_bytes: budget of a host for the same.
    ssd_bytes: budget of a host's SSDs for the same; 0 = none.
    hot_rows, warm_rows, cold_rows: the cuts, where >= 0, in rows of all groups
      together.
    order: of the rows of all groups, which given cuts refer to; None = by the
      problems' profiles.
    capacity: of every buffer, where > 0.
    hot_syncs: how hot gradients may meet, to choose from.
    transports: how sharded rows may travel; none = all that the mesh has.
    table_wise: tables that their owners pool; None = as it is best.

  Raises:
    UserError: the rows do not fit.
  """
  shape = problems[0].shape
  transports = transports or transport_lib.available(shape)
  order = order or common_order.of_buckets([p.profile for p in problems])
  given = Given(order, hot_rows, warm_rows, cold_rows)
  of_all = Budgets(device_bytes, host_bytes, hosts, ssd_bytes)
  problems = [_shared_overflow(p, len(problems)) for p in problems]
  most_owners = max(transports, key=lambda x: x.warm_owners(shape))
  fitting = memory_budgets.check(problems, of_all, given, most_owners)

  def cuts_by(transports: tuple[Transport, ...]) -> list[Placed]:
    found = joint_cuts.best_cuts(
      problems,
      of_all,
      given,
      fitting=fitting,
      hot_syncs=hot_syncs,
      transports=transports,
    )
    return [Placed(p, c) for p, c in zip(problems, found, strict=True)]

  best = cuts_by(transports)
  wanted = table_wise or any(map(choose_tables.candidates, problems))
  if FLAT in transports and wanted and table_wise != ():
    flat = best
    if any(x.cuts.transport != FLAT for x in best):
      flat = cuts_by((FLAT,))
    pooled = _with_table_wise(flat, of_all, given, table_wise)
    cheaper = table_wise is not None or _cost(pooled) < _cost(best)
    if cheaper and any(x.choice for x in pooled):
      best = pooled
  return make_plan.plan(best, groups, capacity)


def _shared_overflow(problem: Problem, groups: int) -> Problem:
  """The problem with its part of the chance that any buffer overflows."""
  if problem.overflow_probability is None or groups == 1:
    return problem
  part = problem.overflow_probability / groups
  return dataclasses.replace(problem, overflow_probability=part)


def _with_table_wise(
  flat: list[Placed],
  of_all: Budgets,
  given: Given,
  table_wise: tuple[str, ...] | None,
) -> list[Placed]:
  """The cuts of the flat exchange, with table-wise tables in each group.

  One group after the other takes the memory that the others leave.
  """
  placed = list(flat)
  for i, (problem, cuts, _) in enumerate(flat):
    names = [t.name for t in problem.profile.tables]
    tables = None
    if table_wise is not None:
      tables = tuple(names.index(x) for x in table_wise if x in names)
    others = [x for k, x in enumerate(placed) if k != i]
    size = problem.shape.stored_bytes
    device = of_all.device_bytes - sum(x.device_bytes for x in others)
    host = of_all.all_hosts - sum(x.host_bytes for x in others)
    ssd = of_all.all_ssds - sum(x.ssd_bytes for x in others)
    cold = given.cold_rows
    if others and cold >= 0:
      cold = int(cuts.cold_rows)
    room = Room(host // size, ssd // size, cold)
    if others:
      rest = joint_paths(
        [x.problem for x in others], [x.traffic() for x in others]
      )
      problem = dataclasses.replace(problem, further=True, rest=rest)
    best = choose_tables.best(
      problem, cuts, device // size, room, fixed=given.fixed, tables=tables
    )
    placed[i] = Placed(flat[i].problem, *best)
  return placed


def _cost(placed: Sequence[Placed]) -> float:
  problems = [x.problem for x in placed]
  return float(joint_cost(problems, [x.traffic() for x in placed]))
