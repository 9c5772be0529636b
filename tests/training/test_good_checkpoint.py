"""A run whose checkpoint is bad, in whatever way, goes on from a good one."""

import json

import attack_flips
import jax
import numpy as np
import pytest
from helpers import quiet

from recjax import jobs
from recjax.errors import UserError
from recjax.training import build, checkpoint, train

pytestmark = pytest.mark.slow


def small_config():
  """A run of seconds with rows in every tier but the frozen one."""
  config = attack_flips.small_config()
  config.checkpoint.full_every = 1
  return config


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  """The loss of its step is of the state before, and finite."""
  config = small_config()
  config.checkpoint.keep = 1
  prepared = jobs.prepare(config, tmp_path, quiet)
  plan, _ = jobs.plan(config, prepared, tmp_path, quiet)
  run = build.build(config, prepared, plan)

  def step(state, batch):
    state, out = run.step(state, batch)
    if int(state.step) == 8:  # parameters that are huge, and finite
      params = jax.tree.map(lambda x: x * 1e36, state.params)
      state = state._replace(params=params)
    return state, out

  with pytest.raises(
    UserError,
    match=r"the state after step 8 is not finite \(a logit of its batch\) and "
    r"is not saved; checkpoint 4 in .* is kept",
  ):
    train.train(config, prepared, run._replace(step=step), tmp_path, quiet)
  kept = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()]
  assert kept == ["4"]
  # Goes on from there.
  assert np.isfinite(jobs.train(config, tmp_path, quiet)["log_loss"])


def test_a_learning_rate_that_explodes_names_the_row(tmp_path):
  config = small_config()
  config.embedding.learning_rate, config.checkpoint.every_steps = 1e38, 1
  with pytest.raises(
    UserError,
    match=r"the state after step 1 is not finite \(the row of rank \d+ in "
    r"table C\d+\) and is not saved; there is no checkpoint before it",
  ):
    jobs.train(config, tmp_path, quiet)


def test_a_damaged_checkpoint_lets_the_one_before_go_on(tmp_path):
  """With a flag that the error offers; what is damaged is put aside."""
  config = small_config()
  want = jobs.train(config, tmp_path, quiet)
  directory = tmp_path / "checkpoints"
  meta = directory / "12" / "meta" / "metadata"
  found = json.loads(meta.read_text())
  found["at"]["done"]["samples"] += 1
  meta.write_text(json.dumps(found))
  with pytest.raises(UserError) as e:
    jobs.train(config, tmp_path, quiet)
  assert str(e.value) == (
    f"checkpoint 12 in {directory} is damaged: its meta data is not what was "
    "written; checkpoint 8 is whole: train on from it with "
    "--config.checkpoint.fall_back=True, or evaluate it with "
    "--config.checkpoint.step=8"
  )
  with pytest.raises(UserError, match=r"damaged.*--config\.checkpoint\.step=8"):
    jobs.evaluate(config, tmp_path, quiet)
  config.checkpoint.fall_back = True
  printed = []
  assert jobs.train(config, tmp_path, printed.append) == want
  aside = directory / "12.damaged"
  said = f"checkpoint 12 is damaged: it is {aside} from now on"
  assert said in printed
  assert aside.exists() and checkpoint.steps(directory) == [8, 12]
  # And where none is whole, nothing is moved.
  for step in (8, 12):
    (directory / str(step) / "meta" / "metadata").write_text("{}")
  with pytest.raises(UserError, match=r"no checkpoint in .* is whole; train a"):
    jobs.train(config, tmp_path, quiet)
  assert checkpoint.steps(directory) == [8, 12]
  config.checkpoint.fall_back = False
  with pytest.raises(UserError, match=r"12 .*damaged.*no other one there is w"):
    jobs.train(config, tmp_path, quiet)


def test_a_flipped_bit_is_noticed_or_nobody_reads_it(tmp_path):
  """In any file that a run reads back; scripts/attack_flips.py has more."""
  config = attack_flips.small_config()
  config.plan.table_wise = "C3,C9"  # of both groups
  jobs.train(config, tmp_path, quiet)
  result = attack_flips.attack(config, tmp_path, tries=24, seed=1)
  assert result.wrong == []
  assert result.tried == 24
  # Orbax's files have other names in every run.
  assert result.refused and result.same
