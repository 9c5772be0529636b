import json
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from recjax.training.metrics import Metrics, MetricsWriter

LOGITS = st.one_of(
  st.sampled_from([-1.5, -0.0, 0.0, 1e-30, -1e-30, 1.0, 1.0000001]),
  st.floats(-80, 80, width=32),
)


@st.composite
def samples(draw, least=0):
  logits = draw(st.lists(LOGITS, min_size=least, max_size=40))
  labels = draw(hnp.arrays(np.int32, len(logits), elements=st.integers(0, 1)))
  return np.array(logits, np.float32), labels


def pairwise_auc(logits, labels):
  a, b = logits[labels == 1][:, None], logits[labels == 0][None, :]
  if not a.size or not b.size:
    return math.nan
  return (2 * int((a > b).sum()) + int((a == b).sum())) / (2 * a.size * b.size)


def metrics_of(logits, labels, pieces=1, **kwargs):
  metrics = Metrics(**kwargs)
  for x, y in zip(
    np.array_split(logits, pieces), np.array_split(labels, pieces), strict=True
  ):
    metrics.add(x, y)
  return metrics


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in ("auc", "auc_error", "samples"):  # sums of integers
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-12, err_msg=name)


@hypothesis.given(samples(), st.integers(1, 5))
def test_auc_equals_pairwise(data, pieces):
  result = metrics_of(*data, pieces).result()
  np.testing.assert_array_equal(result["auc"], pairwise_auc(*data))
  assert result["samples"] == len(data[0])


@hypothesis.given(samples(least=1))
def test_sums_equal_definitions(data):
  logits, labels = data
  result = metrics_of(logits, labels).result()
  x = logits.astype(np.float64)
  # -log p(label), written so that large logits stay exact.
  loss = np.mean(np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - labels * x)
  rate = labels.mean()
  np.testing.assert_allclose(result["log_loss"], loss, rtol=1e-9, atol=1e-15)
  if 0 < rate < 1:
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    np.testing.assert_allclose(
      result["normalized_entropy"], loss / entropy, rtol=1e-9, atol=1e-15
    )
  else:
    assert math.isnan(result["normalized_entropy"])
    assert math.isnan(result["auc"])
  if rate:
    np.testing.assert_allclose(
      result["calibration"],
      np.sum(1 / (1 + np.exp(-x))) / labels.sum(),
      rtol=1e-9,
    )
  else:
    assert math.isnan(result["calibration"])


@hypothesis.given(samples(), samples(), st.sampled_from([5, 1 << 20]))
def test_merge_equals_all_at_once(a, b, limit):
  merged = metrics_of(*a, max_distinct=limit).merge(
    metrics_of(*b, max_distinct=limit)
  )
  both = [np.concatenate(arrays) for arrays in zip(a, b, strict=True)]
  assert_same(merged.result(), metrics_of(*both, max_distinct=limit).result())
  # A merged value goes on as any other.
  merged.add(*a)
  merged.add(*b)
  twice = [np.concatenate([x, x]) for x in both]
  assert_same(merged.result(), metrics_of(*twice, max_distinct=limit).result())


@hypothesis.given(samples(), st.integers(4, 12), st.integers(1, 4))
def test_bound_holds_when_bits_are_dropped(data, limit, pieces):
  result = metrics_of(*data, pieces, max_distinct=limit).result()
  exact = pairwise_auc(*data)
  if not math.isnan(exact):
    assert abs(result["auc"] - exact) <= result["auc_error"] + 1e-15


def test_the_error_counts_pairs_that_may_be_tied_by_dropped_bits():
  logits = np.float32([1, 1, np.nextafter(np.float32(1), 2), 2, 4])
  labels = np.array([1, 0, 0, 1, 0])
  exact = metrics_of(logits, labels).result()
  assert (exact["auc"], exact["auc_error"]) == (2.5 / 6, 0)  # a true tie
  # One bit less: the first positive sample is tied with two, of six pairs.
  coarse = metrics_of(logits, labels, max_distinct=4).result()
  assert (coarse["auc"], coarse["auc_error"]) == (3 / 6, 1 / 6)


@pytest.mark.slow
def test_long_stream_is_bounded_and_close():
  rng = np.random.default_rng(0)
  k = 3_000_000
  logits = rng.normal(-1.3, 1.2, k).astype(np.float32)
  labels = rng.random(k) < 1 / (1 + np.exp(-logits))
  exact = metrics_of(logits, labels, 10).result()
  rank = np.argsort(np.argsort(logits, kind="stable"))
  clicks = labels.sum()
  by_rank = (rank[labels].sum() - clicks * (clicks - 1) / 2) / (
    clicks * (k - clicks)
  )
  assert exact["auc_error"] == 0
  assert exact["auc"] == pytest.approx(by_rank, abs=1e-6)  # ties by position
  metrics = metrics_of(logits, labels, 10, max_distinct=1 << 18)
  coarse = metrics.result()
  assert len(metrics._keys) <= 1 << 18
  assert 0 < coarse["auc_error"] < 1e-4
  assert abs(coarse["auc"] - exact["auc"]) < 1e-7


def test_mask_drops_padding():
  metrics = Metrics()
  metrics.add(
    np.array([1, np.nan, -2], np.float32), [1, 7, 0], [True, False, True]
  )
  assert_same(
    metrics.result(), metrics_of(np.float32([1, -2]), np.r_[1, 0]).result()
  )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
  metrics = metrics_of(np.float32([1.0]), np.array([1]))
  before = metrics.result()
  with pytest.raises(ValueError, match=f"1 of 2 logits.*first: {bad}"):
    metrics.add(np.float32([0, bad]), [0, 1])
  assert_same(metrics.result(), before)


def test_labels_that_are_no_probabilities_are_an_error():
  with pytest.raises(ValueError, match="found 2"):
    Metrics().add(np.float32([0.0]), [2])


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_writer_writes_lines_at_once_and_events(tmp_path):
  values = {"loss": np.float32(0.5), "samples_per_second": 10.0, "rounds": 1}
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, "train", values)
    writer.write(np.int64(2), "test", {"auc": math.nan})
    assert read(tmp_path / "metrics.jsonl") == [
      {
        "step": 1,
        "split": "train",
        "loss": 0.5,
        "samples_per_second": 10.0,
        "rounds": 1,
      },
      {"step": 2, "split": "test", "auc": None},
    ]
  assert scalars(tmp_path) == {
    ("train/loss", 1): 0.5,
    ("train/samples_per_second", 1): 10.0,
    ("train/rounds", 1): 1.0,
  }


def events(folder):
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:  # length, its checksum, record, its checksum
      size = int.from_bytes(data[:8], "little")
      yield event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def scalars(folder):
  return {
    (value.tag, event.step): value.simple_value
    for event in events(folder)
    for value in event.summary.value
  }


def test_writer_resumes_at_a_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(tmp_path) as writer:
    for step in (10, 20, 30):
      writer.write(step, "train", {"loss": step / 10})
  with path.open("a") as f:
    f.write('{"step": 20, "split": "train", "lo')  # killed while writing
  with MetricsWriter(tmp_path, step=20) as writer:
    assert [line["step"] for line in read(path)] == [10, 20]
    writer.write(30, "train", {"loss": 4.0})
  assert [(x["step"], x["loss"]) for x in read(path)] == [
    (10, 1.0),
    (20, 2.0),
    (30, 4.0),
  ]
  assert {p.name for p in tmp_path.iterdir() if "events" not in p.name} == {
    "metrics.jsonl"
  }
  # TensorBoard forgets what it has of these steps and later ones.
  starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
  assert starts == [21]


def test_a_probability_counts_as_that_many_samples_of_each_label():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=60).astype(np.float32)
  quarters = rng.integers(0, 5, 60)  # of label 1, in four samples
  got = metrics_of(logits, quarters / np.float32(4), pieces=3).result()
  labels = np.concatenate([np.arange(4) < q for q in quarters]).astype(int)
  want = metrics_of(np.repeat(logits, 4), labels).result()
  assert got.pop("samples") * 4 == want.pop("samples")
  for name, value in got.items():
    assert value == pytest.approx(want[name], rel=1e-12), name
