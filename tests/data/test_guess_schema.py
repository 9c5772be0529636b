"""What columns are taken for, by their names and values."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
from helpers_logs import config_of

from recjax.config import Config
from recjax.data import column_facts, describe_log, guess_schema, inspect_log
from recjax.log_schema import Id, Ids, Number, Schema


def proposed(**columns) -> guess_schema.Proposal:
  return guess_schema.propose(
    [
      column_facts.column(name, "", [pa.array(values)])
      for name, values in columns.items()
    ]
  )


def test_labels_by_name_by_value_and_by_place():
  label = lambda **columns: proposed(**columns).schema.labels
  two = [0, 1] * 9
  assert label(is_male=two, target=two, clicked=two) == ("target", "clicked")
  assert label(buy=two, is_click=two) == ("is_click", "buy")
  assert label(x=[-1, 1] * 9, item=["a", "b"] * 9) == ("x",)
  assert label(a=two, b=[1, 2] * 9, c=[5, *two[1:]]) == ("a",)
  assert label(clicks=[0, 1, 7]) == ("clicks > 0",)
  assert label(y=[0.1, 0.25, 0.5]) == ("y",)
  assert label(stars=[1, 5, 3]) == ("stars > 3",)
  assert label(score=[1, 5, 10]) == ("score > 6",)
  assert label(click=["True", "False"]) == ("click",)
  assert label(a=["x", "y"], b=[3, 4]) == ()
  # MovieLens' u.data has no header.
  assert label(c1=[1, 2] * 5, c2=[1, 2, 3, 4, 5] * 2) == ("c2 > 3",)
  assert label(a=[1, 2] * 5, b=[1, 2, 3, 4, 5] * 2) == ()


def test_bags_and_what_is_none():
  feature = lambda values: proposed(x=values * 20).schema.features
  genres = ["Action|War", "War", "Drama|Action", "Drama|War", "Action"]
  assert feature([*genres, "Drama"])[0].separator == "|"
  weighted = ["a:0.5|b:1.0", "b:0.25", "a:0.1|b:0.2", "b:0.3|a:0.4", "a:1.0"]
  assert feature(weighted)[0].weight_separator == ":"
  spaced = ["1 2 3", "3 2", "2 1 3 1", "1", "3 1", "2 3", "1 2"]
  assert feature(spaced)[0].separator == " "
  cities = ["New York", "Los Angeles", "San Francisco", "Oslo"]
  assert feature(cities) == (Id("x"),)
  agents = [f"Mozilla/5.0 (X{i}; Linux) Gecko/{i} of {i}" for i in range(20)]
  assert feature(agents) == (Id("x"),)
  brackets = proposed(x=["[1, 2]", "[3]", "[]"] * 20)
  assert "lists in brackets" in brackets.left_out["x"]


def test_a_history_is_found_by_its_ids():
  rng = np.random.default_rng(0)
  items = [f"i{x}" for x in rng.integers(0, 30, 200)]
  past = [items[i : i + i % 6] for i in range(200)]
  schema = proposed(item_id=items, seen=past, other=[["z"], []] * 100).schema
  expected = Ids("seen", 5, keep="last", pooling="none", table="item_id")
  assert schema.features[1] == expected
  assert schema.features[2] == Ids("other", 1, pooling="mean")
  schema = proposed(item_id=items, last_item=items[1:] + items[:1]).schema
  assert schema.features[1] == Id("last_item", table="item_id")


def test_numbers_get_a_transform_by_their_tail():
  rng = np.random.default_rng(0)
  schema = proposed(
    price=np.exp(3 * rng.normal(size=300)),
    age=[None, *rng.integers(18, 80, 299).tolist()],
    shop=rng.integers(0, 10**6, 300),
  ).schema
  assert schema.numbers == (
    Number("price", "log1p"),
    Number("age", "standard", "mean"),
  )
  assert schema.features == (Id("shop"),)


def test_times_and_what_is_of_a_row_are_no_inputs():
  rng = np.random.default_rng(0)
  left = proposed(
    created=["2020-01-02 03:04:05", "2020-01-03 00:00:00"] * 20,
    day=[20200102, 20200103] * 20,
    c4=881_250_949 + rng.integers(0, 10**7, 40),  # in no order
    c5=["1::2::3", "2::3::4"] * 20,
    hex=[f"{x:032x}" for x in range(40)],
    user=[f"u{x}" for x in range(40)],  # each once, but somebody
    session_id=[f"s{x}" for x in range(40)],
  )
  assert list(left.left_out) == ["created", "day", "c5", "hex"]
  assert left.schema.time == "c4"
  assert "sed" in left.left_out["c5"]
  assert left.schema.features == (Id("user"),)
  assert left.schema.keep == ("session_id",)


def test_the_finest_time_that_can_be_read_splits():
  time = lambda **columns: proposed(**columns).schema.time
  days = [f"2020-01-{x % 28 + 1:02}" for x in range(40)]
  seconds = [1e9 - x for x in range(40)]
  assert time(date=days, ts=seconds) == "ts"
  assert time(date=days) == "date"
  assert time(date=days[:5] * 8) == ""  # most would have the last one
  assert time(date=[f"{x} +09:00" for x in days]) == ""
  assert time(ts=[None, *seconds[1:]]) == ""


def test_a_log_that_is_sorted_by_user_is_split_at_random():
  split = lambda **columns: proposed(**columns).split[0]
  user, up = [1, 1, 2, 2, 3] * 8, list(range(40))
  assert split(user=sorted(user)) == "random"
  assert split(user=sorted(user), ts=[1e9 - x for x in up]) == "time"
  assert split(user=user, item=up[::-1]) == "time"


_names = st.text(
  st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
)
_cells = st.lists(
  st.one_of(st.none(), st.text(max_size=5)), min_size=3, max_size=3
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.dictionaries(_names, _cells, min_size=1, max_size=4))
def test_no_name_or_value_breaks_out_of_the_config(table):
  """What a log names is text, and never code."""
  columns = [
    column_facts.column(name, "text", [pa.array(cells, pa.string())])
    for name, cells in {**table, "click": ["0", "1", "0"]}.items()
  ]
  proposal = guess_schema.propose(columns)
  data = Config().data
  data.format, data.train = "csv", "'\"\n" + next(iter(table))
  found = inspect_log.Inspection(
    *(data, ("a",), 1, 3, 3, inspect_log.DamagedLines(0), columns, proposal)
  )
  config = config_of(found)
  assert config.schema == proposal.schema
  assert config.data.train == data.train
  report = describe_log.report(found, config.embedding, Schema())
  assert len(report.split("\n")) < 12 + 3 * len(columns)
