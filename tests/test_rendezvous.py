"""Processes that do not fit together are told so, on both sides."""

import concurrent.futures
import dataclasses
import socket
import time

import pytest

from recjax import distributed, rendezvous
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


@pytest.fixture
def hasty(monkeypatch):
  """Waits a second where a user would wait ten."""
  monkeypatch.setattr(rendezvous, "_SHARED_SECONDS", 0.5)
  monkeypatch.setattr(rendezvous, "_LINGER_SECONDS", 1)


def test_they_meet(pair):
  assert meet(*pair) == [{1: None}, {0: None}]
  assert not list(pair[0].workdir.iterdir())


def test_other_settings_are_named_on_both(pair):
  first, second = pair
  second = dataclasses.replace(second, settings={"--config.seed": 1})
  for said in meet(first, second):
    assert said.startswith("--config.seed: 0 on process 0, but 1 on process 1")


def test_one_id_twice_is_said_to_all(pair, hasty):
  first, second = pair
  first, second = (dataclasses.replace(x, processes=3) for x in pair)
  for said in meet(first, second, second):
    assert said.startswith("--process_id: two processes have 1")


def test_another_number_of_processes_is_named_on_both(pair):
  first, second = pair
  for said in meet(first, dataclasses.replace(second, processes=3)):
    assert said.startswith("--processes: 2 on process 0, but 3 on process 1")


def test_a_workdir_that_is_not_shared_is_said_to_all(pair, tmp_path, hasty):
  first, second = pair
  elsewhere = tmp_path / "elsewhere"
  for said in meet(first, dataclasses.replace(second, workdir=elsewhere)):
    assert said.startswith("--workdir: process 1 does not see")
    assert str(first.workdir) in said


@pytest.mark.parametrize("settings", [{"--config.seed": 0}, {"--mode": "plan"}])
def test_a_second_process_0_is_an_error_on_all(pair, settings, hasty):
  """Of the same job, or of another one on its port."""
  job = [dataclasses.replace(x, processes=3) for x in pair]
  other = [dataclasses.replace(x, settings=settings) for x in job]
  for said in meet(*job, *other):
    assert "--coordinator of its own" in said or "something else" in said


def hello(job):
  """The connection of a process that has said hello."""
  connection = socket.create_connection(rendezvous.parse_address(job.address))
  assert rendezvous._exactly(connection, 9) == b"recjax 1\n"
  said = {"index": job.index, "processes": job.processes}
  rendezvous._send(connection, said | {"settings": dict(job.settings)})
  return connection


def once_it_listens(act):
  """act(), as soon as process 0 takes connections."""
  until = time.monotonic() + 10
  while True:
    try:
      return act()
    except ConnectionRefusedError:
      assert time.monotonic() < until
      time.sleep(0.01)


def test_one_that_ends_before_all_came_is_named(pair, hasty):
  first, second = (dataclasses.replace(x, processes=3) for x in pair)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting = pool.submit(meet, first)
    once_it_listens(lambda: hello(second)).close()
    (said,) = waiting.result()
  assert said.startswith("process 1 of 3 ended before all had come")


@pytest.mark.parametrize(
  "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b""]
)
def test_strangers_are_let_go(pair, sent):
  first, second = pair
  address = rendezvous.parse_address(first.address)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting = pool.submit(meet, first)
    with once_it_listens(lambda: socket.create_connection(address)) as stranger:
      stranger.sendall(sent)
    assert meet(second) == [{0: None}]
    assert waiting.result() == [{1: None}]


def test_nobody_comes(pair, hasty):
  first, second = (dataclasses.replace(x, seconds=1) for x in pair)
  assert "process 1 of 2 did not come" in meet(first)[0]
  assert "no process 0 at" in meet(second)[0]


def test_slurm_says_who_is_who(monkeypatch):
  job = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
  }
  for name, value in job.items():
    monkeypatch.setenv(name, value)
  at, devices = distributed._find(None, None, None)
  assert (at.address, at.processes, at.index) == ("node07:61441", 4, 3)
  assert devices == [1]
  assert distributed._find(None, 1, None) is None  # one alone is asked for
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert distributed._find(None, None, None) is None


def test_a_port_in_use_is_an_error(pair):
  with socket.create_server(("127.0.0.1", int(pair[0].address[10:]))):
    assert "something else listens at" in meet(pair[0])[0]


@pytest.mark.parametrize(
  "text", ["host", "host:", "host:0", "host:65536", ":1"]
)
def test_an_address_without_a_port(text):
  with pytest.raises(UserError, match="host:port expected"):
    rendezvous.parse_address(text)
