"""Trains, evaluates and plans: python main.py --config configs/x.py."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from recjax import config as config_lib
from recjax import topology
from recjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A config.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Holds all that a run makes [runs/<config name>]."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "prepare", "plan", "evaluate"],
  "train does all that is not done yet; the others that one step.",
)


def parse(argv):
  """absl's parser, with errors that name the nearest field."""
  try:
    config_lib.check_flags(argv)
    rest = flags.FLAGS(argv)
    config_lib.check(_CONFIG.value)
    return rest
  except AttributeError as e:
    _fail(config_lib.explain(e))
  except OSError as e:  # of the config file; the last line says which
    _fail(f"--config: {str(e).strip().splitlines()[-1].strip()}")
  except (UserError, flags.Error) as e:
    _fail(e)


def _fail(error) -> None:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(1)


def main(argv) -> None:
  del argv
  config = _CONFIG.value
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{name.stem}").absolute()
  logging.set_verbosity(logging.ERROR)
  topology.keep_freed_memory()
  from recjax import mesh, train  # JAX starts after the flags are known

  mesh.simulate_devices(config.mesh.devices if _MODE.value != "plan" else 0)
  try:
    train.MODES[_MODE.value](config, workdir, lambda s: print(s, flush=True))
  except UserError as e:
    _fail(e)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
