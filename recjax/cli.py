"""The command line: flags, and the mode that they pick.

`python main.py` and the installed command `recjax` both run this.
"""

import itertools
import os
import pathlib
import re
import sys
import threading
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from recjax import config_check, errors, files, folders, malloc, signals
from recjax.config import Config
from recjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="A config file, or the name of one of recjax's own."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Holds all that a run makes [runs/<config name>]."
)
_MODES = ["train", "prepare", "plan", "evaluate", "predict", "export_rows"]
_MODES += ["inspect"]
_WRITE_OUTPUT = (
  "predict",
  "export_rows",
)  # modes that write what --output names
_MODE = flags.DEFINE_enum(
  "mode", "train", _MODES, "train does all that is not done yet."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "What predict, export_rows and inspect write."
)
_TABLES = flags.DEFINE_string(
  "tables", None, "Those that export_rows writes: a,b [all]."
)
# What --mode=inspect begins with where --config is not given.
_NO_CONFIG = str(pathlib.Path(__file__).parent / "no_config.py")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of id 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many run this job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0.")


def run() -> None:
  """Runs the command line of this process; exits with 1 after a UserError.

  With 143 after SIGTERM and 130 after Ctrl-C: see signals.py.
  """
  signals.listen()
  holders = (
    *(_CONFIG, _WORKDIR, _MODE, _OUTPUT, _TABLES),
    *(_COORDINATOR, _PROCESSES, _PROCESS_ID),
  )
  for holder in holders:  # so that --help shows them
    flag = flags.FLAGS[holder.name]
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(main, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
  """Parses flags as absl does, with errors that name the nearest field."""
  try:
    config_check.check_flags(argv)
    rest = flags.FLAGS(_with_own_configs(_with_no_config(argv)))
    config_check.check(_CONFIG.value)
    _written()
    return rest
  except (AttributeError, TypeError, IndexError, flags.Error) as e:
    _fail(config_check.explain(e))
  except UserError as e:
    _fail(e)
  except (OSError, SyntaxError, ImportError) as e:  # of the config file
    _fail(f"--config: {str(e).strip().splitlines()[-1].strip()}")


def main(_: list[str]) -> None:
  """Does what --mode says, in this process of the job."""
  config = _CONFIG.value
  file = config_flags.get_config_filename(flags.FLAGS["config"])
  workdir = _WORKDIR.value or f"runs/{pathlib.Path(file).stem}"
  _leave_errors_to_the_main_thread()
  malloc.keep_freed_memory()
  import pyarrow  # and JAX, after the flags

  pyarrow.enable_signal_handlers(False)  # its readers would raise on Ctrl-C
  if _MODE.value == "inspect":
    return _inspect(config, file)
  from recjax import distributed, jobs, mesh
  from recjax.training import same_run

  job = (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
  settings = {
    f"--config.{path}": same_run.as_json(value)
    for path, value in same_run.flat(config).items()
    if path != "plan.host_store_dir"  # each machine's own
  }
  own = (_MODE, _OUTPUT, _TABLES)
  settings |= {f"--{f.name}": f.value for f in own if f.value is not None}
  index = 0
  try:
    folder = folders.named(workdir, "--workdir")
    with distributed.job(*job, settings=settings, workdir=folder) as (
      index,
      count,
    ):
      if _MODE.value != "plan":  # which answers for more than there can be
        mesh.simulate_devices(config.mesh.devices, count)
      report = lambda s: None if index else print(s, flush=True)
      mode = jobs.MODES[_MODE.value]
      mode(config, folder, report, **_written())
  except signals.Ended as e:
    if index == 0:
      signals.say(str(e))
    sys.exit(signals.code(e.signum))
  except UserError as e:
    _fail(e)


def _inspect(config: Config, file: str) -> None:
  """Reports what a log holds, and writes or prints a config to start from."""
  from recjax.data import describe_log, inspect_log

  changed = config_flags.get_override_values(flags.FLAGS["config"])
  given = file != _NO_CONFIG or "data.format" in changed
  try:
    output = _OUTPUT.value
    with errors.of_the_system(f"inspecting {config.data.train}"):
      found = inspect_log.inspect(config, given)
      print(describe_log.report(found, config.embedding, config.schema))
      made = describe_log.config_file(found, output or "")
    if not output:
      print(f"\n{made}\nto keep this config, say --output=mine.py")
    else:
      with errors.of_the_system(f"writing {output}"):
        files.write(new_config(output), made)
      print(f"{output} holds a config to start from")
  except signals.Ended as e:
    signals.say(str(e))
    sys.exit(signals.code(e.signum))
  except UserError as e:
    _fail(e)


def new_config(path: str) -> str:
  """Returns the path of a config file that is not there yet.

  Raises:
    UserError: it is there; its folder is not; --config could not take it.
  """
  try:
    _whole(path)
  except UserError as e:
    raise UserError(str(e).replace("--config", "--output", 1)) from None
  folder = os.path.dirname(path) or "."
  if os.path.lexists(path):
    raise UserError(
      f"--output: {path} is there already, and is never overwritten; name a "
      "new file"
    )
  if not os.path.isdir(folder):
    raise UserError(f"--output: there is no folder {folder}")
  return path


def _written() -> dict[str, Any]:
  """Returns what --output and --tables say, as a job takes it.

  Raises:
    UserError: one is given that the mode does not take, or is missing.
  """
  mode = _MODE.value
  if _TABLES.value and mode != "export_rows":
    raise UserError("--tables: --mode=export_rows alone takes it; leave it out")
  if mode == "inspect":
    return {"output": new_config(_OUTPUT.value)} if _OUTPUT.value else {}
  if mode not in _WRITE_OUTPUT:
    if _OUTPUT.value:
      raise UserError(
        f"--output: --mode={mode} writes into --workdir alone; leave it out, "
        f"or use it with --mode={' or '.join(_WRITE_OUTPUT)}"
      )
    return {}
  if not _OUTPUT.value:
    raise UserError(f"--output: missing; say where --mode={mode} writes to")
  found: dict[str, Any] = {"output": pathlib.Path(_OUTPUT.value).absolute()}
  if mode == "export_rows":
    found["tables"] = tuple(x for x in (_TABLES.value or "").split(",") if x)
  return found


def own_configs() -> dict[str, pathlib.Path]:
  """Returns the config files that come with recjax, by name."""
  package = pathlib.Path(__file__).parent
  # In a wheel they lie in the package, in a checkout beside it.
  for folder in (package / "configs", package.parent / "configs"):
    if folder.is_dir():
      return {path.stem: path for path in sorted(folder.glob("*.py"))}
  return {}


def find_config(given: str) -> str:
  """Returns the path of the config that --config gives.

  A file of that path comes first. Else `quickstart` and `configs/quickstart.py`
  are recjax's own, wherever recjax is installed.

  Raises:
    UserError: a plain name that neither a file nor a config of recjax has; a
      path that ml_collections would cut.
  """
  if pathlib.Path(given).is_file():
    return _whole(given)
  own = own_configs()
  for name, path in own.items():
    if given in (name, f"configs/{name}.py"):
      return _whole(str(path))
  if re.fullmatch(r"\w+", given):
    raise UserError(
      f"--config: there is no file {given!r}, and recjax has no config of that "
      f"name; it has {', '.join(own)}"
    )
  return given


def _whole(path: str) -> str:
  """Returns the path of a config file, where ml_collections takes all of it."""
  if ":" in path:
    raise UserError(
      f"--config: {path!r} has ':' in it, which begins an argument of the "
      "config file; use a path without"
    )
  return path


def _with_no_config(argv: list[str]) -> list[str]:
  """Returns argv with a config of defaults, where inspecting needs none."""
  pairs = itertools.pairwise([*argv, ""])
  inspects = any(
    re.fullmatch("--?mode=inspect", a)
    or (re.fullmatch("--?mode", a) and b == "inspect")
    for a, b in pairs
  )
  if not inspects or any(re.match("--?config(=|$)", a) for a in argv):
    return argv
  return [*argv[:1], f"--config={_NO_CONFIG}", *argv[1:]]


def _with_own_configs(argv: list[str]) -> list[str]:
  """Returns argv with --config's value as a path; see `find_config`."""
  out = list(argv)
  for i, arg in enumerate(argv):
    if re.fullmatch(r"--?config", arg) and i + 1 < len(argv):
      out[i + 1] = find_config(argv[i + 1])
    elif found := re.fullmatch(r"(--?config=)(.*)", arg, re.DOTALL):
      out[i] = found[1] + find_config(found[2])
  return out


def _leave_errors_to_the_main_thread() -> None:
  """Silences threads and callbacks of libraries: whoever waits gets the error.

  Where a save fails, those of Orbax and TensorStore print hundreds of lines.
  """
  logging.set_verbosity(logging.FATAL)
  threading.excepthook = sys.unraisablehook = lambda _: None


def _fail(error: object) -> NoReturn:
  sys.stdout.flush()
  print(f"error: {error}", file=sys.stderr, flush=True)
  os._exit(1)  # what libraries still write at an exit would fail again
