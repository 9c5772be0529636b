"""The configuration: one tree of typed dataclasses.

A config file's `get_config()` returns a `Config`; the command line overrides
single fields with `--config.a.b=value`. What a field may hold is said once,
beside its default; config_check.py checks it. Slots make a misspelt field of a
config file an error.
"""

import difflib
from collections.abc import Mapping

from recjax.config_fields import choice, dataclass, number, one_of, tree
from recjax.errors import UserError
from recjax.log_schema import Schema
from recjax.schema import TableSpec

# Of logs; recjax.register_format adds to them.
FORMATS = ["criteo", "movielens", "synthetic"]
FORMATS += ["csv", "jsonl", "libsvm", "parquet"]


@dataclass
class Synthetic:
  """Criteo-format logs drawn from a planted teacher (data/synthetic.py)."""

  samples: int = number(1_000_000, at_least=1)
  rows: int = 2_000_000  # of all tables together
  # Of each feature; () = one lookup each.
  hotness: tuple[int, ...] = number((), at_least=1)
  exponent: float = number(1.15, at_least=0, at_most=10)  # ids' power law
  signal: float = 1.0  # scale of the teacher's logit


@dataclass
class Text:
  """How files of text are written, where their columns have names."""

  separator: str = ""  # csv: one character; "" = found out
  header: bool = True  # csv: the first row names the columns
  # csv: of the columns, where no row names them, or instead of its names.
  names: tuple[str, ...] = ()
  quote: str = '"'  # csv: "" = quotes are text like any other


@dataclass
class Data:
  """The logs, and how they are prepared."""

  # Of all but the first three, `schema` names the columns.
  format: str = one_of(FORMATS)
  train: str = ""  # path, or globs: a,b; a comma of a name is [,]
  test: str = ""  # the same; "" = the last part of train
  # Other logs of these columns, by the vocabulary that was prepared: what
  # --mode=predict scores, and --mode=evaluate instead of the test part.
  predict: str = ""
  evaluate: str = ""
  test_fraction: float = number(0.1, between=(0, 1))
  seed: int = number(0, at_least=0)  # of a random split, and of the teacher
  split: str = choice("time", "random")  # which part is the test part
  # Rarer ids share their table's out-of-vocabulary row.
  min_count: int = number(2, at_least=1)
  # With train.start_from on a new log: a value's count before is added, times
  # this. A half lets yesterday weigh half as much as today; 0 = today alone.
  count_decay: float = number(0.5, at_least=0, at_most=1)
  text: Text = tree(Text)
  # Of each feature of a Criteo log; () = one lookup each.
  hotness: tuple[int, ...] = number((), at_least=1)
  # Of each table, to plan before there is data.
  rows: tuple[int, ...] = number((), at_least=1)
  weighted: bool = False  # criteo: an id may end in :weight
  # Damaged lines that are skipped and reported before preparing stops.
  max_bad_rows: int = number(0, at_least=0)
  pooling: str = choice("sum", "mean")  # of multi-hot features
  block_samples: int = number(8_192, at_least=1)  # packed in an example
  # Blocks whose samples are shuffled together.
  shuffle_blocks: int = number(16, at_least=1)
  # Where a batch's lookups are sorted: on the host ahead of the step, or on the
  # device in it; auto = on the host where devices are CPUs.
  route: str = choice("auto", "host", "device")
  # For counting and remapping, in MiB; the rest spills to disk.
  memory_mb: int = number(4_096, at_least=128)
  # What prepares: this machine, or Apache Beam (docs/clusters.md), whose
  # workers take memory_mb each.
  engine: str = choice("duckdb", "beam")
  # Of Beam's pipeline: ("--runner=FlinkRunner", ...); () = one local worker.
  beam_options: tuple[str, ...] = ()
  synthetic: Synthetic = tree(Synthetic)


@dataclass
class TableRule:
  """Tables that are stored and trained otherwise than `embedding` says.

  A rule matches the tables named in `tables` that have fewer than `below_rows`
  rows; without names, tables of any name, and without `below_rows`, of any
  size. What is left empty or 0 is as `embedding` says.
  """

  tables: tuple[str, ...] = ()
  below_rows: int = number(0, at_least=0)
  dim: int = number(0, at_least=0)
  dtype: str = choice("", "float32", "bfloat16")
  optimizer: str = choice("", "rowwise_adagrad", "sgd", "adagrad", "adam")
  learning_rate: float = number(0.0, at_least=0)


@dataclass
class Embedding:
  """The tables; `rules` make exceptions, and the first that matches counts."""

  dim: int = number(16, at_least=1)
  optimizer: str = choice("rowwise_adagrad", "sgd", "adagrad", "adam")
  learning_rate: float = number(0.02, at_least=0)
  dtype: str = choice("float32", "bfloat16")
  init_scale: float = number(0.05, at_least=0)  # uniform in +-init_scale
  exchange_dtype: str = choice("float32", "bfloat16")
  rules: tuple[TableRule, ...] = ()


@dataclass
class Model:
  """The dense model."""

  name: str = choice("dlrm", "dcnv2")
  # Hidden widths; then embedding.dim.
  bottom: tuple[int, ...] = number((512, 256, 64), at_least=1)
  top: tuple[int, ...] = number((512, 256), at_least=1)  # then 1
  cross_layers: int = number(3, at_least=0)  # dcnv2
  cross_rank: int = number(512, at_least=1)  # dcnv2
  compute_dtype: str = choice("float32", "bfloat16")


@dataclass
class Mesh:
  """The devices."""

  devices: int = number(0, at_least=0)  # 0 = all; on CPU so many simulated
  # Devices that fast links join; 0 = as the topology says.
  node_devices: int = number(0, at_least=0)
  # To plan for machines that are not there.
  devices_per_host: int = number(8, at_least=1)


@dataclass
class Plan:
  """Where rows live, and how they travel."""

  # Budgets of rows and slot variables, of a device and of a host; 0 = the
  # machine's.
  device_memory_mb: int = number(0, at_least=0)
  host_memory_mb: int = number(0, at_least=0)
  # Rows that a host's memory has no room for go to files in this folder, which
  # should be on an SSD of each host; "" = all rows must fit memories.
  host_store_dir: str = ""
  # Of a host's files there; 0 = six tenths of what is free.
  ssd_memory_mb: int = number(0, at_least=0)
  hot_rows: int = number(-1, at_least=-1)  # -1 = planned
  warm_rows: int = number(-1, at_least=-1)  # -1 = planned
  # In the hosts' memory, the most used of those left; -1 = as many as fit.
  cold_rows: int = number(-1, at_least=-1)
  # Bound on the probability that a step needs a second round.
  overflow_probability: float = number(1e-2, between=(0, 1))
  # Rows for each peer, in a round, of every buffer; 0 = planned.
  capacity: int = number(0, at_least=0)
  # How the gradients of replicas meet; "" = planned.
  hot_sync: str = choice("", "all_reduce", "all_gather")
  # How sharded rows travel between several nodes; "" = planned.
  exchange: str = choice("", "flat", "two_stage")
  warm_copies: str = choice("", "one", "node")
  table_wise: str = ""  # tables or features, a,b, pooled by owners; or "none"
  topology: str = ""  # a preset's name or a JSON file; "" = this machine
  objective: str = choice("time", "bytes")  # what is least
  # Of every table, where data.rows is planned with.
  exponent: float = number(1.15, at_least=0, at_most=10)
  serving: bool = False  # --mode=plan: for the forward pass alone


@dataclass
class Train:
  """The training run, and the optimizer of the dense part."""

  batch_size: int = number(2_048, at_least=1)  # global
  epochs: int = number(1, at_least=0)
  steps: int = number(0, at_least=0)  # 0 = by epochs
  optimizer: str = choice("adagrad", "sgd", "adam")
  learning_rate: float = number(0.02, at_least=0)
  # Warm-up and decay are of this rate; embedding.learning_rate stays as it is.
  warmup_steps: int = number(0, at_least=0)
  decay_steps: int = number(0, at_least=0)  # linear, at the end; 0 = none
  log_every_steps: int = number(100, at_least=1)
  # Workdir of another run, of the same model: this one begins with what that
  # one has trained, and with the data from the start. These may be a new log,
  # whose new values start afresh; see data.count_decay.
  start_from: str = ""


@dataclass
class Checkpoint:
  """When checkpoints are written, how many are kept, which is read."""

  every_steps: int = number(0, at_least=0)  # 0 = by time, and at the end
  every_minutes: float = number(10.0, at_least=0)  # as well; 0 = never
  keep: int = number(2, at_least=1)
  # Every so many saves one holds all rows of host memory and SSD; the others
  # hold those that were written since, and need the full one.
  full_every: int = number(1, at_least=1)
  step: int = number(-1, at_least=-1)  # to evaluate; -1 = the newest
  # Go on from the newest one that is whole; damaged ones are put aside. Reads
  # the newest twice.
  fall_back: bool = False


@dataclass
class Config:
  """The whole configuration."""

  seed: int = 0
  data: Data = tree(Data)
  schema: Schema = tree(Schema)
  embedding: Embedding = tree(Embedding)
  model: Model = tree(Model)
  mesh: Mesh = tree(Mesh)
  plan: Plan = tree(Plan)
  train: Train = tree(Train)
  checkpoint: Checkpoint = tree(Checkpoint)


# ---- Tables


def table_specs(
  embedding: Embedding,
  rows: Mapping[str, int],
  dims: Mapping[str, int] | None = None,
) -> tuple[TableSpec, ...]:
  """Applies the rules to tables: how each is stored and trained.

  Args:
    embedding: the default, and the rules.
    rows: of each table, by its name.
    dims: those that the log's schema gives tables, where no rule does.

  Raises:
    UserError: a rule names a table that there is not.
  """
  for i, rule in enumerate(embedding.rules):
    for name in rule.tables:
      if name not in rows:
        near = difflib.get_close_matches(name, rows, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else ""
        raise UserError(
          f"embedding.rules[{i}].tables: there is no table {name}; "
          + (hint or f"the tables are {', '.join(rows)}")
        )
  dims = dims or {}
  return tuple(
    _spec(embedding, name, rows[name], dims.get(name, 0)) for name in rows
  )


def _spec(embedding: Embedding, name: str, rows: int, dim: int) -> TableSpec:
  """What the first matching rule and the defaults say of a table."""
  rule = TableRule()
  for r in embedding.rules:
    if (not r.tables or name in r.tables) and (
      not r.below_rows or rows < r.below_rows
    ):
      rule = r
      break
  return TableSpec(
    name,
    rule.dim or dim or embedding.dim,
    rule.dtype or embedding.dtype,
    rule.optimizer or embedding.optimizer,
    rule.learning_rate or embedding.learning_rate,
  )
