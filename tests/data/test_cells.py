"""Columns of any type -> ids, bags, numbers, labels: one rule for all."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from recjax.data import cells
from recjax.errors import UserError


def ids(values, kind=None) -> list:
  return cells.ids("x", pa.array(values, kind)).to_pylist()


def test_an_id_is_its_text_whatever_its_type():
  one = ["1", None, "-2"]
  assert ids([1, None, -2]) == one
  assert ids([1.0, float("nan"), -2.0]) == one
  assert ids(["1", "", "-2"]) == one
  assert ids(["1.0", "NaN", "-2.00"]) == one
  assert ids([decimal.Decimal("1.00"), None, decimal.Decimal(-2)]) == one
  text = pa.array(["1.0", "", "-2", "1"]).dictionary_encode()
  assert cells.ids("x", text).to_pylist() == [*one, "1"]


def test_what_is_no_whole_number_keeps_its_text():
  assert ids(["1.5", "ip:10.0", "1e3", " 1", "01.0"]) == [
    *("1.5", "ip:10.0", "1e3", " 1"),
    "01",
  ]
  assert ids([0.1, 1e300], pa.float64()) == ["0.1", "1e+300"]
  assert ids([0.1], pa.float32()) == ["0.1"]
  assert ids([-0.0]) == ids(["-0.0"]) == ids([0]) == ["0"]
  assert ids([2**63 - 1, -(2**63)]) == [f"{2**63 - 1}", f"-{2**63}"]
  assert ids([True, False]) == ["true", "false"]
  assert ids([datetime.date(2026, 1, 2)]) == ["2026-01-02"]
  assert ids(["null", "NULL", "\\N", "nan"]) == [None] * 4
  assert ids([None, None], pa.null()) == [None] * 2


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}])
def test_lists_and_structs_are_no_id(value):
  with pytest.raises(UserError, match="schema: x: the column holds"):
    ids([value])


def bags(values, kind=None, **options) -> list:
  found = cells.bags("x", pa.array(values, kind), "|", **options)
  assert not found.faults
  if found.weights is None:
    return found.ids.to_pylist()
  pairs = zip(found.ids.to_pylist(), found.weights.to_pylist(), strict=True)
  return [list(zip(*pair, strict=True)) for pair in pairs]


def test_bags_are_lists_or_text():
  wanted = [["1", "2"], [], [], ["3"], []]
  assert bags([[1, 2], None, [], [3, None], [None]]) == wanted
  assert bags(["1|2", None, "", "3|", "|"]) == wanted
  assert bags([["1.0", "2"], None, [], ["", "3"], ["NaN"]]) == wanted
  assert bags([[1.0, 2.0], None, [], [3.0], []], pa.list_(pa.float32())) == (
    wanted
  )
  assert bags([7, None]) == [["7"], []]
  assert bags([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)) == [
    ["1", "2"],
    ["3", "4"],
  ]
  sliced = pa.array([["a"], ["b", "c"], ["d"]]).slice(1)
  assert cells.bags("x", sliced, "|").ids.to_pylist() == [["b", "c"], ["d"]]


def test_weights_come_in_a_column_or_in_the_text():
  of_lists = ("w", pa.array([[0.5, 2.0], None, [1.0, 3.0]]))
  wanted = [[("a", 0.5), ("b", 2.0)], [], [("c", 3.0)]]
  assert bags([["a", "b"], [], [None, "c"]], weights=of_lists) == wanted
  of_text = ("w", pa.array(["0.5|2", "", "|3"]))
  assert bags(["a|b", "", "|c"], weights=of_text) == wanted
  # At the last separator, where one is named.
  assert bags(["ip:10.0:0.5|b"], weight_separator=":") == [
    [("ip:10.0", 0.5), ("b", 1.0)]
  ]
  assert bags(["12:30"]) == [["12:30"]]


@pytest.mark.parametrize(
  "values, weights, rows",
  [
    (["a|b", "c"], ["1", "1"], [0]),
    (["a|b", "c"], ["1|x", "1"], [0]),
    (["a|b", "c"], ["1|2", "inf"], [1]),
    ([["a"], ["c"]], [[1.0], [None]], [1]),
  ],
)
def test_weights_that_do_not_fit_are_named(values, weights, rows):
  found = cells.bags("x", pa.array(values), "|", ("w", pa.array(weights)))
  assert [f.column for f in found.faults] == ["w"]
  assert found.faults[0].rows.tolist() == rows


def test_hashed_ids_are_rows_and_crosses_are_told_apart():
  coded = cells.ids("x", pa.array(["a", None, "b", "a"]))
  found = cells.hashed(coded, 10).to_pylist()
  # The CRC-32 of "a" is 3904355907, that of "b" 1908338681.
  assert found == ["7", None, "1", "7"]
  left = cells.ids("x", pa.array(["a", "ab", None, "a"]))
  right = cells.ids("x", pa.array([1, 1, 1, 1]))
  third = cells.ids("x", pa.array(["c", "c", "c", None]))
  crossed = cells.crossed([left, right, third]).to_pylist()
  assert crossed == ["a\x1f1\x1fc", "ab\x1f1\x1fc", "\x1f1\x1fc", "a\x1f1\x1f"]


def test_numbers_of_any_type():
  wanted = [1.0, np.nan, -2.5]
  for column in (
    pa.array(wanted),
    pa.array(["1", "", "-2.5"]),
    pa.array(["+1.", "NaN", " -2.5 "]),
    pa.array([decimal.Decimal(1), None, decimal.Decimal("-2.5")]),
    pa.array(["1e0", None, "-25e-1"]).dictionary_encode(),
  ):
    found, faults = cells.numbers("x", column)
    np.testing.assert_array_equal(found, wanted)
    assert not faults
  whole, _ = cells.numbers("x", pa.array([2**63 - 1, None, -(2**63)]))
  np.testing.assert_array_equal(whole, [2.0**63, np.nan, -(2.0**63)])


@pytest.mark.parametrize(
  "bad", ["0x1F", "1_0", "1,5", "abc", "inf", "1e400", "1e39"]
)
def test_what_is_no_number_is_named(bad):
  found, (fault,) = cells.numbers("x", pa.array(["1", bad, "2", bad]))
  assert fault.rows.tolist() == [1, 3]
  assert bad in fault.reasons[0]
  assert found[[0, 2]].tolist() == [1.0, 2.0]


def test_labels_are_probabilities_signs_or_above_a_threshold():
  labels = lambda values, t=None: cells.labels("y", pa.array(values), t)
  found, faults = labels([-1, 0, 1, 0.25])
  assert found.tolist() == [0, 0, 1, 0.25] and not faults
  assert labels(["-1", "1"])[0].tolist() == [0, 1]
  assert labels([True, False])[0].tolist() == [1, 0]
  assert labels(["True", "false", "1"])[0].tolist() == [1, 0, 1]
  assert labels([3, 4.5, 5], lambda x: x > 4)[0].tolist() == [0, 1, 1]
  for bad in ([None, 1], ["", "1"], ["x", "1"], [2, 1], [-0.5, 1]):
    _, (fault,) = labels(bad)
    assert fault.rows.tolist() == [0]


def test_sample_weights_are_not_negative():
  assert cells.sample_weights("w", pa.array([0.5, 0]))[0].tolist() == [0.5, 0]
  _, (fault,) = cells.sample_weights("w", pa.array([1, -1, None]))
  assert fault.rows.tolist() == [1, 2]


@pytest.mark.parametrize(
  "values",
  [
    ["2026-11-27 03:10:00", "2026-11-27T03:10:01.5+00:00", "2026-11-28"],
    [1795748400 + 600, 1795748400 + 601, 1795748400 - 10800 + 86400],
    [
      datetime.datetime(2026, 11, 27, 3, 10),
      datetime.datetime(2026, 11, 27, 3, 10, 1),
      datetime.datetime(2026, 11, 28),
    ],
  ],
)
def test_times_are_numbers_or_dates(values):
  found, faults = cells.times("t", pa.array(values))
  assert not faults and (np.diff(found) > 0).all()
  assert found[1] - found[0] == 1
  bad = [None, *values[1:]]
  _, (fault,) = cells.times("t", pa.array(bad))
  assert fault.rows.tolist() == [0] and "is no time" in fault.reasons[0]
