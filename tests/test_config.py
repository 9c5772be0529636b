"""Typos and wrong values name the field, what was found, and the nearest."""

import dataclasses
import pathlib
import runpy

import pytest

from recjax import config as config_lib
from recjax.config import Config, Embedding, TableRule, table_specs
from recjax.config_check import check, check_flags, explain
from recjax.data import criteo
from recjax.errors import UserError
from recjax.schema import groups_of

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
    (
      "--config.embedding.rules[0].dimm=1",
      ["no field embedding.rules[0].dimm", "did you mean"],
    ),
    ("--config.embedding.rules[0]=1", ["rules[0] is a group of fields"]),
    ("--config.embedding.rules.dim=1", ["rules has no fields", "rules[0] has"]),
    ("--config.model.top[0]=1", ["model.top[0] has no number"]),
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
      "--config.embedding.rules=()",
      "--config.embedding.rules[12].dim=3",
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
  explained = explain(e.value)
  assert isinstance(explained, UserError)
  for part in ("config file", "no field", *parts):
    assert part in str(explained)


def test_another_attribute_error_in_a_config_file_is_told_as_it_is():
  with pytest.raises(AttributeError) as e:
    _ = pathlib.get_config
  explained = str(explain(e.value))
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
    ("plan.host_store_dir", "a\0", ["'a\\x00' holds a NUL"]),
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
    (
      "plan.hot_sync",
      "all",
      ["'all' is not one of '', all_reduce, all_gather"],
    ),
    # Ranges
    ("embedding.dim", 0, ["0 found, at least 1 expected"]),
    ("train.batch_size", -4, ["-4 found, at least 1 expected"]),
    ("train.steps", -1, ["-1 found, at least 0 expected"]),
    ("plan.hot_rows", -2, ["-2 found, at least -1 expected"]),
    ("embedding.learning_rate", float("nan"), ["nan found, a finite number"]),
    ("train.learning_rate", float("inf"), ["inf found, a finite number"]),
    ("data.synthetic.signal", float("nan"), ["nan found, a finite number"]),
    ("train.learning_rate", 10**400, ["is a int, expected float"]),
    ("train.steps", 2**63, ["808 found, at most 2147483647"]),
    ("seed", 2**31, ["2147483648 found, at most 2147483647"]),
    ("model.top", (64, 2**40), ["holds a number above 2147483647"]),
    ("plan.overflow_probability", 0.0, ["0.0 is not between 0 and 1"]),
    ("plan.overflow_probability", float("nan"), ["nan found, a finite"]),
    ("data.test_fraction", 1, ["1.0 is not between 0 and 1"]),
    ("data.memory_mb", 127, ["127 found, at least 128 expected"]),
    ("plan.exponent", 11, ["11.0 found, at most 10 expected"]),
    ("model.top", (64, 0), ["(64, 0) holds a number below 1"]),
  ],
)
def test_wrong_value(path, value, parts):
  message = error_of(check, changed(path, value))
  assert message.startswith(f"{path}: ")
  for part in parts:
    assert part in message


def numbers(cls=Config, prefix=""):
  """(path, field) of all fields of numbers that the command line can set."""
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      yield from numbers(f.type, f"{prefix}{f.name}.")
    elif f.type in (int, float, tuple[int, ...]):
      yield prefix + f.name, f


BOUNDED = {path: f for path, f in numbers() if f.metadata}


def test_all_numbers_have_bounds_but_these():
  free = {path for path, _ in numbers()} - BOUNDED.keys()
  assert free == {"seed", "data.synthetic.rows", "data.synthetic.signal"}


@pytest.mark.parametrize("path", BOUNDED)
def test_bounds(path):
  """The bounds themselves pass, or what is beside them; beyond is an error."""
  f = BOUNDED[path]
  least, most = f.metadata["at_least"], f.metadata["at_most"]
  if f.metadata["between"]:
    low, high = f.metadata["between"]
    good, bad = [(low + high) / 2], [low, high, low - 1, high + 1]
  else:
    good = [x for x in (least, most) if x is not None]
    bad = [] if least is None else [least - 1]
    bad += [] if most is None else [most + 1]
  assert bad
  if f.type is float:
    bad.append(float("nan"))
  as_field = (lambda x: (5, x)) if f.type == tuple[int, ...] else f.type
  for value in good:
    check(changed(path, as_field(value)))
  for value in bad:
    assert error_of(check, changed(path, as_field(value))).startswith(
      f"{path}: "
    )


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


def test_the_mixed_config_has_three_groups():
  path = next(p for p in CONFIGS if p.stem == "criteo_kaggle_mixed")
  embedding = runpy.run_path(str(path))["get_config"]().embedding
  rows = dict(zip(criteo.CATEGORIES, criteo.KAGGLE_ROWS, strict=True))
  groups = groups_of(table_specs(embedding, rows))
  found = {(g.dim, g.optimizer): len(g.tables) for g in groups}
  assert found == {
    (16, "rowwise_adagrad"): 10,
    (8, "rowwise_adagrad"): 5,
    (4, "adagrad"): 11,
  }
  floats = {"rowwise_adagrad": lambda d: d + 1, "adagrad": lambda d: 2 * d}
  held = sum(
    4 * floats[g.optimizer](g.dim) * sum(rows[t] for t in g.tables)
    for g in groups
  )
  alike = 4 * 17 * sum(rows.values())
  assert f"{held / 1e9:.2f} GB instead of\n{alike / 1e9:.2f} GB" in (
    path.read_text()
  )


# ---- Rules of tables


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([], "embedding.rules: [] is not a tuple of TableRule"),
    ((8,), "embedding.rules: (8,) is not a tuple of TableRule"),
    (TableRule(), "is not a tuple of TableRule; write (TableRule("),
    (
      (TableRule(), TableRule(dim=-1)),
      "embedding.rules[1].dim: -1 found, at least 0 expected",
    ),
    (
      (TableRule(below_rows=1.5),),
      "embedding.rules[0].below_rows: 1.5 is a float, expected int",
    ),
    (
      (TableRule(tables="C1"),),
      "embedding.rules[0].tables: 'C1' is not a tuple of str; write ('C1',)",
    ),
    ((TableRule(tables=(1,)),), "embedding.rules[0].tables: (1,) is not a tup"),
    (
      (TableRule(optimizer="adagard"),),
      "embedding.rules[0].optimizer: 'adagard' is not one of '', rowwise_adagra"
      "d, sgd, adagrad, adam; did you mean adagrad?",
    ),
    (
      (TableRule(learning_rate=float("nan")),),
      "embedding.rules[0].learning_rate: nan found, a finite number expected",
    ),
  ],
)
def test_a_wrong_rule(rules, message):
  assert message in error_of(check, changed("embedding.rules", rules))


def test_a_rule_with_a_misspelt_field():
  with pytest.raises(TypeError) as e:
    TableRule(**{"dimm": 8})
  message = "no field embedding.rules[i].dimm; did you mean embedding.rules[i]"
  assert message in str(explain(e.value))


def test_the_traceback_that_a_config_file_led_to_is_left_out():
  error = ValueError(
    "Error whilst parsing config file:\nTraceback: ...\nTypeError: "
    "TableRule.__init__() got an unexpected keyword argument 'dimm'"
  )
  assert str(explain(error)).startswith("config file: there is no field embed")
  assert str(explain(ValueError("of a flag"))) == "of a flag"


def test_a_flag_of_a_rule_that_there_is_not():
  assert "embedding.rules[0]" in str(explain(IndexError("out of range")))


ROWS = {"a": 10, "b": 1_000, "c": 10**6}


def specs(*rules):
  found = table_specs(Embedding(rules=rules), ROWS)
  assert [s.name for s in found] == list(ROWS)
  return [(s.dim, s.dtype, s.optimizer, s.learning_rate) for s in found]


def test_without_rules_all_tables_are_alike():
  assert specs() == [(16, "float32", "rowwise_adagrad", 0.02)] * 3


def test_a_rule_of_tables_by_size_and_name():
  small = TableRule(below_rows=1_000, dim=8)
  assert [s[0] for s in specs(small)] == [8, 16, 16]
  named = TableRule(tables=("a", "c"), dim=4)
  assert [s[0] for s in specs(named)] == [4, 16, 4]
  both = TableRule(tables=("b", "c"), below_rows=1_001, dim=4)
  assert [s[0] for s in specs(both)] == [16, 4, 16]
  every = TableRule(dtype="bfloat16", optimizer="sgd", learning_rate=1.0)
  assert specs(every) == [(16, "bfloat16", "sgd", 1.0)] * 3


def test_the_first_rule_that_matches_counts():
  rules = (
    TableRule(below_rows=100, dim=4, optimizer="adagrad"),
    TableRule(below_rows=10_000),  # as they are
    TableRule(dim=8),
  )
  assert specs(*rules) == [
    (4, "float32", "adagrad", 0.02),
    (16, "float32", "rowwise_adagrad", 0.02),
    (8, "float32", "rowwise_adagrad", 0.02),
  ]


def test_a_rule_of_a_table_that_there_is_not():
  rules = (TableRule(dim=4), TableRule(tables=("a", "C1")))
  message = error_of(table_specs, Embedding(rules=rules), ROWS)
  assert message.startswith("embedding.rules[1].tables: there is no table C1; ")
  assert message.endswith("the tables are a, b, c")
  rules = (TableRule(tables=("movies",)),)
  message = error_of(table_specs, Embedding(rules=rules), {"movie": 3})
  assert message.endswith("did you mean movie?")
