"""The public API as a notebook uses it, on columns of one's own."""

import dataclasses
import pathlib
import re

import helpers
import jax
import numpy as np
import pytest

import recjax
from recjax.config import TableRule
from recjax.data import vocabulary
from recjax.errors import UserError

SAMPLES = 6_000
FEATURES = (
  recjax.Feature("user", "user"),
  recjax.Feature("item", "item"),
  recjax.Feature("seen", "item", hotness=3, pooling="mean"),
)


def columns(seed=0):
  """Clicks that depend on the item, and on a number."""
  rng = np.random.default_rng(seed)
  user, item = np.minimum(rng.zipf(1.4, (2, SAMPLES)), 300)
  price = rng.random(SAMPLES)
  seen = [rng.integers(1, 300, k).tolist() for k in rng.integers(0, 5, SAMPLES)]
  p = np.where(item % 2, 0.8, 0.2) * price
  return {
    "user": [f"u{x}" for x in user],
    "item": item,
    "seen": seen,
    "price": price,
    "click": (rng.random(SAMPLES) < p).astype(int),
  }


def config_of() -> recjax.Config:
  c = recjax.Config()
  c.data.min_count = 1
  c.data.block_samples = 500
  c.embedding.dim = 8
  c.embedding.rules = (TableRule(tables=("user",), dim=4, optimizer="adagrad"),)
  c.model.bottom, c.model.top = (8,), (8,)
  c.mesh.devices = 8
  c.plan.hot_rows, c.plan.warm_rows = 20, 200
  c.train.batch_size, c.train.epochs = 256, 2
  return c


def assemble(workdir, config=None):
  config = config or config_of()
  prepared = recjax.prepare_columns(
    columns(), FEATURES, config, workdir, label="click", dense=("price",),
    report=helpers.quiet,
  )  # fmt: skip
  plan = recjax.make_plan(config, prepared, workdir, helpers.quiet)
  return config, prepared, plan, recjax.build(config, prepared, plan)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, config, prepared, plan, run after two epochs, losses)."""
  workdir = tmp_path_factory.mktemp("run")
  config, prepared, plan, run = assemble(workdir)
  losses = []
  for batch in recjax.batches(config, prepared, run):
    state, metrics = run.step(run.state, batch)
    run = run._replace(state=state)
    losses.append(float(metrics["loss"]))
  return workdir, config, prepared, plan, run, losses


def test_a_loop_of_ones_own_learns(trained):
  _, _, prepared, plan, run, losses = trained
  assert len(plan.groups) == 2 and plan.devices == 8
  assert prepared.schema.dense == ("price",)
  assert len(losses) == int(run.state.step) == 2 * (5_400 // 256)
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
  result = recjax.evaluate(run, prepared, helpers.quiet)
  assert result["auc"] > 0.7
  assert result["samples"] == prepared.samples["test"] == 600


@pytest.mark.slow
def test_it_is_what_train_does(trained, tmp_path):
  _, config, prepared, plan, run, _ = trained
  other = recjax.build(config, prepared, plan)
  other, result = recjax.train(config, prepared, other, tmp_path, helpers.quiet)
  assert result == recjax.evaluate(run, prepared, helpers.quiet)
  helpers.assert_close(
    jax.device_get(other.state.params), jax.device_get(run.state.params)
  )
  # And a checkpoint restores, onto another mesh and plan as well.
  one = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh))
  one.mesh.devices = 1
  one.plan = dataclasses.replace(config.plan, hot_rows=0, warm_rows=0)
  plan = recjax.make_plan(one, prepared, tmp_path, helpers.quiet)
  fresh = recjax.build(one, prepared, plan)
  found = recjax.restore(fresh, prepared, tmp_path)
  again = recjax.evaluate(found, prepared, helpers.quiet)
  assert again["log_loss"] == pytest.approx(result["log_loss"], abs=1e-6)
  with pytest.raises(UserError, match="there is no checkpoint 7"):
    recjax.restore(found, prepared, tmp_path, step=7)


@pytest.mark.slow
def test_rows_are_read_by_id_wherever_they_live(trained):
  """Hot, warm and cold ones, of both groups: those that checkpoints hold."""
  _, _, prepared, plan, run, _ = trained
  table = vocabulary.FILE
  import pyarrow.parquet as pq

  found = pq.read_table(pathlib.Path(prepared.directory) / table).to_pydict()
  dense = helpers.in_rank_order(run.state.tables, plan, run.store)
  for name, group in (("user", plan.groups[0]), ("item", plan.groups[1])):
    mine = [v for t, v in zip(found["table"], found["value"], strict=True)
            if t == name]  # fmt: skip
    ids = [v for v in mine if v is not None]
    rows = recjax.rows(run, prepared, name, ids)
    at = [mine.index(v) for v in ids]
    assert group.tables == (name,)
    np.testing.assert_array_equal(rows, dense[group.name].rows[at])
  assert recjax.rows(run, prepared, "item", ["1", "never seen"]).shape == (2, 8)
  with pytest.raises(UserError, match="there is no table 'cat'"):
    recjax.rows(run, prepared, "cat", ["1"])


def test_predictions_are_the_forward_pass(trained):
  _, config, prepared, _, run, _ = trained
  fresh = run._replace(state=run.state._replace(step=0 * run.state.step))
  batch = next(recjax.batches(config, prepared, fresh))
  p = recjax.predict(run, batch)
  assert p.shape == (256,) and np.all((p > 0) & (p < 1))
  y = np.asarray(batch["label"])
  assert p[y == 1].mean() > p[y == 0].mean() + 0.05


def test_prepared_columns_are_recognised(trained):
  """The same columns are loaded; others in one workdir are refused."""
  workdir, config, prepared, *_ = trained
  arguments = {"label": "click", "dense": ("price",), "report": helpers.quiet}
  again = recjax.prepare_columns(
    columns(), FEATURES, config, workdir, **arguments
  )
  assert again.vocabulary == prepared.vocabulary
  with pytest.raises(UserError, match="prepared from other logs"):
    recjax.prepare_columns(
      columns(seed=1), FEATURES, config, workdir, **arguments
    )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"item": None}, "columns: there is no column 'item'; there are user,"),
    ({"click": np.full(SAMPLES, 2)}, "columns: click: labels are 0 or 1"),
    ({"price": ["a"] * SAMPLES}, "columns: price: no numbers"),
    ({"price": [None] * SAMPLES}, "columns: price: a number is missing"),
    ({"price": [1.0]}, "columns: they are not equally long"),
    ({"seen": list(range(SAMPLES))}, "columns: seen: one id a sample found"),
    ({"user": [[1]] * SAMPLES}, "columns: user: lists of ids found"),
    ({"item": np.ones(SAMPLES)}, "columns: item: ids are integers or strings"),
  ],
)
def test_bad_columns_are_named(change, message, tmp_path):
  bad = {k: v for k, v in (columns() | change).items() if v is not None}
  with pytest.raises(UserError, match=re.escape(message)):
    recjax.prepare_columns(
      bad, FEATURES, config_of(), tmp_path, label="click", dense=("price",)
    )


def test_a_state_is_used_once(trained):
  """Where it is used again, JAX would end the process on several devices."""
  _, config, prepared, plan, _, _ = trained
  run = recjax.build(config, prepared, plan)
  batch = next(recjax.batches(config, prepared, run))
  run.step(run.state, batch)
  with pytest.raises(ValueError, match="given to a step before"):
    run.step(run.state, batch)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("train.batch_size", 512, "train.batch_size: the plan was made for 256"),
    ("mesh.devices", 4, "mesh.devices: the plan was made for 8"),
    ("embedding.dim", 16, "embedding: the plan was made for .*_8 .*_16 "),
  ],
)
def test_a_plan_of_another_config_is_refused(trained, path, value, message):
  _, _, prepared, plan, _, _ = trained
  config, (group, field) = config_of(), path.split(".")
  setattr(getattr(config, group), field, value)
  with pytest.raises(UserError, match=message):
    recjax.build(config, prepared, plan)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": 1}, "rows of all tables: the plan was made for"),
    ({"tables": ("other",)}, "embedding: the plan was made for .* of other; "),
  ],
)
def test_a_plan_of_other_data_is_refused(trained, change, message):
  _, config, prepared, plan, _, _ = trained
  first, *others = plan.groups
  if "rows" in change:  # one row fewer, in the last tier
    last = first.tiers[-1]
    last = dataclasses.replace(last, rows=last.rows - change["rows"])
    change = {"tiers": (*first.tiers[:-1], last)}
  first = dataclasses.replace(first, **change)
  other = dataclasses.replace(plan, groups=(first, *others))
  with pytest.raises(UserError, match=message):
    recjax.build(config, prepared, other)


def test_features_are_checked():
  with pytest.raises(ValueError, match="feature 'a': pooling 'avg' found, one"):
    recjax.Feature("a", "a", 2, "avg")
  with pytest.raises(ValueError, match="feature 'a': hotness 0 found"):
    recjax.Feature("a", "a", 0)


def test_every_public_name_is_there():
  for name in recjax.__all__:
    assert getattr(recjax, name).__doc__ or name == "Plan"
  assert set(recjax.__all__) == set(dir(recjax))
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    recjax.nothing  # noqa: B018
