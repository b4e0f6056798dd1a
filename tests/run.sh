#!/usr/bin/env bash
# Every test. Arguments go to pytest: tests/run.sh -k muon, tests/run.sh -m "not ranks".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./tools/env.sh
setup_environment
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two workers on two cores, and gloo ranks in each
exec python -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
