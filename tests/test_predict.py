"""Logs of any columns: trained on, evaluated, predicted, after the raw log."""

import csv
import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from helpers import quiet

from recjax import jobs
from recjax.config import Config
from recjax.data import prepared as prepared_lib
from recjax.errors import UserError
from recjax.log_schema import Cross, Hashed, Id, Ids, Number, Schema
from recjax.training import build, inputs, predictions, score_log

SAMPLES = 3_000
HEADER = ("request", "click", "rating", "w", "price", "score", "user", "item")
HEADER += ("tags", "history")
SCHEMA = Schema(
  labels=("click", "rating > 3"),
  numbers=(
    Number("price", transform="log1p", missing="mean"),
    Number("score", buckets=8),
  ),
  features=(
    Id("user", dim=4),
    Id("item", min_count=1),
    Ids("tags", most=2, pooling="mean"),
    Ids("history", table="item", most=3, keep="last", pooling="none"),
    Hashed("request", rows=50),
    Cross(("user", "item"), rows=100),
  ),
  weight="w",
  keep=("request", "price"),
)


def rows(seed: int, samples: int = SAMPLES) -> list[list[str]]:
  """Clicks that depend on the user and the item."""
  rng = np.random.default_rng(seed)
  user, item = np.minimum(rng.zipf(1.3, (2, samples)), 60)
  p = 1 / (1 + np.exp(-(user % 5 + item % 3 - 3.0)))
  click, price = rng.random(samples) < p, np.exp(rng.normal(size=samples))
  return [
    [
      *(f"r{k}", str(int(click[k])), str(rng.integers(1, 6)), "0.5"),
      *("" if k % 7 == 0 else f"{price[k]:.3f}", f"{rng.normal():.3f}"),
      *(f"u{user[k]}", str(item[k])),
      "|".join(f"t{x}" for x in rng.integers(0, 9, k % 4)),
      "|".join(str(x) for x in rng.integers(1, 60, k % 6)),
    ]
    for k in range(samples)
  ]


def write(path: pathlib.Path, table: list[list[str]], header=HEADER) -> str:
  with open(path, "w", newline="") as f:
    csv.writer(f).writerows([header, *table])
  return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(config, workdir, test metrics) of a run whose raw logs are gone."""
  at = tmp_path_factory.mktemp("log")
  config = Config(schema=SCHEMA)
  config.data.format = "csv"
  config.data.train = write(at / "train.csv", rows(0))
  config.data.test = write(at / "test.csv", rows(1, 700))
  config.data.block_samples, config.data.memory_mb = 500, 256
  config.embedding.dim = 4
  config.model.bottom, config.model.top = (8,), (8,)
  config.mesh.devices = 8
  config.plan.hot_rows, config.plan.warm_rows = 20, 60  # and cold ones
  config.train.batch_size, config.train.epochs = 128, 2
  result = jobs.train(config, at / "run", quiet)
  config.data.train = str(at / "archived.csv")
  (at / "train.csv").unlink()
  return config, at / "run", result


def changed(config: Config, **data) -> Config:
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **data)
  )


def test_labels_and_weights_reach_the_batch_and_weigh_the_loss(trained):
  config, workdir, _ = trained
  prepared = prepared_lib.load(str(workdir / "data"))
  assert prepared.schema.labels == ("click", "rating > 3")
  assert prepared.schema.dense == ("price",)
  plan, _ = jobs.plan(config, prepared, workdir, quiet)
  run = build.build(config, prepared, plan)
  batch = next(
    inputs.fed(inputs.training_batches(config, prepared, run), run, 1)
  )
  np.testing.assert_array_equal(batch["labels"][:, 0], batch["label"])
  assert set(np.unique(batch["labels"][:, 1])) == {0, 1}
  np.testing.assert_array_equal(batch["sample_weight"], 0.5)
  before = jax.device_get(run.state.params)
  weightless = batch | {"sample_weight": batch["sample_weight"] * 0}
  state, out = run.step(run.state, weightless)
  assert float(out["loss"]) == 0
  jax.tree.map(
    np.testing.assert_array_equal, before, jax.device_get(state.params)
  )


def test_a_workdir_is_enough_and_says_so(trained):
  config, workdir, result = trained
  said: list[str] = []
  again = jobs.evaluate(config, workdir, said.append)
  assert again["auc"] == pytest.approx(result["auc"], abs=1e-6)
  assert result["auc"] > 0.6
  wanted = "archived.csv does not exist: what was prepared from it before is"
  assert any(wanted in line for line in said)
  other = dataclasses.replace(
    config, schema=dataclasses.replace(SCHEMA, labels=("click",))
  )
  with pytest.raises(UserError, match=r"schema\.labels was .* is now"):
    jobs.evaluate(other, workdir, quiet)


def test_predictions_are_what_evaluation_sees(trained, tmp_path):
  config, workdir, result = trained
  log = config.data.test
  said: list[str] = []
  evaluated = jobs.evaluate(changed(config, evaluate=log), workdir, said.append)
  output = tmp_path / "p.parquet"
  found = jobs.predict(
    changed(config, predict=log), workdir, quiet, output=output
  )
  for name in ("auc", "log_loss", "calibration", "samples"):
    assert found[name] == pytest.approx(result[name], abs=1e-6)
    assert evaluated[name] == pytest.approx(result[name], abs=1e-6)
  table = pq.read_table(output)
  assert table.column_names == ["request", "price", "probability"]
  assert table["request"].to_pylist() == [f"r{k}" for k in range(700)]
  label = np.array([int(row[1]) for row in rows(1, 700)])
  p = table["probability"].to_numpy().astype(np.float64)
  loss = -np.mean(np.log(np.where(label, p, 1 - p)))
  assert loss == pytest.approx(result["log_loss"], abs=1e-6)
  assert any("out of vocabulary: " in line for line in said)
  unchanged = prepared_lib.load(str(workdir / "data"))
  assert unchanged.samples == {"train": SAMPLES, "test": 700}


def test_a_log_without_labels_is_predicted_but_not_evaluated(trained, tmp_path):
  config, workdir, _ = trained
  table = rows(1, 700)
  for row in table[:350]:
    row[6] = "nobody"
  bare = [0, *range(4, len(HEADER))]  # neither labels nor weights
  log = write(
    tmp_path / "new.csv",
    [[row[i] for i in bare] for row in table],
    [HEADER[i] for i in bare],
  )
  said: list[str] = []
  output = tmp_path / "p.csv"
  found = jobs.predict(
    changed(config, predict=log), workdir, said.append, output=output
  )
  assert found == {}
  assert len(pa.csv.read_csv(output)) == 700
  assert any("user 5" in line for line in said)  # 50% and the seldom ones
  with pytest.raises(UserError, match=r"data\.evaluate at step .* no label"):
    jobs.evaluate(changed(config, evaluate=log), workdir, quiet)


def test_a_label_that_is_missing_loses_no_row(trained, tmp_path):
  config, workdir, _ = trained
  table = rows(1, 300)
  for row in table[::3]:
    row[1] = ""
  log, output = write(tmp_path / "new.csv", table), tmp_path / "p.parquet"
  found = jobs.predict(
    changed(config, predict=log), workdir, quiet, output=output
  )
  assert found["samples"] == 200 and len(pq.read_table(output)) == 300


def test_columns_that_are_renamed_are_named_once(trained, tmp_path):
  config, workdir, _ = trained
  header = tuple("itm" if name == "item" else name for name in HEADER)
  log = write(tmp_path / "new.csv", rows(1, 10), header)
  output = tmp_path / "p.csv"
  with pytest.raises(UserError, match=r"no column 'item' .*'itm'"):
    jobs.predict(changed(config, predict=log), workdir, quiet, output=output)
  assert not output.exists()


@pytest.mark.parametrize(
  "name, there, wanted",
  [
    ("p.txt", False, "ends in neither .parquet nor .csv"),
    ("p.csv", True, "is there already"),
  ],
)
def test_an_output_that_cannot_be_is_refused(
  trained, tmp_path, name, there, wanted
):
  config, workdir, _ = trained
  if there:
    (tmp_path / name).write_text("mine")
  with pytest.raises(UserError, match=wanted):
    jobs.predict(
      changed(config, predict=config.data.test),
      workdir,
      quiet,
      output=tmp_path / name,
    )
  assert not there or (tmp_path / name).read_text() == "mine"


def test_predictions_that_were_cut_off_go_on(trained, tmp_path, monkeypatch):
  config, workdir, _ = trained
  config = changed(config, predict=config.data.test)
  whole, output = tmp_path / "whole.parquet", tmp_path / "p.parquet"
  jobs.predict(config, workdir, quiet, output=whole)
  monkeypatch.setattr(predictions, "_ROWS", 256)
  score = score_log.score

  def dies(*args, **kwargs):
    for i, part in enumerate(score(*args, **kwargs)):
      if i == 4:
        raise KeyboardInterrupt
      yield part

  with monkeypatch.context() as m:
    m.setattr(score_log, "score", dies)
    with pytest.raises(KeyboardInterrupt):
      jobs.predict(config, workdir, quiet, output=output)
  assert not output.exists()
  said: list[str] = []
  found = jobs.predict(config, workdir, said.append, output=output)
  assert any("going on with" in x and "after 512 samples" in x for x in said)
  assert pq.read_table(output).equals(pq.read_table(whole))
  assert found["samples"] == 700
  assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []
  # Of another checkpoint, they begin anew.
  assert predictions.begun(output, {"of": 1}) == 0
  shutil.rmtree(tmp_path / "p.parquet.unfinished")


def test_the_next_day_keeps_the_normalisers(trained, tmp_path):
  config, workdir, _ = trained
  was = prepared_lib.load(str(workdir / "data")).numbers
  table = rows(2, 500)
  for row in table:
    row[4] = row[5] = "1000"
  log = write(tmp_path / "next.csv", table)
  begun = dataclasses.replace(config.train, start_from=str(workdir))
  config = dataclasses.replace(changed(config, train=log), train=begun)
  found = jobs.prepare(config, tmp_path / "run", quiet)
  assert found.numbers == was and len(was) == 2
  alone = dataclasses.replace(config, train=trained[0].train)
  fresh = jobs.prepare(alone, tmp_path / "fresh", quiet)
  assert fresh.numbers != was
