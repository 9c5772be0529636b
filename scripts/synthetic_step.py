"""Train steps on ids drawn from power laws, for measurements.

A `Setting` is a model and its tables, a `Run` its compiled train step under a
plan: what bench_step.py, bench_choice.py, refine.py and bench_dcnv2.py time.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from criteo_tables import names
from jax.sharding import Mesh

from recjax import config as config_lib
from recjax.data import power_law
from recjax.embedding import host_store, optimizers
from recjax.embedding.embedding import make_embedding
from recjax.frequency import Profile
from recjax.mesh import batch_sharding
from recjax.models import build as models
from recjax.plan import positions
from recjax.plan.plan import TIERS, Plan
from recjax.planner import frequency_buckets, presets
from recjax.planner import solve as solve_lib
from recjax.planner.problem import Problem, make_problem
from recjax.planner.topology import Topology
from recjax.schema import Feature, TableGroup, TableSpec, groups_of
from recjax.training import visiting
from recjax.training.inputs import one_ahead
from recjax.training.state import StepSpec, TrainState, first_state
from recjax.training.step import lower

DENSE = 13  # numeric inputs
LEARNING_RATE = 0.02
INIT_SCALE = 0.05
SMALL_TABLE = 1_000  # rows; below, tables have Setting.small_dim
_LOG = 10**12  # samples that counts are expected of
SMALL = config_lib.Model(bottom=(64, 32), top=(64, 32))
LARGE = config_lib.Model(bottom=(512, 256, 64), top=(512, 256))


@dataclasses.dataclass(frozen=True)
class Setting:
  """A model, its tables, and ids whose probability falls as a power law."""

  tables: tuple[int, ...]  # rows
  exponent: float
  dim: int
  batch: int  # global
  share: float  # of all rows, what a device's budget holds
  optimizer: str = "rowwise_adagrad"
  wire: str = "float32"
  model: config_lib.Model = dataclasses.field(default_factory=lambda: SMALL)
  hotness: tuple[int, ...] = ()  # lookups of a sample by table; () = one each
  node_devices: int = 0  # 0 = one node
  small_dim: int = 0  # of tables below 1,000 rows; 0 = dim

  def __str__(self) -> str:
    size = "small" if self.model == SMALL else "large"
    return (
      f"{len(self.tables)} tables, {sum(self.tables):,} rows, exponent "
      f"{self.exponent}, dim {self.dim}, batch {self.batch:,}, a device holds "
      f"{self.share:.0%}, {self.optimizer}, {self.wire} wire, {size} MLPs"
      + (f", {sum(self.hotness)} lookups a sample" if self.hotness else "")
      + (f", nodes of {self.node_devices}" if self.node_devices else "")
    )

  def times(self, k: int) -> "Setting":
    """With k times the rows and samples."""
    rows = tuple(k * r for r in self.tables)
    return dataclasses.replace(self, tables=rows, batch=k * self.batch)

  @property
  def features(self) -> tuple[Feature, ...]:
    """One a table, of its name."""
    found = names(len(self.tables))
    return tuple(map(Feature, found, found, self.hotness or (1,) * len(found)))

  @property
  def groups(self) -> tuple[TableGroup, ...]:
    """The tables by dim."""
    small = self.small_dim or self.dim
    return groups_of(
      TableSpec(
        f.name,
        small if rows < SMALL_TABLE else self.dim,
        optimizer=self.optimizer,
        learning_rate=LEARNING_RATE,
      )
      for f, rows in zip(self.features, self.tables, strict=True)
    )

  @property
  def inputs(self) -> dict[str, tuple[int, int]]:
    """What the model takes of each feature: (1, its table's dim)."""
    dims = {name: g.dim for g in self.groups for name in g.tables}
    return {f.name: (1, dims[f.table]) for f in self.features}


def times_of(mesh: Mesh) -> int:
  """How much larger the work is that an accelerator is measured with."""
  return 1 if mesh.devices.flat[0].platform == "cpu" else 8


# ---- Ids


class Ranks(NamedTuple):
  """A setting's rows in one order, most used first, as prepared data has it."""

  ids: np.ndarray  # [R] int32: the rank of each row, table after table
  first: np.ndarray  # [S]: where each lookup's table begins in ids
  profile: Profile  # expected counts of a long log

  def of(self, ids: np.ndarray) -> np.ndarray:
    """Turns rows of tables, [..., S] from 0 each, into ranks, int32."""
    return self.ids[self.first + ids]


def probabilities(rows: int, exponent: float) -> np.ndarray:
  """Returns those of the ids that data.power_law.ranks draws, [rows]."""
  edges = np.arange(1, rows + 2.0)
  power = 1 - exponent
  p = np.diff(np.log(edges) if abs(power) < 1e-6 else edges**power)
  return p / p.sum()


def rank_rows(setting: Setting) -> Ranks:
  """Ranks the rows by how often a sample looks them up."""
  hotness = [f.hotness for f in setting.features]
  counts = np.concatenate(
    [
      _LOG * h * probabilities(rows, setting.exponent)
      for rows, h in zip(setting.tables, hotness, strict=True)
    ]
  )
  order = np.argsort(-counts, kind="stable")
  rank = np.empty(len(order), np.int32)
  rank[order] = np.arange(len(order), dtype=np.int32)
  whose = np.arange(len(hotness), dtype=np.int16)
  profile = Profile(
    _LOG,
    tuple(f.table for f in setting.features),
    counts[order].astype(np.int64),
    np.repeat(whose, setting.tables)[order],
  )
  first = np.repeat(np.cumsum([0, *setting.tables[:-1]]), hotness)
  return Ranks(rank, first, profile)


class Drawn(NamedTuple):
  """Batches whose ids are ranks, on a mesh."""

  batches: list[dict[str, jax.Array]]
  profile: Profile


def draw(setting: Setting, ranks: Ranks, mesh: Mesh, count: int) -> Drawn:
  """Draws batches."""
  rng = np.random.default_rng(0)
  batches = []
  for _ in range(count):
    ids = [
      power_law.ranks(rng, (setting.batch, f.hotness), rows, setting.exponent)
      for rows, f in zip(setting.tables, setting.features, strict=True)
    ]
    batch = {
      "label": (rng.random(setting.batch) < 0.25).astype(np.float32),
      "dense": rng.random((setting.batch, DENSE), np.float32),
      "ids": ranks.of(np.concatenate(ids, axis=1)),
    }
    batches.append(jax.device_put(batch, batch_sharding(mesh)))
  return Drawn(batches, ranks.profile)


# ---- Plans


def topology_here(name: str = "") -> Topology:
  """Returns the named preset or file, else the preset nearest to the device."""
  if name:
    return presets.get(name, 1)
  return presets.of_device(jax.devices()[0].device_kind, 1, 1)


def problems_of(
  setting: Setting, profile: Profile, t: Topology, devices: int
) -> list[Problem]:
  """Returns the problem of each group of tables.

  Args:
    setting: what is to be planned.
    profile: of its `rank_rows`.
    t: the machines; the setting may divide them into nodes, whose network is
      as fast as their links.
    devices: n.
  """
  if setting.node_devices:
    t = dataclasses.replace(t, node_devices=setting.node_devices)
  dense = models.cost(setting.model, DENSE, setting.inputs, setting.dim)
  hotness = {f.table: f.hotness for f in setting.features}
  problems = []
  for group in setting.groups:
    own = tuple(hotness[name] for name in group.tables)
    problems.append(
      make_problem(
        frequency_buckets.of_profile(profile.of_tables(group.tables), own),
        devices=devices,
        batch_size=setting.batch,
        lookups=sum(own),
        dim=group.dim,
        dtype=group.dtype,
        slot_bytes=optimizers.slot_bytes(group.optimizer, group.dim),
        topology=t,
        exchange_dtype=setting.wire,
        dense=None if problems else dense,
        compute_dtype=setting.model.compute_dtype,
      )
    )
  return problems


def plan_of(
  setting: Setting, problems: Sequence[Problem], share: float, **options: Any
) -> Plan:
  """Plans where a device's budget holds this share of all rows.

  Args:
    setting: whose tables they are.
    problems: of `problems_of`.
    share: of the bytes of all rows and slot variables; a host holds all twice.
    **options: of `planner.solve.solve`: given cuts, what to choose from.
  """
  stored = sum(p.profile.rows * p.shape.stored_bytes for p in problems)
  return solve_lib.solve(
    problems,
    setting.groups,
    hosts=1,
    device_bytes=int(share * stored),
    host_bytes=2 * stored,
    **options,
  )


def tiers_of(plan: Plan) -> str:
  """Says how many rows of all groups are in each tier."""
  found = dict.fromkeys(TIERS, 0)
  for report in plan.prediction.tiers:
    found[report.tier] += report.rows
  return ", ".join(f"{n:,} {tier}" for tier, n in found.items()) + " rows"


# ---- Steps


def spec_of(
  plan: Plan,
  features: tuple[Feature, ...],
  apply: Callable,
  dense_optimizer: optax.GradientTransformation,
  wire: str = "float32",
) -> StepSpec:
  """The static part of a step whose rows' optimizers are the plan's."""
  of_rows = {
    g.name: optimizers.OPTIMIZERS[g.optimizer](LEARNING_RATE)
    for g in plan.groups
  }
  embedding = make_embedding(plan, features, of_rows, wire_dtype=wire)
  return StepSpec(apply, embedding, dense_optimizer)


def summed(params, dense, activations, masks) -> jax.Array:
  """The model without layers: all activations' sum, times params["scale"]."""
  del dense, masks
  x = jnp.concatenate(list(activations.values()), axis=1)  # [b, F, d]
  return params["scale"] * jnp.sum(x, axis=(1, 2))


class Run:
  """A plan's compiled train step and, between start and stop, its state."""

  def __init__(
    self, setting: Setting, plan: Plan, mesh: Mesh, routed: bool = False
  ):
    """Lowers the step; if `routed`, the host makes its batches' routes."""
    self.setting, self.plan, self.mesh = setting, plan, mesh
    self.routed = routed
    self.params, apply = models.build(
      setting.model, DENSE, setting.inputs, setting.dim, 0
    )
    dense_optimizer = optax.adagrad(LEARNING_RATE, 0.0, 1e-8)
    self.spec = spec_of(
      plan, setting.features, apply, dense_optimizer, setting.wire
    )
    self.lowered, _ = lower(self.spec, mesh, self.params, DENSE, routed=routed)
    self.seconds, self.rounds = [], 0

  def compile(self) -> "Run":
    """Compiles the step; returns the run."""
    self.compiled = self.lowered.compile()
    return self

  def start(self, drawn: Drawn, delay: Callable | None = None) -> None:
    """Makes the state, and the batches as this plan's positions.

    `delay` is the host store's.
    """
    groups = positions.of_groups(self.plan, drawn.profile)
    ranks = {name: group.ranks for name, group in groups.items()}
    self.state = first_state(
      self.spec, self.mesh, self.params, INIT_SCALE, ranks
    )
    self.batches = drawn.batches
    where = positions.of_batches(
      self.plan, drawn.profile, self.setting.features
    )
    if where:
      self.batches = [dict(x) for x in self.batches]
      for x in self.batches:
        ids = where.of_batch(np.asarray(x["ids"]))
        x["ids"] = jax.device_put(ids, batch_sharding(self.mesh))
    self.store = visiting.make_store(self.spec, self.mesh, delay=delay)
    if self.store:
      host_store.init(self.store, self.spec.embedding, INIT_SCALE)
    self.steps_ = visiting.Step(
      self.spec, self.mesh, self.store, on_host=self.routed
    )
    self.fed = ahead(self)

  def step(self, state: TrainState, batch: dict[str, Any]):
    """Takes a step with a batch of `fed`: (state, metrics)."""
    if self.store:
      return self.steps_.train(state, batch)
    return self.compiled(state, batch, {}, {})[:2]

  def stop(self) -> None:
    """Frees the state."""
    if self.store:
      self.store.close()
    del self.state, self.batches, self.store, self.steps_, self.fed

  def steps(self, timed: int) -> None:
    """Times steps.

    One more comes first, as another plan has left the caches.
    """
    for i in range(timed + 1):
      begin = time.perf_counter()
      self.state, out = self.step(self.state, next(self.fed))
      jax.block_until_ready(self.state)
      if i:
        self.seconds.append(time.perf_counter() - begin)
    self.rounds = max(self.rounds, int(out["rounds"]))


def ahead(run: Run) -> Iterator[dict[str, Any]]:
  """Cycles through a run's batches without end, one ahead.

  What the host finds out of the next batch's ids, a thread does while the step
  is at one, as training's input pipeline does.
  """
  if not (run.routed or run.store):
    yield from itertools.cycle(run.batches)
  host_ids = [{"ids": np.asarray(x["ids"])} for x in run.batches]
  prepare = functools.partial(run.steps_.prepare, training=True)

  def placed():
    pool, queue = futures.ThreadPoolExecutor(1), collections.deque()
    for ids, batch in itertools.cycle(zip(host_ids, run.batches, strict=True)):
      queue.append((batch, pool.submit(prepare, ids)))
      if len(queue) > 1:
        batch, made = queue.popleft()
        yield batch | run.steps_.place(made.result())

  yield from one_ahead(placed())
