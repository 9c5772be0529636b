"""Processes that do not fit together are told so, on both sides."""

import concurrent.futures
import dataclasses
import socket

import pytest

from recjax import rendezvous
from recjax.errors import UserError


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def meet(*jobs):
  """What each process gets: connections, or the error's text."""

  def one(job):
    try:
      return {i: c.close() for i, c in rendezvous.meet(job).items()}
    except UserError as e:
      return str(e)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, jobs))


@pytest.fixture
def pair(tmp_path):
  address = f"127.0.0.1:{free_port()}"
  first = rendezvous.Job(address, 2, 0, {"--config.seed": 0}, tmp_path, 20)
  return first, dataclasses.replace(first, index=1)


def test_they_meet(pair):
  assert meet(*pair) == [{1: None}, {0: None}]
  assert not list(pair[0].workdir.iterdir())


def test_other_settings_are_named_on_both(pair):
  first, second = pair
  second = dataclasses.replace(second, settings={"--config.seed": 1})
  for said in meet(first, second):
    assert said.startswith("--config.seed: 0 on process 0, but 1 on process 1")


def test_one_id_twice_is_said_to_all(pair):
  first, second = pair
  first, second = (dataclasses.replace(x, processes=3) for x in pair)
  for said in meet(first, second, second):
    assert said.startswith("--process_id: two processes have 1")


def test_a_port_in_use_is_an_error(pair):
  with socket.create_server(("127.0.0.1", int(pair[0].address[10:]))):
    assert "something else listens at" in meet(pair[0])[0]


@pytest.mark.parametrize(
  "text", ["host", "host:", "host:0", "host:65536", ":1"]
)
def test_an_address_without_a_port(text):
  with pytest.raises(UserError, match="host:port expected"):
    rendezvous.parse_address(text)
