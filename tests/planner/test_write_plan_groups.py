"""Groups of tables of other dims, from a config to their plan and its page."""

import re

import numpy as np
import pytest
from helpers_planner import DENSE, groups_for, svgs, terabyte, write_plan_of

from recjax.config import Config
from recjax.data import prepare as prepare_lib
from recjax.errors import UserError
from recjax.models.cost import DenseCost
from recjax.plan.plan import COLD, HOT, WARM, Plan
from recjax.planner import presets, workload
from recjax.planner.workload import Machine


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 16])
def test_groups_of_other_dims_are_planned_together(tmp_path, devices):
  config = terabyte(
    data__rows=(2_000_000, 900, 300_000, 50),
    plan__device_memory_mb=100,
  )
  plan, printed = write_plan_of(
    config, tmp_path, devices, dims=(128, 8, 128, 8)
  )
  assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan
  assert [g.dim for g in plan.groups] == [128, 8]
  assert [g.tables for g in plan.groups] == [("C1", "C3"), ("C2", "C4")]
  page = (tmp_path / "plan.html").read_text()
  assert len(svgs(page)) == 5
  for group in plan.groups:
    assert f"group {group.name}: 2 table(s), " in printed
    assert f"Coverage and cut points: {group.name}" in page
  for name in ("recjax", "row-wise", "FAE", "table-wise", "HugeCTR"):
    assert re.search(f"^{name}", printed, re.MULTILINE)
  tiers = plan.prediction.tiers
  assert sum(t.rows for t in tiers) == plan.rows == 2_300_950
  assert sum(t.share for t in tiers) == pytest.approx(1)
  held = sum(t.bytes for t in tiers if t.tier != COLD)
  assert held <= 100 << 20


@pytest.mark.slow
def test_given_cuts_count_rows_of_all_groups(tmp_path):
  config = terabyte(
    data__rows=(2_000_000, 900, 300_000, 50),
    plan__hot_rows=1_000,
    plan__warm_rows=50_000,
    plan__capacity=7,
  )
  plan, _ = write_plan_of(config, tmp_path, dims=(128, 8, 128, 8))
  for name, rows in ((HOT, 1_000), (WARM, 50_000)):
    assert sum(g.rows_of(name) for g in plan.groups) == rows
  sharded = [t for g in plan.groups for t in g.sharded]
  assert max(t.capacity for t in sharded) == 7
  config.plan.hot_rows = 10**7
  config.plan.device_memory_mb = 1
  with pytest.raises(
    UserError, match=r"plan\.hot_rows: .* of 64 to 1024 b"
  ) as e:
    write_plan_of(config, tmp_path, dims=(128, 8, 128, 8))
  config.plan.hot_rows = int(re.search(r"at most (\d+) fit", str(e.value))[1])
  with pytest.raises(UserError, match=r"plan\.warm_rows: 50000 rows"):
    write_plan_of(config, tmp_path, dims=(128, 8, 128, 8))
  config.plan.warm_rows = 0
  write_plan_of(config, tmp_path, dims=(128, 8, 128, 8))


def test_counted_groups_are_corrected_each_by_itself(tmp_path):
  c = Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples = 20_000
  c.data.synthetic.rows = 20_000
  c.data.block_samples = 1_024
  c.train.batch_size = 512
  prepared = prepare_lib.prepare(c, str(tmp_path / "data"), lambda _: None)
  groups = groups_for(c, prepared, dims=(16, 8, 16, 8, 8))
  problems = workload.problems_of(
    c,
    prepared,
    groups,
    Machine(presets.cpu(4), 4),
    slot_bytes=(4, 4),
    dense=DENSE,
  )
  assert [p.shape.dense for p in problems] == [DENSE, DenseCost()]
  rows = [p.profile.rows for p in problems]
  assert sum(rows) == prepared.profile.rows
  for p in problems:
    ratio = p.profile.measured.ratio(p.profile, 128)
    assert np.all(np.abs(ratio - 1) < 0.2)
  # Given cuts are those of the counted order, exactly.
  c.plan.hot_rows, c.plan.warm_rows = 777, 2_000
  plan, _ = write_plan_of(c, tmp_path, 4, prepared, dims=(16, 8, 16, 8, 8))
  own = np.isin(prepared.profile.tables, groups[0].tables)
  of_first = own[prepared.profile.table]
  found = plan.groups[0]
  assert found.rows_of(HOT) == np.count_nonzero(of_first[:777])
  assert found.rows_of(WARM) == np.count_nonzero(of_first[777:2_777])
