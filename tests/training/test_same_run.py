"""What a run goes on with: the same settings, and samples not seen yet."""

import collections
import dataclasses
import shutil

import jax
import numpy as np
import pytest
from helpers import lines, quiet
from hypothesis import given
from hypothesis import strategies as st

from recjax import config as config_lib
from recjax import jobs
from recjax.data.shuffle import Done
from recjax.errors import UserError
from recjax.training import build, checkpoint, inputs, same_run, train
from recjax.training.state import At

# ---- Settings


def test_every_field_may_change_or_is_refused():
  """A field that somebody adds is refused until it is known to be harmless."""
  fields = same_run.as_json(same_run.flat(config_lib.Config()))
  for name in same_run.MAY_CHANGE:
    assert any(f"{path}.".startswith(f"{name}.") for path in fields), name
  refused = {
    path.split(".")[0]
    for path in fields
    if same_run.differences(fields, fields | {path: "another"})
  }
  assert refused == {*("seed", "data", "schema", "embedding", "model", "train")}
  free = {
    path
    for path in fields
    if not same_run.differences(fields, fields | {path: "another"})
  }
  assert {x for x in free if x[:5] not in ("plan.", "mesh.", "check")} == {
    "data.count_decay",
    "data.max_bad_rows",
    "data.memory_mb",
    "data.engine",
    "data.beam_options",
    "data.route",
    "data.rows",
    "data.predict",
    "data.evaluate",
    "schema.keep",
    "train.batch_size",
    "train.epochs",
    "train.log_every_steps",
    "train.start_from",
    "train.steps",
  }


def test_a_moving_end_of_the_decay_keeps_the_batch_size():
  now = {"train.decay_steps": 5, "train.steps": 0, "train.batch_size": 64}
  was = now | {"train.batch_size": 32}
  assert same_run.differences(was, now) == {"train.batch_size": (32, 64)}
  fixed = {"train.steps": 9}
  assert same_run.differences(was | fixed, now | fixed) == {}


# ---- What is done of the data


@given(st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1), st.data())
def test_no_sample_is_left_out_or_seen_twice(samples, sizes, data):
  """But those that fill no batch, with batches of any sizes, one by one."""
  done, seen = Done(), collections.Counter()
  for size in sizes:
    if size > samples:
      continue
    steps = data.draw(st.integers(0, 10))
    for i in range(steps):
      after = done.after(i + 1, samples, size)
      first = after.samples - size
      seen.update((after.epoch, x) for x in range(first, after.samples))
    done = done.after(steps, samples, size)
    assert done.until(done.epoch + 1, samples, size) * size <= samples
  assert not seen or max(seen.values()) == 1
  for epoch in range(done.epoch):
    assert {x for e, x in seen if e == epoch} >= set(
      range(samples - max(sizes) + 1)
    )


# ---- Runs


def small_config(**changes) -> config_lib.Config:
  c = config_lib.Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples, c.data.synthetic.rows = 3_000, 500
  c.data.block_samples, c.data.min_count = 256, 1
  c.data.test_fraction = 0.2
  c.embedding.dim, c.model.bottom, c.model.top = 4, (4,), (4,)
  c.embedding.optimizer, c.train.optimizer = "adam", "adam"
  c.mesh.devices = 2
  c.plan.hot_rows, c.plan.warm_rows = 20, 200
  c.train.batch_size, c.train.steps, c.train.warmup_steps = 64, 10, 4
  for path, value in changes.items():
    group, field = path.split("__")
    setattr(getattr(c, group), field, value)
  return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of ten steps of 64 samples."""
  workdir = tmp_path_factory.mktemp("trained")
  jobs.train(small_config(), workdir, quiet)
  return workdir


@pytest.fixture
def copied(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "copied")


def test_a_finished_run_does_not_answer_for_another_one(trained):
  before = (trained / "metrics.jsonl").read_text()
  config = small_config(train__learning_rate=5.0)
  config.seed = 1
  with pytest.raises(UserError) as e:
    jobs.train(config, trained, quiet)
  said = str(e.value)
  assert "seed is 0 there and 1 in this config" in said
  assert "train.learning_rate is 0.02 there and 5.0 in this config" in said
  assert f"--config.train.start_from={trained}" in said
  assert "--workdir" in said
  assert (trained / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
  "change",
  [
    {"data__shuffle_blocks": 2},
    {"train__warmup_steps": 5},
    {"embedding__learning_rate": 0.1},
    {"embedding__exchange_dtype": "bfloat16"},
    {"embedding__rules": (config_lib.TableRule(learning_rate=0.1),)},
  ],
)
def test_other_settings_are_refused(change, trained):
  (name,) = change
  with pytest.raises(UserError, match=name.replace("__", r"\.") + " is "):
    jobs.train(small_config(train__steps=12, **change), trained, quiet)


def test_fewer_steps_than_are_done_are_refused(trained):
  with pytest.raises(
    UserError, match=r"train\.steps, .* has done 10 steps, .* 8"
  ):
    jobs.train(small_config(train__steps=8), trained, quiet)


def test_it_goes_on_with_batches_of_another_size(copied):
  """37 batches of 64 are in an epoch of 2,400: after 10, 13 of 128 are left."""
  config = small_config(train__steps=0, train__batch_size=128)
  config.train.log_every_steps = 1
  jobs.train(config, copied, quiet)
  steps = [x["step"] for x in lines(copied, "train")]
  assert steps == [10, *range(11, 24)]
  last = small_config(train__steps=0, train__batch_size=2_048)
  jobs.train(last, copied, quiet)  # nothing is left for such a batch
  assert lines(copied, "test")[-1]["step"] == 23


def test_the_samples_of_a_resumed_epoch_are_those_not_seen(copied):
  """By their labels and ids, beside an epoch in one order."""
  config = small_config(train__steps=0)
  prepared = jobs.prepare(config, copied, quiet)
  plan, _ = jobs.plan(config, prepared, copied, quiet)
  run = build.build(config, prepared, plan)
  whole = inputs.batches(run, prepared, "train", 2_400, shuffle_blocks=16)
  rest = inputs.training_batches(
    small_config(train__batch_size=160), prepared, run, Done(0, 640)
  )
  # Of a batch, rows come in the order of their blocks.
  want = collections.Counter(map(bytes, next(whole)["ids"]))
  first = inputs.training_batches(config, prepared, run)
  for data, batches in ((first, 10), (rest, 11)):
    for _ in range(batches):
      want.subtract(map(bytes, next(data)["ids"]))
  assert set(want.values()) == {0}


def test_a_window_of_the_log_says_how_many_steps_it_is_of(copied):
  jobs.train(
    small_config(train__steps=14, train__log_every_steps=4), copied, quiet
  )
  found = [(x["step"], x["steps"]) for x in lines(copied, "train")]
  assert found == [(10, 10), (12, 2), (14, 2)]


# ---- Checkpoints by time


def test_checkpoints_by_time_change_nothing(trained, tmp_path):
  """Each scores a batch once more, whose stored rows visit for that."""
  results = []
  for minutes, want in ((1e-9, [1, 2, 3]), (60.0, [3]), (0.0, [3])):
    workdir = tmp_path / str(minutes)
    shutil.copytree(trained / "data", workdir / "data")
    config = small_config(train__steps=3, checkpoint__keep=9)
    config.checkpoint.every_minutes = minutes
    results.append(jobs.train(config, workdir, quiet))
    assert checkpoint.steps(workdir / "checkpoints") == want
  assert results[0] == results[1] == results[2]


# ---- Another run's weights


def test_it_starts_from_another_run(trained, tmp_path):
  changes = {"train__start_from": str(trained), "train__learning_rate": 0.001}
  config = small_config(**changes, train__steps=6)
  shutil.copytree(trained / "data", tmp_path / "data")
  prepared = jobs.prepare(config, tmp_path, quiet)
  plan, _ = jobs.plan(config, prepared, tmp_path, quiet)
  run = build.build(config, prepared, plan)
  began, at = train._begin_from(config, prepared, run, quiet)
  assert at == At(10, Done(), 10)
  kept, _ = train.restore(
    build.build(config, prepared, plan),
    prepared,
    trained / "checkpoints",
    10,
    quiet,
  )
  for field in ("params", "tables"):
    got, want = getattr(began.state, field), getattr(kept.state, field)
    jax.tree.map(np.testing.assert_array_equal, got, want)
  counts = [
    int(x.count)
    for x in jax.tree.leaves(
      began.state.opt_state,
      is_leaf=lambda x: "count" in getattr(x, "_fields", ()),
    )
  ]
  assert counts == [10, 0]  # Adam's, and that of the warm-up

  jobs.train(config, tmp_path, quiet)
  config.train.steps = 8  # goes on from its own checkpoint
  jobs.train(config, tmp_path, quiet)
  assert [x["step"] for x in lines(tmp_path, "test")] == [16, 18]


def test_what_to_start_from_must_be_there_and_fit(trained, tmp_path):
  shutil.copytree(trained / "data", tmp_path / "data")
  config = small_config(train__start_from=str(tmp_path / "nowhere"))
  with pytest.raises(UserError, match=r"train\.start_from: .* no checkpoint"):
    jobs.train(config, tmp_path, quiet)
  config = small_config(train__start_from=str(trained), model__top=(8,))
  with pytest.raises(UserError, match=r"of another model: model\.top is \[4\]"):
    jobs.train(config, tmp_path, quiet)


def test_evaluating_needs_the_model_only(trained):
  config = small_config(train__learning_rate=0.5, train__batch_size=128)
  got = jobs.evaluate(config, trained, quiet)
  want = lines(trained, "test")[-1]
  for name, value in got.items():
    np.testing.assert_allclose(value, want[name], rtol=1e-6)


def test_settings_read_back_as_they_were():
  rules = (config_lib.TableRule(tables=("a",), dim=4),)
  flat = same_run.as_json(same_run.flat(config_lib.Embedding(rules=rules)))
  assert flat["rules"] == [same_run.as_json(dataclasses.asdict(rules[0]))]
