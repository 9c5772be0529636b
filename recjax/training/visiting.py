"""A run's step and forward pass, with the stored rows that visit them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from recjax.embedding import host_route, lookup, optimizers
from recjax.embedding import tables as tables_lib
from recjax.embedding.embedding import make_embedding
from recjax.embedding.host_store import HostStore
from recjax.mesh import batch_sharding, owners_here
from recjax.plan.plan import VISITORS, Group
from recjax.schema import AXES, Feature
from recjax.training.look_ahead import LookAhead, Visit
from recjax.training.state import Run, StepSpec, TrainState
from recjax.training.step import make_forward, make_train_step


def make_store(
  spec: StepSpec, mesh: Mesh, directory: str = "", **options: Any
) -> HostStore | None:
  """Makes the store of a run's stored rows; None where none are.

  Their values are not set.

  Args:
    spec: of the run.
    mesh: of the plan.
    directory: of the files of frozen rows.
    **options: of HostStore.
  """
  if not spec.embedding.visited:
    return None
  return HostStore(spec.embedding, owners_here(mesh), directory, **options)


class Step:
  """What a run does with its batches; see `state.Run`.

  Batches that were prepared and placed are trained and scored at once; of
  others, whose ids are on the mesh, it is then found out what visits.
  """

  def __init__(
    self,
    spec: StepSpec,
    mesh: Mesh,
    store: HostStore | None,
    *,
    on_host: bool | None = None,
    options: dict | None = None,
  ):
    """Makes them, to be compiled for the first batch.

    Args:
      spec: of the run.
      mesh: of the plan.
      store: of stored rows.
      on_host: whether the host finds out what visits, where a process has the
        whole batch, and makes the route; None = where its devices are CPUs.
      options: the compiler's, for the train step.
    """
    if on_host is None:
      on_host = mesh.devices.flat[0].platform == "cpu"
    self._on_host = on_host and not (store and jax.process_count() > 1)
    self._mesh = mesh
    self._look = store and LookAhead(spec.embedding, mesh, store, self._on_host)
    self._sized = sized = _Sized(spec.embedding.with_visitors)
    made = lambda make: _Sized(
      lambda rows: make(spec._replace(embedding=sized(rows)))
    )
    self._train = made(lambda spec: make_train_step(spec, mesh, options))
    self._forward = made(lambda spec: make_forward(spec, mesh))

  def train(self, state: TrainState, batch: Mapping[str, Any]):
    """Takes a step: (state, metrics); the state is donated."""
    batch, visit = _apart(batch)
    look = self._look
    if look is None:
      return self._train({})(state, batch, {}, {})[:2]
    visit, fetched = look.ready(visit or look.visit(batch["ids"]))
    batch["ids"], beside = visit.ids, look.beside(visit, fetched)
    step = self._train(visit.rows)
    state, metrics, updated = step(state, batch, fetched.arrays, beside)
    look.returned(visit, updated)
    return state, metrics

  def forward(self, state: TrainState, batch: Mapping[str, Any]):
    """Scores a batch: (logits, labels, mask), [B] each."""
    batch, visit = _apart(batch)
    look = self._look
    if look is None:
      return self._forward({})(state, batch, {})
    visit, fetched = look.ready(visit or look.visit(batch["ids"]), late=0)
    batch["ids"] = visit.ids
    return self._forward(visit.rows)(state, batch, fetched.arrays)

  def prepare(
    self, batch: Mapping[str, Any], training: bool
  ) -> Mapping[str, Any]:
    """Adds what the host finds out of a batch of NumPy arrays.

    Changes nothing: any thread may call it.
    """
    if not self._on_host:
      return batch
    ids, rows, found = batch["ids"], {}, {}
    if self._look is not None:
      seen = found["seen"] = self._look.see(ids)
      ids, rows = seen.ids, seen.rows
    embedding = self._sized(rows)
    if host_route.needed(embedding, training):
      here = len(owners_here(self._mesh))
      found["route"] = host_route.routes(ids, embedding, here)
    return {**batch, **found}

  def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a batch onto the mesh, and begins to fetch its stored rows."""
    batch, sharding = dict(batch), batch_sharding(self._mesh)
    seen = batch.pop("seen", None)
    placed = jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )
    if self._look is not None:
      placed["visit"] = self._look.visit(seen or placed["ids"])
    return placed


def _apart(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Visit | None]:
  batch = dict(batch)
  return batch, batch.pop("visit", None)


def read_rows(run: Run, group: Group, at: np.ndarray) -> np.ndarray:
  """Returns the rows of a group at positions [k] int32: [k, d] float32.

  Every process asks for the same ones.
  """
  embedding = run.spec.embedding
  plan = dataclasses.replace(embedding.plan, groups=(group,))
  reader = make_embedding(
    plan,
    (Feature("rows", group.tables[0], len(at), "none"),),
    {group.name: optimizers.sgd(0.0)},
  )
  ids = np.full((plan.devices, len(at)), -1, np.int32)
  ids[0] = at  # the first device asks, the others for nothing
  placed = jax.device_put(ids, batch_sharding(run.mesh))
  tiers = dict(run.state.tables[group.name])
  if run.store and group.visitors:
    alone = jax.process_count() == 1
    look = LookAhead(reader, run.mesh, run.store, alone)
    visit, fetched = look.ready(look.visit(ids if alone else placed))
    reader, placed = reader.with_visitors(visit.rows), visit.ids
    tiers[VISITORS] = fetched.arrays[group.name]
  tables = {group.name: {t: x._replace(slots={}) for t, x in tiers.items()}}
  forward = jax.shard_map(
    lambda tables, ids: lookup.forward(reader, tables, {"ids": ids})[0],
    mesh=run.mesh,
    in_specs=(tables_lib.specs(reader, visitors=True), PartitionSpec(AXES)),
    out_specs=PartitionSpec(AXES),
    check_vma=False,
  )
  return np.asarray(jax.jit(forward)(tables, placed)["rows"][0])


class _Sized:
  """A function of the visitors' rows {group: V}, called once for each."""

  def __init__(self, make: Callable[[Mapping[str, int]], Any]):
    self._make = make
    self._made: dict[Any, Any] = {}

  def __call__(self, rows: Mapping[str, int]) -> Any:
    key = tuple(sorted(rows.items()))
    if key not in self._made:
      self._made[key] = self._make(rows)
    return self._made[key]
