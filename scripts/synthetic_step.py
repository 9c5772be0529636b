"""Train steps on ids drawn from power laws, for measurements.

What bench_choice.py and calibrate.py run: DLRM of a setting, under any plan.
"""

import dataclasses
import pathlib
import sys
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax import config as config_lib
from recjax.embedding import optimizers, tables
from recjax.frequency import Profile
from recjax.mesh import batch_sharding, replicated
from recjax.models import dlrm
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.planner import buffer_sizes, frequency_buckets, step_cost, topology
from recjax.planner import solve as solve_lib
from recjax.planner.cut_points import Problem
from recjax.schema import Feature
from recjax.training import step as step_lib

DENSE = 13  # numeric inputs
SMALL, LARGE = ((64, 32), (64, 32)), ((512, 256, 64), (512, 256))


@dataclasses.dataclass(frozen=True)
class Setting:
  tables: tuple[int, ...]  # rows
  exponent: float
  dim: int
  batch: int  # global
  share: float  # of all rows, what a device's budget holds
  optimizer: str = "rowwise_adagrad"
  wire: str = "float32"
  layers: tuple = SMALL  # of the model: (bottom, top)
  hotness: tuple[int, ...] = ()  # lookups of a sample by table; () = one each
  node_devices: int = 0  # 0 = one node

  def __str__(self):
    size = "small" if self.layers == SMALL else "large"
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
    names = [f"C{i}" for i in range(len(self.tables))]
    return tuple(map(Feature, names, names, self.hotness or (1,) * len(names)))


def times_of(mesh) -> int:
  """How much larger the work is that an accelerator is measured with."""
  return 1 if mesh.devices.flat[0].platform == "cpu" else 8


def problem_of(setting: Setting, t: topology.Topology, devices: int) -> Problem:
  """Of a mesh whose network is as fast as its links."""
  names = [f.name for f in setting.features]
  hotness = [f.hotness for f in setting.features]
  named = map(frequency_buckets.Table, names, setting.tables, hotness)
  bottom, top = setting.layers
  if setting.node_devices:
    t = dataclasses.replace(t, node_devices=setting.node_devices)
  return solve_lib.make_problem(
    frequency_buckets.power_law(tuple(named), setting.exponent),
    devices=devices,
    batch_size=setting.batch,
    lookups=sum(hotness),
    dim=setting.dim,
    dtype="float32",
    slot_bytes=optimizers.slot_bytes(setting.optimizer, setting.dim),
    topology=t,
    exchange_dtype=setting.wire,
    dense=step_cost.dense_model(
      "dlrm", bottom, top, DENSE, len(names), setting.dim
    ),
  )


class Drawn(NamedTuple):
  batches: list  # of ranks, on the mesh
  profile: Profile  # of which only the tables of rows are true


def draw(setting: Setting, mesh, count: int) -> Drawn:
  """Batches from the power laws that the spectrum is of."""
  rng = np.random.default_rng(0)
  features = setting.features
  p = [np.arange(1, r + 1.0) ** -setting.exponent for r in setting.tables]
  p = [x / x.sum() for x in p]
  touched = [
    buffer_sizes.bag_probability(x, f.hotness)
    for x, f in zip(p, features, strict=True)
  ]
  order = np.argsort(-np.concatenate(touched), kind="stable")
  rank = np.empty(len(order), np.int32)
  rank[order] = np.arange(len(order), dtype=np.int32)
  first = np.cumsum([0, *setting.tables[:-1]])
  table = np.repeat(np.arange(len(p), dtype=np.int16), setting.tables)[order]
  batches = []
  for _ in range(count):
    ids = [
      start
      + np.searchsorted(
        np.cumsum(x)[:-1], rng.random((setting.batch, f.hotness))
      )
      for start, x, f in zip(first, p, features, strict=True)
    ]
    batch = {
      "label": (rng.random(setting.batch) < 0.25).astype(np.float32),
      "dense": rng.random((setting.batch, DENSE), np.float32),
      "ids": rank[np.concatenate(ids, axis=1)],
    }
    batches.append(jax.device_put(batch, batch_sharding(mesh)))
  names = tuple(f.name for f in features)
  return Drawn(batches, Profile(1, names, np.ones(len(table), np.int64), table))


class Run:
  """A plan's compiled train step and, between start and stop, its state."""

  def __init__(self, setting: Setting, plan: Plan, mesh):
    self.plan, self.mesh = plan, mesh
    bottom, top = setting.layers
    self.params, apply = dlrm.build(
      config_lib.Model(bottom=bottom, top=top),
      DENSE,
      len(setting.features),
      setting.dim,
      0,
    )
    self.model = step_lib.Model(
      apply=apply,
      features=setting.features,
      dense_optimizer=optax.adagrad(0.01, 0.0, 1e-8),
      sparse_optimizer=optimizers.OPTIMIZERS[setting.optimizer](0.01),
      plan=plan,
      exchange_dtype=jnp.dtype(setting.wire),
      seed=0,
    )
    lowered, _ = step_lib.lower(self.model, mesh, self.params, DENSE)
    self.step = lowered.compile()
    self.seconds, self.rounds = [], 0

  def initial(self):
    opt_state = self.model.dense_optimizer.init(self.params)
    dense = (np.int32(0), self.params, opt_state)
    rows = tables.init(
      self.plan, self.model.sparse_optimizer, self.mesh, 0.05, 0
    )
    return step_lib.TrainState(
      *jax.device_put(dense, replicated(self.mesh)), rows
    )

  def start(self, drawn: Drawn):
    self.state, self.batches = self.initial(), drawn.batches
    to_positions = positions.from_ranks(self.plan, drawn.profile)
    if to_positions:
      self.batches = [dict(x) for x in self.batches]
      for x in self.batches:
        ids = to_positions(np.asarray(x["ids"]))
        x["ids"] = jax.device_put(ids, batch_sharding(self.mesh))

  def stop(self):
    del self.state, self.batches

  def steps(self, timed: int):
    """One more step comes first, as another plan has left the caches."""
    for i in range(timed + 1):
      begin = time.perf_counter()
      batch = self.batches[i % len(self.batches)]
      self.state, out = self.step(self.state, batch)
      jax.block_until_ready(self.state)
      if i:
        self.seconds.append(time.perf_counter() - begin)
    self.rounds = max(self.rounds, int(out["rounds"]))
