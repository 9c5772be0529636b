"""Ranks range by range: those of one sort of all rows."""

import collections
import os

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.data import ranges, vocabulary

TABLES = 3
KEYS = st.tuples(
  st.integers(0, TABLES - 1),
  st.text(st.sampled_from("ab\0é\U0001f600"), max_size=3),
)
RUNS = st.lists(
  st.dictionaries(KEYS, st.integers(0, 4), max_size=25), min_size=1, max_size=4
)


def order(key) -> tuple[int, bytes]:
  return key[0], key[1].encode()


@settings(max_examples=60)
@given(
  runs=RUNS,
  min_counts=st.lists(st.integers(1, 3), min_size=TABLES, max_size=TABLES),
  batch=st.integers(1, 5),
  range_bytes=st.integers(20, 400),
)
def test_ranks_are_those_of_one_sort(
  tmp_path_factory, runs, min_counts, batch, range_bytes
):
  tmp = tmp_path_factory.mktemp("runs")
  folders = []
  for i, run in enumerate(runs):
    folders.append(str(tmp / f"run{i}"))
    os.makedirs(folders[-1])
    rows = [(*key, run[key]) for key in sorted(run, key=order)]
    batches = [
      pa.record_batch(
        list(zip(*rows[k : k + batch], strict=True)), vocabulary.COUNTS
      )
      for k in range(0, len(rows), batch)
    ]
    ranges.write_run(folders[-1], batches)
  cut = ranges.cut(folders, range_bytes)
  of_ranges = []
  for p in range(len(cut.bounds) + 1):
    of_ranges.append(str(tmp / f"range{p}"))
    os.makedirs(of_ranges[-1])
    ranges.save(of_ranges[-1], ranges.add_up(folders, cut, p, min_counts))
  missing = np.arange(TABLES)
  bases = ranges.bases(of_ranges, missing)

  total = collections.Counter()
  for run in runs:
    total.update(run)
  rows = [(-n, *order(k)) for k, n in total.items() if n >= min_counts[k[0]]]
  rows = [(n, t, 2, v) for n, t, v in rows]
  for t in range(TABLES):
    rare = [n for k, n in total.items() if k[0] == t and n < min_counts[t]]
    rows += [(-sum(rare), t, 0, b""), (-t, t, 1, b"")]
  want = {row[1:]: i for i, row in enumerate(sorted(rows))}
  for t in range(TABLES):
    assert [want[t, 0, b""], want[t, 1, b""]] == bases.special[:, t].tolist()
  found = [[] for _ in runs]
  for folder, base in zip(of_ranges, bases.groups, strict=True):
    rank, starts = ranges.ranks(folder, base)
    for i in range(len(runs)):
      found[i] += rank[starts[i] : starts[i + 1]].tolist()
  for run, got in zip(runs, found, strict=True):
    keys = sorted(run, key=order)
    assert got == [want.get((k[0], 2, k[1].encode()), -1) for k in keys]
  written = pa.Table.from_batches(
    [b for b in ranges.rows(of_ranges, bases.counts) if len(b)]
  ).to_pylist()
  got = [
    (-r["n"], r["tbl"], r["kind"], (r["value"] or "").encode()) for r in written
  ]
  assert sorted(got) == sorted(rows)
