#!/usr/bin/env bash
# All the set-up, then the main job: scripts/run.sh --config configs/x.py ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec .venv/bin/python main.py "$@"
