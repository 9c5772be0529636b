"""Checks of a configuration: errors that name the field and the nearest one.

A flag may name no field, a config file may set one that there is not, and a
value may have the wrong type or lie outside of its bounds (config.py).
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping

from recjax.config import Config
from recjax.errors import UserError

# ---- Names


def check_flags(argv: list[str]) -> None:
  """Raises UserError for a `--config.a.b` that names no field."""
  for arg in argv:
    found = re.match(r"--?config\.([^=]*)", arg)
    if not found:
      continue
    classes, path = (Config,), found[1].split(".")
    for i, name in enumerate(path):
      # Which of several classes an entry has, the config file says.
      fields = {k: f for cls in classes for k, f in _fields(cls).items()}
      name, index = re.fullmatch(r"(.*?)(\[\d+\])?", name).groups()
      if name not in fields:
        raise _unknown(".".join(path[:i]), name, fields, arg)
      dotted, last = ".".join(path[: i + 1]), i == len(path) - 1
      items = _items(fields[name].type)
      entries = any(map(dataclasses.is_dataclass, items))
      if index and not entries:
        raise UserError(f"{arg}: {dotted} has no number; set the whole field")
      if entries and not index and not last:
        raise UserError(f"{arg}: {dotted} has no fields, but {dotted}[0] has")
      classes = items if index else (fields[name].type,)
      if dataclasses.is_dataclass(classes[0]) == last:
        what = "is a group of fields" if last else "has no fields"
        raise UserError(f"{arg}: {dotted} {what}")


def explain(error: Exception) -> UserError:
  """Explains an error of a config file, or of a flag, that sets what is not.

  Args:
    error: AttributeError, TypeError, IndexError, or the absl.flags.Error that
      ml_collections wraps them in, traceback and all.
  """
  # Setting a slot that is not there leaves error.name and error.obj empty.
  found = re.search(
    r"'(\w+)' object has no attribute '(\w+)'"
    r"|(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'",
    str(error),
  )
  if found:
    name, field = (x for x in found.groups() if x)
    for cls, prefix in _groups(Config):
      if cls.__name__ == name:
        return _unknown(prefix, field, _fields(cls), "config file")
  if isinstance(error, IndexError):
    return UserError(
      f"--config: {error}: a flag sets a field of an entry, such as "
      "embedding.rules[0], that the config file does not have"
    )
  if isinstance(error, AttributeError | TypeError):
    return UserError(f"config file: {error}")
  return UserError(str(error))


def _groups(cls: type, prefix: str = "") -> Iterator[tuple[type, str]]:
  """Yields each dataclass of the tree with the path of its fields."""
  yield cls, prefix
  for name, field in _fields(cls).items():
    path = f"{prefix}.{name}" if prefix else name
    if dataclasses.is_dataclass(field.type):
      yield from _groups(field.type, path)
    for item in filter(dataclasses.is_dataclass, _items(field.type)):
      yield from _groups(item, f"{path}[i]")


def _fields(cls: type) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(cls)}


def _items(cls: type) -> tuple[type, ...]:
  """Returns what a tuple of this type may hold; () of another type."""
  if typing.get_origin(cls) is not tuple:
    return ()
  item = typing.get_args(cls)[0]
  return typing.get_args(item) or (item,)


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
  """A hint of the name that was meant; empty where none is near."""
  near = difflib.get_close_matches(name, names, 1, 0.5)
  return f"did you mean {prefix}{near[0]}?" if near else ""


def _unknown(prefix: str, name: str, fields: dict, where: str) -> UserError:
  """The error for a field that there is not, with the one that was meant."""
  dot = f"{prefix}." if prefix else ""
  all_of_them = f"the fields are {', '.join(dot + f for f in fields)}"
  return UserError(
    f"{where}: there is no field {dot}{name}; "
    + (_nearest(name, fields, dot) or all_of_them)
  )


# ---- Values

_MOST = 2**31 - 1  # of whole numbers that have no bound of their own


def _as_tuple(value: typing.Any) -> tuple:
  return value if isinstance(value, tuple) else (value,)


def check(config: typing.Any, prefix: str = "") -> None:
  """Raises UserError for a value of the wrong type or outside of its bounds.

  Whole numbers become floats where the field is one.

  Args:
    config: a Config, or a group of fields of one.
    prefix: of the fields' path in errors.
  """
  if config is None:
    raise UserError("--config: missing; try --config configs/quickstart.py")
  try:
    fields = dataclasses.fields(config)
  except TypeError:
    raise UserError(
      f"--config: get_config() returns a {type(config).__name__}, not a "
      "recjax.config.Config"
    ) from None
  for f in fields:
    given = getattr(config, f.name)
    if f.type is float and type(given) is int and abs(given) <= _MOST:
      setattr(config, f.name, float(given))
    path, value = prefix + f.name, getattr(config, f.name)
    _check_type(path, value, f.type)
    _check_bounds(path, value, f.metadata)


def _check_type(path: str, value: typing.Any, cls: type) -> None:
  """Raises UserError where the value, or one of a group's, has another type."""
  items = _items(cls)
  if items:
    if not (isinstance(value, tuple) and all(type(x) in items for x in value)):
      hint = f"; write ({value!r},)" if type(value) in items else ""
      names = " or ".join(x.__name__ for x in items)
      raise UserError(f"{path}: {value!r} is not a tuple of {names}{hint}")
    for i, x in enumerate(value):
      if dataclasses.is_dataclass(x):
        check(x, f"{path}[{i}].")
  elif dataclasses.is_dataclass(cls):
    if type(value) is not cls:
      raise UserError(f"{path}: {value!r} is not a {cls.__name__}")
    check(value, path + ".")
  elif type(value) is not cls:
    raise UserError(
      f"{path}: {value!r} is a {type(value).__name__}, expected {cls.__name__}"
    )
  elif cls is str and "\0" in value:
    raise UserError(f"{path}: {value!r} holds a NUL, which no name may hold")


def _check_bounds(path: str, value: typing.Any, bounds: Mapping) -> None:
  """Raises UserError for a value outside of its field's metadata."""
  choices = bounds.get("choices")
  if choices and value not in choices:
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(c or repr(c) for c in choices)
    raise UserError(f"{path}: {value!r} is not one of {known}{hint}")
  least, most = bounds.get("at_least"), bounds.get("at_most")
  whole = [x for x in _as_tuple(value) if type(x) is int]
  if most is None and whole:
    most = _MOST
  if isinstance(value, tuple):
    for x in whole:
      if least is not None and x < least:
        raise UserError(f"{path}: {value} holds a number below {least}")
      if x > most:
        raise UserError(f"{path}: {value} holds a number above {most}")
    return
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{path}: {value} found, a finite number expected")
  # Not `value < least`, which nan is not either.
  if least is not None and not value >= least:
    raise UserError(f"{path}: {value} found, at least {least} expected")
  if most is not None and not value <= most:
    raise UserError(f"{path}: {value} found, at most {most} expected")
  if between := bounds.get("between"):
    low, high = between
    if not low < value < high:
      raise UserError(f"{path}: {value} is not between {low} and {high}")
