"""Prepares damaged logs: each ends with the right samples or one message.

    python scripts/attack_logs.py [--tries 1000] [--seed 0]

A try damages a small Criteo or MovieLens log, packed or not: bytes changed,
cut, doubled, put in; lines joined; fields without end; NULs, bad UTF-8, byte
order marks; the .gz itself. Right is either of

- a prepared data set. All samples and all lines of skipped.tsv are the lines of
  the log; no line as it was is skipped and none that is no sample is kept; the
  lines as they were come back with their numbers.
- a UserError that names the file, and the line where it speaks of a line.

Anything else is wrong and printed, and the exit code is 1. So is more than a
minute for one try.
"""

import argparse
import collections
import csv
import dataclasses
import faulthandler
import gzip
import os
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from recjax.config import Config, Data
from recjax.data import prepare, text_blocks
from recjax.data.prepared import Prepared
from recjax.errors import UserError

LINES = 60
SECONDS = 60  # a try may take
_USERS = [f"{i}::{'FM'[i % 2]}::25::{i % 7}::0{i:04}" for i in range(1, 9)]
_MOVIES = [f"{i}::Up {i} (2001)::Drama|Comedy" for i in range(1, 9)]


@dataclasses.dataclass(frozen=True)
class Log:
  """A log that is to be damaged."""

  name: str
  files: dict[str, bytes]  # name -> content; the first one holds the samples
  data: Data  # without paths
  good: Callable[[list[bytes]], bool]  # whether fields may be a sample
  separator: bytes


@dataclasses.dataclass
class Result:
  """What came of the tries."""

  counts: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )  # 'prepared', 'message'
  wrong: list[str] = dataclasses.field(default_factory=list)


def logs() -> list[Log]:
  """Returns the undamaged logs."""
  rng = random.Random(0)
  small = {"block_samples": 16, "min_count": 1, "memory_mb": 128}
  criteo, bags, ratings = [], [], []
  for i in range(LINES):
    start = [str(i % 2), *(str(i + j) for j in range(13))]
    cells = [f"{rng.randrange(16):x}" for _ in range(26)]
    criteo.append("\t".join(start + cells))
    bag = ",".join(f"{x}:{rng.random():.2f}" for x in cells[:3])
    bags.append("\t".join([*start, bag, *cells[1:]]))
    ratings.append([1 + i % 8, 1 + i % 5, 1 + i % 5, 1_000 + i])
  times = ["::".join(map(str, r)) for r in ratings]
  plain = ["\t".join(map(str, r[:3])) for r in ratings]
  sides = {"users.dat": _bytes(_USERS), "movies.dat": _bytes(_MOVIES)}
  hotness = (3, *[1] * 25)
  movielens = {"format": "movielens", **small}
  return [
    Log("criteo", {"a.tsv": _bytes(criteo)}, Data(**small), _criteo, b"\t"),
    Log(
      "bags",
      {"a.tsv": _bytes(bags)},
      Data(hotness=hotness, weighted=True, **small),
      _criteo,
      b"\t",
    ),
    Log(
      "movielens",
      {"ratings.dat": _bytes(times), **sides},
      Data(**movielens),
      _ratings,
      b"::",
    ),
    Log(
      "movielens.tsv",
      {"ratings.tsv": _bytes(plain), **sides},
      Data(split="random", **movielens),
      _ratings,
      b"\t",
    ),
  ]


def _bytes(lines: list[str]) -> bytes:
  return "".join(f"{line}\n" for line in lines).encode()


def _criteo(fields: list[bytes]) -> bool:
  whole = re.compile(rb"\s*-?\d{0,19}\s*")
  return (
    len(fields) == 40
    and fields[0].strip().lstrip(b"0-") in (b"", b"1")
    and all(whole.fullmatch(x) for x in fields[1:14])
    and _utf8(b"".join(fields))
  )


def _ratings(fields: list[bytes]) -> bool:
  return len(fields) in (3, 4) and _utf8(b"".join(fields))


def _utf8(line: bytes) -> bool:
  try:
    line.decode()
  except UnicodeDecodeError:
    return False
  return True


# ---- Damage


def _put(rng: random.Random, data: bytes, what: bytes) -> bytes:
  at = rng.randrange(len(data) + 1)
  if rng.random() < 0.5:  # where a line or a field begins
    at = rng.choice([m.end() for m in re.finditer(rb"^|[\n\t:,]", data)])
  return data[:at] + what + data[at:]


def _flip(rng: random.Random, data: bytes) -> bytes:
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 3, 20))):
    changed[rng.randrange(len(changed))] = rng.randrange(256)
  return bytes(changed)


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
  start = rng.randrange(len(data))
  return start, min(len(data), start + rng.choice((1, 7, 100, 1_000)))


def _cut(rng: random.Random, data: bytes) -> bytes:
  start, stop = _span(rng, data)
  return data[:start] + (b"" if rng.random() < 0.5 else data[stop:])


def _double(rng: random.Random, data: bytes) -> bytes:
  start, stop = _span(rng, data)
  return data[:stop] + data[start:]


def _join(rng: random.Random, data: bytes) -> bytes:
  ends = [m.start() for m in re.finditer(b"\n", data)] or [0]
  at = rng.choice(ends)
  return data[:at] + data[at + 1 :]


def _mark(rng: random.Random, data: bytes) -> bytes:
  starts = [m.end() for m in re.finditer(rb"^|\n", data)]
  at = rng.choice(starts)
  return data[:at] + _BOM + data[at:]


_BOM = b"\xef\xbb\xbf"
_PUT = [
  b"\0", b"\0" * 100, b"\xff\xfe", b"\xc3", _BOM, b"\r", b"\r\n",
  b"\n", b"\n" * 50, b"\t", b"\t" * 50, b'"', b"'", b"::", b",", b":nan",
  b":1e999", b" ", b"-", b"+1", b"9" * 18, b"9" * 20, b"9" * 5_000,
  b"x" * 5_000, b"x" * 200_000, "\u2028\x85\x1c".encode(), b"\\",
]  # fmt: skip


def damage(rng: random.Random, data: bytes) -> bytes:
  """Damages a file in one to three ways; never to nothing."""
  kinds = [_flip, _cut, _double, _join, _mark]
  for _ in range(rng.choice((1, 1, 2, 3))):
    if rng.random() < 0.5:
      data = _put(rng, data, rng.choice(_PUT))
    elif rng.random() < 0.05:
      data = data.replace(b"\n", b"\r\n")
    else:
      data = rng.choice(kinds)(rng, data) or b"\n"
  return data


# ---- Judgement


def attempt(seed: int, index: int, folder: str, result: Result) -> None:
  """Damages a log, prepares it in an empty folder and judges what comes."""
  rng = random.Random(f"{seed}/{index}")
  log = rng.choice(logs())
  hit = rng.choice([next(iter(log.files)), *log.files])
  zipped = not hit.endswith(".dat") and rng.random() < 0.4
  limit = rng.choice((0, 3, 1_000_000))
  content = dict(log.files)
  if zipped and rng.random() < 0.6:
    content[hit] = damage(rng, gzip.compress(content[hit], mtime=0))
  elif zipped:
    content[hit] = gzip.compress(damage(rng, content[hit]), mtime=0)
  else:
    content[hit] = damage(rng, content[hit])
  paths = {}
  for name, data in content.items():
    paths[name] = os.path.join(folder, name + ".gz" * (zipped and name == hit))
    with open(paths[name], "wb") as f:
      f.write(data)
  first = next(iter(log.files))
  c = Config(
    data=dataclasses.replace(log.data, train=paths[first], max_bad_rows=limit)
  )
  label = f"try {index} ({log.name}, {os.path.basename(paths[hit])}, {limit})"
  chunk = rng.choice((1 << 25, 3_000))
  try:
    with mock.patch.object(text_blocks, "CHUNK_BYTES", chunk):
      found = prepare.prepare(c, os.path.join(folder, "p"), lambda _: None)
  except UserError as e:
    result.counts["message"] += 1
    wrong = _message_faults(str(e), folder)
  except Exception:
    wrong = [traceback.format_exc(limit=-4)]
  else:
    result.counts["prepared"] += 1
    wrong = _sample_faults(found, log, content[first], folder, limit)
  result.wrong += [f"{label}: {w}" for w in wrong]


def _message_faults(message: str, folder: str) -> Iterator[str]:
  """Yields what a message lacks."""
  if re.match(r"the logs hold [\d,]+ samples, of which", message):
    return  # nothing is left of them
  named = folder in message
  where = r"line [\d,]+|is empty|no undamaged line|truncated or damaged"
  if not named or not re.search(where, message) or "\n" in message:
    yield f"message without a place: {message}"


def _sample_faults(
  found: Prepared, log: Log, data: bytes, folder: str, limit: int
) -> Iterator[str]:
  """Yields what is wrong with a prepared data set."""
  first = next(iter(log.files))
  if data[:2] == b"\x1f\x8b":
    data = gzip.decompress(data)
  lines = data.removeprefix(_BOM).removesuffix(b"\n").split(b"\n")
  skipped = _skipped(os.path.join(found.directory, "skipped.tsv"))
  if len(skipped) > limit:
    yield f"{len(skipped)} lines skipped"
  out = {n for name, n in skipped if os.path.basename(name).startswith(first)}
  if (samples := sum(found.samples.values())) != len(lines) - len(out):
    yield f"{samples} samples of {len(lines)} lines, {len(out)} skipped"
    return
  as_was = set(log.files[first].split(b"\n"))
  for i, line in enumerate(lines, start=1):
    fields = line.removesuffix(b"\r").split(log.separator)
    if i in out and line in as_was and line:
      yield f"line {i} is skipped and good"
    if i not in out and (line.startswith(_BOM) or not log.good(fields)):
      yield f"line {i} is kept and no sample: {line[:80]!r}"
  if log.data.format == "criteo":
    kept = [x for i, x in enumerate(lines, start=1) if i not in out]
    yield from _value_faults(found, kept, as_was)


def _skipped(path: str) -> list[tuple[str, int]]:
  """Reads file and number of the lines that were skipped."""
  if not os.path.exists(path):
    return []
  with open(path, newline="", encoding="utf-8") as f:
    rows = list(csv.reader(f, delimiter="\t"))
  return [(row[0], int(row[1])) for row in rows[1:]]


def _value_faults(
  found: Prepared, kept: list[bytes], as_was: set[bytes]
) -> Iterator[str]:
  """Yields where a line that is as it was comes back with other numbers."""
  label, dense = [], []
  for split in ("train", "test"):
    blocks = found.blocks(split)
    arrays = blocks[range(len(blocks.sizes))]
    label.append(arrays["label"])
    dense.append(arrays["dense"])
  label, dense = np.concatenate(label), np.concatenate(dense)
  for i, line in enumerate(kept):
    if line in as_was:
      numbers = np.array(line.split(b"\t")[:14], np.float64)
      if label[i] != numbers[0] or not np.allclose(
        dense[i], np.log(numbers[1:] + 2), rtol=1e-5
      ):
        yield f"kept line {i + 1} has other numbers"


def attack(tries: int, seed: int, seconds: int = 0) -> Result:
  """Runs the tries; ends the process where one takes more than `seconds`."""
  result = Result()
  for i in range(tries):
    if seconds:  # says where it hangs
      faulthandler.dump_traceback_later(seconds, exit=True)
    with tempfile.TemporaryDirectory() as folder:
      attempt(seed, i, folder, result)
  faulthandler.cancel_dump_traceback_later()
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tries", type=int, default=1_000)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  result = attack(args.tries, args.seed, SECONDS)
  print("\n".join(result.wrong))
  bad = len({w.split(" (")[0] for w in result.wrong})
  print(
    f"tried {args.tries:,}, right {args.tries - bad:,}, wrong {bad:,}"
    f" ({result.counts['prepared']:,} prepared,"
    f" {result.counts['message']:,} messages)"
  )
  sys.exit(bool(bad))


if __name__ == "__main__":
  main()
