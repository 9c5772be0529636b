"""Small logs that look like public ones, and what inspecting them gives."""

import csv
import gzip
import json
import pathlib
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recjax import config_check
from recjax.config import Config
from recjax.data import describe_log, inspect_log

ROWS = 400


def inspected(path, **data) -> inspect_log.Inspection:
  config = Config()
  config.data.train = str(path)
  for name, value in data.items():
    setattr(config.data, name, value)
  return inspect_log.inspect(config, "format" in data)


def config_of(found: inspect_log.Inspection) -> Config:
  """Runs the config file that is proposed."""
  module = types.ModuleType("mine")
  exec(describe_log.config_file(found), module.__dict__)
  config = module.get_config()
  config_check.check(config)
  return config


def write(path, header, columns, separator=",") -> pathlib.Path:
  with open(path, "w", newline="") as f:
    out = csv.writer(f, delimiter=separator)
    out.writerows([*([header] if header else []), *zip(*columns, strict=True)])
  return path


def draws(seed=0):
  """Returns (the generator, clicks, a function that draws ids by skew)."""
  rng = np.random.default_rng(seed)
  click = (rng.random(ROWS) < 0.3).astype(int)
  return rng, click, lambda n: np.minimum(rng.zipf(1.3, ROWS), n)


def avazu(at) -> pathlib.Path:
  rng, click, ids = draws()
  text = lambda n: [f"{i * 2654435761 % 2**32:08x}" for i in ids(n)]
  columns = {
    "id": 10**18 + rng.permutation(ROWS) * 7919,
    "click": click,
    "hour": 14102100 + np.arange(ROWS) // 20,
    "C1": rng.choice([1001, 1005, 1010], ROWS),
    "banner_pos": rng.integers(0, 3, ROWS),
    **{n: text(50) for n in ("site_id", "site_domain", "site_category")},
    **{n: text(30) for n in ("app_id", "app_domain", "app_category")},
    "device_id": text(5),
    "device_ip": [f"{x:08x}" for x in rng.integers(0, 2**32, ROWS)],
    "device_model": text(80),
    "device_type": rng.integers(0, 4, ROWS),
    "C14": rng.integers(375, 24_052, ROWS),
    "C15": rng.choice([300, 320, 728], ROWS),
    "C17": rng.integers(112, 2_758, ROWS),
    "C20": rng.choice([-1, 100_084, 100_148], ROWS),
    "C21": rng.integers(1, 256, ROWS),
  }
  return write(at / "train.csv", list(columns), columns.values())


def open_bandit(at) -> pathlib.Path:
  rng, click, ids = draws()
  when = np.datetime64("2019-11-24T00:00:20") + np.sort(
    rng.integers(0, 10**6, ROWS)
  )
  columns = {
    "": np.arange(ROWS),
    "timestamp": [f"{x} +00:00".replace("T", " ") for x in when],
    "item_id": ids(80),
    "position": rng.integers(1, 4, ROWS),
    "click": click,
    "propensity_score": rng.choice([0.0125, 0.31, 0.0047], ROWS),
    **{
      f"user_feature_{i}": [f"{x * 7919:032x}" for x in ids(9)]
      for i in range(4)
    },
    **{
      f"user-item_affinity_{i}": rng.exponential(0.1, ROWS).round(3)
      for i in range(46)
    },
  }
  return write(at / "all.csv", list(columns), columns.values())


def recbole(at) -> pathlib.Path:
  rng, _, ids = draws()
  columns = {
    "user_id:token": ids(99),
    "item_id:token": ids(200),
    "rating:float": rng.integers(1, 6, ROWS),
    "timestamp:float": rng.integers(874_724_710, 893_286_638, ROWS),
    "genre:token_seq": [
      " ".join(f"g{x}" for x in rng.integers(0, 9, 1 + i % 3))
      for i in range(ROWS)
    ],
  }
  return write(at / "ml.inter", list(columns), columns.values(), "\t")


def ali_ccp(at) -> pathlib.Path:
  rng, click, ids = draws()
  columns = {
    "click": click,
    "buy": click * (rng.random(ROWS) < 0.2),
    **{name: ids(40) for name in ("101", "121", "122", "205", "508")},
    "D109_14": rng.random(ROWS).round(4),
  }
  return write(at / "ali.csv", list(columns), columns.values())


def behaviour(at, kind="jsonl") -> pathlib.Path:
  rng, click, ids = draws()
  item, user = ids(60), ids(40)
  past = [rng.permutation(60)[: k % 9].tolist() for k in range(ROWS)]
  rows = [
    {
      "request_id": f"r{k * 7919 % 10_007}",
      "is_click": bool(click[k]),
      "user_id": int(user[k]),
      "item_id": int(item[k]),
      "hist_item": past[k],
      "tags": [f"t{x}" for x in past[k] if x < 7],
      "tag_weights": [x / 7 + 0.01 for x in past[k] if x < 7],
      "price": None if k % 5 == 0 else float(np.exp(3 * rng.normal()) + 1),
      "sample_weight": 0.5 + (k % 2),
      "platform": "web",
      "ts": 1_700_000_000 + k,
      "title": f"A story of {k} and the rest of it, part {k % 17}",
    }
    for k in range(ROWS)
  ]
  if kind == "parquet":
    pq.write_table(pa.Table.from_pylist(rows), at / "log.parquet")
    return at / "log.parquet"
  (at / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return at / "log.jsonl"


def frappe(at) -> pathlib.Path:
  rng, click, _ = draws()
  line = lambda k: " ".join(
    f"{10 * i + rng.integers(0, 10)}:1" for i in range(10)
  )
  path = at / "frappe.train.libfm"
  path.write_text("".join(f"{2 * c - 1} {line(c)}\n" for c in click))
  return path


def criteo(at) -> pathlib.Path:
  _, click, ids = draws()
  numbers = [["" if x % 7 == 0 else x for x in ids(999)] for _ in range(13)]
  categories = [[f"{x * 7919:08x}" for x in ids(99)] for _ in range(26)]
  columns = (click, *numbers, *categories)
  path = write(at / "day_0", None, columns, "\t")
  (at / "day_0.gz").write_bytes(gzip.compress(path.read_bytes()))
  return at / "day_0.gz"


def movielens_csv(at) -> pathlib.Path:
  rng, _, ids = draws()
  columns = {
    "userId": np.sort(ids(30)),
    "movieId": ids(300),
    "rating": rng.integers(1, 11, ROWS) / 2,
    "timestamp": rng.integers(789_652_009, 1_537_799_250, ROWS),
  }
  return write(at / "ratings.csv", list(columns), columns.values())


def amazon(at) -> pathlib.Path:
  rng, _, ids = draws()
  rows = [
    {
      "reviewerID": f"A{u}X",
      "asin": f"B{i:09}",
      "reviewerName": f"Name {u}",
      "helpful": [int(u) % 4, 4],
      "reviewText": f"I bought {k} of them and the {i} is as {u} as it gets.",
      "overall": float(r),
      "verified": bool(k % 3),
      "unixReviewTime": int(1_250_000_000 + rng.integers(0, 10**8)),
      "reviewTime": f"{k % 12 + 1:02} {k % 28 + 1}, 2013",
    }
    for k, (u, i, r) in enumerate(
      zip(ids(80), ids(90), rng.integers(1, 6, ROWS), strict=True)
    )
  ]
  (at / "reviews.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
  return at / "reviews.json"


def kuairec(at) -> pathlib.Path:
  rng, _, ids = draws()
  duration = rng.integers(3_000, 60_000, ROWS)
  played = (duration * rng.exponential(0.9, ROWS)).astype(int)
  columns = {
    "user_id": ids(60),
    "video_id": ids(150),
    "play_duration": played,
    "video_duration": duration,
    "time": [f"2020-07-05 00:{k % 60:02}:18.3" for k in range(ROWS)],
    "date": np.full(ROWS, 20200705) + np.arange(ROWS) // 50,
    "timestamp": 1593878900.0 + np.sort(rng.random(ROWS) * 1e6).round(2),
    "watch_ratio": played / duration,
  }
  return write(at / "big_matrix.csv", list(columns), columns.values())
