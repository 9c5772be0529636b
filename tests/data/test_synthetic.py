"""The planted teacher and the logs that it writes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.config import Data, Synthetic
from recjax.data import criteo, log_files, synthetic, text
from recjax.errors import UserError


@given(st.integers(100, 50_000_000))
def test_tables_total_the_rows_asked_for(total):
  rows = synthetic.table_rows(total)
  assert sum(rows) == total
  assert min(rows) >= 2
  assert max(rows) == rows[2]  # as in the Kaggle log


def test_too_few_rows():
  with pytest.raises(UserError, match=r"data\.synthetic\.rows is 51"):
    synthetic.table_rows(51)


@given(
  st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=60)
)
def test_auc_is_the_share_of_pairs_in_order(pairs):
  label = np.array([y for y, _ in pairs])
  score = np.array([s for _, s in pairs], np.float64)
  differ = score[label][:, None] - score[~label]
  if differ.size:
    want = ((differ > 0) + (differ == 0) / 2).mean()
    assert synthetic.auc(label, score) == pytest.approx(want)
  else:
    assert np.isnan(synthetic.auc(label, score))


def test_tokens_are_distinct_and_hide_the_rank():
  tokens = synthetic.tokens(3, np.arange(10_000)).to_pylist()
  assert len(set(tokens)) == 10_000
  assert all(len(t) == 8 for t in tokens)
  order = np.argsort(np.argsort(tokens))
  assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
  assert tokens[0] != synthetic.tokens(4, np.arange(1)).to_pylist()[0]


def small(**fields) -> Data:
  s = Synthetic(samples=30_000, rows=5_000, **fields)
  return Data(format="synthetic", synthetic=s)


def written(tmp_path, data, name="logs"):
  synthetic.write(data, str(tmp_path / name), lambda _: None)
  files = sorted((tmp_path / name).glob("*"))
  return b"".join(f.read_bytes() for f in files)


def test_the_teacher_is_reachable_and_not_perfect(tmp_path):
  data = small()
  written(tmp_path, data)
  teacher = json.loads((tmp_path / "logs" / "teacher.json").read_text())
  assert teacher["test_samples"] == 3_000
  assert 0.75 < teacher["auc"] < 0.86
  # The labels of the test part are the teacher's: its log loss is that of a
  # calibrated model, well under the base rate's entropy.
  paths = log_files.find(str(tmp_path / "logs" / "*.tsv"), "data.train")
  c = Data()
  chunks = criteo.chunks(c, criteo.schema(c), paths, text.DamagedLines(0))
  label = np.concatenate([c.label for c in chunks])
  assert len(label) == 30_000
  base = label[-3_000:].mean()
  entropy = -base * np.log(base) - (1 - base) * np.log(1 - base)
  assert 0.7 * entropy < teacher["log_loss"] < 0.95 * entropy


def test_the_same_seed_writes_the_same_logs(tmp_path):
  data = small()
  first = written(tmp_path, data)
  assert written(tmp_path, data) == first  # over a finished one
  data.seed = 1
  assert written(tmp_path, data, "other") != first


def test_hotness_a_feature(tmp_path):
  data = small(hotness=(3, *[1] * 24, 2))
  written(tmp_path, data)
  line = (tmp_path / "logs" / "part_0000.tsv").read_text().splitlines()[0]
  commas = [cell.count(",") for cell in line.split("\t")]
  assert sum(commas) in (0, 1, 2, 3)
  assert max(commas[15:39]) == 0
