"""Steps over tables that are never created, compiled, and what they hold."""

import dense_reference as dense
import helpers
import jax
import optax

from recjax.embedding.embedding import make_embedding
from recjax.mesh import make_mesh
from recjax.plan.plan import Group, Plan
from recjax.training import step as step_lib
from recjax.training.compiled import aliased_arguments, shard_bytes
from recjax.training.state import StepSpec


def big_group(devices, rows, tiers, part: dense.Part, **kw) -> Group:
  """A group of so many rows, with buffers of 8 rows an owner.

  As many stored rows visit an owner, however many rows there are.
  """
  hot, warm = {
    "warm": (0, rows),
    "cold": (0, 0),
    "mixed": (64, rows // 2 - 64),
  }[tiers]
  made = part._asdict() | {"rows": rows, "hot": hot, "warm": warm}
  made |= {"capacity": 8, "visitors": 8}
  return helpers.make_group(devices, **made | kw)


def spec_of(case: dense.Case, plan: Plan, **kw):
  """(StepSpec, mesh) of a case under a plan of the same groups."""
  optimizer_of = {p.name: dense.OPTIMIZERS[p.optimizer]() for p in case.parts}
  embedding = make_embedding(plan, case.features, optimizer_of, **kw)
  spec = StepSpec(dense.apply_of(case), embedding, optax.adagrad(0.1))
  return spec, make_mesh(plan.devices, plan.node_devices)


def compiled_step(case: dense.Case, plan: Plan, *, options=None, **kw):
  """(the step as users compile it, shapes of its state)."""
  spec, mesh = spec_of(case, plan, **kw)
  params = dense.init_params(case)
  lowered, shapes = step_lib.lower(spec, mesh, params, dense.DENSE)
  return lowered.compile(options or helpers.OPTIMIZED), shapes


def check_in_place(case, plans, **kw):
  """Asserts that a step updates its tables in place, whatever their size.

  Args:
    case: whose step it is.
    plans: of few rows, and of many.
    **kw: of compiled_step.
  """
  steps = [compiled_step(case, plan, **kw) for plan in plans]
  small, large = (step.memory_analysis() for step, _ in steps)
  step, shapes = steps[1]
  aliased = large.alias_size_in_bytes + large.host_alias_size_in_bytes
  assert aliased >= sum(map(shard_bytes, jax.tree.leaves(shapes.tables)))
  # Every table and slot variable: the state's leaves are the first arguments.
  leaves = len(jax.tree.leaves(shapes))
  tables = len(jax.tree.leaves(shapes.tables))
  assert aliased_arguments(step.as_text()) >= {*range(leaves - tables, leaves)}
  assert large.temp_size_in_bytes == small.temp_size_in_bytes
  assert large.host_temp_size_in_bytes == small.host_temp_size_in_bytes
  assert large.temp_size_in_bytes < 1 << 20
