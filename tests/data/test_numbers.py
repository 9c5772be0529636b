"""Normalisers: fitted to the training split alone, the same in any parts."""

import numpy as np
import pyarrow as pa
import pytest

from recjax.data import fit_numbers, numbers
from recjax.log_schema import Number

NUMBERS = (
  Number("a"),
  Number("b", transform="log1p", missing="mean"),
  Number("c", transform="standard"),
  Number("d", transform="minmax", missing="mean"),
  Number("e", buckets=4),
)


def drawn(rows: int = 1_000) -> np.ndarray:
  rng = np.random.default_rng(0)
  raw = rng.normal(3, [1, 5, 1e3, 2, 1], (rows, 5))
  raw[rng.random(raw.shape) < 0.2] = np.nan
  return raw


def fitted(raw, train, parts: int = 1):
  pieces, at = [], 0
  for x, t in zip(
    np.array_split(raw, parts), np.array_split(train, parts), strict=True
  ):
    pieces.append(fit_numbers.sums(NUMBERS, x, at, t, int(train.sum())))
    at += len(x)
  return fit_numbers.fit(NUMBERS, pieces)


def test_the_training_split_alone_is_fitted():
  raw = drawn()
  train = np.arange(len(raw)) < 900
  other = np.where(train[:, None], raw, 1e9)
  assert fitted(raw, train) == fitted(other, train)
  got = numbers.normalised(fitted(raw, train), raw)
  of = raw[:900]
  log = np.sign(of[:, 1]) * np.log1p(np.abs(of[:, 1]))
  span = np.nanmax(of[:, 3]) - np.nanmin(of[:, 3])
  wanted = np.stack(
    [
      np.nan_to_num(of[:, 0]),
      np.where(np.isnan(log), np.nanmean(log), log),
      np.nan_to_num((of[:, 2] - np.nanmean(of[:, 2])) / np.nanstd(of[:, 2])),
      (
        np.where(np.isnan(of[:, 3]), np.nanmean(of[:, 3]), of[:, 3])
        - np.nanmin(of[:, 3])
      )
      / span,
    ],
    axis=1,
  )
  np.testing.assert_allclose(got[:900], wanted, rtol=1e-5, atol=1e-6)
  assert got.dtype == np.float32


def test_parts_say_what_the_whole_says():
  raw = drawn()
  train = np.arange(len(raw)) % 3 > 0
  whole, parts = fitted(raw, train), fitted(raw, train, parts=7)
  for a, b in zip(whole, parts, strict=True):
    assert (a.name, a.log, a.edges) == (b.name, b.log, b.edges)
    np.testing.assert_allclose(a[2:5], b[2:5], rtol=1e-12, atol=1e-12)
  read = numbers.Fitted.from_json(whole[-1]._asdict())
  assert read == whole[-1]


@pytest.mark.parametrize("value", [np.nan, 7.0])
def test_a_number_that_never_changes_is_0_or_itself(value):
  raw = np.full((10, 5), value)
  got = numbers.normalised(fitted(raw, np.ones(10, bool)), raw)
  itself = 0.0 if np.isnan(value) else value
  np.testing.assert_allclose(
    got[0], [itself, np.log1p(itself), 0, 0], rtol=1e-6, atol=0
  )


def test_buckets_hold_equal_shares_and_missing_ones_stay():
  raw = drawn()
  found = fitted(raw, np.ones(len(raw), bool))
  arrays = {
    "dense": raw,
    "codes": np.tile(np.int32([5, 0]), (len(raw), 1)),
    "feature": np.int16([0, 0, 0, 0, 0, 1]),
  }
  values = pa.array([None, "u", "v", "w", "x", None])
  got, value = numbers.bucketed(found, arrays, values)
  text = value.take(pa.array(got["codes"][:, 1])).to_pylist()
  missing = np.isnan(raw[:, 4])
  assert [x is None for x in text] == missing.tolist()
  there = int((~missing).sum())
  shares = [text.count(str(i)) for i in range(4)]
  assert max(shares) - min(shares) <= 1 and sum(shares) == there
  assert got["feature"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
  x = raw[~missing, 4]
  bucket = np.array([int(b) for b in text if b is not None])
  assert all(x[bucket == i].max() < x[bucket == i + 1].min() for i in range(3))
