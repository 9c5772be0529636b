"""Some tries of scripts/attack_paths.py."""

import attack_paths
import pytest


@pytest.mark.slow
def test_names_are_names():
  first = ("#1 %41?b", " #%41 {a,b}'\"$~é\n-")
  result = attack_paths.attack(2, seed=0, first=first)
  assert not result.wrong
  assert result.counts == {"refused": 1, "worked": 1}


def test_every_printable_character_is_in_a_name():
  tried = dict(zip(range(100), attack_paths.names(0), strict=False))
  letters = {chr(x) for x in range(32, 127)} - {"/"}
  assert not letters - set("".join(tried.values()))
