"""Which samples train and which test."""

import numpy as np

from recjax.config import Data
from recjax.data.split import Split


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
