"""What training holds: the state, what is static in a step, and a whole run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from recjax.data.shuffle import Done
from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import Embedding
from recjax.embedding.host_store import HostStore
from recjax.embedding.tables import Tables
from recjax.mesh import replicated


class TrainState(NamedTuple):
  """Donated to every step. The dense parts are replicated."""

  step: jax.Array  # [] int32
  params: Any
  opt_state: Any
  tables: Tables


class At(NamedTuple):
  """Where a run stands."""

  step: int = 0
  done: Done = Done()  # of the training data
  began: int = 0  # the step at which it did: not 0 after train.start_from


class StepSpec(NamedTuple):
  """All that is static in a compiled step."""

  # (params, dense [b, D], {feature: [b, h, d]}, {feature: [b, h] bool}) ->
  # logits [b]
  apply: Callable
  embedding: Embedding
  dense_optimizer: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a checkpoint must share with the run that restores it.

  A run that only evaluates may have other settings.
  """

  model: dict  # JSON: everything that shapes the parameters and the rows
  vocabulary: str  # fingerprint
  rows: int  # of all tables
  settings: dict  # JSON: all settings of the run; see same_run.py


class Run(NamedTuple):
  """A model on a mesh, ready to train and to evaluate."""

  spec: StepSpec
  mesh: Mesh
  state: TrainState
  step: Callable  # (state, batch) -> (state, metrics); state is donated
  forward: Callable  # (state, batch) -> (logits, labels, mask), [B] each
  identity: Identity
  # (a process's part of a batch {name: NumPy array}, training) -> the same with
  # what the host finds out ahead: its stored rows, its route.
  prepare: Callable
  # Puts such a batch onto the mesh, and begins to fetch its stored rows.
  place: Callable
  store: HostStore | None = None  # of stored rows, where there are any


def state_specs(embedding: Embedding) -> TrainState:
  """Returns PartitionSpec prefixes of the state."""
  everywhere = PartitionSpec()
  return TrainState(
    everywhere, everywhere, everywhere, tables_lib.specs(embedding)
  )


def state_shardings(embedding: Embedding, mesh: Mesh) -> TrainState:
  """Returns NamedSharding prefixes of the state."""
  everywhere = replicated(mesh)
  return TrainState(
    everywhere, everywhere, everywhere, tables_lib.shardings(embedding, mesh)
  )


def first_state(
  spec: StepSpec,
  mesh: Mesh,
  params: Any,
  init_scale: float,
  ranks: Mapping[str, np.ndarray] | None = None,
) -> TrainState:
  """Returns the state before the first step, on the mesh.

  Args:
    spec: the step.
    mesh: of the spec's plan.
    params: of the dense part; copied.
    init_scale, ranks: of the rows; see `tables.init`.
  """
  params = jax.tree.map(np.array, params)  # steps donate them: a copy
  dense = (np.int32(0), params, spec.dense_optimizer.init(params))
  step, params, opt_state = jax.device_put(dense, replicated(mesh))
  tables = tables_lib.init(spec.embedding, mesh, init_scale, ranks)
  return TrainState(step, params, opt_state, tables)
