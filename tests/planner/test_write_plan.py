"""From a config to plan.json and plan.html, without and with counted data."""

import dataclasses
import json
import re

import numpy as np
import pytest
from helpers_planner import (
  DENSE,
  TERABYTE,
  groups_for,
  svgs,
  terabyte,
  write_plan_of,
)

from recjax.config import Config
from recjax.data import prepare as prepare_lib
from recjax.errors import UserError
from recjax.plan.plan import COLD, HOT, WARM, Plan
from recjax.planner import presets, topology, transport, workload, write_plan
from recjax.planner.workload import Machine
from recjax.schema import AXES, DEVICE


def seconds_of(plan) -> float:
  return plan.prediction.step_seconds


def only(plan):
  (group,) = plan.groups
  return group


def test_more_rows_than_addresses_are_refused(tmp_path):
  """Ranks are int32."""
  c = Config()
  c.data.rows = (2_000_000_000, 1_000_000_000)
  c.plan.topology, c.plan.host_memory_mb = "dgx_h200", 2_000_000_000
  with pytest.raises(
    UserError, match=r"^embedding: group .* \(tables C1, C2\)"
  ):
    write_plan_of(c, tmp_path, 64)
  assert not (tmp_path / "plan.json").exists()
  c.data.rows = (2_000_000_000, 100_000_000)
  plan, _ = write_plan_of(c, tmp_path, 64)
  assert plan.rows == 2_100_000_000


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_terabyte_before_there_is_data(tmp_path, devices):
  plan, printed = write_plan_of(terabyte(), tmp_path, devices)
  assert plan.rows == sum(TERABYTE)
  assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan
  assert "no data counted: every table a power law of exponent 1.15" in printed
  assert "samples/s" in printed
  assert "bytes a sample" in printed
  for name in ("recjax", "row-wise", "FAE", "table-wise", "HugeCTR"):
    assert re.search(f"^{name}", printed, re.MULTILINE)
  assert re.search("most samples/s: .* with batches of", printed)
  assert seconds_of(plan) == sum(dict(plan.prediction.seconds).values()) > 0
  # Tables and what the step needs fit the device.
  assert sum(dict(plan.prediction.memory).values()) < 141e9

  page = (tmp_path / "plan.html").read_text()
  assert "no data counted" in page
  assert len(svgs(page)) == 4
  outside = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
  assert not re.search(r"https?:|<script|<link|src=", outside)
  for svg in svgs(page):
    width, height = map(float, svg.get("viewBox").split()[2:])
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
      x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
      assert 0 <= x <= x + w <= width
      assert 0 <= y <= y + h <= height
      assert w > 0


def test_serving_is_planned_for_the_forward_pass(tmp_path):
  trained, _ = write_plan_of(terabyte(), tmp_path)
  served, _ = write_plan_of(terabyte(), tmp_path, serving=True)
  assert Plan.from_json((tmp_path / "plan.json").read_text()) == trained
  assert Plan.from_json((tmp_path / "serving_plan.json").read_text()) == served
  assert len(svgs((tmp_path / "serving_plan.html").read_text())) == 4
  assert seconds_of(served) < seconds_of(trained) / 2
  # Nothing is replicated where gradients meet; in serving it saves the trip.
  assert only(trained).hot is None
  assert only(served).hot is not None
  assert dict(served.prediction.memory)["slot variables"] == 0
  assert dict(served.prediction.sent)["gradients"] == 0


def test_a_plan_that_sends_nothing_is_drawn(tmp_path):
  plan, _ = write_plan_of(terabyte(data__rows=(1_000, 50)), tmp_path, devices=1)
  assert only(plan).tier(COLD) is None and plan.bytes_per_sample == 0
  assert len(svgs((tmp_path / "plan.html").read_text())) >= 3


def test_the_step_is_drawn_beside_what_was_measured(tmp_path):
  lines = [
    {"step": step, "samples_per_second": 65_536 / seconds}
    for step, seconds in ((20, 9.0), (40, 0.0123), (60, 0.0121))
  ]
  text = "\n".join([*map(json.dumps, lines), '{"step": 60, "auc": 0.8}', '{"s'])
  (tmp_path / "metrics.jsonl").write_text(text)
  write_plan_of(terabyte(), tmp_path)
  page = (tmp_path / "plan.html").read_text()
  assert "measured 12.3" in page
  assert len(svgs(page)) == 4


def test_a_measured_topology_is_used(tmp_path):
  slow = dataclasses.replace(presets.get("dgx_h200", 8), link=1e9, name="slow")
  topology.save(slow, tmp_path / "slow.json")
  config = terabyte(plan__topology=str(tmp_path / "slow.json"))
  plan, _ = write_plan_of(config, tmp_path)
  fast, _ = write_plan_of(terabyte(), tmp_path)
  assert plan.prediction.topology == "slow"
  slow, fast = (dict(p.prediction.seconds)["all-to-all"] for p in (plan, fast))
  assert slow > fast


def test_budgets_that_cannot_work(tmp_path):
  config = terabyte(plan__device_memory_mb=10, plan__host_memory_mb=10)
  with pytest.raises(
    UserError, match=r"It fits with plan\.host_memory_mb="
  ) as e:
    write_plan_of(config, tmp_path)
  enough = int(re.search(r"host_memory_mb=(\d+)", str(e.value))[1])
  write_plan_of(
    terabyte(plan__device_memory_mb=10, plan__host_memory_mb=enough), tmp_path
  )
  with pytest.raises(UserError, match=r"data\.hotness: 2 numbers for the 26"):
    write_plan_of(terabyte(data__hotness=(1, 2)), tmp_path)
  with pytest.raises(UserError, match="divided over 3 devices"):
    write_plan_of(terabyte(), tmp_path, 3)


def test_what_cannot_run_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(write_plan, "HOT_SYNCS", ("all_reduce",))
    with pytest.raises(UserError, match=r"plan\.hot_sync: 'all_gather'"):
      write_plan_of(terabyte(plan__hot_sync="all_gather"), tmp_path)
  config = terabyte(plan__hot_sync="all_gather", plan__hot_rows=1_000)
  plan, _ = write_plan_of(config, tmp_path)
  group = only(plan)
  assert group.hot_sync == "all_gather"
  distinct = plan.report(group.name, HOT).distinct
  assert 0 < distinct < group.hot.capacity <= 1_000
  config.plan.hot_sync = "all_reduce"
  assert only(write_plan_of(config, tmp_path)[0]).hot.capacity == 0


@pytest.mark.slow
def test_transports_between_nodes_are_chosen_and_overridden(tmp_path):
  few = {"data__rows": (100_000, 1_000, 50)}
  plan, printed = write_plan_of(terabyte(**few), tmp_path, 16)
  assert (plan.nodes, plan.node_devices) == (2, 8)
  assert "2 nodes of 8: " in printed
  seconds = {}
  for exchange in ("flat", "two_stage"):
    for copies in ("one", "node"):
      config = terabyte(
        **few, plan__exchange=exchange, plan__warm_copies=copies
      )
      config.plan.hot_rows = 0
      forced, printed = write_plan_of(config, tmp_path, 16)
      group = only(forced)
      warm, cold = group.tier(WARM), group.tier(COLD)
      assert warm.axes == (AXES if copies == "one" else (DEVICE,))
      assert warm.owners == (16 if copies == "one" else 8)
      assert warm.shard_rows >= warm.rows / warm.owners
      two_stage = exchange == "two_stage"
      assert (warm.node_capacity > 0) == (two_stage or copies == "node")
      if cold:
        assert (cold.node_capacity > 0) == two_stage
        assert transport.of_group(group) == (exchange, copies)
      per_sample = forced.network_bytes_per_sample
      assert f"{per_sample:,.0f} bytes a sample between" in printed
      sent, network = forced.prediction.sent, dict(forced.prediction.network)
      total = sum(v for k, v in sent if k != "host")
      assert sum(network.values()) < total
      seconds[exchange, copies] = seconds_of(forced)
  assert seconds_of(plan) <= min(seconds.values())
  assert network["rows"] == 0 or cold  # copies are read in the node


def test_nodes_are_simulated_or_refused(tmp_path):
  few = {"data__rows": (100_000, 1_000, 50)}
  config = terabyte(**few, mesh__node_devices=2)
  plan, printed = write_plan_of(config, tmp_path)
  assert (plan.nodes, plan.node_devices) == (4, 2)
  for text in (printed, (tmp_path / "plan.html").read_text()):
    exchange = transport.of_group(only(plan)).exchange
    assert f"4 nodes of 2: {exchange} exchange, " in text
  config.mesh.node_devices = 3
  with pytest.raises(UserError, match=r"mesh\.node_devices: 8 devices cannot"):
    write_plan_of(config, tmp_path)
  for field, value in (("exchange", "two_stage"), ("warm_copies", "node")):
    config = terabyte(**few, **{f"plan__{field}": value})
    with pytest.raises(UserError, match=rf"plan\.{field}: '{value}' needs"):
      write_plan_of(config, tmp_path)  # 8 devices, one node
  # 12 devices are no whole nodes of 8: one exchange for all.
  plan, _ = write_plan_of(
    terabyte(**few, train__batch_size=12 * 512), tmp_path, 12
  )
  assert plan.nodes == 1
  assert transport.of_group(only(plan)) == transport.FLAT


def test_overrides_are_kept(tmp_path):
  config = terabyte(plan__hot_rows=1_000, plan__warm_rows=5_000_000)
  config.plan.capacity = 7
  plan, _ = write_plan_of(config, tmp_path)
  group = only(plan)
  assert (group.hot.rows, group.tier(WARM).rows) == (1_000, 5_000_000)
  assert {t.capacity for t in group.sharded} == {7}


@pytest.mark.slow
def test_fewer_bytes_where_bytes_are_asked_for(tmp_path):
  time, _ = write_plan_of(terabyte(), tmp_path)
  least, _ = write_plan_of(terabyte(plan__objective="bytes"), tmp_path)
  assert least.bytes_per_sample <= time.bytes_per_sample
  assert seconds_of(least) >= seconds_of(time)


def test_a_table_of_one_lookup_is_table_wise_if_asked(tmp_path):
  config = terabyte(data__rows=(200_000, 300), plan__table_wise="C1")
  plan, printed = write_plan_of(config, tmp_path)
  assert [name for name, _ in only(plan).table_wise] == ["C1"]
  assert "no effect" not in printed
  config.plan.hot_rows = 200_300
  plan, printed = write_plan_of(config, tmp_path)
  assert only(plan).table_wise == ()
  assert "plan.table_wise: C1: no effect, since a table without warm" in printed
  plan, printed = write_plan_of(config, tmp_path, 1)
  assert "C1: no effect, since one device owns all tables" in printed


def test_tables_of_long_bags_are_table_wise(tmp_path):
  config = terabyte(
    data__rows=(2_000_000, 300_000, 50),
    data__hotness=(100, 7, 1),
    plan__objective="bytes",
    train__batch_size=4_096,
  )
  plan, printed = write_plan_of(config, tmp_path)
  owner = dict(only(plan).table_wise)
  assert set(owner) == {"C1", "C2"} and owner["C1"] != owner["C2"]
  assert f"C1 on {owner['C1']}" in printed
  page = (tmp_path / "plan.html").read_text()
  assert f"pooled by the owner: C1 on device {owner['C1']}" in page
  assert "2,300,050 rows" in page and f"{2_300_050:,} rows" in printed
  assert dict(plan.prediction.memory)["table-wise"] > 0

  config.plan.table_wise = "none"
  none, printed = write_plan_of(config, tmp_path)
  assert only(none).table_wise == () and "pooled by" not in printed
  assert none.bytes_per_sample > plan.bytes_per_sample
  config.plan.table_wise = "C3, C2"
  some, _ = write_plan_of(config, tmp_path)
  assert {name for name, _ in only(some).table_wise} == {"C2", "C3"}
  with pytest.raises(UserError, match=r"plan\.table_wise: .*'C4'.* C1, C2, C3"):
    config.plan.table_wise = "C1,C4"
    write_plan_of(config, tmp_path)
  with pytest.raises(
    UserError, match=r"plan\.table_wise: C1: .*without weights"
  ):
    config.plan.table_wise, config.data.weighted = "C1", True
    write_plan_of(config, tmp_path)
  config.plan.table_wise = ""
  assert only(write_plan_of(config, tmp_path)[0]).table_wise == ()


def test_table_wise_tables_on_several_nodes_need_the_flat_exchange(tmp_path):
  config = terabyte(
    data__rows=(2_000_000, 50),
    data__hotness=(100, 1),
    mesh__node_devices=4,
    plan__objective="bytes",
    train__batch_size=4_096,
  )
  plan, _ = write_plan_of(config, tmp_path)
  assert [name for name, _ in only(plan).table_wise] == ["C1"]
  assert transport.of_group(only(plan)) == transport.FLAT
  assert 0 < plan.network_bytes_per_sample < plan.bytes_per_sample
  config.plan.exchange = "two_stage"
  two_stage, _ = write_plan_of(config, tmp_path)
  assert only(two_stage).table_wise == ()
  assert all(tier.node_capacity for tier in only(two_stage).sharded)
  assert two_stage.bytes_per_sample > plan.bytes_per_sample
  config.plan.table_wise = "C1"
  with pytest.raises(
    UserError, match=r"plan\.table_wise: C1: .*plan\.exchange"
  ):
    write_plan_of(config, tmp_path)


def test_counted_data_are_corrected_and_used(tmp_path):
  c = Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples = 20_000
  c.data.synthetic.rows = 20_000
  c.data.block_samples = 1_024
  c.train.batch_size = 512
  prepared = prepare_lib.prepare(c, str(tmp_path / "data"), lambda _: None)
  t = presets.cpu(4)
  (problem,) = workload.problems_of(
    c,
    prepared,
    groups_for(c, prepared),
    Machine(t, 4),
    slot_bytes=(4,),
    dense=DENSE,
  )
  assert set(problem.profile.measured.samples) == {32, 128, 512}
  ratio = problem.profile.measured.ratio(problem.profile, 128)
  assert np.all(np.abs(ratio - 1) < 0.15)  # the teacher's are independent
  plan, printed = write_plan_of(c, tmp_path, 4, prepared)
  assert plan.prediction.topology == "cpu"
  assert "no data" not in printed
  page = (tmp_path / "plan.html").read_text()
  assert "counted on real batches" in page


def test_rows_that_no_memory_holds_go_to_a_folder(tmp_path):
  """As much as is free there, or as is said."""
  small = {
    "data__rows": (3_000_000, 50),
    "plan__device_memory_mb": 50,
    "plan__host_memory_mb": 1_000,
  }
  with pytest.raises(UserError, match=r"plan\.ssd_memory_mb=\d+ and an SSD's"):
    write_plan_of(terabyte(**small), tmp_path)
  store = {"plan__host_store_dir": str(tmp_path / "store")}
  plan, printed = write_plan_of(terabyte(**small, **store), tmp_path)
  cold, frozen = only(plan).stored
  assert (cold.memory, frozen.memory) == ("host", "ssd")
  assert cold.rows * 1_024 <= 1_000 << 20 < (cold.rows + 8_000) * 1_024
  text = f"{frozen.shard_rows * 8 / 1_024:,.1f} MB of SSDs"
  assert re.search(rf"^frozen +{frozen.rows:,} +{text}", printed, re.M)
  beside = sum(dict(plan.prediction.host_seconds).values())
  page = (tmp_path / "plan.html").read_text()
  for out in (printed, page):
    assert f"beside the step: {beside * 1e3:,.3g} ms (SSD " in out
  assert ">frozen</text>" in page
  assert f"{frozen.rows:,} frozen rows" in printed
  assert not (tmp_path / "store").exists()  # planning writes nothing there
  with pytest.raises(UserError, match="and the 1 MB of their SSDs"):
    write_plan_of(terabyte(**small, **store, plan__ssd_memory_mb=1), tmp_path)
  kept, _ = write_plan_of(
    terabyte(**small, **store, plan__cold_rows=500_000), tmp_path
  )
  assert only(kept).rows_of("cold") == 500_000
  # Without a folder an SSD can only be planned for, on machines elsewhere.
  named = terabyte(**small, plan__ssd_memory_mb=9_000)
  assert only(write_plan_of(named, tmp_path)[0]).rows_of("frozen") > 0
  named.plan.topology = ""
  with pytest.raises(UserError, match=r"plan\.ssd_memory_mb: .*host_store_dir"):
    write_plan_of(named, tmp_path)


def test_serving_brings_rows_and_takes_none_back(tmp_path):
  config = terabyte(data__rows=(3_000_000, 50), plan__device_memory_mb=50)
  trained, _ = write_plan_of(config, tmp_path)
  served, _ = write_plan_of(config, tmp_path, serving=True)
  sent = [dict(p.prediction.sent)["host"] for p in (trained, served)]
  v = [only(p).visitors.shard_rows for p in (trained, served)]
  assert sent == pytest.approx([v[0] * (2 * 1_024 + 8), v[1] * (512 + 8)])
  held = [dict(p.prediction.memory)["visitors"] for p in (trained, served)]
  assert held == pytest.approx([v[0] * (3 * 1_024 + 16), v[1] * (2 * 512 + 16)])
