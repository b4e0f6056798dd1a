#!/usr/bin/env bash
# muon.py inside accelerate, Lightning and transformers. They go into .venv/frameworks, which sees
# the packages of .venv and changes none. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./tools/env.sh
setup_environment
folder=.venv/frameworks
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
python -m venv --without-pip "$folder"
python -c "$packages" >"$("$folder/bin/python" -c "$packages")/project.pth"
python -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check \
    --no-compile -c requirements.txt -r tests/requirements-frameworks.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$folder/bin/python" -m pytest tests/test_muon_frameworks.py \
    -k "accelerate or lightning or transformers" "$@"
