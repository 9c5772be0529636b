"""How a config's fields are declared: type, default, and what they may hold."""

import dataclasses
import typing

dataclass = dataclasses.dataclass(slots=True)


def tree(cls: type) -> typing.Any:
  """A field that holds a group of fields."""
  return dataclasses.field(default_factory=cls)


def choice(default: str, *others: str) -> typing.Any:
  """One of these strings. (ml_collections 1.1 cannot override a Literal.)"""
  return one_of([default, *others])


def one_of(choices: list[str]) -> typing.Any:
  """One of these strings, to which others may be added; first the default."""
  return dataclasses.field(default=choices[0], metadata={"choices": choices})


def number(
  default: float | tuple[int, ...],
  *,
  at_least: float | None = None,
  at_most: float | None = None,
  between: tuple[float, float] | None = None,
) -> typing.Any:
  """A number, or numbers, with bounds; those of `between` are excluded."""
  bounds = {"at_least": at_least, "at_most": at_most, "between": between}
  return dataclasses.field(default=default, metadata=bounds)
