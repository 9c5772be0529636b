"""Which settings a run may change when it goes on, and which it may not.

A checkpoint holds all settings of its run: the config, and what the data was
prepared with. A run goes on from it with the same ones, but for those that do
not change what is trained, or whose change is handled.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from recjax import config as config_lib
from recjax.config import Config
from recjax.data.old_vocabulary import NUMBERS
from recjax.data.prepared import Prepared
from recjax.errors import UserError
from recjax.training.state import Identity

# Fields and groups of them. All others must be the same, new ones too.
MAY_CHANGE = (
  "mesh",
  "plan",
  "checkpoint",
  "train.log_every_steps",
  "train.start_from",  # read by a workdir without checkpoints only
  # More epochs or steps go on; fewer than are done are refused (train.py).
  "train.epochs",
  "train.steps",
  # What is done of the data counts samples. See `differences`.
  "train.batch_size",
  # How data is prepared and read, not what is read.
  "data.count_decay",  # prepare.py asks for it where it counts
  "data.max_bad_rows",
  "data.memory_mb",
  "data.engine",
  "data.beam_options",
  "data.route",
  "data.rows",  # of no data
  "data.predict",  # logs that a run does not train on
  "data.evaluate",
  "schema.keep",  # of predictions
)
_SHOWN = 60  # characters of a value


def settings_of(config: Config, prepared: Prepared) -> dict[str, Any]:
  """Returns all settings of a run by their paths, as JSON gives them back.

  Of data.* those that the data was prepared with count: logs by fingerprints.
  """
  found = as_json(flat(config)) | prepared.settings
  if prepared.numbers:
    found[NUMBERS] = as_json([x._asdict() for x in prepared.numbers])
  return found


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
  """Returns the fields of a tree of dataclasses by their paths."""
  found: dict[str, Any] = {}
  for f in dataclasses.fields(config):
    value, path = getattr(config, f.name), prefix + f.name
    if dataclasses.is_dataclass(value):
      found |= flat(value, f"{path}.")
    else:
      found[path] = value
  return found


def as_json(x: Any) -> Any:
  """Returns what JSON gives back: lists for tuples, dicts for dataclasses."""
  if dataclasses.is_dataclass(x):
    return as_json(flat(x))
  if isinstance(x, dict):
    return {k: as_json(v) for k, v in x.items()}
  return [as_json(v) for v in x] if isinstance(x, (list, tuple)) else x


def differences(
  was: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns {field: (value then, value now)} of what may not change.

  The batch size may not where the learning rate's decay is counted from an end
  that it moves.
  """
  decays = now.get("train.decay_steps") and not now.get("train.steps")
  may_change = [x for x in MAY_CHANGE if not (decays and "batch" in x)]
  free = lambda path: any(f"{path}.".startswith(f"{x}.") for x in may_change)
  # A field that is newer than a checkpoint had its default there.
  default = as_json(flat(config_lib.Config()))
  of = lambda settings, path: settings.get(path, default.get(path))
  return {
    path: (of(was, path), of(now, path))
    for path in sorted(was.keys() | now.keys())
    if not free(path) and of(was, path) != of(now, path)
  }


def check(
  workdir: pathlib.Path, step: int, was: Mapping[str, Any], now: Mapping
) -> None:
  """Raises UserError where a run would go on with other settings.

  Args:
    workdir: of the run.
    step: of the checkpoint.
    was: its settings.
    now: those of this config and data.
  """
  differ = differences(was, now)
  if differ:
    what = "; ".join(
      f"{path} is {_shown(a)} there and {_shown(b)} in this config"
      for path, (a, b) in differ.items()
    )
    raise UserError(
      f"{workdir} holds a run of other settings, at step {step}: {what}. Go on "
      "with those there, or begin a run of its own with another --workdir: "
      f"from scratch, or from what is trained with "
      f"--config.train.start_from={workdir}"
    )


def check_identity(directory, step, meta: dict, want: Identity) -> None:
  """Raises UserError where the checkpoint is of something else."""
  got = check_model(directory, step, meta, want)
  if got.vocabulary != want.vocabulary:
    raise UserError(
      f"checkpoint {step} in {directory} was trained with another vocabulary "
      f"({got.vocabulary[:12]}, {got.rows} rows; this data set has "
      f"{want.vocabulary[:12]}, {want.rows} rows): its rows mean other ids. "
      "Prepare the data that it was trained on, or use another --workdir: "
      "with train.start_from a run begins with what another one has trained"
    )


def check_model(
  directory, step, meta: dict, want: Identity, *, new_tables: bool = False
) -> Identity:
  """Raises UserError where the checkpoint is of another model.

  Args:
    directory, step, meta: the checkpoint.
    want: what the run is.
    new_tables: whether tables may be new, or be there no more.

  Returns:
    What the checkpoint is of.
  """
  got = Identity(**meta["identity"])
  for field, value in want.model.items():
    if new_tables and field.startswith("table ") and field not in got.model:
      continue
    if got.model.get(field) != value:
      raise UserError(
        f"checkpoint {step} in {directory} is of another model: {field} is "
        f"{got.model.get(field)!r} there and {value!r} in this config; "
        "restore it with the config it was trained with, or use another "
        "--workdir"
      )
  return got


def described(settings: Mapping[str, Any]) -> str:
  """Returns the settings that are not the config's defaults, in one line."""
  default = as_json(flat(config_lib.Config()))
  return ", ".join(
    f"{path}={_shown(value)}"
    for path, value in settings.items()
    if path in default and value != default[path]
  )


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
