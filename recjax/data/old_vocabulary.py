"""Another run's vocabulary: its counts go into a new log's, its rows go on.

A run may begin with what another one has trained (`train.start_from`), on a new
log. A value's count is then that of the log, plus `data.count_decay` times what
it was, rounded down; so is that of a table's special rows. A value that does
not come any more stays until its count falls below `data.min_count`, and then
counts as out of vocabulary. Counts of many days are a geometric sum: with a
half, yesterday's log weighs half as much as today's, and a month old one
nothing; all together at most as much as today's, so that ranks follow.

Rows are the same where table and value are, or the kind of a special row.
"""

import collections
import itertools
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recjax import files
from recjax.data import prepared, vocabulary
from recjax.data.numbers import Fitted
from recjax.errors import UserError
from recjax.frequency import Profile

# table [V] int16, value [V] (null = missing), count [V].
Part = tuple[np.ndarray, pa.Array, np.ndarray]
BEFORE, DECAY = "data.counts_before", "data.count_decay"  # settings
# Setting of a run: the normalisers that its data was prepared with.
NUMBERS = "data.numbers"
FRESH = -1  # rank of a row that was not there


class Before(NamedTuple):
  """The data that another run has trained on."""

  path: str  # of its vocabulary
  fingerprint: str
  settings: Mapping[str, Any]  # all of that run's


def _tables_of(path: pathlib.Path) -> tuple[str, ...]:
  """Returns the tables of a run's vocabulary, in their order.

  Raises:
    OSError, ValueError, UserError: that is not known.
  """
  found = vocabulary.tables_of(str(path))
  if found is None:  # an old file: its data's schema says it
    found = prepared.load(str(path.parents[1] / "data")).schema.tables
  return found


def find(workdir: pathlib.Path, fingerprint: str, field: str) -> str:
  """Returns the path of a run's vocabulary; its data may be gone.

  Args:
    workdir: of the run.
    fingerprint: that its checkpoint names.
    field: that names the workdir, for the error.

  Raises:
    UserError: there is none, or none that is whole.
  """
  places = [workdir / x / vocabulary.FILE for x in ("checkpoints", "data")]
  for path in places:
    try:
      tables = _tables_of(path)
      if vocabulary.fingerprint_of(str(path), tables) == fingerprint:
        return str(path)
    except (OSError, UserError, ValueError, TypeError, pa.ArrowException):
      continue  # not there, damaged, or of no table order that is known
  raise UserError(
    f"{field}: neither {places[0]} nor {places[1]} is the vocabulary "
    f"{fingerprint[:12]} that the checkpoint there was trained with; put it "
    "back, or use another workdir"
  )


def numbers_of(
  before: Before | None, settings: Mapping[str, Any]
) -> tuple[Fitted, ...]:
  """Returns the normalisers that another run goes by; () = there are none.

  What it has trained goes on with the same ones, whatever the new log says.

  Args:
    before: the other run's data.
    settings: of the new data set.
  """
  if before is None:
    return ()
  was, key = before.settings, "schema.numbers"
  found = was.get(NUMBERS, []) if was.get(key) == settings.get(key) else []
  return tuple(Fitted.from_json(x) for x in found)


def profile_of(path: str) -> Profile:
  """Returns the profile of a run's vocabulary, which `find` has found.

  That of a training split of one sample: what it had is not known.
  """
  return vocabulary.read_profile(path, _tables_of(pathlib.Path(path)), 1)


# ---- Counts


def settings_of(
  before: Before | None,
  decay: float,
  own: Mapping[str, Any],
  logs: Mapping[str, Any],
  found: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns what else a data set depends on: which counts it goes on from.

  None where it is of the log that the other run has trained on, which counts
  once: then of what that one's depends on.

  Args:
    before: the other run's data; None = as the data set has it.
    decay: of its counts.
    own: what the data set depends on, but for that.
    logs: the part of that which names the logs.
    found: what the data set that is there depends on; empty = none is.
  """
  if before is None:
    return {k: found[k] for k in (BEFORE, DECAY) if k in found}
  was = before.settings
  if all(was.get(k) == x for k, x in logs.items()):
    same = all(was.get(k) == x for k, x in own.items()) and BEFORE in was
    return {k: was[k] for k in (BEFORE, DECAY)} if same else {}
  return {BEFORE: before.fingerprint, DECAY: decay} if decay else {}


def count(
  engine: duckdb.DuckDBPyConnection,
  parts: Iterator[Part],
  tables: tuple[str, ...],
  min_counts: Sequence[int],
  path: str,
  *,
  before: Before | None,
  settings: Mapping[str, Any],
) -> tuple[str, float]:
  """Writes the vocabulary of a log, as `vocabulary.count` does.

  Args:
    engine, parts, tables, min_counts, path: see there.
    before: the other run's data.
    settings: of the data set, those of `settings_of` among them.

  Returns:
    Its fingerprint, and its counts' sum over that of the log's own: of so many
    times the log's samples the counts are.

  Raises:
    UserError: more rows than int32 can count.
  """
  if before is None or BEFORE not in settings:
    return vocabulary.count(engine, parts, tables, min_counts, path), 1.0
  own = 0

  def tallied() -> Iterator[Part]:
    nonlocal own
    for part in parts:
      own += int(part[2].sum())
      yield part

  if settings[BEFORE] != before.fingerprint:  # the same log
    collections.deque(tallied(), 0)
    fingerprint = before.fingerprint
    with files.replacing(path) as copy:
      shutil.copyfile(before.path, copy)
  else:
    oov, others = decayed(before.path, tables, settings[DECAY])
    both = itertools.chain(tallied(), others)
    fingerprint = vocabulary.count(
      engine, both, tables, min_counts, path, oov=oov
    )
  return fingerprint, _accesses(path) / max(own, 1)


def decayed(
  path: str, tables: tuple[str, ...], decay: float
) -> tuple[np.ndarray, Iterator[Part]]:
  """Returns a vocabulary's counts times `decay`, rounded down.

  Those of tables that there are no more are left out.

  Args:
    path: of the file.
    tables: that there are now.
    decay: from 0 to 1.

  Returns:
    [tables] int64 of out-of-vocabulary rows, and an iterator over (table, value
    or null = missing, count) of the others: as `vocabulary.count` takes both.
  """
  names = pa.array(tables, pa.string())

  def read(unknown: bool):
    for batch in pq.ParquetFile(path).iter_batches(
      columns=["table", "kind", "value", "count"]
    ):
      table = pc.index_in(batch["table"], names)
      mine = pc.equal(batch["kind"], "oov")
      mine = pc.and_(mine if unknown else pc.invert(mine), table.is_valid())
      count = batch["count"].filter(mine).to_numpy()
      n = np.floor(count * decay).astype(np.int64)
      at = table.filter(mine).to_numpy(zero_copy_only=False)
      yield at.astype(np.int16), batch["value"].filter(mine), n

  oov = np.zeros(len(tables), np.int64)
  for table, _, n in read(unknown=True):
    np.add.at(oov, table, n)
  return oov, read(unknown=False)


def _accesses(path: str) -> int:
  """Returns the sum of all counts of a vocabulary."""
  batches = pq.ParquetFile(path).iter_batches(columns=["count"])
  return sum(int(b["count"].to_numpy().sum()) for b in batches)


# ---- Rows


def ranks_in(
  engine: duckdb.DuckDBPyConnection, old: str, new: str, rows: int
) -> np.ndarray:
  """Joins two vocabularies: where the rows of one are in the other.

  Args:
    engine: see `vocabulary.open_engine`.
    old, new: paths of their files.
    rows: of the new one.

  Returns:
    [rows] int32, of each row of the new one its rank in the old one, or FRESH.
  """
  for name, path in (("old_rows", old), ("new_rows", new)):
    file = pq.ParquetFile(path)
    columns = ["table", "kind", "value", "rank"]
    reader = pa.RecordBatchReader.from_batches(
      pa.schema([file.schema_arrow.field(c) for c in columns]),
      file.iter_batches(columns=columns),
    )
    engine.register(name, reader)
  # Special rows have no value: their kind is one that no value is beside.
  found = engine.sql(
    "SELECT n.rank AS new, o.rank AS old FROM new_rows AS n JOIN old_rows AS o"
    ' ON n."table" = o."table" AND n.kind = o.kind'
    " AND coalesce(n.value, '') = coalesce(o.value, '')"
  ).to_arrow_reader(1 << 18)
  ranks = np.full(rows, FRESH, np.int32)
  for batch in found:
    ranks[batch["new"].to_numpy()] = batch["old"].to_numpy()
  return ranks
