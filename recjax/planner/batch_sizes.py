"""How fast other batch sizes would be, each with a plan of its own."""

import dataclasses
from collections.abc import Sequence

from recjax.errors import UserError
from recjax.plan.plan import Plan
from recjax.planner import solve, workload
from recjax.planner.problem import Problem
from recjax.planner.transport import Transport
from recjax.schema import TableGroup


def plans(
  problems: Sequence[Problem],
  groups: Sequence[TableGroup],
  table_wise: tuple[str, ...] = (),
  transports: tuple[Transport, ...] = (),
  ssd_bytes: int = 0,
) -> dict[int, Plan]:
  """Plans by global batch size: powers of two times n, as far as they fit.

  Activations and buffers of larger batches leave less for tables.

  Args:
    problems: of the groups, on a topology that names its memory.
    groups: their tables.
    table_wise: tables that are table-wise at every size.
    transports: to choose from; none = all that the mesh has.
    ssd_bytes: budget of a host's SSDs.
  """
  n, t = problems[0].shape.devices, problems[0].topology
  found = {}
  for power in range(4, 24):
    size = n * -(-(1 << power) // n)
    if size in found:
      continue
    resized = [
      dataclasses.replace(
        p, shape=dataclasses.replace(p.shape, batch_size=size)
      )
      for p in problems
    ]
    device, host = workload.budgets(resized)
    try:
      found[size] = solve.solve(
        resized,
        groups,
        hosts=t.hosts(n),
        device_bytes=device,
        host_bytes=host,
        ssd_bytes=ssd_bytes,
        table_wise=table_wise,
        transports=transports,
      )
    except UserError:
      continue
  return found


def describe(plans: dict[int, Plan]) -> str:
  """The fastest batch size and its neighbours, to print."""
  if not plans:
    return "no batch size fits"
  rate = {b: b / p.prediction.step_seconds for b, p in plans.items()}
  best = max(rate, key=lambda b: rate[b])
  enough = min(b for b in rate if rate[b] >= 0.9 * rate[best])
  return (
    f"most samples/s: {rate[best]:,.0f} with batches of {best:,}; 90% of it "
    f"from {enough:,} on ({rate[enough]:,.0f})"
  )
