"""A run's step and forward pass, with the stored rows that visit them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from recjax.embedding.host_store import HostStore
from recjax.mesh import batch_sharding, owners_here
from recjax.training.look_ahead import LookAhead, Visit
from recjax.training.state import StepSpec, TrainState
from recjax.training.step import make_forward, make_train_step


def make_look_ahead(
  spec: StepSpec, mesh: Mesh, directory: str = "", **options: Any
) -> LookAhead | None:
  """Makes the store of a run's stored rows and what looks ahead for them.

  Their values are not set. None where no rows are stored.

  Args:
    spec: of the run.
    mesh: of the plan.
    directory: of the files of frozen rows.
    **options: of HostStore, and on_host, of LookAhead; by default where a
      process has the whole batch and its devices are CPUs.
  """
  if not spec.embedding.visited:
    return None
  alone = jax.process_count() == 1
  on_host = alone and mesh.devices.flat[0].platform == "cpu"
  on_host = options.pop("on_host", on_host)
  owners = owners_here(mesh)
  store = HostStore(spec.embedding, owners, directory, **options)
  return LookAhead(spec.embedding, mesh, store, on_host)


class _Sized:
  """A function of the step's spec, made once for each room of visitors."""

  def __init__(self, make: Callable[[StepSpec], Callable], spec: StepSpec):
    self._make, self._spec = make, spec
    self._made: dict[Any, Callable] = {}

  def __call__(self, visit: Visit | None) -> Callable:
    rows = {} if visit is None else {k: v for k, (v, _) in visit.room.items()}
    key = tuple(sorted(rows.items()))
    if key not in self._made:
      embedding = self._spec.embedding.with_visitors(rows)
      self._made[key] = self._make(self._spec._replace(embedding=embedding))
    return self._made[key]


def make_run_step(
  spec: StepSpec,
  mesh: Mesh,
  look: LookAhead | None,
  options: dict | None = None,
):
  """Makes (state, batch) -> (state, metrics); the state is donated.

  The batch may be one that `placed` has looked ahead for, or any other.

  Args:
    spec, mesh: as `make_train_step` has them.
    look: ahead for the stored rows; None where there are none.
    options: the compiler's.
  """
  sized = _Sized(lambda spec: make_train_step(spec, mesh, options), spec)

  def step(state: TrainState, batch: Mapping[str, Any]):
    batch, visit = _apart(batch)
    if look is None:
      return sized(None)(state, batch, {}, {})[:2]
    visit, fetched = look.ready(visit or look.visit(batch["ids"]))
    batch["ids"], beside = visit.ids, look.beside(visit, fetched)
    state, metrics, updated = sized(visit)(state, batch, fetched.arrays, beside)
    look.returned(visit, updated)
    return state, metrics

  return step


def make_run_forward(spec: StepSpec, mesh: Mesh, look: LookAhead | None):
  """Makes (state, batch) -> (logits, labels, mask), [B] each."""
  sized = _Sized(lambda spec: make_forward(spec, mesh), spec)

  def forward(state: TrainState, batch: Mapping[str, Any]):
    batch, visit = _apart(batch)
    if look is None:
      return sized(None)(state, batch, {})
    visit, fetched = look.ready(visit or look.visit(batch["ids"]), late=0)
    return sized(visit)(state, batch | {"ids": visit.ids}, fetched.arrays)

  return forward


def _apart(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Visit | None]:
  batch = dict(batch)
  return batch, batch.pop("visit", None)


# ---- Batches


def place(
  batch: Mapping[str, np.ndarray], mesh: Mesh, look: LookAhead | None
) -> dict[str, Any]:
  """Puts a process's part of a batch onto the mesh, and asks for its rows.

  Returns:
    Global arrays; and its `Visit` where rows are stored.
  """
  sharding = batch_sharding(mesh)
  placed: dict[str, Any] = {
    name: jax.make_array_from_process_local_data(sharding, x)
    for name, x in batch.items()
  }
  if look is not None:
    placed["visit"] = look.visit((batch if look.on_host else placed)["ids"])
  return placed


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
  """Yields items, each when the next one is there: what looks ahead."""
  items = iter(items)
  try:
    item = next(items)
  except StopIteration:
    return
  for following in items:
    yield item
    item = following
  yield item
