"""The next item of an iterator, made by a thread while this one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T]) -> Iterator[T]:
  """Yields the items, each while a thread makes the next one.

  What making one raises is raised in its place. The thread has ended when the
  iterator is closed.
  """
  of = iter(items)
  with ThreadPoolExecutor(1) as thread:
    following = thread.submit(next, of, _END)
    while (item := following.result()) is not _END:
      following = thread.submit(next, of, _END)
      yield item
