"""The configuration: one tree of typed dataclasses.

A config file's `get_config()` returns a `Config`; the command line overrides
single fields with `--config.a.b=value`. Slots make a misspelt field of a
config file an error; `check` makes a wrong type one.
"""

import dataclasses
import difflib
import typing
from typing import Literal

from recjax.errors import UserError

dataclass = dataclasses.dataclass(slots=True)


def _tree(cls):
  return dataclasses.field(default_factory=cls)


@dataclass
class Synthetic:
  """Criteo-format logs drawn from a planted teacher (recjax/synthetic.py)."""

  samples: int = 1_000_000
  rows: int = 2_000_000  # of all tables together
  hotness: tuple[int, ...] = ()  # a feature; () = one lookup each
  exponent: float = 1.15  # of the ids' power law
  signal: float = 1.0  # scale of the teacher's logit


@dataclass
class Data:
  format: Literal["criteo", "movielens", "synthetic"] = "criteo"
  train: str = ""  # path or glob
  test: str = ""  # path or glob; "" = the last part of train
  test_fraction: float = 0.1
  seed: int = 0  # of a random split and of the synthetic teacher
  split: Literal["time", "random"] = "time"  # which part is the test part
  min_count: int = 2  # rarer ids share their table's out-of-vocabulary row
  hotness: tuple[int, ...] = ()  # criteo: a feature; () = one lookup each
  max_bad_rows: int = 0  # damaged lines to skip (and report) before stopping
  pooling: Literal["sum", "mean"] = "sum"  # of multi-hot features
  block_samples: int = 8_192  # samples packed in an example
  shuffle_blocks: int = 16  # blocks whose samples are shuffled together
  memory_mb: int = 4_096  # for counting and remapping; the rest spills
  synthetic: Synthetic = _tree(Synthetic)


@dataclass
class Embedding:
  dim: int = 16
  optimizer: Literal["sgd", "rowwise_adagrad", "adagrad", "adam"] = (
    "rowwise_adagrad"
  )
  learning_rate: float = 0.02
  dtype: Literal["float32", "bfloat16"] = "float32"
  init_scale: float = 0.05  # rows start uniform in +-init_scale
  exchange_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class Model:
  name: Literal["dlrm", "dcnv2"] = "dlrm"
  bottom: tuple[int, ...] = (512, 256, 64)  # hidden widths; then embedding.dim
  top: tuple[int, ...] = (512, 256)  # hidden widths; then 1
  cross_layers: int = 3  # dcnv2
  cross_rank: int = 512  # dcnv2
  compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class Mesh:
  devices: int = 0  # 0 = all; on CPU that many simulated devices


@dataclass
class Plan:
  device_memory_mb: int = 0  # tables and slots, a device; 0 = from the machine
  host_memory_mb: int = 0  # tables and slots, a host; 0 = from the machine
  hot_rows: int = -1  # -1 = planned
  warm_rows: int = -1  # -1 = planned
  overflow_probability: float = 1e-6  # a step, all buffers together
  capacity: int = 0  # rows a peer and round of every buffer; 0 = planned


@dataclass
class Train:
  batch_size: int = 2_048  # global
  epochs: int = 1
  steps: int = 0  # 0 = by epochs
  optimizer: Literal["sgd", "adagrad", "adam"] = "adagrad"  # dense part
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
