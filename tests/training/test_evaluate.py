"""Evaluation: every sample of the split counts once, and padding not at all."""

import math

import dense_reference as dense
import jax
import numpy as np
import pytest
from helpers import quiet
from helpers_cases import case_of, plan_of

from recjax.data import batches as batches_lib
from recjax.errors import UserError
from recjax.training import inputs
from recjax.training.evaluate import evaluate

CASE = case_of("multi_hot_mean")
SAMPLES = 2 * dense.BATCH + 5  # of the split: the last batch is mostly padding


def scored(run):
  """The batches of the split, as `scored_batches` has them."""
  for i, batch in enumerate(dense.batches(CASE, 3)):
    here = min(SAMPLES - i * dense.BATCH, dense.BATCH)
    batch["mask"] = np.ones(here, np.float32)
    part = {name: x[:here] for name, x in batch.items()}
    part = batches_lib.padded(part, dense.BATCH)
    yield run.place(run.prepare(part, training=False))


def logits_of(run) -> tuple[np.ndarray, np.ndarray]:
  """(logits, labels) of the split, a sample after the other, in NumPy."""
  rows = dense.by_rank(CASE, run)["g"].rows
  w1, w2 = (np.asarray(run.state.params[name]) for name in ("w1", "w2"))
  logits, labels = [], []
  for batch in dense.batches(CASE, 3):
    labels += batch["label"].tolist()
    for numbers, ids in zip(batch["dense"], batch["ids"], strict=True):
      a, bag, listed = ids[:1], ids[1:5], ids[5:]
      mean = rows[bag[bag >= 0]].sum(0) / max((bag >= 0).sum(), 1)
      there = np.where(listed[:, None] >= 0, rows[listed], 0)
      x = np.concatenate([numbers, rows[a[0]], mean, there.ravel()])
      logits.append((np.tanh(x @ w1) @ w2).item())
  return np.array(logits[:SAMPLES]), np.array(labels[:SAMPLES])


@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_are_those_of_the_samples(devices):
  run = dense.build(CASE, plan_of(CASE, devices, "mixed"))
  batches = inputs.one_ahead(scored(run))
  printed = []
  got = evaluate(run, batches, SAMPLES, printed.append)
  assert printed[-1].startswith(f"evaluate: {SAMPLES} samples, ")
  logits, labels = logits_of(run)
  run.store.close()
  loss = np.mean(np.logaddexp(0, logits) - labels * logits)
  a, b = logits[labels == 1][:, None], logits[labels == 0][None]
  rate = labels.mean()
  entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
  want = {
    "log_loss": loss,
    "auc": np.mean((a > b) + 0.5 * (a == b)),
    "auc_error": 0,
    "normalized_entropy": loss / entropy,
    "calibration": np.sum(1 / (1 + np.exp(-logits))) / labels.sum(),
    "samples": SAMPLES,
  }
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


def test_a_logit_that_is_not_finite_is_the_users_to_mend():
  run = dense.build(CASE, plan_of(CASE, 1, "warm"))
  params = jax.tree.map(lambda x: x * np.nan, run.state.params)
  run = run._replace(state=run.state._replace(params=params))
  with pytest.raises(UserError, match=r"at step 0: 32 of 32 .*Lower train"):
    evaluate(run, scored(run), SAMPLES, quiet)


def test_a_stored_row_that_is_not_finite_is_the_users_to_mend():
  """Of the host store, where no device has seen it before."""
  run = dense.build(CASE, plan_of(CASE, 1, "mixed"))
  for part in run.store.groups["g"].parts:
    part.rows[:] = np.nan
  wrong = r"^evaluation at step 0: \d+ of 32 logits .*Lower train[^\n]*$"
  with pytest.raises(UserError, match=wrong):
    evaluate(run, scored(run), SAMPLES, quiet)
  run.store.close()
