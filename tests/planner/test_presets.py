"""Presets make sense; a topology file is read back, and its errors named."""

import dataclasses
import json

import pytest

from recjax.errors import UserError
from recjax.planner import presets, topology

NAMES = ["cpu", *presets.PRESETS]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_survives_a_file(name, tmp_path):
  """Which also checks each number against its limits."""
  t = presets.get(name, 8)
  assert t.name == name
  assert t.source
  topology.save(t, tmp_path / "t.json")
  assert presets.get(str(tmp_path / "t.json"), 8) == t


def test_what_data_sheets_say_about_each_other():
  a, b, c = (presets.PRESETS[f"dgx_{x}"] for x in ("a100", "h100", "h200"))
  assert a.link < b.link == c.link
  assert a.device_memory == b.device_memory < c.device_memory == 141e9
  assert a.stream < b.stream < c.stream < 4.8e12
  for t in presets.PRESETS.values():
    assert t.gather < t.stream
    assert t.network < t.link
    assert t.host_link < t.stream
    assert t.ssd_read < t.host_gather
    assert t.matmul_float32 < t.matmul_bfloat16


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("NVIDIA H200", "dgx_h200"),
    ("NVIDIA H100 80GB HBM3", "dgx_h100"),
    ("NVIDIA A100-SXM4-80GB", "dgx_a100"),
    ("TPU v5 lite", "tpu_v5e"),
    ("TPU v5", "tpu_v5p"),
    ("TPU v6 lite", "tpu_v6e"),
    ("cpu", "cpu"),
  ],
)
def test_the_device_at_hand(kind, name):
  t = presets.of_device(kind, 4, 1)
  assert t.name == name
  if name.startswith("dgx"):
    assert t.node_devices == 4
    assert t.hosts(4) == t.nodes(4) == 1


def error_of(tmp_path, change) -> str:
  fields = dataclasses.asdict(presets.cpu(1))
  path = tmp_path / "t.json"
  path.write_text(json.dumps(change(fields)))
  with pytest.raises(UserError) as e:
    presets.get(str(path), 1)
  assert "\n" not in str(e.value)
  assert str(path) in str(e.value)
  return str(e.value)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("link", 0),
    ("link", -1e9),
    ("gather", 1e30),
    ("device_memory", 80),  # meant as GB
    ("host_memory", "2 TB"),
    ("sort", None),
    ("launch", float("nan")),
    ("stream", float("inf")),
    ("torus", 4),
    ("node_devices", 1.5),
    ("node_devices", True),
    ("source", 3),
    ("name", None),
  ],
)
def test_an_absurd_number_is_named(tmp_path, field, value):
  message = error_of(tmp_path, lambda fields: fields | {field: value})
  assert f"{field}: {value!r}" in message


def test_missing_and_unknown_fields_are_named(tmp_path):
  for name in ("link", "host_latency", "name"):
    message = error_of(
      tmp_path, lambda f, n=name: {k: v for k, v in f.items() if k != n}
    )
    assert f"lacks {name};" in message
  assert "bandwith" in error_of(tmp_path, lambda f: f | {"bandwith": 1})
  assert "object" in error_of(tmp_path, lambda f: [f])


def test_files_from_before_there_were_ssds_are_read_with_a_note(tmp_path):
  t = presets.get("dgx_h200", 8)
  fields = dataclasses.asdict(t)
  del fields["ssd_read"], fields["ssd_latency"]
  path = tmp_path / "t.json"
  path.write_text(json.dumps(fields))
  found = presets.get(str(path), 8)
  assert found.source == f"{t.source}; ssd_read, ssd_latency assumed"
  assert 0 < found.ssd_read <= t.ssd_read and found.ssd_latency > 0
  assert found.host_link == t.host_link


def test_no_file_and_no_json(tmp_path):
  (tmp_path / "t.json").write_text("{")
  with pytest.raises(UserError, match="no JSON"):
    presets.get(str(tmp_path / "t.json"), 1)
  with pytest.raises(UserError, match="No such file"):
    presets.get(str(tmp_path / "none.json"), 1)
  with pytest.raises(UserError, match="dgx_h200"):
    presets.get("dgx_h2000", 1)
