"""Logs like ten public ones, of a few hundred rows: what is proposed."""

import pathlib

import helpers_logs
import numpy as np
import pytest
from helpers import quiet
from helpers_logs import ROWS, config_of, inspected

from recjax import jobs
from recjax.config import Config, Embedding
from recjax.data import describe_log, inspect_log
from recjax.embedding import optimizers
from recjax.errors import UserError
from recjax.log_schema import Schema

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def roles(found: inspect_log.Inspection) -> dict[str, str]:
  return {
    c.name: describe_log.role(found.proposal.schema, c.name) or "left out"
    for c in found.columns
  }


BEHAVIOUR = {
  "request_id": "keep",
  "is_click": "label",
  "user_id": "id",
  "item_id": "id",
  "hist_item": "history of item_id",
  "tags": "bag",
  "tag_weights": "weights of tags",
  "price": "number, log1p",
  "sample_weight": "weight",
  "platform": "left out",
  "ts": "time",
  "title": "left out",
}
# What a person would propose, of the columns that tell.
LOGS = {
  "avazu": (
    helpers_logs.avazu,
    "csv",
    ("click",),
    dict.fromkeys(["C1", "banner_pos", "site_id", "app_category"], "id")
    | dict.fromkeys(["device_ip", "device_type", "C14", "C15", "C17"], "id")
    | dict.fromkeys(["C20", "C21"], "id")
    | {"id": "keep", "hour": "time"},
  ),
  "open bandit": (
    helpers_logs.open_bandit,
    "csv",
    ("click",),
    {
      "": "left out",
      "timestamp": "time",
      "item_id": "id",
      "position": "id",
      "propensity_score": "number, standard",
      **{f"user_feature_{i}": "id" for i in range(4)},
      **{f"user-item_affinity_{i}": "number, standard" for i in range(46)},
    },
  ),
  "recbole": (
    helpers_logs.recbole,
    "csv",
    ("rating:float > 3",),
    {
      "user_id:token": "id",
      "item_id:token": "id",
      "timestamp:float": "time",
      "genre:token_seq": "bag",
    },
  ),
  "ali-ccp": (
    helpers_logs.ali_ccp,
    "csv",
    ("click", "buy"),
    {"101": "id", "508": "id", "D109_14": "number, standard"},
  ),
  "behaviour": (helpers_logs.behaviour, "jsonl", ("is_click",), BEHAVIOUR),
  "behaviour as parquet": (
    lambda at: helpers_logs.behaviour(at, "parquet"),
    "parquet",
    ("is_click",),
    BEHAVIOUR,
  ),
  "frappe": (
    helpers_logs.frappe,
    "libsvm",
    ("label",),
    {"features": "bag, not pooled", "values": "left out"},
  ),
  "criteo": (
    helpers_logs.criteo,
    "criteo",
    ("label",),
    {"I1": "number, log1p", "I13": "number, log1p", "C1": "id", "C26": "id"},
  ),
  "movielens": (
    helpers_logs.movielens_csv,
    "csv",
    ("rating > 3",),
    {"userId": "id", "movieId": "id", "timestamp": "time"},
  ),
  "amazon": (
    helpers_logs.amazon,
    "jsonl",
    ("overall > 3",),
    {
      "reviewerID": "id",
      "asin": "id",
      "reviewText": "left out",
      "verified": "id",
      "unixReviewTime": "time",
      "reviewTime": "left out",
    },
  ),
  "kuairec": (
    helpers_logs.kuairec,
    "csv",
    ("watch_ratio > 1",),
    {
      "user_id": "id",
      "video_id": "id",
      "play_duration": "left out",
      "time": "left out",
      "date": "left out",
      "timestamp": "time",
    },
  ),
}


@pytest.mark.parametrize("name", LOGS)
def test_it_proposes_what_a_person_would(name, tmp_path):
  make, format, labels, expected = LOGS[name]
  found = inspected(make(tmp_path))
  assert found.data.format == format
  assert found.proposal.schema.labels == labels
  got = roles(found)
  assert {n: got[n] for n in expected} == expected
  assert (found.rows, found.total) == (ROWS, ROWS)
  config = config_of(found)
  if format != "criteo":
    assert config.schema == found.proposal.schema
  text = describe_log.report(found, config.embedding, config.schema)
  assert all(n in text for n in expected)


@pytest.mark.parametrize("name", ["behaviour", "recbole", "frappe"])
def test_the_written_config_trains(name, tmp_path):
  config = config_of(inspected(LOGS[name][0](tmp_path)))
  config.model.top = config.model.bottom = (8,) * bool(config.model.bottom)
  config.train.epochs = 1
  result = jobs.train(config, tmp_path / "run", quiet)
  assert 0 < result["auc"] < 1


# ---- Files


def test_headers_are_told_from_rows(tmp_path):
  text = lambda body, **data: inspected(_file(tmp_path, body), **data).data.text
  assert text("a,b\n1,2\n3,4\n").header
  assert text("a,7\n1,2\n3,4\n").header  # Ali-CCP's fields are numbers
  assert text("user,city\nanna,Rome\nbert,Oslo\n").header
  assert text("a,NA\n1,2\n").header
  for body in ("1,2\n3,4\n", "1,x\n3,y\n", "x,y\nz,y\n", "NA,1\n2,3\n"):
    found = text(body)
    assert (found.header, found.names) == (False, ("c1", "c2")), body
  assert text("a;b\n1,5;2\n").names == ()
  assert text("10 7\n10 8\n").separator == " "
  assert text("10 7\n10 8 9\n").separator == ""
  told = Config().data.text
  told.header = False
  assert text("a,b\nc,d\n", format="csv", text=told).names == ("c1", "c2")


def _file(folder, body: str | bytes, name="log") -> pathlib.Path:
  path = folder / name
  path.write_bytes(body.encode() if isinstance(body, str) else body)
  return path


@pytest.mark.parametrize(
  ("body", "said"),
  [
    (b"\x7fELF\x02\x01\x01\0\0\0", "log is a program, not text"),
    (b"PAR1 and no more", "truncated or damaged at its end"),
    (b"\0\1\2\3" * 100, "binary, not text"),
    (b"# A title\n\nSome words, and\nmore, of, them\n" * 9, "rows cannot be"),
    (b"click\n", "holds no row"),
    (b"click,a,a\n1,2,3\n", "has the column 'a' 2 times"),
    (b'[{"click": 1},\n {"click": 0}]', "write an object a line"),
    (b'{\n  "click": 1\n}\n', "write an object a line"),
    (b"", "is empty"),
  ],
)
def test_what_is_no_log_is_one_message(body, said, tmp_path):
  path = _file(tmp_path, body)
  with pytest.raises(UserError) as e:
    inspected(path)
  assert said in str(e.value) and str(path) in str(e.value)
  assert "\n" not in str(e.value)


def test_no_file_and_no_path(tmp_path):
  with pytest.raises(UserError, match=r"^data\.train: .*none.* does not exist"):
    inspected(tmp_path / "none")
  with pytest.raises(UserError, match=r"^data\.train is empty"):
    inspected("")


def test_a_sample_of_several_files_tells_of_all(tmp_path):
  rng, rows = np.random.default_rng(0), 60_000
  for day in range(3):
    user = rng.integers(0, 500, rows)
    key = rng.integers(0, 2**60, rows)
    lines = zip(user.tolist(), key.tolist(), strict=True)
    body = "click,user,device\n" + "".join(
      f"{k % 2},{u},{k}\n" for u, k in lines
    )
    _file(tmp_path, body, f"day_{day}.csv")
  found = inspected(tmp_path / "day_*.csv")
  assert len(found.paths) == 3
  assert found.rows == inspect_log.ROWS // 3 * 3
  assert found.total == pytest.approx(3 * rows, rel=0.01)
  assert describe_log.tables(found) == {
    "user": 500,
    "device": pytest.approx(3 * rows, rel=0.01),
  }
  text = describe_log.report(found, Embedding(), Schema())
  assert "180,000 rows, 12.2 MB" in text  # of 17 floats each


def test_slots_are_those_of_the_optimizers():
  for name, of in describe_log.SLOTS.items():
    assert 4 * of(24) == optimizers.slot_bytes(name, 24)
  assert set(describe_log.SLOTS) == set(optimizers.OPTIMIZERS)


def test_damaged_rows_are_told_and_skipped(tmp_path):
  body = "click,item\n" + "1,a\n0,b\n" * 50 + "1\n"
  found = inspected(_file(tmp_path, body))
  assert "line 102: 1 fields where 2" in describe_log.report(
    found, Embedding(), Schema()
  )
  assert config_of(found).data.max_bad_rows == 2


# ---- Data that is here only


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
@pytest.mark.parametrize(
  ("name", "format", "labels"),
  [
    ("criteo_kaggle_80k.tsv.gz", "criteo", ("label",)),
    ("ml-1m", "movielens", ("label",)),
    ("sequences/Beauty.txt.gz", "csv", ()),
  ],
)
def test_shared_data(name, format, labels):
  found = inspected(SHARED / name)
  assert found.data.format == format
  assert found.proposal.schema.labels == labels
  assert config_of(found).data.format == format
