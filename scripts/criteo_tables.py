"""Criteo's tables and MLPerf's lookups in them, for benchmarks; no JAX."""

import pathlib
import runpy

from recjax.config import Config

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Lookups of a sample, by table: MLPerf training's DLRM-DCNv2
# (mlcommons/training, dlrm_dcnv2).
MULTI_HOT = (
  *(3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10),
  *(3, 1, 1),
)


def terabyte_config() -> Config:
  """The config of MLPerf's model, whose data.rows are the Terabyte log's."""
  return runpy.run_path(str(_CONFIGS / "criteo_terabyte.py"))["get_config"]()


def names(count: int) -> tuple[str, ...]:
  """C1, C2, ... as the features of a Criteo log are called."""
  return tuple(f"C{i + 1}" for i in range(count))
