"""The rows of tables as files, streamed from a checkpoint; needs no devices.

For nearest-neighbour indexes, and whatever else wants vectors by value. Rows
are read in rank order, block by block, whatever tiers, mesh and plan they were
saved with; and all of a group's, as its checksums are of all.
"""

import contextlib
import difflib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recjax import files
from recjax.data import old_vocabulary
from recjax.errors import UserError
from recjax.frequency import Profile
from recjax.plan import positions
from recjax.plan.plan import Plan
from recjax.progress import Progress
from recjax.training import checkpoint, restore_rows
from recjax.training.checkpoint_reader import StoredGroup

_BUFFER_BYTES = 64 << 20  # of all tables, which wait to be written
_ABOUT = pa.schema(
  [("value", pa.string()), ("kind", pa.string()), ("count", pa.int64())]
)


def export_rows(
  workdir: pathlib.Path,
  output: pathlib.Path,
  tables: Sequence[str] = (),
  *,
  step: int = -1,
  report: Callable[[str], None] = print,
) -> None:
  """Writes value, kind, count and vector of all rows of tables.

  Args:
    workdir: of the run.
    output: NAME.parquet; or NAME.npy of vectors [rows, d] float32, the rest in
      NAME.values.parquet; or, of any number of tables, a folder of
      TABLE.parquet. Nothing of that name may be there.
    tables: their names; none = all.
    step: of the checkpoint; -1 = the newest.
    report: takes lines of progress.

  Raises:
    UserError: there is no such checkpoint or table, the checkpoint is damaged,
      or something is at the output's place.
  """
  saved = _open(workdir, step)
  wanted = _named(tables, saved.profile)
  _check_output(output, wanted)
  output.parent.mkdir(parents=True, exist_ok=True)
  report(
    f"exporting {', '.join(wanted)} of checkpoint {saved.step} in "
    f"{saved.directory}"
  )
  rows, dims = saved.profile.table_rows(), saved.dims()
  with _writing(output, {t: (rows[t], dims[t]) for t in wanted}) as write:
    for table, about, vectors in _read(saved, wanted, report):
      write(table, about, vectors)


# ---- What there is


class _Saved(NamedTuple):
  """A checkpoint and its vocabulary."""

  directory: pathlib.Path
  step: int
  meta: dict
  vocabulary: str  # path
  profile: Profile

  @property
  def plan(self) -> Plan:
    """The plan that it was saved under."""
    return Plan.from_json(self.meta["plan"])

  def dims(self) -> dict[str, int]:
    """Returns d of each table."""
    return {t: g.dim for g in self.plan.groups for t in g.tables}


def _open(workdir: pathlib.Path, step: int) -> _Saved:
  directory = workdir / "checkpoints"
  found = checkpoint.newest(directory) if step < 0 else step
  if found is None:
    raise UserError(
      f"--workdir: {directory} holds no checkpoint to export; train first"
    )
  meta = checkpoint.read_meta(directory, found)
  path = old_vocabulary.find(
    workdir, meta["identity"]["vocabulary"], "--workdir"
  )
  return _Saved(directory, found, meta, path, old_vocabulary.profile_of(path))


def _named(tables: Sequence[str], profile: Profile) -> tuple[str, ...]:
  """Returns the names of tables, all where none is given."""
  for name in tables:
    if name not in profile.tables:
      near = difflib.get_close_matches(name, profile.tables, 1, 0.5)
      hint = f"did you mean {near[0]}?" if near else ""
      raise UserError(
        f"--tables: there is no table {name!r}; "
        + (hint or f"the tables are {', '.join(profile.tables)}")
      )
  return tuple(dict.fromkeys(tables)) or profile.tables


def _check_output(output: pathlib.Path, tables: tuple[str, ...]) -> None:
  """Raises UserError where the output cannot be written as it is named."""
  one = output.suffix in (".parquet", ".npy")
  if one and len(tables) > 1:
    raise UserError(
      f"--output: {output} is a file, which holds one table; name one of "
      f"{', '.join(tables)} with --tables, or a folder to put TABLE.parquet of "
      "each in"
    )
  for path in (output, _values_of(output)):
    if path.exists() or path.is_symlink():
      raise UserError(
        f"--output: {path} is there already; name another place, or remove it"
      )
  for table in () if one else tables:
    if "/" in table or table.startswith("."):
      raise UserError(
        f"--output: table {table!r} cannot name a file in a folder; export it "
        "alone, with --tables and an output that ends in .parquet or .npy"
      )


def _values_of(output: pathlib.Path) -> pathlib.Path:
  """Returns where the values beside an .npy go; else the output itself."""
  if output.suffix == ".npy":
    return output.with_suffix(".values.parquet")
  return output


# ---- Reading


def _read(
  saved: _Saved, tables: tuple[str, ...], report: Callable[[str], None]
) -> Iterator[tuple[str, pa.RecordBatch, np.ndarray]]:
  """Yields (table, value, kind and count, vectors [m, d]) in rank order.

  Raises:
    UserError: the checkpoint is damaged, which may be seen at the end only.
  """
  progress = Progress("export", report, saved.profile.rows)
  try:
    sources = _sources(saved, tables)
    rows = restore_rows.BLOCK_BYTES // (4 * max(s.dim for s in sources))
    for batch in pq.ParquetFile(saved.vocabulary).iter_batches(
      max(1, rows), columns=["table", *_ABOUT.names]
    ):
      for source in sources:
        yield from source.read(batch, tables)
      progress.add(len(batch))
    for source in sources:
      want = source.found.wanted(saved.meta["checksums"])
      restore_rows.compare(source.found.sums(), want)
  except Exception as e:
    raise checkpoint.damaged(saved.directory, saved.step, e) from e


class _Source:
  """The rows of a group, read in rank order."""

  def __init__(self, found: StoredGroup, group, where):
    self.found, self.dim = found, group.dim
    self._tables, self._where, self._done = pa.array(group.tables), where, 0

  def read(
    self, batch: pa.RecordBatch, tables: tuple[str, ...]
  ) -> Iterator[tuple[str, pa.RecordBatch, np.ndarray]]:
    """Yields the rows of these tables that a batch of the vocabulary names."""
    table = pc.fill_null(pc.index_in(batch["table"], self._tables), -1)
    table = table.to_numpy()
    mine = table[table >= 0]
    ranks = np.arange(self._done, self._done + len(mine))
    self._done += len(mine)
    if not len(mine):
      return
    at = ranks if self._where is None else self._where.positions_of(ranks)
    vectors = self.found.read("rows", at).astype(np.float32)
    about = batch.select(_ABOUT.names)
    for t in np.unique(mine):
      name = self._tables[int(t)].as_py()
      if name in tables:
        yield name, about.filter(pa.array(table == t)), vectors[mine == t]


def _sources(saved: _Saved, tables: tuple[str, ...]) -> list[_Source]:
  """Opens the groups of these tables."""
  plan, directory = saved.plan, saved.directory.absolute()
  full = checkpoint.full_meta(directory, saved.step, saved.meta)
  items = restore_rows.open_items(directory / str(saved.step), saved.meta, full)
  where = positions.of_groups(plan, saved.profile)
  return [
    _Source(StoredGroup(items, g, ["rows"]), g, where.get(g.name))
    for g in plan.groups
    if set(g.tables) & set(tables)
  ]


# ---- Writing

Write = Callable[[str, pa.RecordBatch, np.ndarray], None]


@contextlib.contextmanager
def _writing(
  output: pathlib.Path, shapes: dict[str, tuple[int, int]]
) -> Iterator[Write]:
  """Gives what writes some rows of a table; all appear when the block ends.

  shapes: (rows, d) of each table.
  """
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context

    def parquet(path: str | pathlib.Path, dim: int) -> _Parquet:
      file = enter(open(path, "wb"))  # noqa: SIM115
      return enter(_Parquet(file, dim))

    if output.suffix == ".npy":
      ((rows, dim),) = shapes.values()
      file = enter(open(enter(files.replacing(output)), "wb"))  # noqa: SIM115
      header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
      np.lib.format.write_array_header_1_0(file, header)
      values = parquet(enter(files.replacing(_values_of(output))), 0)

      def write(table: str, about: pa.RecordBatch, x: np.ndarray) -> None:
        file.write(np.ascontiguousarray(x, "<f4"))
        values.add(about, x)
        if values.nbytes > _BUFFER_BYTES:
          values.flush()

      yield write
      return
    if output.suffix == ".parquet":
      ((table, (_, dim)),) = shapes.items()
      parts = {table: parquet(enter(files.replacing(output)), dim)}
    else:
      folder = pathlib.Path(enter(files.replacing_folder(output)))
      parts = {
        table: parquet(folder / f"{table}.parquet", dim)
        for table, (_, dim) in shapes.items()
      }

    def put(table: str, about: pa.RecordBatch, x: np.ndarray) -> None:
      parts[table].add(about, x)
      while sum(p.nbytes for p in parts.values()) > _BUFFER_BYTES:
        max(parts.values(), key=lambda p: p.nbytes).flush()

    yield put


class _Parquet:
  """A Parquet file of a table, whose rows wait for more before it is written.

  Else the row groups of tables that are seldom used would be of a few rows.
  """

  def __init__(self, file: BinaryIO, dim: int):
    """dim: d of the column `vector`; 0 = there is none."""
    self._schema, self._dim = _ABOUT, dim
    if dim:
      vector = pa.field("vector", pa.list_(pa.float32(), dim))
      self._schema = _ABOUT.append(vector)
    self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
    self._waiting: list[pa.RecordBatch] = []
    self.nbytes = 0

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.flush()
    self._writer.close()

  def add(self, about: pa.RecordBatch, vectors: np.ndarray) -> None:
    """Adds rows: value, kind and count, and vectors [m, d] float32."""
    columns = about.columns
    if self._dim:
      flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
      columns.append(pa.FixedSizeListArray.from_arrays(flat, self._dim))
    batch = pa.record_batch(columns, schema=self._schema)
    self._waiting.append(batch)
    self.nbytes += batch.nbytes

  def flush(self) -> None:
    """Writes what waits, as a row group."""
    if self._waiting:
      table = pa.Table.from_batches(self._waiting)
      self._writer.write_table(table, row_group_size=max(1, len(table)))
    self._waiting, self.nbytes = [], 0
