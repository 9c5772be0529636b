#!/usr/bin/env bash
# All the set-up, then the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "test"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # workers share a GPU
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
