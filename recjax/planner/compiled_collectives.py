"""What a compiled step sends: its collectives, read from the compiler's text.

The sizes of XLA's buffers are static, so that bytes on the wire are known
exactly before the step has run, up to the headers of the network.
"""

import dataclasses
import itertools
import math
import re

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_KINDS = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)")
_TYPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction of the step that every device runs."""

  kind: str  # "all-to-all", "all-reduce", ...
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of results: (dtype, dims)
  groups: tuple[tuple[int, ...], ...]  # devices that meet; pairs of a permute
  scope: str  # of named_scopes, where it comes from
  repeated: bool  # in a loop: of rounds after the first

  @property
  def operand_bytes(self) -> int:
    """What a device puts in, its own part included."""
    size = sum(_BYTES[t] * math.prod(dims) for t, dims in self.shapes)
    if self.kind == "all-gather":
      return size // len(self.groups[0])
    if self.kind == "reduce-scatter":
      return size * len(self.groups[0])
    return size

  def sent(self, devices: int, node_devices: int = 0) -> float:
    """Bytes that a device sends for it, the mean over `devices`.

    All-to-all: each peer its part. All-gather and all-reduce: as rings do,
    (g-1) and 2 (g-1)/g operands in a group of g.

    Args:
      node_devices: counts only what goes to another node of so many devices;
        0 = all. Of all-to-alls and permutes; a ring over several nodes has as
        many links between them as nodes.
    """
    size, node = self.operand_bytes, node_devices or 1
    leaves = lambda a, b: a // node != b // node if node_devices else a != b
    total = 0.0
    for group in self.groups:
      g = len(group)
      if self.kind == "collective-permute":
        total += size * leaves(*group)
      elif self.kind == "all-to-all":
        pairs = itertools.product(group, group)
        total += size / g * sum(a != b and leaves(a, b) for a, b in pairs)
      else:
        ring = zip(group, group[1:] + group[:1], strict=True)
        links = sum(leaves(a, b) for a, b in ring) if g > 1 else 0
        factor = {
          "all-gather": g - 1,
          "all-reduce": 2 * (g - 1) / g,
          "reduce-scatter": (g - 1) / g,
        }[self.kind]
        total += size * factor * links
    return total / devices


def of_step(text: str, devices: int) -> list[Collective]:
  """The collectives of `compiled.as_text()`, in the order of the text."""
  found = []
  for line in text.splitlines():
    match = _LINE.search(line)
    if not match:
      continue
    types, kind, start, rest = match.groups()
    shapes = tuple(
      (t, tuple(int(x) for x in dims.split(",") if x))
      for t, dims in _TYPE.findall(_results(types, kind) if start else types)
    )
    scope = re.search(r'op_name="([^"]*)"', rest)
    scope = scope[1] if scope else ""
    found.append(
      Collective(kind, shapes, _groups(rest, devices), scope, "while" in scope)
    )
  return found


def _results(types: str, kind: str) -> str:
  """The types of an asynchronous collective's results.

  Its own type is a tuple of operands, results and what it needs meanwhile:
  ((operands), results, ...), or (operand, result, ...). The start of an
  all-reduce may have the type of its results alone.
  """
  types = re.sub(r"\{[^}]*\}", "", types)  # layouts
  if types.startswith("(("):
    operands, _, rest = types.partition(")")
    if rest.startswith(", ("):
      return rest[2:].partition(")")[0]
    return ",".join(_pieces(rest)[: len(_pieces(operands))])
  if kind == "all-reduce" or not types.startswith("("):
    return types
  return _pieces(types)[1]


def _pieces(types: str) -> list[str]:
  return [f"{t}[{dims}]" for t, dims in _TYPE.findall(types)]


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Of an instruction's attributes, in each of XLA's spellings."""
  braces = r"=\{((?:\{[\d,]*\},?)*)\}"
  plain = re.search(f"(?:source_target_pairs|replica_groups){braces}", text)
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?",
                   text)  # fmt: skip
  mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text)
  if mesh:
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    names, sizes = list(axes), [int(x) for x in axes.values()]
    used = re.findall(r"'(\w+)'", mesh[2])
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    ids = np.moveaxis(ids, [names.index(x) for x in used], range(-len(used), 0))
    size = math.prod(int(axes[x]) for x in used)
    return _tuples(ids.reshape(-1, size))
  if iota:
    numbers = lambda s: [int(x) for x in s.split(",")]
    ids = np.arange(devices).reshape(numbers(iota[2]))
    if iota[4]:
      ids = ids.transpose(numbers(iota[4]))
    return _tuples(ids.reshape(numbers(iota[1])))
  groups = re.findall(r"\{([\d,]+)\}", plain[1]) if plain else []
  if not groups:  # all devices
    return _tuples(np.arange(devices)[None])
  return tuple(tuple(int(x) for x in g.split(",")) for g in groups)


def _tuples(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(g) for g in ids.tolist())
