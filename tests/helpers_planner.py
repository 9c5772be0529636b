"""Small problems, and plans of them, for the planner's tests."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import hypothesis.strategies as st
import numpy as np

from recjax.config import Config
from recjax.frequency import Profile
from recjax.models.cost import DenseCost
from recjax.plan.plan import Plan
from recjax.planner import solve, write_plan
from recjax.planner.frequency_buckets import BucketedProfile, Table
from recjax.planner.problem import Cuts, Problem, make_problem
from recjax.planner.topology import Topology
from recjax.planner.traffic import StepShape
from recjax.schema import TableGroup, TableSpec, groups_of

HUGE = 1 << 50


def shape_of(devices=2, local=8, **changes) -> StepShape:
  arguments = {
    "devices": devices,
    "batch_size": devices * local,
    "lookups": 100,
    "dim": 8,
    "row_bytes": 32,
    "slot_bytes": 4,
    "wire_bytes": 32,
  }
  return StepShape(**(arguments | changes))


def probabilities():
  """A strategy: that a sample touches a row.

  0, or not so small that a tier's rows are touched less than once in 1e9
  batches: those count as if they were (buffer_sizes.buffer_rows).
  """
  return st.just(0.0) | st.floats(1e-6, 1)


def buckets_of(p) -> BucketedProfile:
  """One table whose rows samples touch with probabilities p, a bucket each."""
  p = np.sort(np.asarray(p, np.float64))[::-1]
  table = Table("t", len(p))
  return BucketedProfile((table,), np.ones(len(p), np.int64), p, p)


def profile_of(counts, samples=None, tables=1) -> Profile:
  """Counted rows, dealt out to tables t0, t1, ... in rank order."""
  counts = np.sort(np.asarray(counts, np.int64))[::-1].copy()
  samples = int(counts.max()) if samples is None else samples
  table = (np.arange(len(counts)) % tables).astype(np.int16)
  names = tuple(f"t{i}" for i in range(tables))
  return Profile(max(samples, 1), names, counts, table)


def group_of(problem: Problem, name="all") -> TableGroup:
  """The group of a problem's tables."""
  shape = problem.shape
  dtype = "float32" if shape.row_bytes == 4 * shape.dim else "bfloat16"
  tables = tuple(t.name for t in problem.profile.tables)
  return TableGroup(name, tables, shape.dim, dtype, "adagrad", 0.1)


def solved(problems, **budgets) -> Plan:
  """The plan of a problem or of several, in unlimited memory if not said."""
  if isinstance(problems, Problem):
    problems = [problems]
  names = [f"g{i}" for i in range(len(problems))]
  groups = list(map(group_of, problems, names))
  unlimited = {"hosts": 1, "device_bytes": HUGE, "host_bytes": HUGE}
  return solve.solve(problems, groups, **(unlimited | budgets))


def planned(profile, **arguments) -> Plan:
  """The plan of one group, with the arguments of make_problem and solve."""
  budgets = ("hosts", "device_bytes", "host_bytes", "hot_rows", "warm_rows",
             "ssd_bytes", "cold_rows", "capacity", "hot_syncs",
             "transports", "table_wise")  # fmt: skip
  given = {k: arguments.pop(k) for k in list(arguments) if k in budgets}
  return solved(make_problem(profile, **arguments), **given)


def free_of_latencies(t: Topology) -> Topology:
  """A machine on which latencies do not decide."""
  return dataclasses.replace(
    t,
    link_latency=0.0,
    network_latency=0.0,
    host_latency=0.0,
    ring_latency=0.0,
    tier_latency=0.0,
    ssd_latency=0.0,
  )


def with_host_path(problem: Problem, ratio: float) -> Problem:
  """The problem where the hosts need `ratio` times as long as the devices.

  With all rows cold, and without the launch of a step: from a host path that is
  hidden whatever the cuts, below 1, to one that is all that counts.
  """
  free = dataclasses.replace(problem.topology, launch=0.0)
  problem = dataclasses.replace(problem, topology=free)
  if problem.objective == "bytes":
    return problem
  paths = problem.paths(problem.traffic(Cuts(0, 0)))
  slower = ratio * float(paths.device) / float(paths.host)
  t = dataclasses.replace(
    free,
    host_gather=free.host_gather / slower,
    host_link=free.host_link / slower,
    host_latency=free.host_latency * slower,
    ssd_read=free.ssd_read / slower,
    ssd_latency=free.ssd_latency * slower,
  )
  return dataclasses.replace(problem, topology=t)


RATIOS = (None, 0.3, 0.8, 1.0, 1.5, 4.0)  # None: as the preset has it


# ---- From a config

TERABYTE = (
  227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956,
  405282, 10, 2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510,
  590152, 12973, 108, 36,
)  # fmt: skip
# DCNv2 of 27 vectors of 128, as the default config has it.
DENSE = DenseCost(13_100_000, 26_200_000, 16_000)


def terabyte(**changes) -> Config:
  c = Config()
  c.data.rows = TERABYTE
  c.embedding.dim = 128
  c.model.name = "dcnv2"
  c.train.batch_size = 65_536
  c.plan.topology = "dgx_h200"
  for path, value in changes.items():
    group, field = path.split("__")
    setattr(getattr(c, group), field, value)
  return c


def groups_for(config, prepared=None, dims=()):
  """Groups of the config's tables; dims: of the first tables, if not its."""
  count = len(config.data.rows)
  names = [f"C{i + 1}" for i in range(count)]
  if prepared:
    names = prepared.schema.tables
  dims = (*dims, *[config.embedding.dim] * len(names))
  specs = map(TableSpec, names, dims[: len(names)])
  return groups_of(list(specs))


def write_plan_of(config, workdir, devices=8, prepared=None, **changes):
  lines = []
  groups = groups_for(config, prepared, changes.pop("dims", ()))
  plan, _ = write_plan.run(
    config,
    prepared,
    workdir,
    lines.append,
    groups=groups,
    slot_bytes=tuple(4 * g.dim for g in groups),
    dense=DENSE,
    devices=devices,
    hosts=1,
    **changes,
  )
  return plan, "\n".join(lines)


def svgs(text) -> list[ET.Element]:
  return [
    ET.fromstring(x) for x in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
  ]
