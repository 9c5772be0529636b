"""recjax: recommendation models with embedding tables larger than the devices.

The public API; see recjax/api.py, README.md and docs/tutorial.ipynb.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from recjax.api import (
    batches,
    build,
    evaluate,
    export_rows,
    make_plan,
    predict,
    prepare,
    prepare_columns,
    restore,
    rows,
    train,
  )
  from recjax.config import Config, TableRule
  from recjax.data.log import Format
  from recjax.data.rows import Rows
  from recjax.data.staging import register_format
  from recjax.embedding import optimizers
  from recjax.embedding.embedding import Embedding, make_embedding
  from recjax.embedding.lookup import forward
  from recjax.embedding.tables import init as init_tables
  from recjax.embedding.tables import specs as table_specs
  from recjax.embedding.update import backward
  from recjax.errors import UserError
  from recjax.log_schema import Cross, Hashed, Id, Ids, Number, Schema
  from recjax.mesh import make_mesh, simulate_devices
  from recjax.plan.plan import Plan
  from recjax.schema import Feature

# Loaded when they are asked for: data and plans need no JAX, and devices are
# simulated before JAX starts.
_HOMES = {
  "recjax.api": (
    *("batches", "build", "evaluate", "export_rows", "make_plan", "predict"),
    *("prepare", "prepare_columns", "restore", "rows", "train"),
  ),
  "recjax.config": ("Config", "TableRule"),
  "recjax.data.log": ("Format",),
  "recjax.data.rows": ("Rows",),
  "recjax.data.staging": ("register_format",),
  "recjax.embedding": ("optimizers",),
  "recjax.embedding.embedding": ("Embedding", "make_embedding"),
  "recjax.embedding.lookup": ("forward",),
  "recjax.embedding.tables": ("init_tables", "table_specs"),
  "recjax.embedding.update": ("backward",),
  "recjax.errors": ("UserError",),
  "recjax.log_schema": ("Cross", "Hashed", "Id", "Ids", "Number", "Schema"),
  "recjax.mesh": ("make_mesh", "simulate_devices"),
  "recjax.plan.plan": ("Plan",),
  "recjax.schema": ("Feature",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_INSIDE = {"init_tables": "init", "table_specs": "specs"}  # their names there

__all__ = [
  "Config",
  "Cross",
  "Embedding",
  "Feature",
  "Format",
  "Hashed",
  "Id",
  "Ids",
  "Number",
  "Plan",
  "Rows",
  "Schema",
  "TableRule",
  "UserError",
  "backward",
  "batches",
  "build",
  "evaluate",
  "export_rows",
  "forward",
  "init_tables",
  "make_embedding",
  "make_mesh",
  "make_plan",
  "optimizers",
  "predict",
  "prepare",
  "prepare_columns",
  "register_format",
  "restore",
  "rows",
  "simulate_devices",
  "table_specs",
  "train",
]


def __getattr__(name: str) -> Any:
  if name not in _HOME_OF:
    raise AttributeError(f"module 'recjax' has no attribute {name!r}")
  return pkgutil.resolve_name(f"{_HOME_OF[name]}.{_INSIDE.get(name, name)}")


def __dir__() -> list[str]:
  return sorted(__all__)
