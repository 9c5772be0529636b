"""Which samples train and which test."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from recjax.config import Data
from recjax.data.split import Split, time_cut


def test_the_split_is_the_same_row_by_row():
  split = Split(Data(split="random"), None, 1_000)
  whole = split.mask(0, 1_000)
  parts = [split.mask(i, 10) for i in range(0, 1_000, 10)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert split.train == whole.sum()


def test_the_end_of_the_logs_tests():
  split = Split(Data(test_fraction=0.25), None, 10)
  assert split.train == 8
  assert split.mask(6, 4).tolist() == [True, True, False, False]


def test_the_logs_of_data_test_test():
  split = Split(Data(test="b.tsv", split="random"), 3, 5)
  assert split.train == 3
  assert split.mask(0, 5).tolist() == [True] * 3 + [False] * 2


@hypothesis.given(
  st.lists(st.sampled_from([-1e9, -2.5, -0.0, 0.0, 1.0, 1.5, 2e9]), min_size=2),
  st.data(),
)
def test_the_last_times_test(times, data):
  train = data.draw(st.integers(1, len(times) - 1))
  x = np.array(times)
  cut, before = time_cut(lambda: np.array_split(x, 3), train)
  assert cut == np.sort(x)[train]
  assert before == (x < cut).sum()
  split = Split(Data(), None, len(x), (cut, before))
  assert split.train == before == split.mask(0, len(x), x).sum()
