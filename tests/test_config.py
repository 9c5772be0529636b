"""Typos and wrong values name the field, what was found, and the nearest."""

import pathlib
import runpy

import pytest

from recjax import config as config_lib
from recjax.config import Config, check, check_flags
from recjax.errors import UserError

CONFIGS = sorted(
  (pathlib.Path(__file__).parents[1] / "configs").glob("[!_]*.py")
)


def error_of(f, *args) -> str:
  with pytest.raises(UserError) as e:
    f(*args)
  assert "\n" not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize(
  ("arg", "parts"),
  [
    ("--config.seeed=1", ["no field seeed", "did you mean seed?"]),
    ("--config.trian.steps=1", ["no field trian", "did you mean train?"]),
    (
      "--config.train.bach_size=64",
      ["no field train.bach_size", "did you mean train.batch_size?"],
    ),
    (
      "--config.data.synthetic.sample=1",
      [
        "no field data.synthetic.sample",
        "did you mean data.synthetic.samples?",
      ],
    ),
    ("--config.train.xyzzy=1", ["the fields are", "train.batch_size"]),
    ("--config.train=1", ["train is a group of fields"]),
    ("-config.data.synthetic=1", ["data.synthetic is a group of fields"]),
    ("--config.seed.x=1", ["seed has no fields"]),
    ("--config.train.steps.x", ["train.steps has no fields"]),
  ],
)
def test_flag_that_names_no_field(arg, parts):
  argv = ["main.py", "--config", "configs/quickstart.py", arg]
  message = error_of(check_flags, argv)
  assert message.startswith(arg)
  for part in parts:
    assert part in message


def test_flags_of_fields_and_other_flags_pass():
  check_flags(
    [
      "main.py",
      "--config=configs/quickstart.py",
      "--workdir=config.nothing",
      "--config.train.batch_size=64",
      "-config.data.synthetic.rows=10",
      "--config.seed",
      "3",
    ]
  )


def assign_wrong(c, *path):
  for name in path[:-1]:
    c = getattr(c, name)
  setattr(c, path[-1], 1)


@pytest.mark.parametrize(
  ("path", "parts"),
  [
    (("seeed",), ["field seeed;", "did you mean seed?"]),
    (("train", "step"), ["train.step;", "did you mean train.steps?"]),
    (("train", "xyzzy"), ["train.xyzzy", "fields are train.batch_size"]),
    (("trian", "steps"), ["field trian;", "did you mean train?"]),
    (
      ("data", "synthetic", "sample"),
      ["data.synthetic.sample;", "did you mean data.synthetic.samples?"],
    ),
  ],
)
def test_typo_in_a_config_file(path, parts):
  with pytest.raises(AttributeError) as e:
    assign_wrong(Config(), *path)
  explained = config_lib.explain(e.value)
  assert isinstance(explained, UserError)
  for part in ("config file", "no field", *parts):
    assert part in str(explained)


def test_another_attribute_error_in_a_config_file_is_told_as_it_is():
  with pytest.raises(AttributeError) as e:
    _ = pathlib.get_config
  explained = str(config_lib.explain(e.value))
  assert explained == f"config file: {e.value}"


def changed(path: str, value) -> Config:
  c = group = Config()
  *groups, name = path.split(".")
  for g in groups:
    group = getattr(group, g)
  setattr(group, name, value)
  return c


@pytest.mark.parametrize(
  ("path", "value", "parts"),
  [
    # Types
    ("seed", "1", ["'1' is a str", "expected int"]),
    ("seed", True, ["True is a bool", "expected int"]),
    ("train.batch_size", 2.5, ["2.5 is a float", "expected int"]),
    ("train.learning_rate", "0.1", ["'0.1' is a str", "expected float"]),
    ("data.train", None, ["None is a NoneType", "expected str"]),
    ("model.top", [64, 32], ["[64, 32] is not a tuple of int"]),
    ("model.top", (64, 3.5), ["(64, 3.5) is not a tuple of int"]),
    ("data.synthetic.hotness", 3, ["3 is not a tuple of int"]),
    ("train", None, ["None is not a Train"]),
    ("data.synthetic", config_lib.Train(), ["is not a Synthetic"]),
    # Choices
    ("model.name", "dlmr", ["'dlmr' is not one of", "did you mean dlrm?"]),
    (
      "embedding.optimizer",
      "row_wise_adagrad",
      ["sgd, adagrad, adam", "did you mean rowwise_adagrad?"],
    ),
    ("data.format", "xyz", ["not one of criteo, movielens, synthetic"]),
    # Ranges
    ("embedding.dim", 0, ["0 found, at least 1 expected"]),
    ("train.batch_size", -4, ["-4 found, at least 1 expected"]),
    ("train.steps", -1, ["-1 found, at least 0 expected"]),
    ("plan.hot_rows", -2, ["-2 found, at least -1 expected"]),
    ("embedding.learning_rate", float("nan"), ["nan found, at least 0"]),
    ("plan.overflow_probability", 0.0, ["0.0 is not between 0 and 1"]),
    ("plan.overflow_probability", float("nan"), ["is not between 0 and 1"]),
    ("data.test_fraction", 1, ["1.0 is not between 0 and 1"]),
  ],
)
def test_wrong_value(path, value, parts):
  message = error_of(check, changed(path, value))
  assert message.startswith(f"{path}: ")
  for part in parts:
    assert part in message


def test_an_int_where_a_float_is_expected_becomes_one():
  c = changed("train.learning_rate", 1)
  check(c)
  assert type(c.train.learning_rate) is float


def test_defaults_are_good_and_not_shared():
  a, b = Config(), Config()
  check(a)
  a.data.synthetic.rows = 1
  assert b.data.synthetic.rows != 1


def test_there_are_configs():
  names = {p.stem for p in CONFIGS}
  assert {"criteo_kaggle", "quickstart"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_file_loads_and_says_how_to_run_it(path):
  module = runpy.run_path(str(path))
  check(module["get_config"]())
  command = f"python main.py --config configs/{path.name}"
  assert command in module["__doc__"]
