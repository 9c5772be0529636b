"""From a config to plan.json and plan.html, without and with counted data."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from recjax.config import Config
from recjax.data import prepare as prepare_lib
from recjax.errors import UserError
from recjax.plan.plan import Plan
from recjax.planner import (
  baselines,
  frequency_buckets,
  presets,
  topology,
  write_plan,
)
from recjax.planner import solve as solve_lib
from recjax.planner.frequency_buckets import Table

TERABYTE = (
  227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956,
  405282, 10, 2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510,
  590152, 12973, 108, 36,
)  # fmt: skip


def terabyte(**changes) -> Config:
  c = Config()
  c.data.rows = TERABYTE
  c.embedding.dim = 128
  c.model.name = "dcnv2"
  c.train.batch_size = 65_536
  c.plan.topology = "dgx_h200"
  for path, value in changes.items():
    group, field = path.split("__")
    setattr(getattr(c, group), field, value)
  return c


def run(config, workdir, devices=8, prepared=None, serving=False):
  lines = []
  plan, _ = write_plan.run(
    config,
    prepared,
    workdir,
    lines.append,
    devices=devices,
    hosts=1,
    slot_bytes=512,
    serving=serving,
  )
  return plan, "\n".join(lines)


def svgs(text) -> list[ET.Element]:
  return [
    ET.fromstring(x) for x in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
  ]


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_terabyte_before_there_is_data(tmp_path, devices):
  plan, printed = run(terabyte(), tmp_path, devices)
  assert plan.rows == sum(TERABYTE)
  assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan
  assert "no data counted: every table a power law of exponent 1.15" in printed
  assert "samples/s" in printed
  assert "bytes a sample" in printed
  for name in ("recjax", "row-wise", "FAE", "table-wise", "HugeCTR"):
    assert re.search(f"^{name}", printed, re.MULTILINE)
  assert re.search("most samples/s: .* with batches of", printed)
  assert plan.step_seconds == sum(dict(plan.seconds).values()) > 0
  # Tables, slots and what the step needs fit the device.
  assert sum(dict(plan.memory).values()) < 141e9

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
  trained, _ = run(terabyte(), tmp_path)
  served, _ = run(terabyte(), tmp_path, serving=True)
  assert Plan.from_json((tmp_path / "plan.json").read_text()) == trained
  assert Plan.from_json((tmp_path / "serving_plan.json").read_text()) == served
  assert len(svgs((tmp_path / "serving_plan.html").read_text())) == 4
  assert served.step_seconds < trained.step_seconds / 2
  # Nothing is replicated where gradients meet; in serving it saves the trip.
  assert trained.hot == 0 < served.hot
  assert dict(served.memory)["slots"] == dict(served.sent)["gradients"] == 0


def test_a_plan_that_sends_nothing_is_drawn(tmp_path):
  plan, _ = run(terabyte(data__rows=(1_000, 50)), tmp_path, devices=1)
  assert plan.cold == 0 and plan.bytes_per_sample == 0
  assert len(svgs((tmp_path / "plan.html").read_text())) >= 3


def test_the_step_is_drawn_beside_what_was_measured(tmp_path):
  lines = [
    {"step": step, "samples_per_second": 65_536 / seconds}
    for step, seconds in ((20, 9.0), (40, 0.0123), (60, 0.0121))
  ]
  text = "\n".join([*map(json.dumps, lines), '{"step": 60, "auc": 0.8}', '{"s'])
  (tmp_path / "metrics.jsonl").write_text(text)
  run(terabyte(), tmp_path)
  page = (tmp_path / "plan.html").read_text()
  assert "measured 12.3" in page
  assert len(svgs(page)) == 4


def test_a_measured_topology_is_used(tmp_path):
  slow = dataclasses.replace(presets.get("dgx_h200", 8), link=1e9, name="slow")
  topology.save(slow, tmp_path / "slow.json")
  config = terabyte(plan__topology=str(tmp_path / "slow.json"))
  plan, _ = run(config, tmp_path)
  fast, _ = run(terabyte(), tmp_path)
  assert plan.topology == "slow"
  assert dict(plan.seconds)["all-to-all"] > dict(fast.seconds)["all-to-all"]


def test_budgets_that_cannot_work(tmp_path):
  config = terabyte(plan__device_memory_mb=10, plan__host_memory_mb=10)
  with pytest.raises(
    UserError, match=r"It fits with plan\.host_memory_mb="
  ) as e:
    run(config, tmp_path)
  enough = int(re.search(r"host_memory_mb=(\d+)", str(e.value))[1])
  run(
    terabyte(plan__device_memory_mb=10, plan__host_memory_mb=enough), tmp_path
  )
  with pytest.raises(UserError, match=r"data\.hotness: 2 numbers for the 26"):
    run(terabyte(data__hotness=(1, 2)), tmp_path)
  with pytest.raises(UserError, match="divided over 3 devices"):
    run(terabyte(), tmp_path, 3)


def test_what_cannot_run_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(write_plan.cut_points, "HOT_SYNCS", ("dense",))
  with pytest.raises(UserError, match=r"plan\.hot_sync: 'sparse'"):
    run(terabyte(plan__hot_sync="sparse"), tmp_path)
  monkeypatch.setattr(write_plan.cut_points, "HOT_SYNCS", ("dense", "sparse"))
  config = terabyte(plan__hot_sync="sparse", plan__hot_rows=1_000)
  plan, _ = run(config, tmp_path)
  assert plan.hot_sync == "sparse"
  assert 0 < plan.reports[0].distinct < plan.capacity_hot <= 1_000
  config.plan.hot_sync = "dense"
  assert run(config, tmp_path)[0].capacity_hot == 0


def test_transports_between_nodes_are_chosen_and_overridden(tmp_path):
  few = {"data__rows": (100_000, 1_000, 50)}
  plan, printed = run(terabyte(**few), tmp_path, 16)
  assert (plan.nodes, plan.node_devices) == (2, 8)
  assert "2 nodes of 8: " in printed
  seconds = {}
  for exchange in ("flat", "two_stage"):
    for copies in ("one", "node"):
      config = terabyte(
        **few, plan__exchange=exchange, plan__warm_copies=copies
      )
      config.plan.hot_rows = 0
      forced, printed = run(config, tmp_path, 16)
      assert (forced.exchange, forced.warm_copies) == (exchange, copies)
      owners = 16 if copies == "one" else 8
      assert forced.warm_owners == owners
      assert forced.warm_slots >= forced.warm / owners
      assert (forced.capacity_far_warm > 0) == (
        exchange == "two_stage" or copies == "node"
      )
      assert (forced.capacity_far_cold > 0) == (
        exchange == "two_stage" and forced.cold > 0
      )
      per_sample = f"{forced.network_per_sample:,.0f} bytes a sample between"
      assert per_sample in printed
      total = sum(v for k, v in forced.sent if k != "host")
      assert sum(dict(forced.network).values()) < total
      seconds[exchange, copies] = forced.step_seconds
  assert plan.step_seconds <= min(seconds.values())
  network = dict(forced.network)
  assert network["rows"] == 0 or forced.cold  # copies are read in the node


def test_nodes_are_simulated_or_refused(tmp_path):
  few = {"data__rows": (100_000, 1_000, 50)}
  config = terabyte(**few, mesh__node_devices=2)
  plan, printed = run(config, tmp_path)
  assert (plan.nodes, plan.node_devices) == (4, 2)
  for text in (printed, (tmp_path / "plan.html").read_text()):
    assert f"4 nodes of 2: {plan.exchange} exchange, " in text
  config.mesh.node_devices = 3
  with pytest.raises(UserError, match=r"mesh\.node_devices: 8 devices cannot"):
    run(config, tmp_path)
  for field, value in (("exchange", "two_stage"), ("warm_copies", "node")):
    config = terabyte(**few, **{f"plan__{field}": value})
    with pytest.raises(UserError, match=rf"plan\.{field}: '{value}' needs"):
      run(config, tmp_path)  # 8 devices, one node
  # 12 devices are no whole nodes of 8: one exchange for all.
  plan, _ = run(terabyte(**few, train__batch_size=12 * 512), tmp_path, 12)
  assert (plan.nodes, plan.exchange, plan.warm_copies) == (1, "flat", "one")


def test_overrides_are_kept(tmp_path):
  config = terabyte(plan__hot_rows=1_000, plan__warm_rows=5_000_000)
  config.plan.capacity = 7
  plan, _ = run(config, tmp_path)
  assert (plan.hot, plan.warm) == (1_000, 5_000_000)
  assert plan.capacity_warm == plan.capacity_cold == 7


def test_fewer_bytes_where_bytes_are_asked_for(tmp_path):
  time, _ = run(terabyte(), tmp_path, 64)
  least, _ = run(terabyte(plan__objective="bytes"), tmp_path, 64)
  assert least.bytes_per_sample <= time.bytes_per_sample
  assert least.step_seconds >= time.step_seconds


def test_long_bags_are_pooled_at_owners(tmp_path):
  config = terabyte(
    data__rows=(2_000_000, 300_000, 50),
    data__hotness=(100, 7, 1),
    plan__objective="bytes",
    train__batch_size=4_096,
  )
  plan, printed = run(config, tmp_path)
  owner = dict(plan.pooled)
  assert set(owner) == {"C1", "C2"} and owner["C1"] != owner["C2"]
  assert f"C1 on {owner['C1']}" in printed
  page = (tmp_path / "plan.html").read_text()
  assert f"pooled at the owner: C1 on device {owner['C1']}" in page
  assert "2,300,050 rows" in page and f"{2_300_050:,} rows" in printed
  assert dict(plan.memory)["pooled"] > 0

  config.plan.pooled = "none"
  none, printed = run(config, tmp_path)
  assert none.pooled == () and "pooled" not in printed
  assert none.bytes_per_sample > plan.bytes_per_sample
  config.plan.pooled = "C3, C2"
  some, _ = run(config, tmp_path)
  assert {name for name, _ in some.pooled} == {"C2", "C3"}
  with pytest.raises(UserError, match=r"plan\.pooled: .*'C4'.* C1, C2, C3"):
    config.plan.pooled = "C1,C4"
    run(config, tmp_path)
  with pytest.raises(UserError, match=r"plan\.pooled: C1: .*without weights"):
    config.plan.pooled, config.data.weighted = "C1", True
    run(config, tmp_path)
  config.plan.pooled = ""
  assert run(config, tmp_path)[0].pooled == ()


def test_pooled_tables_on_several_nodes_need_the_flat_exchange(tmp_path):
  config = terabyte(
    data__rows=(2_000_000, 50),
    data__hotness=(100, 1),
    mesh__node_devices=4,
    plan__objective="bytes",
    train__batch_size=4_096,
  )
  plan, _ = run(config, tmp_path)
  assert (plan.pooled, plan.exchange) == ((("C1", plan.pooled[0][1]),), "flat")
  assert 0 < plan.network_per_sample < plan.bytes_per_sample
  config.plan.exchange = "two_stage"
  staged, _ = run(config, tmp_path)
  assert (staged.pooled, staged.exchange) == ((), "two_stage")
  assert staged.bytes_per_sample > plan.bytes_per_sample
  config.plan.pooled = "C1"
  with pytest.raises(UserError, match=r"plan\.pooled: C1: .*plan\.exchange"):
    run(config, tmp_path)


def test_counted_data_are_corrected_and_used(tmp_path):
  c = Config()
  c.data.format = "synthetic"
  c.data.synthetic.samples = 20_000
  c.data.synthetic.rows = 20_000
  c.data.block_samples = 1_024
  c.train.batch_size = 512
  prepared = prepare_lib.prepare(c, str(tmp_path / "data"), lambda _: None)
  t = presets.cpu(4)
  problem = write_plan.problem_of(c, prepared, t, 4, 4)
  assert set(problem.spectrum.measured.samples) == {32, 128, 512}
  ratio = problem.spectrum.measured.ratio(problem.spectrum, 128)
  assert np.all(np.abs(ratio - 1) < 0.15)  # the teacher's are independent
  plan, printed = run(c, tmp_path, 4, prepared)
  assert plan.topology == "cpu"
  assert "no data" not in printed
  page = (tmp_path / "plan.html").read_text()
  assert "counted on real batches" in page


# ---- Other placements


def placed_of(rows, devices, device_bytes, hotness=1, **changes):
  tables = tuple(Table(f"t{i}", r, hotness) for i, r in enumerate(rows))
  arguments = {
    "devices": devices,
    "batch_size": devices * 1_024,
    "lookups": hotness * len(rows),
    "dim": 16,
    "dtype": "float32",
    "slot_bytes": 0,
    "topology": presets.get("dgx_h200", devices),
  }
  problem = solve_lib.make_problem(
    frequency_buckets.power_law(tables, 1.15), **(arguments | changes)
  )
  host = 1 << 40
  plan = solve_lib.solve(
    problem, hosts=1, device_bytes=device_bytes, host_bytes=host
  )
  return {
    p.name.split()[0].rstrip(",:"): p
    for p in baselines.compare(problem, plan, device_bytes, host)
  }


@pytest.mark.parametrize("devices", [2, 8, 16])
def test_the_plan_is_the_best_of_the_table(devices):
  placed = placed_of((10**6, 10**5, 300, 7) * 4, devices, 1 << 30)
  ours = placed.pop("recjax")
  for p in placed.values():
    assert ours.seconds <= p.seconds * (1 + 1e-9), p.name


def test_what_does_not_fit_says_so():
  placed = placed_of((10**6, 10), 4, 20 << 20)
  assert np.isnan(placed["table-wise"].seconds)
  assert "does not fit" in placed["table-wise"].note
  # HugeCTR's rule splits the large table over devices instead.
  assert placed["HugeCTR's"].device_bytes <= 20 << 20
  assert placed["FAE"].host_bytes > 0
  assert "does not fit" not in baselines.describe((placed["recjax"],))


def test_greedy_fills_the_least_loaded():
  """Eight equal tables on four devices: two on each; bytes by hand."""
  placed = placed_of((1_000,) * 8, 4, 1 << 30)
  table = placed["table-wise"]
  assert table.device_bytes == 2 * 1_000 * 64
  assert table.bytes_per_sample == 8 * (4 + 2 * 64) * 3 / 4
  assert placed["row-wise"].bytes_per_sample == pytest.approx(
    8 * (4 + 2 * 64) * 3 / 4
  )


def test_shards_are_pooled_at_their_owners():
  """A row-wise, a column-wise and a host table on four devices, by hand."""
  tables = (Table("rows", 400), Table("columns", 100), Table("host", 10))
  problem = solve_lib.make_problem(
    frequency_buckets.power_law(tables, 1.15),
    devices=4,
    batch_size=64,
    lookups=3,
    dim=16,
    dtype="float32",
    slot_bytes=0,
  )
  shards = [baselines.Shard(0, i, 100, splits=4) for i in range(4)]
  shards += [baselines.Shard(1, i, 100, columns=0.5) for i in range(2)]
  shards += [baselines.Shard(2, 3, 10, host=True)]
  placed = baselines.of_shards("mixed", problem, shards, replicas=7)
  assert placed.device_bytes == (100 + 50 + 7) * 64
  assert placed.host_bytes == 10 * 64
  # Ids go to both halves of the columns; each half sends half a vector.
  hot = 2 * 7 * 4 * 17 * 3 / 4 / 16  # all-reduced by a device with 16 samples
  a_sample = (3 / 4) * (4 + 2 * 4 + 4 + 3 * 2 * 64)
  assert placed.bytes_per_sample == pytest.approx(a_sample + hot)
  near = [s for s in shards if not s.host] + [baselines.Shard(2, 3, 10)]
  assert baselines.of_shards("near", problem, near).seconds < placed.seconds
