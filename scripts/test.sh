#!/usr/bin/env bash
# All the set-up, then the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "test"

# XLA's compilers for TPUs and NVIDIA GPUs, apart from what tests and users run
# with: beside JAX, each process would look for an accelerator and miss it aloud.
compilers=.venv/compilers
if [ "$(uname -sm)" = "Linux x86_64" ] && [ -n "$constraints" ] &&
  [ "$(cat "$compilers/installed" 2>/dev/null)" != "$want" ]; then
  echo "installing XLA's compilers into $compilers"
  rm -rf "$compilers"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --no-deps --target "$compilers" \
    libtpu jax-cuda12-plugin jax-cuda12-pjrt ||
    fail "pip could not install XLA's compilers"
  echo "$want" >"$compilers/installed"
fi

# Apache Beam, apart as well: it refuses the PyArrow and protobuf that we pin.
beam=.venv/beam
pins=$(cksum <constraints/beam.txt)
if [ -n "$constraints" ] &&
  [ "$(cat "$beam/installed" 2>/dev/null)" != "$pins" ]; then
  echo "installing Apache Beam into $beam"
  rm -rf "$beam"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --target "$beam" --requirement constraints/beam.txt ||
    fail "pip could not install Apache Beam"
  echo "$pins" >"$beam/installed"
fi

export XLA_PYTHON_CLIENT_PREALLOCATE=false # workers share a GPU
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
