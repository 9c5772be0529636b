"""MovieLens-1M: ratings with what is known of the user and the movie.

A folder holds ratings.dat (the original: user::movie::rating::timestamp) or
ratings.tsv[.gz] (user, movie, rating; no time), and users.dat and movies.dat
(latin-1). The label is whether the rating is at least 4. A movie's genres are
a bag, separated by '|'.
"""

import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow_datasets as tfds

from recjax import files
from recjax.config import Data
from recjax.data import log_files, text, text_blocks
from recjax.data.chunks import Chunk, encode
from recjax.data.text import DamagedLines
from recjax.errors import UserError
from recjax.schema import Feature, Schema

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
_RATINGS = ("ratings.dat", "ratings.tsv", "ratings.tsv.gz")
_USER = ("gender", "age", "occupation", "zip")
_ROWS = 1 << 17  # of a chunk


def schema(data: Data) -> Schema:
  """Seven features and no dense input; the longest list of genres has six."""
  one_hot = ("user", "movie", *_USER)
  genres = Feature("genres", "genres", 6, data.pooling)
  return Schema((), (*(Feature(n, n) for n in one_hot), genres))


def sources(data: Data) -> dict[str, tuple[str, ...]]:
  """Finds the files of ratings, users and movies; downloads them if none is.

  Returns:
    {'data.train': (ratings, users, movies)}.

  Raises:
    UserError: files are missing, or cannot be downloaded.
  """
  if data.test:
    raise UserError(
      f"data.test is {data.test}, but MovieLens has one log: leave it empty and"
      " set data.split and data.test_fraction"
    )
  found = data.train or _download()
  directory = found if os.path.isdir(found) else os.path.dirname(found)
  ratings = found
  if os.path.isdir(found):
    there = [n for n in _RATINGS if os.path.exists(os.path.join(found, n))]
    if not there:
      raise UserError(
        f"data.train: {found} holds none of {', '.join(_RATINGS)}"
      )
    ratings = os.path.join(found, there[0])
  paths = (
    ratings,
    os.path.join(directory, "users.dat"),
    os.path.join(directory, "movies.dat"),
  )
  found = (log_files.find(path, "data.train") for path in paths)
  return {"data.train": tuple(path for (path,) in found)}


def _download() -> str:
  """Downloads and unpacks ml-1m.zip, once; returns its folder.

  Through tensorflow-datasets, which knows the checksum, but not through its
  movielens builder: that needs TensorFlow to read the files.
  """
  target = os.path.join(tfds.core.constants.DATA_DIR, "downloads")
  extracted = os.path.join(target, "extracted", "ml-1m")
  if os.path.isdir(extracted):
    return extracted
  try:
    probe = urllib.request.Request(URL, method="HEAD")
    urllib.request.urlopen(probe, timeout=10).close()  # fail soon, not retry
    infos = tfds.core.download.checksums.get_all_url_infos()
    manager = tfds.download.DownloadManager(
      download_dir=target,
      url_infos={URL: infos[URL]},
      dataset_name="movielens",
      force_checksums_validation=True,
    )
    path = manager.download(URL)
    os.makedirs(os.path.dirname(extracted), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
      with zipfile.ZipFile(os.fspath(path)) as file:
        file.extractall(scratch)
      files.move_folder(os.path.join(scratch, "ml-1m"), extracted)
  except Exception as e:  # whatever stops a download
    raise UserError(
      f"MovieLens-1M cannot be downloaded from {URL} ({e}): fetch and unpack it"
      " yourself and set data.train to its directory"
    ) from e
  return extracted


def chunks(
  data: Data, inputs: Schema, paths: tuple[str, ...], damaged: DamagedLines
) -> Iterator[Chunk]:
  """Reads the ratings, in the order of their time where they have one.

  Args:
    data: the config.
    inputs: see `schema`.
    paths: of ratings, users and movies.
    damaged: takes damaged lines.

  Raises:
    UserError: a file that cannot be read, more damaged lines than allowed, a
      split by time without times.
  """
  ratings, users, movies = paths
  dat = ratings.endswith(".dat")
  if data.split == "time" and not dat:
    raise UserError(
      f"data.split=time needs times, which {ratings} does not have: use the"
      " original ratings.dat, or data.split=random"
    )
  table = _ratings(ratings, dat, damaged)
  of_user = _side(users, 5, damaged)
  of_movie = _side(movies, 3, damaged)

  user = _index(table["user"], of_user)
  for i, name in enumerate(_USER, start=1):
    known = pa.array([*(row[i] for row in of_user), None], pa.string())
    table = table.append_column(name, known.take(user))
  bags = pa.array([*(row[2].split("|") for row in of_movie), [""]])
  genres = bags.take(_index(table["movie"], of_movie))
  table = table.append_column("genres", genres)

  for start in range(0, len(table), _ROWS):
    part = table.slice(start, _ROWS)
    label = pc.greater_equal(part["rating"], 4).to_numpy()
    cells = {f.name: part[f.name].combine_chunks() for f in inputs.features}
    yield Chunk(
      label=label.astype(np.float32),
      dense=np.empty((len(part), 0), np.float32),
      read=(start + len(part)) / len(table),
      **encode(inputs, cells),
    )


def _index(ids: pa.ChunkedArray, side: list[list[str]]) -> pa.Array:
  """Finds each id's row of `side`; one past the last where there is none."""
  found = pc.index_in(ids, pa.array([row[0] for row in side], pa.string()))
  return pc.fill_null(found, len(side)).combine_chunks()


def _ratings(path: str, dat: bool, damaged: DamagedLines) -> pa.Table:
  """Reads ratings.dat, sorted by time, or ratings.tsv, as it is.

  Raises:
    UserError: more damaged lines than allowed, or no other.
  """
  kinds = {"user": "text", "movie": "text", "rating": "int"}
  if dat:
    kinds["timestamp"] = "int"

  def convert(table: pa.Table) -> pa.Table:
    good = pc.is_in(table["rating"], pa.array([1, 2, 3, 4, 5]))
    if not pc.all(good).as_py() or (dat and table["timestamp"].null_count):
      raise pa.ArrowInvalid("rating or timestamp")
    return table

  def explain(fields: list[str]) -> tuple[str, str] | None:
    if fields[2] not in ("1", "2", "3", "4", "5"):
      return "rating", f"{text.shown(fields[2])} is not 1, 2, 3, 4 or 5"
    if dat and not fields[3]:
      return "timestamp", "it is empty"
    return None

  columns = text.Columns(
    kinds, convert, explain, separator=b"::" if dat else b"\t"
  )
  found = [part for part, _ in text.parse(path, columns, damaged)]
  if not found:
    raise UserError(f"{path}: no undamaged line")
  table = pa.concat_tables(found).combine_chunks()
  if dat:
    order = np.argsort(table["timestamp"].to_numpy(), kind="stable")
    table = table.take(pa.array(order))
  return table


def _side(path: str, fields: int, damaged: DamagedLines) -> list[list[str]]:
  """Splits the lines of users.dat or movies.dat into fields.

  Args:
    path: of the file.
    fields: how many a line has.
    damaged: takes the lines with another number.
  """
  rows = []
  with open(path, encoding="latin-1") as file:
    lines = iter(lambda: file.readline(text_blocks.CHUNK_BYTES + 1), "")
    for number, line in enumerate(lines, start=1):
      if len(line) > text_blocks.CHUNK_BYTES:
        raise UserError(
          f"{path}, line {number}: longer than {text_blocks.CHUNK_BYTES:,}"
          " bytes; is this a table in text form?"
        )
      row = line.rstrip("\r\n").split("::")
      if len(row) == fields:
        rows.append(row)
      else:
        damaged.add(
          path, number, "", f"{len(row)} fields where {fields} are expected"
        )
  return rows
