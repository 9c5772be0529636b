# Sourced by run.sh and test.sh: makes .venv and installs recjax into it.
# $1: an extra of pyproject.toml to install besides the accelerator's, or "".
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $1" >&2
  exit 1
}

extras=${1:-}
if [ ! -x .venv/bin/python ]; then
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null ||
    fail "no $python found: install Python 3.11 or newer, or set PYTHON to one"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) found at $(command -v "$python"), 3.11 or newer needed: set PYTHON to one"
  "$python" -m venv .venv ||
    fail "$python cannot make a virtual environment (on Debian: apt-get install python3-venv)"
fi

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  extras="gpu${extras:+,$extras}"
elif [ -e /dev/accel0 ] || ls /dev/vfio/[0-9]* >/dev/null 2>&1; then
  extras="tpu${extras:+,$extras}"
else
  # XLA's compilers for accelerators may be there without one (recjax[compile]);
  # JAX would look for it at every start, and say so.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
fi

# The versions that the tests ran with, where there is a list for this Python.
constraints=constraints/python$(.venv/bin/python -c \
  'import sys; print("%d.%d" % sys.version_info[:2])').txt
[ -f "$constraints" ] || constraints=""

# Installed once for given project files and set of extras.
stamp=".venv/installed-${extras:-plain}"
want=$(cat pyproject.toml ${constraints:+"$constraints"} | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "installing recjax${extras:+[$extras]} into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    ${constraints:+--constraint "$constraints"} \
    --editable ".${extras:+[$extras]}" || fail "pip could not install recjax"
  echo "$want" >"$stamp"
fi
