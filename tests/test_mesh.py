"""The mesh: its devices, its axis, and how a batch lies on it."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from recjax import mesh as mesh_lib
from recjax.errors import UserError
from recjax.schema import AXES


@pytest.mark.parametrize(("asked", "got"), [(1, 1), (2, 2), (8, 8), (0, 8)])
def test_mesh_of_the_first_devices(asked, got):
  mesh = mesh_lib.make_mesh(asked)
  assert mesh.axis_names == AXES
  assert mesh.axis_types == (AxisType.Auto,) * 2
  assert mesh.devices.tolist() == [jax.devices()[:got]]


def test_more_devices_than_exist():
  with pytest.raises(UserError, match=r"mesh\.devices: 9 asked for") as e:
    mesh_lib.make_mesh(9)
  assert "JAX finds 8 cpu device(s)" in str(e.value)
  assert "--config.mesh.devices=8" in str(e.value)


def test_batches_are_split_and_parameters_replicated():
  mesh = mesh_lib.make_mesh(4)
  x = np.arange(24).reshape(8, 3)
  split = jax.device_put(x, mesh_lib.batch_sharding(mesh))
  for i, shard in enumerate(split.addressable_shards):
    np.testing.assert_array_equal(shard.data, x[2 * i : 2 * i + 2])
  whole = jax.device_put(x, mesh_lib.replicated(mesh))
  assert len(whole.addressable_shards) == 4
  assert whole.is_fully_replicated


def test_devices_of_a_node_are_neighbours():
  mesh = mesh_lib.make_mesh(8, 4)
  assert dict(mesh.shape) == {"node": 2, "device": 4}
  assert mesh.devices.ravel().tolist() == jax.devices()
  # Over both axes a batch lies as on one node.
  x = np.arange(16)
  split = jax.device_put(x, mesh_lib.batch_sharding(mesh))
  for i, shard in enumerate(split.addressable_shards):
    np.testing.assert_array_equal(shard.data, x[2 * i : 2 * i + 2])


def test_nodes_that_do_not_share_out():
  with pytest.raises(UserError, match=r"mesh\.node_devices: 8 devices") as e:
    mesh_lib.make_mesh(8, 3)
  assert "one of 1, 2, 4, 8, or 0" in str(e.value)
