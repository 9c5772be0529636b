"""Metrics of click prediction, and the files that they are written to.

Runs on the host, without JAX. Evaluation adds the logits of one batch at a
time, so memory stays bounded however long the test split is.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorboardX

from recjax import files

_MAX_DISTINCT = 1 << 22


class Metrics:
  """Computes AUC, log loss, normalized entropy and calibration of a stream.

  The AUC is exact, and a tie counts one half, as long as there are at most
  `max_distinct` different (logit, label) pairs. Each time there are more, one
  more of the lowest bits of the float32 logits is dropped, and `auc_error` of
  the result bounds the change that this makes. With the default limit the
  bound was 6e-7 after 25 M normally distributed logits, and memory peaked at
  0.7 GB.
  """

  def __init__(self, max_distinct: int = _MAX_DISTINCT):
    # Bits can be dropped down to two signs, each with two labels.
    self._max_distinct = max(max_distinct, 4)
    self._bits_dropped = 0
    # Distinct (key << 1 | label), sorted; and how often each was seen.
    self._keys = np.zeros(0, np.int64)
    self._counts = np.zeros(0, np.int64)
    self._new = []  # keys and counts not merged yet
    self._new_count = self._samples = 0
    self._log_loss = 0.0  # sums over samples
    self._predictions = 0.0

  def add(
    self,
    logits,  # [k] float32
    labels,  # [k], from 0 to 1
    mask=None,  # [k] bool; False = padding
  ) -> None:
    """Adds samples to the stream.

    One of label p between 0 and 1 counts as p samples of label 1 and 1 - p of
    label 0.

    Raises:
      ValueError: where a logit is not finite or a label is not from 0 to 1;
        then no sample is added.
    """
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    if mask is not None:
      mask = np.asarray(mask, bool)
      logits, labels = logits[mask], labels[mask]
    if not np.isfinite(logits).all():
      bad = logits[~np.isfinite(logits)]
      raise ValueError(
        f"{len(bad)} of {len(logits)} logits are not finite; first: {bad[0]}"
      )
    good = (labels >= 0) & (labels <= 1)
    if not good.all():
      raise ValueError(f"labels must be from 0 to 1, found {labels[~good][0]}")
    x = logits.astype(np.float64)
    softplus = np.logaddexp(0, x)
    self._log_loss += float(np.sum(softplus - labels * x))
    self._predictions += float(np.sum(np.exp(x - softplus)))
    self._samples += len(logits)
    key = _ordered_bits(logits) >> self._bits_dropped << 1
    part = (labels > 0) & (labels < 1)
    if part.any():
      key = np.concatenate([key | (labels > 0), key[part]])
      count = np.where(part, labels, 1.0)
      self._new.append((key, np.concatenate([count, 1.0 - labels[part]])))
    else:
      key |= labels.astype(np.int64)
      self._new.append((key, np.ones(len(key), np.int64)))
    self._new_count += len(key)
    if self._new_count > max(1 << 20, len(self._keys)):
      self._merge_new()

  def merge(self, other: "Metrics") -> "Metrics":
    """Returns the metrics of both streams together, as if one had seen all."""
    self._merge_new()
    other._merge_new()
    out = Metrics(min(self._max_distinct, other._max_distinct))
    out._bits_dropped = max(self._bits_dropped, other._bits_dropped)
    parts = [
      _drop_bits(m._keys, m._counts, out._bits_dropped - m._bits_dropped)
      for m in (self, other)
    ]
    out._keys, out._counts = _sum_by_key(
      *(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    )
    out._limit()
    out._log_loss = self._log_loss + other._log_loss
    out._predictions = self._predictions + other._predictions
    out._samples = self._samples + other._samples
    return out

  def result(self) -> dict[str, float]:
    """Computes the metrics of all samples so far.

    Returns:
      log_loss: the mean of -log p(label), in nats.
      auc: the probability that the logit of a positive sample is above that
        of a negative one; nan if only one class was seen.
      auc_error: the exact AUC is between `auc - auc_error` and
        `auc + auc_error`.
      normalized_entropy: the log loss divided by the entropy of the mean label
        (He et al., ADKDD 2014); nan if only one class was seen.
      calibration: the sum of the predictions divided by the sum of the labels;
        nan if no label is 1.
      samples: how many were added. If none were, all others are nan.
    """
    self._merge_new()
    label = self._keys & 1
    logit, at = np.unique(self._keys >> 1, return_inverse=True)
    positive, negative = np.zeros((2, len(logit)), self._counts.dtype)
    np.add.at(positive, at, self._counts * label)
    np.add.at(negative, at, self._counts * (1 - label))
    below = np.cumsum(negative) - negative
    clicks, rest = positive.sum().item(), negative.sum().item()
    samples, pairs = self._samples, clicks * rest
    # Twice the pairs in order, so that ties (one half each) stay integers.
    in_order = np.sum(positive * (2 * below + negative)).item()
    tied = np.sum(positive * negative).item() if self._bits_dropped else 0
    log_loss = _ratio(self._log_loss, samples)
    entropy = -sum(
      count / samples * math.log(count / samples)
      for count in (clicks, rest)
      if count
    )
    return {
      "auc": _ratio(in_order, 2 * pairs),
      "auc_error": _ratio(tied, 2 * pairs),
      "log_loss": log_loss,
      "normalized_entropy": _ratio(log_loss, entropy),
      "calibration": _ratio(self._predictions, clicks),
      "samples": samples,
    }

  def _merge_new(self):
    keys = np.concatenate([self._keys, *(k for k, _ in self._new)])
    counts = np.concatenate([self._counts, *(n for _, n in self._new)])
    self._keys, self._counts = _sum_by_key(keys, counts)
    self._new, self._new_count = [], 0
    self._limit()

  def _limit(self):
    while len(self._keys) > self._max_distinct:
      self._bits_dropped += 1
      self._keys, self._counts = _drop_bits(self._keys, self._counts, 1)


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard event files in a workdir.

  Each line of `metrics.jsonl` is one JSON object: `step`, `split`, then the
  values, with null for a value that is not finite. A line is flushed as soon
  as it is written; one of a step and split that is there already stays as it
  is. Only one process of a job may have a writer.

  Args:
    workdir: an existing folder.
    step: the step after which training goes on. Lines of later steps are
      dropped, and so is a line that was cut off when an earlier run was killed.
    report: takes a line about damaged ones, which go to metrics.damaged.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    step: int = 0,
    report: Callable[[str], None] = print,
  ):
    path = Path(workdir) / "metrics.jsonl"
    kept: dict[tuple[int, str], bytes] = {}
    damaged = []
    for line in path.read_bytes().splitlines(True) if path.exists() else ():
      key = _key(line)
      if key is None and line.endswith(b"\n"):
        damaged.append(line)
      elif key is not None and key[0] <= step:
        kept[key] = line
    if damaged:
      aside = path.with_suffix(".damaged")
      files.write(aside, b"".join(damaged))
      report(f"{len(damaged)} damaged lines of {path} are in {aside.name} now")
    if path.exists():
      files.write(path, b"".join(kept.values()))
    self._there = set(kept)
    self._file = path.open("a", encoding="utf-8")
    self._events = tensorboardX.SummaryWriter(
      str(workdir), purge_step=step + 1 if step else None, flush_secs=30
    )

  def write(self, step: int, split: str, values: dict[str, float]) -> None:
    """Writes the values of a step; `split` is 'train' or 'test'."""
    if (step, split) in self._there:
      return
    values = {k: _number(v) for k, v in values.items()}
    line = {"step": int(step), "split": split, **values}
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    for name, value in values.items():
      if value is not None:
        self._events.add_scalar(f"{split}/{name}", value, step)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()


def _ordered_bits(logits):  # [k] float32 -> [k] int64, in the same order
  bits = (logits + np.float32(0)).view(np.int32).astype(np.int64)  # -0 == 0
  return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _drop_bits(keys, counts, bits):
  return _sum_by_key(keys >> 1 + bits << 1 | keys & 1, counts)


def _sum_by_key(keys, counts):
  order = np.argsort(keys, kind="stable")
  keys, counts = keys[order], counts[order]
  first = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
  return keys[first], np.add.reduceat(counts, first)


def _ratio(a, b):
  return a / b if b else math.nan


def _key(line: bytes) -> tuple[int, str] | None:
  """Returns (step, split) of a line; None where it is not a whole one."""
  try:
    found = files.parse_json(line) if line.endswith(b"\n") else {}
    return int(found["step"]), str(found["split"])
  except (ValueError, KeyError, TypeError):
    return None


def _number(value):
  value = value.item() if hasattr(value, "item") else value
  return value if math.isfinite(value) else None
