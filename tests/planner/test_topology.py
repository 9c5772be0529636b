"""Budgets: what the user says, else parts of the machine that fit it."""

import os

import pytest

from recjax.errors import UserError
from recjax.planner import presets, topology

RAM = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GB = 1 << 30


@pytest.mark.parametrize("limit", [None, 80 * GB])
def test_given_budgets_are_kept(limit):
  got = topology.memory_budgets(3, 5, 8, limit)
  assert got == (3 << 20, 5 << 20)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_simulated_devices_and_the_host_share_the_memory(devices):
  device, host = topology.memory_budgets(0, 0, devices)
  assert device > 0
  assert host > 0
  assert 0.4 * RAM < devices * device + host < 0.9 * RAM


def test_an_accelerators_memory_is_its_own():
  device, host = topology.memory_budgets(0, 0, 8, 80 * GB)
  assert 40 * GB < device < 80 * GB
  assert 0.4 * RAM < host < 0.9 * RAM


def test_each_budget_is_read_alone():
  device, host = topology.memory_budgets(0, 0, 2)
  assert topology.memory_budgets(7, 0, 2) == (7 << 20, host)
  assert topology.memory_budgets(0, 7, 2) == (device, 7 << 20)


def test_the_budget_of_an_ssd_is_what_is_free_where_rows_go(tmp_path):
  assert topology.ssd_budget(0, "") == 0
  assert topology.ssd_budget(7, "") == 7 << 20  # to plan for other machines
  found = os.statvfs(tmp_path)
  free = found.f_bavail * found.f_frsize
  for folder in (tmp_path, tmp_path / "not" / "there"):
    budget = topology.ssd_budget(0, str(folder))
    assert 0.3 * free < budget < 0.9 * free
    assert topology.ssd_budget(7, str(folder)) == 7 << 20
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"plan\.host_store_dir: .*/file is no"):
    topology.ssd_budget(7, str(tmp_path / "file" / "under"))


def test_a_file_may_have_any_name(tmp_path):
  wanted = presets.get("h100", 8)
  for name in ("[1]*?", "#%41\\", "~", "a:b\n", "file:x", "\udce9"):
    topology.save(wanted, tmp_path / name)
    assert presets.get(str(tmp_path / name), 8) == wanted
