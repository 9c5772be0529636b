"""Criteo lines -> chunks."""

import gzip
import math

import numpy as np
import pytest
from helpers_data import GOOD, field, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recjax.config import Data
from recjax.data import criteo
from recjax.data.text import DamagedLines
from recjax.errors import UserError

cell = st.text(
  st.characters(blacklist_characters="\t\n\r,:\0", blacklist_categories=["Cs"]),
  max_size=6,
)
integer = st.one_of(st.none(), st.integers(-100, 2**40))
row = st.tuples(
  st.integers(0, 1),
  st.lists(integer, min_size=13, max_size=13),
  st.lists(cell, min_size=26, max_size=26),
)


@settings(
  max_examples=50,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  rows=st.lists(row, min_size=1, max_size=5),
  zipped=st.booleans(),
  end=st.sampled_from(["\n", "\r\n"]),
  last=st.booleans(),
)
def test_what_is_written_is_read(tmp_path, rows, zipped, end, last):
  lines = [
    "\t".join([str(y), *("" if x is None else str(x) for x in ints), *cells])
    for y, ints, cells in rows
  ]
  text = end.join(lines) + (end if last else "")
  path = tmp_path / "log.tsv"
  path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
  label, dense, bags, _ = read(path)
  assert label == [y for y, _, _ in rows]
  want = [[math.log(max(x or 0, -1) + 2) for x in ints] for _, ints, _ in rows]
  np.testing.assert_allclose(dense, want, rtol=1e-5, atol=1e-6)
  assert bags == [[[(c or None, 1)] for c in cells] for _, _, cells in rows]


def test_quotes_mean_nothing(tmp_path):
  path = tmp_path / "log.tsv"
  path.write_bytes(field(GOOD, 20, b'"a') + field(GOOD, 21, b'b""\\') + GOOD)
  _, _, bags, _ = read(path)
  assert bags[0][6] == [('"a', 1)]
  assert bags[1][7] == [('b""\\', 1)]
  assert len(bags) == 3


def test_bags_and_weights(tmp_path):
  data = Data(hotness=(3, *[1] * 25), weighted=True)
  path = tmp_path / "log.tsv"
  path.write_bytes(
    field(GOOD, 14, b"a:0.5,b,c:2,d") + field(GOOD, 14, b"") + GOOD
  )
  _, _, bags, _ = read(path, data)
  assert bags[0][0] == [("a", 0.5), ("b", 1), ("c", 2)]  # d is past the hotness
  assert bags[1][0] == [(None, 1)]
  assert bags[2][0] == [("c0", 1)]
  assert bags[0][1] == [("c1", 1)]


def test_hotness_must_fit():
  with pytest.raises(UserError, match=r"data\.hotness .* 26 numbers"):
    criteo.schema(Data(hotness=(1, 2)))


def test_a_log_to_score_needs_no_labels(tmp_path):
  path = tmp_path / "x.tsv"
  path.write_bytes(b"".join(line[2:] for line in [GOOD] * 3))
  data = Data()
  inputs = criteo.schema(data)
  scored = lambda keep: list(
    criteo.chunks(data, inputs, (str(path),), DamagedLines(0), keep=keep)
  )
  (chunk,) = scored(())
  assert np.isnan(chunk.label).all() and len(chunk.label) == 3
  assert chunk.values.to_pylist()[:2] == ["c0", None]
  with pytest.raises(UserError, match="39 fields where 40 are expected"):
    scored(None)
  path.write_bytes(GOOD)
  assert scored(())[0].label.tolist() == [1]
