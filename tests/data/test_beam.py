"""Apache Beam's local runner: the same bits, with a worker that dies.

Beam is in a folder of its own (scripts/test.sh), and runs in other processes.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import helpers_beam
import pytest
from helpers_data import config, content, log, quiet

from recjax.data import prepare
from recjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
BEAM = pathlib.Path(sys.prefix) / "beam"
SCRIPT = """
import sys
import helpers_beam
from recjax.data import prepare
from recjax.errors import UserError

train, tmp = sys.argv[1:]
workers = "--direct_running_mode=multi_processing", "--direct_num_workers=2"

def main():
  with helpers_beam.registered() as of:
    prepare.prepare(of(train), f"{tmp}/alone")
    try:
      wrong = of(train, engine="beam", beam_options=("--direct_num_workers=x",))
      prepare.prepare(wrong, f"{tmp}/one")
    except UserError as e:
      print(e)
    prepare.prepare(of(train, engine="beam"), f"{tmp}/one")
    open(train.replace("?", "1.kill"), "w").close()
    two = of(train, engine="beam", beam_options=workers)
    prepare.prepare(two, f"{tmp}/two")

if __name__ == "__main__":
  main()
"""


@pytest.mark.slow
@pytest.mark.skipif(
  not (BEAM / "apache_beam").exists()
  and importlib.util.find_spec("apache_beam") is None,
  reason="no Apache Beam: scripts/test.sh installs it",
)
def test_workers_prepare_the_same_and_one_of_them_dies(tmp_path):
  """One worker; then two, of which the format's `read` kills one, once."""
  for i in range(3):
    helpers_beam.write(tmp_path / f"log_{i}", 250, i)
  paths = [BEAM, ROOT, ROOT / "tests", *sys.path]
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(tmp_path / "log_?"), str(tmp_path)],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  wrong = "data.beam_options: ('--direct_num_workers=x',) are not options"
  assert wrong in done.stdout
  assert "prepare: Beam failed (" in done.stdout
  assert not (tmp_path / "log_1.kill").exists()
  alone = content(tmp_path / "alone")
  assert content(tmp_path / "one") == alone
  assert content(tmp_path / "two") == alone


def test_without_beam_one_message_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  log(tmp_path / "log.tsv", 20)
  c = config(tmp_path / "log.tsv", engine="beam")
  with pytest.raises(UserError, match=r"install 'recjax\[beam\]'"):
    prepare.prepare(c, str(tmp_path / "p"), quiet)
