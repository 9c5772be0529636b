"""Trains, evaluates and plans: python main.py --config configs/x.py."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from recjax import config as config_lib
from recjax import malloc
from recjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A config.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Holds all that a run makes [runs/<config name>]."
)
_MODES = ["train", "prepare", "plan", "evaluate"]
_MODE = flags.DEFINE_enum(
  "mode", "train", _MODES, "train does all that is not done yet."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of id 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many run this job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0.")


def parse(argv):
  """absl's parser, with errors that name the nearest field."""
  try:
    config_lib.check_flags(argv)
    rest = flags.FLAGS(argv)
    config_lib.check(_CONFIG.value)
    return rest
  except AttributeError as e:
    _fail(config_lib.explain(e))
  except (UserError, flags.Error) as e:
    _fail(e)
  except (OSError, SyntaxError, ImportError) as e:  # of the config file
    _fail(f"--config: {str(e).strip().splitlines()[-1].strip()}")


def _fail(error) -> None:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(1)


def main(_) -> None:
  config = _CONFIG.value
  file = config_flags.get_config_filename(flags.FLAGS["config"])
  workdir = _WORKDIR.value or f"runs/{pathlib.Path(file).stem}"
  logging.set_verbosity(logging.ERROR)
  malloc.keep_freed_memory()
  from recjax import distributed, mesh
  from recjax.training import train

  job = (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
  try:
    with distributed.job(*job) as (index, count):
      if _MODE.value != "plan":  # which answers for more than there can be
        mesh.simulate_devices(config.mesh.devices, count)
      report = lambda s: None if index else print(s, flush=True)
      run = train.MODES[_MODE.value]
      run(config, pathlib.Path(workdir).absolute(), report)
  except UserError as e:
    _fail(e)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
