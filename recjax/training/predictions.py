"""Predictions as a file, in the order of the log; a run cut off goes on.

While they are made they lie in parts in `<output>.unfinished`, beside a note of
what they are of; at the end they become one file.
"""

import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from recjax import files
from recjax.errors import UserError
from recjax.training.metrics import Metrics
from recjax.training.score_log import Scored

SUFFIXES = (".parquet", ".csv")
PROBABILITY = "probability"  # the column
_OF = "of.json"
_LOGIT, _LABEL = "\0logit", "\0label"  # columns of parts alone
_ROWS = 1 << 20  # of a part


def check(output: pathlib.Path, keep: tuple[str, ...]) -> None:
  """Raises UserError where predictions cannot be written as asked for.

  Args:
    output: their file.
    keep: columns of the log that they repeat.
  """
  if output.suffix not in SUFFIXES:
    raise UserError(
      f"--output: {output.name} ends in neither {' nor '.join(SUFFIXES)}, the "
      "formats of predictions"
    )
  if output.exists():
    raise UserError(
      f"--output: {output} is there already; name another place, or remove it"
    )
  if PROBABILITY in keep:
    raise UserError(
      f"schema.keep: {PROBABILITY!r} is the column of the predictions; leave "
      "it out"
    )


def begun(output: pathlib.Path, of: dict[str, Any]) -> int:
  """Returns how many samples of these predictions are done; begins them.

  Args:
    output: their file.
    of: JSON: all that they depend on. Parts of something else are removed.
  """
  folder = _folder(output)
  try:
    same = files.read_json(folder / _OF) == of
    return sum(pq.read_metadata(p).num_rows for p in _parts(folder) if same)
  except (OSError, ValueError, pa.ArrowException):
    same = False
  finally:
    if not same:
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      files.write(folder / _OF, json.dumps(of))
  return 0


def write(output: pathlib.Path, scored: Iterable[Scored]) -> dict[str, float]:
  """Writes the predictions of scored samples after those that are done.

  Returns:
    The metrics of all samples with a label; none where no sample has one.

  Raises:
    UserError: a logit is not finite.
  """
  folder = _folder(output)
  waiting: list[pa.Table] = []
  for part in scored:
    waiting.append(_table(part))
    if sum(map(len, waiting)) >= _ROWS:
      _write_part(folder, waiting)
      waiting = []
  _write_part(folder, waiting)
  total = Metrics()
  with files.replacing(output) as path:
    _join(folder, output.suffix, path, total)
  shutil.rmtree(folder)
  result = total.result()
  return result if result["samples"] else {}


def _folder(output: pathlib.Path) -> pathlib.Path:
  return output.with_name(output.name + ".unfinished")


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.iterdir() if p.suffix == ".parquet")


def _table(part: Scored) -> pa.Table:
  if not np.isfinite(part.logits).all():
    raise UserError(
      "a prediction is not finite: the parameters have diverged, or a number "
      "of the log is far off those of training; evaluate the checkpoint"
    )
  table = part.keep if part.keep is not None else pa.table({})
  for i, column in enumerate(table.columns):
    if pa.types.is_dictionary(column.type):
      table = table.set_column(
        i, table.column_names[i], column.cast(column.type.value_type)
      )
  own = [pa.array(part.logits), pa.array(part.labels)]
  return pa.table(
    [*table.columns, *own], names=[*table.column_names, _LOGIT, _LABEL]
  )


def _write_part(folder: pathlib.Path, tables: list[pa.Table]) -> None:
  if tables:
    i = len(_parts(folder))
    with files.replacing(folder / f"{i:06}.parquet") as path:
      table = pa.concat_tables(tables, promote_options="permissive")
      pq.write_table(table, path)


def _join(folder: pathlib.Path, suffix: str, path: str, total: Metrics) -> None:
  """Writes the parts as one file; adds what has labels to the metrics."""
  parts = _parts(folder)
  schema = pa.unify_schemas(
    [pq.read_schema(p) for p in parts], promote_options="permissive"
  )
  plain = pa.schema(
    [f for f in schema if f.name not in (_LOGIT, _LABEL)]
    + [pa.field(PROBABILITY, pa.float32())]
  )
  open_writer = pq.ParquetWriter if suffix == ".parquet" else pa.csv.CSVWriter
  with open(path, "wb") as file, open_writer(file, plain) as writer:
    for batch in _batches(parts):
      logits = batch[_LOGIT].to_numpy()
      labels = batch[_LABEL].to_numpy()
      there = ~np.isnan(labels)
      total.add(logits[there], labels[there])
      x = logits.astype(np.float64)
      probability = np.exp(x - np.logaddexp(0, x)).astype(np.float32)
      kept = batch.drop_columns([_LOGIT, _LABEL])
      kept = kept.append_column(PROBABILITY, pa.array(probability))
      writer.write_table(pa.table(kept).cast(plain))


def _batches(parts: list[pathlib.Path]) -> Iterator[pa.Table]:
  for part in parts:
    for batch in pq.ParquetFile(part).iter_batches(1 << 17):
      yield pa.Table.from_batches([batch])
