"""What a compiled program holds, aliases, copies and launches, by XLA's word.

Of any backend, here or not: read from `compiled.as_text()` and
`compiled.memory_analysis()`.
"""

import collections
import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import jax

SCOPES = ("route", "lookup", "dense", "update")
OTHER = "other"
_INSTRUCTION = re.compile(
  r"^\s*(ROOT )?%?([\w.\-]+) = (.*?)"
  r"(?:metadata=\{.*?op_name=\"([^\"]*)\".*)?$"
)
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_TYPE = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|branch_computations"
  r"|(?:true|false)_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
# Opcodes that start nothing on the device.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "opt-barrier"),
}
# Opcodes that run the instructions of other computations.
_RUNS = {"call", "conditional", "while", "async-start"}
_COPIES = {
  *("copy", "copy-start", "transpose", "reshape", "pad", "concatenate"),
  *("all-gather", "all-gather-start", "all-to-all", "all-to-all-start"),
}


class Memory(NamedTuple):
  """Bytes of one device that a program holds."""

  arguments: int
  outputs: int
  aliased: int  # of the outputs, those that take the place of arguments
  temp: int
  host: int  # of the host's memory: all of these
  host_temp: int

  @property
  def total(self) -> int:
    """All of the device's."""
    return self.arguments + self.outputs - self.aliased + self.temp


def memory(compiled: jax.stages.Compiled) -> Memory:
  """Returns what the compiler says of a program's memory."""
  x = compiled.memory_analysis()
  assert x is not None
  host = x.host_argument_size_in_bytes + x.host_output_size_in_bytes
  host += x.host_temp_size_in_bytes - x.host_alias_size_in_bytes
  return Memory(
    x.argument_size_in_bytes,
    x.output_size_in_bytes,
    x.alias_size_in_bytes,
    x.temp_size_in_bytes,
    host,
    x.host_temp_size_in_bytes,
  )


def aliased_arguments(text: str) -> set[int]:
  """Returns the arguments of a program that its results take the place of."""
  aliases = re.findall(r"input_output_alias=\{(.*?)\}, \w+=", text)
  return {int(x) for x in re.findall(r"\((\d+), \{\}", "".join(aliases))}


# ---- Instructions


class Instruction(NamedTuple):
  """An instruction of a module's text."""

  computation: str  # "ENTRY" for the entry's
  opcode: str
  op_name: str  # its path in the traced function
  result: str  # its type
  called: tuple[tuple[str, str], ...]  # (how, computation)
  root: bool


def instructions(text: str) -> dict[str, Instruction]:
  """Parses `compiled.as_text()`: {name: Instruction}."""
  found, computation = {}, ""
  for line in text.splitlines():
    if line.startswith("ENTRY "):
      computation = "ENTRY"
    elif line and not line[0].isspace():
      computation = line.split(" ", 1)[0].lstrip("%")
    elif match := _INSTRUCTION.match(line):
      root, name, rest, op_name = match.groups()
      opcode = _OPCODE.search(" " + re.sub(r"\{[^}]*\}", "", rest))
      result = rest.partition(f" {opcode[1]}(")[0] if opcode else ""
      called = tuple(
        (how, x)
        for how, names in _CALLED.findall(rest)
        for x in re.findall(r"%([\w.\-]+)", names)
      )
      found[name] = Instruction(
        computation,
        opcode[1] if opcode else "?",
        op_name or "",
        result,
        called,
        bool(root),
      )
  return found


def scope_of(op_name: str) -> str:
  """Finds the first of SCOPES in a path, jit(step)/.../update/..."""
  for part in op_name.split("/"):
    words = re.findall(r"\w+", part)
    for scope in SCOPES:
      if words and words[-1] == scope:
        return scope
  return OTHER


class Launches(NamedTuple):
  """How many kernels a program launches, by the scope that they come from.

  An instruction counts as one, whatever it is: a fusion, a library's product,
  a sort, a copy, a collective.
  """

  once: dict[str, int]
  repeated: dict[str, int]  # in the body of a loop, each time


def launches(text: str) -> Launches:
  """Counts the instructions that start something on the device."""
  by_computation = collections.defaultdict(list)
  for x in instructions(text).values():
    by_computation[x.computation].append(x)
  once, repeated = collections.Counter(), collections.Counter()

  def run(computation: str, loop: bool) -> None:
    for x in by_computation[computation]:
      if x.opcode in _RUNS:
        for how, called in x.called:
          if how != "condition":
            run(called, loop or how == "body")
      elif x.opcode not in _FREE and not x.opcode.endswith("-done"):
        (repeated if loop else once)[scope_of(x.op_name)] += 1

  run("ENTRY", False)
  order = (*SCOPES, OTHER)
  return Launches(*({s: x[s] for s in order if x[s]} for x in (once, repeated)))


def opcodes(text: str) -> dict[str, int]:
  """Counts the entry's instructions by opcode, the most frequent first."""
  found = (
    x.opcode
    for x in instructions(text).values()
    if x.computation == "ENTRY" and x.opcode not in _FREE
  )
  return dict(collections.Counter(found).most_common())


def copies(text: str, shapes: Collection[tuple[int, ...]]) -> list[str]:
  """Returns the instructions that make a copy of an array of these shapes.

  Copies, transposes and the like, alone or as the result of a fusion; in
  programs of several devices those that bring an array together. Not what a TPU
  moves to its fast memory, S(1), to work on it there: that is small.

  Args:
    text: of the compiled program.
    shapes: of a device's shard; dimensions of 1 don't matter.
  """
  wanted = {_squeezed(shape) for shape in shapes}
  known = instructions(text)
  fused = {
    name for x in known.values() if x.opcode == "fusion" for _, name in x.called
  }
  return [
    f"{name} ({x.opcode} of {shape}, {x.op_name or 'no op_name'})"
    for name, x in known.items()
    if x.opcode in _COPIES and (x.root or x.computation not in fused)
    if "S(1)" not in x.result
    for shape in _shapes(x.result)
    if _squeezed(shape) in wanted
  ]


def _shapes(result: str) -> Iterator[tuple[int, ...]]:
  """Yields the distinct shapes of a type, which may be a tuple."""
  found = {
    tuple(int(x) for x in dims.split(",") if x)
    for dims in _TYPE.findall(re.sub(r"\{[^}]*\}", "", result))
  }
  yield from sorted(found)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(x for x in shape if x != 1)


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Returns the bytes of a device's part of an array with a sharding."""
  return math.prod(shard_shape(x)) * x.dtype.itemsize


def shard_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  """Returns the shape of a device's part of an array with a sharding."""
  assert x.sharding is not None
  return x.sharding.shard_shape(x.shape)
