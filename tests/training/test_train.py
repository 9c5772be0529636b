"""The whole job as a user runs it: resumed, killed, fed with bad input."""

import errno
import fcntl
import importlib.util
import os
import pathlib
import shutil

import attack_kills
import numpy as np
import pytest
from helpers import lines, quiet

from recjax import config as config_lib
from recjax import jobs, writer_lock
from recjax.config import Train
from recjax.errors import UserError
from recjax.plan.plan import Plan
from recjax.training import build, metrics, step_log, train

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def small_config(tmp_path) -> config_lib.Config:
  """A run of seconds with all three tiers in use."""
  c = config_lib.Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples = 20_000
  c.data.synthetic.rows = 5_000
  c.data.block_samples = 1_024
  c.data.min_count = 1
  c.embedding.dim = 4
  c.model.bottom = (8,)
  c.model.top = (8,)
  c.mesh.devices = 8
  c.plan.hot_rows = 100
  c.plan.warm_rows = 2_000
  c.train.batch_size = 256
  c.train.log_every_steps = 10
  c.checkpoint.every_steps = 20
  c.checkpoint.full_every = 2
  return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(config, workdir, final metrics, all that was printed) of one run."""
  workdir = tmp_path_factory.mktemp("run")
  config = small_config(workdir)
  printed = []
  result = jobs.train(config, workdir, printed.append)
  return config, workdir, result, printed


def test_a_run_leaves_what_it_should(trained):
  _, workdir, result, printed = trained
  steps = 18_000 // 256
  last = lines(workdir, "test")[-1]
  assert last["step"] == steps
  for name in ("auc", "log_loss", "normalized_entropy", "calibration"):
    assert last[name] == result[name]
    assert np.isfinite(result[name])
  assert result["auc"] > 0.65
  first, *_, end = lines(workdir, "train")
  assert first["step"] == 10 and end["step"] == steps
  assert end["loss"] < first["loss"]
  assert end["rounds"] >= 1 and end["distinct_rows"] > 0
  assert end["samples_per_second"] > 0
  assert f"auc {result['auc']:.6f}" in printed[-1]
  assert "teacher" in printed[-1]
  assert list(workdir.glob("events.out.tfevents*")) or list(
    workdir.glob("**/events.out.tfevents*")
  )
  assert (workdir / "plan.json").exists()
  assert "measured" in (workdir / "plan.html").read_text()
  assert (workdir / "checkpoints" / "vocabulary.parquet").exists()
  kept = [p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()]
  assert sorted(kept) == ["60", str(steps)]


def test_padding_of_the_last_test_batch_does_not_count(trained):
  """Metrics are those of the split's samples, whatever the batch size."""
  config, workdir, result, _ = trained
  assert 2_000 % config.train.batch_size  # the last batch is padded
  assert result["samples"] == 2_000
  config = small_config(workdir)
  config.train.batch_size = 2_000  # and this one is not
  whole = jobs.evaluate(config, workdir, quiet)
  for name in result:
    np.testing.assert_allclose(whole[name], result[name], atol=1e-6)


def test_tables_may_be_table_wise_and_then_no_longer(tmp_path):
  """What training wrote to an owner's rows is read where they are else."""
  config = small_config(tmp_path)
  config.mesh.devices = 2
  config.data.synthetic.samples = 4_000
  config.data.synthetic.hotness = (*[1, 1, 6], *[1] * 8, 3, *[1] * 14)
  config.data.pooling = "mean"
  config.plan.table_wise = "C3,C12"
  config.train.steps = 8
  printed = []
  pooled = jobs.train(config, tmp_path, printed.append)
  assert "pooled by their owners: C3 on" in "\n".join(printed)
  config.plan.table_wise = "none"
  config.plan.hot_rows = 50
  plain = jobs.evaluate(config, tmp_path, quiet)
  assert plain["log_loss"] == pytest.approx(pooled["log_loss"], abs=1e-6)


def test_run_again_it_only_evaluates(trained):
  config, workdir, result, _ = trained
  before = (workdir / "metrics.jsonl").read_text()
  printed = []
  assert jobs.train(config, workdir, printed.append) == result
  (said,) = [x for x in printed if x.startswith("finished before")]
  assert said.startswith("finished before, at step 70 of 70: data.format='syn")
  assert "train.batch_size=256" in said
  assert (workdir / "metrics.jsonl").read_text() == before


def test_killed_before_its_test_line_it_writes_it(trained, tmp_path):
  config, workdir, result, _ = trained
  for name in ("data", "checkpoints"):
    shutil.copytree(workdir / name, tmp_path / name)
  whole = (workdir / "metrics.jsonl").read_text().splitlines(True)
  (tmp_path / "metrics.jsonl").write_text("".join(whole[:-1]))
  assert jobs.train(config, tmp_path, quiet) == result
  assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole)


@pytest.mark.parametrize(("expected", "said"), [(0.0, False), (7.0, True)])
def test_a_device_alone_tells_of_no_exchange(tmp_path, expected, said):
  printed, written = [], []
  log = step_log.StepLog(
    Train(batch_size=4, log_every_steps=1),
    2,
    0,
    expected,
    write=lambda *line: written.append(line),
    report=printed.append,
    saver=None,
    directory=tmp_path,
  )
  log.add(1, {"loss": 0.5, "rounds": 1, "distinct_rows": expected})
  log.flush()
  assert ("rounds 1, distinct rows 7 (planned 7), " in printed[0]) == said
  assert printed[0].startswith("step 1 of 2: loss 0.50000, ")
  assert written[0][2]["rounds"] == 1


def test_evaluates_on_one_device_with_every_row_cold(trained):
  config, workdir, result, _ = trained
  config = small_config(workdir)
  config.mesh.devices = 1
  config.plan.hot_rows = config.plan.warm_rows = 0
  trained_with = (workdir / "plan.json").read_text()
  got = jobs.evaluate(config, workdir, quiet)
  for name in result:
    np.testing.assert_allclose(got[name], result[name], atol=1e-6)
  # Planned without gradients and slots, beside the plan of the training.
  assert (workdir / "plan.json").read_text() == trained_with
  plan = Plan.from_json((workdir / "serving_plan.json").read_text())
  predicted, (group,) = plan.prediction, plan.groups
  assert dict(predicted.memory)["slot variables"] == 0
  assert dict(predicted.sent)["gradients"] == 0
  cold = group.tier("cold")
  of_cold = plan.report(group.name, "cold")
  assert of_cold.bytes == cold.shard_rows * cold.owners * 4 * group.dim


def test_two_runs_do_not_share_a_workdir(trained, tmp_path):
  """But a run and an evaluation do."""
  config, workdir, result, _ = trained
  before = (workdir / "metrics.jsonl").read_bytes()
  with (workdir / writer_lock.FILE).open("a") as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # as another process does
    for job in (jobs.train, jobs.prepare_and_plan):
      with pytest.raises(UserError, match=r"--workdir: .* is being written to"):
        job(config, workdir, quiet)
    assert jobs.evaluate(config, workdir, quiet) == result
  assert (workdir / "metrics.jsonl").read_bytes() == before
  jobs.prepare_and_plan(config, workdir, quiet)


def test_evaluates_a_workdir_that_it_may_not_write_to(trained, monkeypatch):
  config, workdir, result, _ = trained
  stamps = lambda: {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
  before = stamps()
  monkeypatch.setattr(os, "access", lambda *_: False)  # root may do all
  assert jobs.evaluate(config, workdir, quiet) == result
  assert stamps() == before


@pytest.mark.parametrize("what", ["folder", "damaged", "full"])
def test_metrics_never_stop_a_run(trained, tmp_path, what, monkeypatch):
  config, workdir, result, _ = trained
  for name in ("data", "checkpoints"):
    shutil.copytree(workdir / name, tmp_path / name)
  path = tmp_path / "metrics.jsonl"
  if what == "folder":
    path.mkdir()
  else:
    path.write_bytes(b'{"step": 1}\n\xff\x00\n' + b"[" * 9_999 + b"\n[1]\n")
  if what == "full":
    monkeypatch.setattr(metrics.MetricsWriter, "write", refused)
  printed = []
  assert jobs.train(config, tmp_path, printed.append) == result
  said = "\n".join(printed)
  if what == "damaged":
    assert "4 damaged lines of " in said
    assert (tmp_path / "metrics.damaged").read_bytes().startswith(b'{"step"')
    assert [x["step"] for x in lines(tmp_path, "test")] == [70]
  else:
    assert said.count("no more metrics in ") == 1


def refused(*_):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_the_system_refuses_is_one_message(trained, tmp_path):
  config, workdir, result, _ = trained
  shutil.copytree(workdir / "data", tmp_path / "data")
  (tmp_path / "checkpoints").write_text("a file")
  with pytest.raises(UserError, match=r"checkpoints: (File exists|Not a dir)"):
    jobs.train(config, tmp_path, quiet)
  (tmp_path / "checkpoints").unlink()
  assert jobs.train(config, tmp_path, quiet) == result
  with pytest.raises(UserError, match=r"file: File exists\. What"):
    (tmp_path / "file").touch()
    jobs.train(config, tmp_path / "file", quiet)


def test_evaluates_an_older_checkpoint(trained):
  config, workdir, result, _ = trained
  config = small_config(workdir)
  config.checkpoint.step = 60
  got = jobs.evaluate(config, workdir, quiet)
  assert got["auc"] != result["auc"]
  config.checkpoint.step = 61
  with pytest.raises(UserError, match=r"checkpoint\.step: .*61.*\[60, "):
    jobs.evaluate(config, workdir, quiet)


# ---- Killed and resumed


def test_killed_at_any_moment_it_ends_with_the_same_metrics():
  """A small part of scripts/attack_kills.py."""
  found = attack_kills.attack(4)
  assert [x.wrong for x in found] == [""] * len(found)
  went_on = {x.resumed for x in found if x.resumed}
  assert len(went_on) > 1  # from several checkpoints
  assert any(x.signum and x.newest for x in found)


# ---- Bad input, at the level of the job


def assembled(config, workdir):
  """(prepared data, run) of a job."""
  prepared = jobs.prepare(config, workdir, quiet)
  plan, _ = jobs.plan(config, prepared, workdir, quiet)
  return prepared, build.build(config, prepared, plan)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
  """That of a batch which meets a stored row that is not."""
  config = small_config(tmp_path)
  config.train.steps = 30
  prepared, run = assembled(config, tmp_path)

  def step(state, batch):
    if int(state.step) == 24:
      for stored in run.store.groups.values():
        stored.parts[0].rows[:] = np.nan
    return run.step(state, batch)

  with pytest.raises(
    UserError, match=r"the loss is .* at step 2\d; checkp.* 20"
  ):
    train.train(config, prepared, run._replace(step=step), tmp_path, quiet)
  kept = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()]
  assert kept == ["20"]
  # Goes on from there.
  assert np.isfinite(jobs.train(config, tmp_path, quiet)["log_loss"])


def test_what_does_not_fit_the_run_is_named(trained, tmp_path):
  _, workdir, _, _ = trained

  def check(pattern, **changes):
    config = small_config(workdir)
    for path, value in changes.items():
      group, field = path.split("__")
      setattr(getattr(config, group), field, value)
    before = sorted(p for p in workdir.rglob("*") if "checkpoints" in str(p))
    with pytest.raises(UserError, match=pattern):
      jobs.train(config, workdir, quiet)
    after = sorted(p for p in workdir.rglob("*") if "checkpoints" in str(p))
    assert before == after

  check(r"mesh\.devices: 99 asked for, but JAX finds 8", mesh__devices=99)
  check(r"train\.batch_size: 257 .* 8 devices; .* 256", train__batch_size=257)
  check(
    r"plan\.host_memory_mb: .* MB more than",
    plan__host_memory_mb=1,
    plan__warm_rows=0,
    embedding__dim=256,
  )
  check(r"other settings, .* model\.top is \[8\] there", model__top=(16,))
  check(r"embedding\.dim is 4 there and 8 in this", embedding__dim=8)
  check(r"data\.min_count", data__min_count=3)


# ---- Real logs

CRITEO = ROOT.parent / "shared" / "data" / "criteo_kaggle_80k.tsv.gz"


@pytest.mark.skipif(not CRITEO.exists(), reason="the Criteo log is not here")
def test_criteo_kaggle_reaches_its_auc(tmp_path):
  spec = importlib.util.spec_from_file_location(
    "criteo_kaggle", ROOT / "configs" / "criteo_kaggle.py"
  )
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.data.train = str(CRITEO)
  config.data.test_fraction = 0.2
  config.mesh.devices = 1
  result = jobs.train(config, tmp_path, quiet)
  assert result["samples"] == 16_000
  assert result["auc"] >= 0.765
  assert result["log_loss"] < 0.445


def test_a_plan_for_serving_cannot_train(tmp_path):
  config = small_config(tmp_path)
  config.plan.serving = True
  with pytest.raises(UserError, match=r"plan\.serving: .*--mode=plan"):
    jobs.train(config, tmp_path, quiet)
