"""Some tries of scripts/attack_logs.py, and that it sees what is wrong."""

import attack_logs
import pytest

from recjax.data import criteo, text


@pytest.mark.slow
def test_damaged_logs_end_in_the_right_samples_or_one_message():
  result = attack_logs.attack(30, seed=1)
  assert not result.wrong
  assert min(result.counts["prepared"], result.counts["message"]) >= 8


def _lose_a_line(real, *args):
  return iter(list(real(*args))[:-1])


def _zero_a_sample(real, *args):
  found = real(*args)
  found["dense"][-1] = 0
  return found


def _crash(_, *args):
  raise KeyError("a field")


@pytest.mark.parametrize(
  ("module", "name", "fault"),
  [
    (text, "_sift", _lose_a_line),
    (criteo, "_convert", _zero_a_sample),
    (text, "_explain", _crash),
  ],
  ids=["a line lost", "a number changed", "a crash"],
)
def test_it_sees_faults(monkeypatch, module, name, fault):
  real = getattr(module, name)
  monkeypatch.setattr(module, name, lambda *args: fault(real, *args))
  assert attack_logs.attack(20, seed=0).wrong
