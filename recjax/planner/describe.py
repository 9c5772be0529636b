"""A plan as text to print: its tiers, its transports, what is predicted."""

from recjax.plan.plan import TIERS, Group, Plan, TierReport
from recjax.planner import transport as transport_lib


def transports(plan: Plan) -> str:
  """How sharded rows travel between several nodes, in a line."""
  found = [transport_lib.of_group(g) for g in plan.groups]
  parts = []
  for group, transport in zip(plan.groups, found, strict=True):
    where = "in each" if transport.copies else "sharded over all"
    name = f"{group.name}: " if len(set(found)) > 1 else ""
    parts.append(f"{name}{transport.exchange} exchange, warm rows {where}")
  return (
    f"{plan.nodes} nodes of {plan.node_devices}: "
    f"{'; '.join(dict.fromkeys(parts))}, "
    f"{plan.network_bytes_per_sample:,.0f} bytes a sample between nodes"
  )


def table_wise(plan: Plan) -> list[tuple[str, int]]:
  """The table-wise tables of all groups, and their owners."""
  return [x for g in plan.groups for x in g.table_wise]


def describe(plan: Plan) -> str:
  """The plan as a table to print."""
  one = len(plan.groups) == 1
  dims = f" x {plan.groups[0].dim} {plan.groups[0].dtype}" if one else ""
  lines = [
    f"plan: {plan.rows:,} rows{dims} on {plan.devices} device(s), global batch "
    f"{plan.batch_size:,}"
  ]
  for group in plan.groups:
    if not one:
      rows = group.rows - group.padding_rows
      lines.append(
        f"group {group.name}: {len(group.tables)} table(s), {rows:,} rows x "
        f"{group.dim} {group.dtype}"
      )
    lines += _tiers(plan, group)
  if plan.nodes > 1:
    lines.append(transports(plan))
  if table_wise(plan):
    of = [f"{name} on {owner}" for name, owner in table_wise(plan)]
    lines.append(f"table-wise, pooled by their owners: {', '.join(of)}")
  return "\n".join(lines + _predicted(plan))


def host_path(plan: Plan) -> str:
  """What stored rows' way to the devices and back takes beside a step.

  Empty where no rows are stored.
  """
  terms = [(k, v) for k, v in plan.prediction.host_seconds if v > 0]
  if not terms:
    return ""
  whole = sum(v for _, v in terms)
  shown = dict(plan.prediction.seconds).get("host rows", 0.0)
  parts = ", ".join(f"{k} {v * 1e3:,.3g}" for k, v in terms)
  return (
    f"stored rows to the devices and back, beside the step: {whole * 1e3:,.3g} "
    f"ms ({parts}), of which {max(whole - shown, 0) * 1e3:,.3g} ms are hidden"
  )


def _tiers(plan: Plan, group: Group) -> list[str]:
  """The lines of a group's tiers, those without rows included."""
  where = {"device": "a device", "host": "of hosts", "ssd": "of SSDs"}
  lines = [
    f"{'tier':6} {'rows':>13} {'memory':>18} {'accesses':>9} "
    f"{'distinct/step':>14} {'buffer rows':>12} {'buffers':>10}"
  ]
  for name in TIERS:
    tier = group.tier(name)
    r = plan.report(group.name, name)
    r = r or TierReport(group.name, name, 0, 0, 0.0, 0.0, 0)
    size = (
      f"{r.bytes / 2**20:,.1f} MB {where[tier.memory if tier else 'device']}"
    )
    buffers = "-"
    if tier in group.sharded:
      buffers = f"{tier.owners} x {tier.capacity:,}"
    lines.append(
      f"{name:6} {r.rows:>13,} {size:>18} {r.share:>9.2%} "
      f"{r.distinct:>14,.0f} {buffers:>12} {r.buffer_bytes / 2**20:>7,.1f} MB"
    )
  if visitors := group.visitors:
    lines.append(
      f"visitors: room for {visitors.shard_rows:,} of a batch's stored rows on "
      f"each device; buffers {visitors.owners} x {visitors.capacity:,}"
    )
  return lines


def _predicted(plan: Plan) -> list[str]:
  """The lines of what the planner expects of a step."""
  found = plan.prediction
  if not found.seconds:
    return []
  seconds = found.step_seconds
  lines = [
    f"predicted on {found.topology}: {seconds * 1e3:,.3f} ms a step, "
    f"{plan.batch_size / seconds:,.0f} samples/s, "
    f"{plan.bytes_per_sample:,.0f} bytes a sample"
  ]
  for title, terms, scale, unit in (
    ("time", found.seconds, 1e3, "ms"),
    ("memory of a device", found.memory, 2**-20, "MB"),
  ):
    parts = [f"{k} {v * scale:,.3g}" for k, v in terms if v * scale >= 5e-4]
    lines.append(f"  {title} ({unit}): {', '.join(parts)}")
  if beside := host_path(plan):
    lines.insert(2, f"  {beside}")
  return lines
