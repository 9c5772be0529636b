"""What is to be planned: problems from the config and what was counted."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recjax.config import Config
from recjax.data.prepared import Prepared
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.models.cost import DenseCost
from recjax.planner import common_order, frequency_buckets, step_cost
from recjax.planner.common_order import CommonOrder
from recjax.planner.frequency_buckets import (
  BucketedProfile,
  DistinctRatios,
  Table,
)
from recjax.planner.problem import Problem, make_problem
from recjax.planner.topology import Topology
from recjax.schema import TableGroup

_SAMPLED = 16  # blocks that correlation is measured on
_SLICE = 1 << 24  # rows at a time, so that temporaries stay small
_TABLE_SHARE = 0.9  # of a memory that a topology names, after the step's


class Machine(NamedTuple):
  """Where the step is to run."""

  topology: Topology
  devices: int  # n


def problems_of(
  config: Config,
  prepared: Prepared | None,
  groups: Sequence[TableGroup],
  machine: Machine,
  *,
  slot_bytes: Sequence[int],
  dense: DenseCost,
  train: bool = True,
) -> list[Problem]:
  """The problem of each group.

  Args:
    config: the batch, the wire and the objective; without data, the tables.
    prepared: counted data; None = the tables of data.rows, each a power law.
    groups: tables that share a row space.
    machine: topology and devices.
    slot_bytes: of a row's slot variables, a group.
    dense: what the dense part of the model costs.
    train: False plans the forward pass only.

  Raises:
    UserError: data.hotness does not fit data.rows, or the batch the devices.
  """
  problems = []
  by_table = config.plan.table_wise not in ("", "none")
  for group, slots in zip(groups, slot_bytes, strict=True):
    if prepared is None:
      profile = _assumed(config, group, by_table)
    else:
      batch = config.train.batch_size
      local = max(batch // machine.devices, 1)
      sizes = {max(local // 4, 1), local, 4 * local, batch}
      profile = _counted(prepared, group, sizes, by_table)
    problems.append(
      make_problem(
        profile,
        devices=machine.devices,
        batch_size=config.train.batch_size,
        lookups=sum(t.hotness for t in profile.tables),
        dim=group.dim,
        dtype=group.dtype,
        slot_bytes=slots,
        overflow_probability=config.plan.overflow_probability,
        topology=machine.topology,
        exchange_dtype=config.embedding.exchange_dtype,
        dense=None if problems else dense,
        compute_dtype=config.model.compute_dtype,
        objective=config.plan.objective,
        train=train,
      )
    )
  return problems


def order_of(
  prepared: Prepared | None, groups: Sequence[TableGroup]
) -> CommonOrder | None:
  """The counted order of all groups' rows; None where none were counted."""
  if prepared is None:
    return None
  return common_order.of_profile(prepared.profile, groups)


def _assumed(
  config: Config, group: TableGroup, by_table: bool
) -> BucketedProfile:
  """The group's tables among C1, C2, ... of data.rows, as power laws."""
  rows = config.data.rows
  hotness = config.data.hotness or (1,) * len(rows)
  if len(hotness) != len(rows):
    raise UserError(
      f"data.hotness: {len(hotness)} numbers for the {len(rows)} tables of "
      "data.rows"
    )
  bags = int(not config.data.weighted)
  tables = [
    Table(f"C{i + 1}", *x, bags)
    for i, x in enumerate(zip(rows, hotness, strict=True))
  ]
  own = tuple(t for t in tables if t.name in group.tables)
  return frequency_buckets.power_law(
    own, config.plan.exponent, by_table=by_table
  )


# ---- Counted data


def _counted(
  prepared: Prepared, group: TableGroup, sizes: set[int], by_table: bool
) -> BucketedProfile:
  """The group's rows as counted, corrected by batches of these sizes."""
  users = [
    [f for f in prepared.schema.features if f.table == name]
    for name in group.tables
  ]
  plain = lambda f: f.pooling != "none" and not f.weighted
  profile = frequency_buckets.of_profile(
    prepared.profile.of_tables(group.tables),
    tuple(sum(f.hotness for f in of) for of in users),
    tuple(len(of) if all(map(plain, of)) else 0 for of in users),
    by_table=by_table,
  )
  ratios = measure(prepared, group, profile, sizes)
  return dataclasses.replace(profile, measured=ratios)


def measure(
  prepared: Prepared,
  group: TableGroup,
  profile: BucketedProfile,
  sizes: set[int],
) -> DistinctRatios | None:
  """Distinct rows of batches as training draws them: from shuffled blocks.

  Args:
    prepared: where the batches are.
    group: whose rows are counted.
    profile: of the group.
    sizes: samples of a batch, used as far as those read reach.

  Returns:
    The ratios to what is expected of independent samples; None where there
    are too few samples.
  """
  blocks = prepared.blocks("train")
  rng = np.random.default_rng(0)
  chosen = rng.permutation(len(blocks.sizes))[:_SAMPLED]
  ids = blocks[np.sort(chosen)]["ids"]
  ids = ids[rng.permutation(len(ids))]
  ids = _own_ranks(prepared.profile, group.tables, ids)
  batches = {
    size: [
      ids[i * size : (i + 1) * size] for i in range(min(8, len(ids) // size))
    ]
    for size in sizes
    if size <= len(ids)
  }
  return frequency_buckets.measure(profile, batches) if batches else None


def _own_ranks(
  profile: Profile, tables: tuple[str, ...], ids: np.ndarray
) -> np.ndarray:
  """Ranks of all tables -> ranks among those of `tables`; -1 for others."""
  if tables == profile.tables:
    return ids
  own = np.isin(profile.tables, tables)
  distinct, index = np.unique(ids, return_inverse=True)
  ranks = np.full(len(distinct), -1, np.int64)
  below = 0  # rows of these tables before the slice
  for at in range(0, profile.rows, _SLICE):
    mine = own[profile.table[at : at + _SLICE]]
    rank = below + np.cumsum(mine) - 1
    inside = (distinct >= at) & (distinct < at + len(mine))
    there = distinct[inside] - at
    ranks[inside] = np.where(mine[there], rank[there], -1)
    below += int(np.count_nonzero(mine))
  return ranks[index].reshape(ids.shape)


# ---- Memory


def budgets(problems: Sequence[Problem]) -> tuple[int, int]:
  """Bytes for tables and slot variables that a topology's memory leaves.

  What a step needs beside them, with all rows exchanged as if they were stored,
  is taken off first.

  Returns:
    (of a device, of a host).
  """
  t, step = problems[0].topology, 0.0
  for p in problems:
    rows = p.profile.rows
    of_group = step_cost.device_bytes(
      p.shape,
      hot=0,
      warm_shard=0,
      buffers=float(p.buffers(0, rows)),
      visitors=float(p.visitors(0, rows)),
      tiled=p.tiled,
      longest_bag=p.longest_bag,
    )
    step += sum(of_group.values())
  device = max(_TABLE_SHARE * t.device_memory - step, 0)
  return int(device), int(_TABLE_SHARE * t.host_memory)
