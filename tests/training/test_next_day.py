"""A run that begins with what another one has trained, on another log."""

import dataclasses
import shutil

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers_checkpoint import (
  PROFILE_OF_TWO,
  assert_same,
  by_rank,
  fresh,
  make_plan,
  save,
)

import recjax
from recjax.embedding.optimizers import TierArrays
from recjax.embedding.row_random import initial_rows
from recjax.errors import UserError
from recjax.frequency import Profile, group_ranks
from recjax.training import checkpoint, same_run, train
from recjax.training.row_sources import Carried, check_groups
from recjax.training.state import Identity

# ---- Rows

OWNED = make_plan(
  "two", g={"table_wise": (("u", 6), ("t", 1)), "padding_rows": 16}
)
OWNED_OF_TWO = make_plan(
  "two_2",
  g={"table_wise": (("t", 1),)},
  h={"table_wise": (("v", 0),), "padding_rows": 6},
)
FROZEN = make_plan("two", g={"frozen": 500}, h={"frozen": 300})
FROZEN_ALONE = make_plan("two_1_cold", g={"frozen": 9_999})
SCALE = 0.3


def other_vocabulary() -> tuple[Profile, np.ndarray]:
  """The same rows of each table in another order, of which some are new."""
  rng = np.random.default_rng(5)
  table = rng.permutation(PROFILE_OF_TWO.table)
  ranks = np.empty(len(table), np.int32)
  for t in range(3):
    ranks[table == t] = rng.permutation(
      np.flatnonzero(PROFILE_OF_TWO.table == t)
    )
  ranks[rng.random(len(table)) < 0.2] = -1
  return dataclasses.replace(PROFILE_OF_TWO, table=table), ranks


def wanted(rows, plan, profile, ranks, seeds):
  """Rows and slot variables now, of `rows` by rank in their groups before."""
  groups = [g.tables for g in plan.groups]
  there = group_ranks(PROFILE_OF_TWO, groups)
  found = {}
  for g in plan.groups:
    mine = ranks[np.isin(profile.table, [profile.tables.index(t)
                                         for t in g.tables])]  # fmt: skip
    old = rows[g.name]
    at = np.where(mine < 0, 0, there[mine])
    zero = lambda x, mine=mine: np.where(
      (mine < 0).reshape(-1, *[1] * (x.ndim - 1)), 0, x
    )
    first = initial_rows(
      np.arange(len(mine), dtype=np.int32), g.dim, SCALE, seeds[g.name]
    )
    new = (mine < 0)[:, None]
    found[g.name] = TierArrays(
      np.where(new, np.asarray(first), old.rows[at]),
      {k: zero(x[at]) for k, x in old.slots.items()},
    )
  return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """(directory, rows and slot variables by rank) of two groups, all tiers."""
  directory = tmp_path_factory.mktemp("before") / "checkpoints"
  run = fresh(OWNED, seed=3, profile=PROFILE_OF_TWO)
  rng = np.random.default_rng(1)
  for of in run.store.groups.values():  # slot variables that are not 0
    for part in of.parts:
      for x in part.slots.values():
        x[:] = rng.normal(size=x.shape)
  with checkpoint.manager(directory) as to:
    save(to, 1, run)
  return directory, by_rank(run, PROFILE_OF_TWO)


def carry(directory, plan, carried, profile):
  run = fresh(plan, profile=profile)
  meta = checkpoint.read_meta(directory, 1)
  state = checkpoint.restore(directory, 1, meta, run, profile, carried=carried)
  return run._replace(state=state)


@pytest.mark.parametrize(
  "plan",
  [FROZEN_ALONE, OWNED_OF_TWO, FROZEN],
  ids=["one device", "two with owners", "eight"],
)
def test_rows_go_on_by_table_and_value(plan, stored):
  """Onto other tiers, owners and devices; new ones get their first values."""
  directory, rows = stored
  profile, ranks = other_vocabulary()
  run = carry(directory, plan, Carried(PROFILE_OF_TWO, ranks, SCALE), profile)
  seeds = {g.name: np.uint32(g.seed) for g in run.spec.embedding.groups}
  assert_same(by_rank(run, profile), wanted(rows, plan, profile, ranks, seeds))


def test_rows_that_do_not_go_on_are_checked_too(stored, tmp_path):
  """The checksums are of all rows: one bit of one of those."""
  directory, _ = stored
  profile, ranks = other_vocabulary()
  copied = shutil.copytree(directory, tmp_path / "checkpoints")
  (chunk,) = (copied / "1" / "stored" / "h.cold.rows").glob("0.0.0")
  data = bytearray(chunk.read_bytes())
  data[-1 - 4 * 4 * 7] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(UserError, match=r"the checksum of h\.cold\.rows"):
    carry(copied, FROZEN_ALONE, Carried(PROFILE_OF_TWO, ranks, SCALE), profile)


def test_a_table_that_is_new_starts_afresh_and_one_may_be_gone(stored):
  directory, rows = stored
  g, h = make_plan("two_1_cold").groups
  k = dataclasses.replace(h, name="k", tables=("w",))
  plan = dataclasses.replace(make_plan("two_1_cold"), groups=(g, k))
  profile = dataclasses.replace(PROFILE_OF_TWO, tables=("t", "u", "w"))
  ranks = np.arange(profile.rows, dtype=np.int32)
  ranks[profile.table == 2] = -1
  run = carry(directory, plan, Carried(PROFILE_OF_TWO, ranks, SCALE), profile)
  found = by_rank(run, profile)
  assert_same(found["g"], rows["g"])
  seed = np.uint32(run.spec.embedding.group("k").seed)
  first = initial_rows(np.arange(k.rows, dtype=np.int32), k.dim, SCALE, seed)
  assert_same(found["k"].rows, np.asarray(first))
  assert all(not x.any() for x in found["k"].slots.values())


def test_tables_that_stay_have_the_same_dims():
  """As a checkpoint of a run of other data is compared."""
  model = {"embedding.dim": 8, "table a": [8, "float32", "sgd"]}
  meta = {"identity": {"model": model, "vocabulary": "", "rows": 1}}
  meta["identity"]["settings"] = {}
  check = lambda of, **new: same_run.check_model(
    "there", 3, meta, Identity({"embedding.dim": 8} | of, "", 1, {}), **new
  )
  new = {"table b": [4, "float32", "adam"]}
  assert check(new, new_tables=True).model == model
  with pytest.raises(UserError, match="another model: table b is None there"):
    check(new)
  other = {"table a": [4, "float32", "sgd"]}
  with pytest.raises(UserError, match="of another model: table a is"):
    check(other, new_tables=True)


def test_groups_of_other_learning_rates_are_refused():
  now = make_plan("two")
  other = dataclasses.replace(now.groups[1], name="h_0.1")
  now = dataclasses.replace(now, groups=(now.groups[0], other))
  check_groups(now, now)
  with pytest.raises(UserError, match=r"start_from: table v is in group h th"):
    check_groups(make_plan("two"), now)


# ---- Days

ITEMS = 400
FEATURES = (
  recjax.Feature("user", "user"),
  recjax.Feature("item", "item"),
  recjax.Feature("seen", "item", hotness=2, pooling="mean"),
)


def log_of(day: int, samples: int) -> dict:
  """Clicks that depend on user and items; a quarter of these is new a day."""
  rng = np.random.default_rng(day)
  taste = np.random.default_rng(100).normal(size=(2, 5_000))
  popular = np.random.default_rng(day // 2).permutation(ITEMS)
  item = popular[rng.zipf(1.2, samples) % ITEMS] + day * ITEMS // 4
  user = rng.integers(0, 200, samples)
  seen = rng.choice(item, (samples, 2))
  logit = 1.5 * taste[0, item] + taste[1, user] + taste[0, seen].mean(1)
  return {
    "user": user,
    "item": item,
    "seen": seen.tolist(),
    "click": (rng.random(samples) < 1 / (1 + np.exp(-logit))).astype(int),
  }


def config_of(**train_fields) -> recjax.Config:
  c = recjax.Config()
  c.data.min_count, c.data.block_samples, c.data.test_fraction = 1, 500, 0.3
  c.embedding.dim, c.embedding.learning_rate = 8, 0.1
  c.model.bottom, c.model.top = (8,), (16,)
  c.mesh.devices = 1
  c.plan.hot_rows, c.plan.warm_rows = 20, 2_000
  c.train.batch_size, c.train.epochs = 100, 2
  for name, value in train_fields.items():
    setattr(c.train, name, value)
  return c


def assembled(config, log, workdir):
  prepared = recjax.prepare_columns(
    log, FEATURES, config, workdir, label="click", report=helpers.quiet
  )
  plan = recjax.make_plan(config, prepared, workdir, helpers.quiet)
  return prepared, recjax.build(config, prepared, plan)


def by_value(run, folder) -> dict:
  """{(table, kind, value): (its row, its slot variables)} of all tables."""
  (arrays,) = helpers.in_rank_order(
    run.state.tables, run.spec.embedding.plan, run.store
  ).values()
  found = pq.read_table(folder / "vocabulary.parquet").to_pydict()
  return {
    key: (arrays.rows[i], *(x[i] for x in arrays.slots.values()))
    for i, key in enumerate(
      zip(found["table"], found["kind"], found["value"], strict=True)
    )
  }


def test_a_day_later_it_is_better_than_the_old_model_and_a_fresh_one(tmp_path):
  config, yesterday, today = config_of(), tmp_path / "0", tmp_path / "1"
  prepared, run = assembled(config, log_of(0, 8_000), yesterday)
  run, _ = recjax.train(config, prepared, run, yesterday, helpers.quiet)
  old_rows = by_value(run, yesterday / "checkpoints")
  shutil.rmtree(yesterday / "data")  # its checkpoints are enough

  config = config_of(start_from=str(yesterday))
  prepared, run = assembled(config, log_of(1, 2_000), today)
  plan = run.spec.embedding.plan
  fresh_run = recjax.build(config, prepared, plan)
  first_rows = by_value(fresh_run, today / "data")
  began, at = train._begin_from(config, prepared, run, helpers.quiet)
  assert at.began == 112
  rows = by_value(began, today / "data")
  kept, new = rows.keys() & old_rows.keys(), rows.keys() - old_rows.keys()
  assert len(kept) > 300 and len(new) > 50 and old_rows.keys() - kept
  assert ("item", "oov", None) in kept and ("user", "missing", None) in kept
  for key in rows:
    assert_same(rows[key], (old_rows if key in kept else first_rows)[key])

  for batch in recjax.batches(config, prepared, fresh_run):
    state, _ = fresh_run.step(fresh_run.state, batch)
    fresh_run = fresh_run._replace(state=state)
  alone = recjax.evaluate(fresh_run, prepared, helpers.quiet)["auc"]
  config.train.epochs = 0  # the old model alone; nothing is saved
  run, old = recjax.train(config, prepared, began, today, helpers.quiet)
  config.train.epochs = 2
  _, result = recjax.train(config, prepared, run, today, helpers.quiet)
  assert result["auc"] > max(old["auc"], alone) + 0.02
