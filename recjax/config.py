"""The configuration: one tree of typed dataclasses.

A config file's `get_config()` returns a `Config`; the command line overrides
single fields with `--config.a.b=value`. Slots make a misspelt field of a
config file an error, `check_flags` that of a flag, `check` a wrong value.
"""

import dataclasses
import difflib
import re
import typing

from recjax.errors import UserError

dataclass = dataclasses.dataclass(slots=True)


def _tree(cls) -> typing.Any:
  return dataclasses.field(default_factory=cls)


def _choice(default: str, *others: str) -> typing.Any:
  """One of these strings. (ml_collections 1.1 cannot override a Literal.)"""
  choices = (default, *others)
  return dataclasses.field(default=default, metadata={"choices": choices})


@dataclass
class Synthetic:
  """Criteo-format logs drawn from a planted teacher (recjax/data/synthetic.py)."""

  samples: int = 1_000_000
  rows: int = 2_000_000  # of all tables together
  hotness: tuple[int, ...] = ()  # a feature; () = one lookup each
  exponent: float = 1.15  # of the ids' power law
  signal: float = 1.0  # scale of the teacher's logit


@dataclass
class Data:
  format: str = _choice("criteo", "movielens", "synthetic")
  train: str = ""  # path or glob
  test: str = ""  # path or glob; "" = the last part of train
  test_fraction: float = 0.1
  seed: int = 0  # of a random split and of the synthetic teacher
  split: str = _choice("time", "random")  # which part is the test part
  min_count: int = 2  # rarer ids share their table's out-of-vocabulary row
  hotness: tuple[int, ...] = ()  # criteo: a feature; () = one lookup each
  rows: tuple[int, ...] = ()  # a table's, to plan before there is data
  weighted: bool = False  # criteo: an id may end in :weight
  max_bad_rows: int = 0  # damaged lines to skip (and report) before stopping
  pooling: str = _choice("sum", "mean")  # of multi-hot features
  block_samples: int = 8_192  # samples packed in an example
  shuffle_blocks: int = 16  # blocks whose samples are shuffled together
  memory_mb: int = 4_096  # for counting and remapping; the rest spills
  synthetic: Synthetic = _tree(Synthetic)


@dataclass
class Embedding:
  dim: int = 16
  optimizer: str = _choice("rowwise_adagrad", "sgd", "adagrad", "adam")
  learning_rate: float = 0.02
  dtype: str = _choice("float32", "bfloat16")
  init_scale: float = 0.05  # rows start uniform in +-init_scale
  exchange_dtype: str = _choice("float32", "bfloat16")


@dataclass
class Model:
  name: str = _choice("dlrm", "dcnv2")
  bottom: tuple[int, ...] = (512, 256, 64)  # hidden widths; then embedding.dim
  top: tuple[int, ...] = (512, 256)  # hidden widths; then 1
  cross_layers: int = 3  # dcnv2
  cross_rank: int = 512  # dcnv2
  compute_dtype: str = _choice("float32", "bfloat16")


@dataclass
class Mesh:
  devices: int = 0  # 0 = all; on CPU that many simulated devices
  node_devices: int = 0  # joined by fast links; 0 = as the topology says
  devices_per_host: int = 8  # to plan for machines that are not there


@dataclass
class Plan:
  device_memory_mb: int = 0  # tables and slots, a device; 0 = from the machine
  host_memory_mb: int = 0  # tables and slots, a host; 0 = from the machine
  hot_rows: int = -1  # -1 = planned
  warm_rows: int = -1  # -1 = planned
  overflow_probability: float = 1e-2  # bound: a step needs a second round
  capacity: int = 0  # rows a peer and round of every buffer; 0 = planned
  hot_sync: str = _choice("", "dense", "sparse")  # of gradients; "" = planned
  # How sharded rows travel between several nodes; "" = planned.
  exchange: str = _choice("", "flat", "two_stage")
  warm_copies: str = _choice("", "one", "node")
  pooled: str = ""  # tables or features, a,b: pooled at owners; or "none"
  topology: str = ""  # a preset's name or a JSON file; "" = this machine
  objective: str = _choice("time", "bytes")  # what is least
  exponent: float = 1.15  # of every table, where data.rows is planned with
  serving: bool = False  # --mode=plan: for the forward pass, without slots


@dataclass
class Train:
  batch_size: int = 2_048  # global
  epochs: int = 1
  steps: int = 0  # 0 = by epochs
  optimizer: str = _choice("adagrad", "sgd", "adam")  # dense part
  learning_rate: float = 0.02  # dense part
  warmup_steps: int = 0
  decay_steps: int = 0  # linear, at the end of training; 0 = none
  log_every_steps: int = 100


@dataclass
class Checkpoint:
  every_steps: int = 0  # 0 = only at the end
  keep: int = 2
  step: int = -1  # to evaluate; -1 = the newest


@dataclass
class Config:
  seed: int = 0
  data: Data = _tree(Data)
  embedding: Embedding = _tree(Embedding)
  model: Model = _tree(Model)
  mesh: Mesh = _tree(Mesh)
  plan: Plan = _tree(Plan)
  train: Train = _tree(Train)
  checkpoint: Checkpoint = _tree(Checkpoint)


def check_flags(argv: list[str]) -> None:
  """Raises UserError for a `--config.a.b` that names no field."""
  for arg in argv:
    found = re.match(r"--?config\.([^=]*)", arg)
    if not found:
      continue
    cls, path = Config, found[1].split(".")
    for i, name in enumerate(path):
      fields = _fields(cls)
      if name not in fields:
        raise _unknown(".".join(path[:i]), name, fields, arg)
      cls = fields[name].type
      if dataclasses.is_dataclass(cls) == (i == len(path) - 1):
        what = "is a group of fields" if i == len(path) - 1 else "has no fields"
        raise UserError(f"{arg}: {'.'.join(path[: i + 1])} {what}")


def explain(error: AttributeError) -> UserError:
  """For a field that a config file sets and that does not exist."""
  # Setting a slot that is not there leaves error.name and error.obj empty.
  found = re.match(r"'(\w+)' object has no attribute '(\w+)'", str(error))
  cls = globals().get(found[1]) if found else None
  if not found or not dataclasses.is_dataclass(cls):
    return UserError(f"config file: {error}")
  prefix = {Config: "", Synthetic: "data.synthetic"}.get(
    cls, cls.__name__.lower()
  )
  return _unknown(prefix, found[2], _fields(cls), "config file")


def _fields(cls) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(cls)}


def _unknown(prefix, name, fields, where) -> UserError:
  near = difflib.get_close_matches(name, fields, 1, 0.5)
  dot = f"{prefix}." if prefix else ""
  hint = f"did you mean {dot}{near[0]}?" if near else ""
  return UserError(
    f"{where}: there is no field {dot}{name}; {hint or 'the fields are'}"
    + ("" if near else f" {', '.join(dot + f for f in fields)}")
  )


def check_nodes(devices: int, node_devices: int) -> None:
  """Raises UserError where devices do not make whole nodes; 0 = one node."""
  if node_devices and devices % node_devices:
    fit = [g for g in range(1, devices + 1) if devices % g == 0]
    raise UserError(
      f"mesh.node_devices: {devices} devices cannot be shared out to nodes of "
      f"{node_devices}; use one of {', '.join(map(str, fit))}, or 0 for what "
      "the topology says"
    )


def check(config, prefix: str = "") -> None:
  """Raises UserError for a value of the wrong type or out of its choices."""
  if config is None:
    raise UserError("--config: missing; try --config configs/quickstart.py")
  try:
    fields = dataclasses.fields(config)
  except TypeError:
    raise UserError(
      f"--config: get_config() returns a {type(config).__name__}, not a "
      "recjax.config.Config"
    ) from None
  for f in fields:
    path, value = prefix + f.name, getattr(config, f.name)
    if dataclasses.is_dataclass(f.type):
      if type(value) is not f.type:
        raise UserError(f"{path}: {value!r} is not a {f.type.__name__}")
      check(value, path + ".")
    elif f.type in (int, float, str, bool):
      if f.type is float and type(value) is int:
        setattr(config, f.name, float(value))
      elif type(value) is not f.type:
        raise UserError(
          f"{path}: {value!r} is a {type(value).__name__}, expected "
          f"{f.type.__name__}"
        )
    elif not (isinstance(value, tuple) and all(type(x) is int for x in value)):
      raise UserError(f"{path}: {value!r} is not a tuple of int")
    choices = f.metadata.get("choices")
    if choices and value not in choices:
      near = difflib.get_close_matches(value, choices, 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise UserError(
        f"{path}: {value!r} is not one of {', '.join(choices)}{hint}"
      )
  if not prefix:
    _check_ranges(config)


def _check_ranges(c: Config) -> None:
  def at_least(path, least):
    value = c
    for name in path.split("."):
      value = getattr(value, name)
    if not value >= least:
      raise UserError(f"{path}: {value} found, at least {least} expected")

  for path in [
    "embedding.dim",
    "train.batch_size",
    "data.block_samples",
    "data.shuffle_blocks",
    "data.min_count",
    "data.memory_mb",
    "checkpoint.keep",
    "train.log_every_steps",
    "mesh.devices_per_host",
    "model.cross_rank",
    "data.synthetic.samples",
  ]:
    at_least(path, 1)
  for path in [
    "train.epochs",
    "train.steps",
    "train.warmup_steps",
    "train.decay_steps",
    "checkpoint.every_steps",
    "mesh.devices",
    "mesh.node_devices",
    "plan.device_memory_mb",
    "plan.capacity",
    "plan.host_memory_mb",
    "data.max_bad_rows",
    "embedding.init_scale",
    "embedding.learning_rate",
    "train.learning_rate",
  ]:
    at_least(path, 0)
  for path in ("model.bottom", "model.top", "data.hotness", "data.rows"):
    group, field = path.split(".")
    if any(x < 1 for x in getattr(getattr(c, group), field)):
      raise UserError(
        f"{path}: {getattr(getattr(c, group), field)} holds a number below 1"
      )
  if not 0 <= c.plan.exponent <= 10:
    raise UserError(f"plan.exponent: {c.plan.exponent} is not from 0 to 10")
  for path in ("plan.hot_rows", "plan.warm_rows", "checkpoint.step"):
    at_least(path, -1)
  if not 0 < c.plan.overflow_probability < 1:
    raise UserError(
      f"plan.overflow_probability: {c.plan.overflow_probability} is not "
      "between 0 and 1"
    )
  if not 0 < c.data.test_fraction < 1:
    raise UserError(
      f"data.test_fraction: {c.data.test_fraction} is not between 0 and 1"
    )
