"""Every program of a run, lowered for shapes alone: nothing need exist."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recjax.embedding import tables as tables_lib
from recjax.embedding.optimizers import TierArrays
from recjax.mesh import replicated
from recjax.schema import AXES
from recjax.training import checksums, restore_rows
from recjax.training.state import StepSpec
from recjax.training.step import (
  batch_shapes,
  lower,
  make_forward,
  state_shapes,
  visitor_shapes,
)

TRAIN, CHECKSUMS = "train step", "checksums"


class Program(NamedTuple):
  """A program that is not compiled yet, and what it says of tables."""

  name: str
  lowered: jax.stages.Lowered
  tables: Any  # pytree of the tables' shapes that it takes or makes
  in_place: tuple[int, ...]  # arguments that are tables to be updated


def lower_all(
  spec: StepSpec, mesh: Mesh, params: Any, inputs: int
) -> Iterator[Program]:
  """Lowers the programs that train, evaluate, begin, save and restore.

  Args:
    spec: the step.
    mesh: where they would run; its devices may be described only.
    params: of the dense part, arrays or shapes.
    inputs: D, dense inputs of a sample.
  """
  yield train_step(spec, mesh, params, inputs)
  state = state_shapes(spec, mesh, params)
  tables = state.tables
  batch = batch_shapes(spec, mesh, inputs, scored=True)
  fetched, _ = visitor_shapes(spec, mesh)
  forward = make_forward(spec, mesh).lower(state, batch, fetched)
  yield Program("forward pass", forward, tables, ())
  yield Program("first values", _lower_init(spec, mesh), tables, ())
  sums = checksums.make_checksums(spec.embedding, mesh).lower(tables)
  yield Program(CHECKSUMS, sums, tables, ())
  yield from _lower_writers(spec, mesh, tables)


def train_step(spec: StepSpec, mesh: Mesh, params: Any, inputs: int) -> Program:
  """Lowers the train step; see `lower_all`."""
  lowered, state = lower(spec, mesh, params, inputs)
  count = lambda tree: len(jax.tree.leaves(tree))
  stop = count(state)  # tables are the state's last leaves
  own = range(stop - count(state.tables), stop)
  first = stop + count(batch_shapes(spec, mesh, inputs))
  fetched = range(first, first + count(visitor_shapes(spec, mesh)[0]))
  return Program(TRAIN, lowered, state.tables, (*own, *fetched))


def _lower_init(spec: StepSpec, mesh: Mesh) -> jax.stages.Lowered:
  embedding = spec.embedding
  place = NamedSharding(mesh, PartitionSpec(None, AXES))
  ranks = {}
  for g in embedding.groups:
    if tier := g.group.table_wise_tier:
      shape = (tier.shard_rows, tier.owners)
      ranks[g.name] = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
  seeds = jax.ShapeDtypeStruct(
    (len(embedding.groups),), jnp.uint32, sharding=replicated(mesh)
  )
  return tables_lib.make_init(embedding, mesh, 0.05).lower(seeds, ranks)


def _lower_writers(
  spec: StepSpec, mesh: Mesh, tables: tables_lib.Tables
) -> Iterator[Program]:
  """Lowers what a restore writes blocks with, tier by tier."""
  rows = restore_rows.block_rows(spec.embedding)
  for g in spec.embedding.groups:
    for tier in g.group.resident:
      arrays: TierArrays = tables[g.name][tier.name]
      write = tables_lib.block_writer(tier, tuple(g.optimizer.slots), mesh)
      size = next(tables_lib.blocks(tier, rows))[1]
      block = jax.tree.map(
        lambda x, size=size: jax.ShapeDtypeStruct(
          (size, *x.shape[1:]), x.dtype, sharding=x.sharding
        ),
        arrays,
      )
      start = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
      yield Program(
        f"block writer of {g.name}, {tier.name}",
        write.lower(arrays, block, start),
        arrays,
        tuple(range(len(jax.tree.leaves(arrays)))),
      )
