"""A small part of scripts/attack_config.py."""

import attack_config
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("path", ["train.batch_size", "plan.warm_rows"])
def test_odd_values_end_in_a_message_or_work(path):
  found = attack_config.attack_field(path)
  assert len(found) == len(attack_config.VALUES)
  assert {k: v for k, v in found.items() if v} == {}
