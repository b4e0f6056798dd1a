# Sourced by run.sh and tests/run.sh: makes .venv from requirements.txt once, then only looks at it.
#
#   PYTHON=python3.12   which interpreter to build it with (3.11 or newer)
#   NO_VENV=1           use the python on PATH as it is (a container that has torch already)

die() { echo "$(basename "$0"): $*" >&2; exit 2; }

setup_environment() {
    local python="${PYTHON:-python3}" stamp
    command -v "$python" >/dev/null || die "no $python on PATH; install Python 3.11 or 3.12"
    if [ "${NO_VENV:-}" = 1 ]; then
        "$python" -c 'import torch' 2>/dev/null || die "NO_VENV=1, but $python has no torch"
    else
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            || die "expected Python 3.11 or newer, got $("$python" -V); set PYTHON=..."
        stamp="$("$python" -c 'import sys; print(sys.version_info[:2])') $(cksum <requirements.txt)"
        if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
            echo "setting up .venv from requirements.txt (once; minutes on a slow network)"
            "$python" -m venv .venv \
                || die "could not create .venv (on Debian: apt-get install python3-venv)"
            .venv/bin/python -m pip install --quiet --disable-pip-version-check \
                -r requirements.txt || die "pip could not install requirements.txt (see above)"
            echo "$stamp" >.venv/stamp
        fi
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    # Threads that wait sleep, but look 20,000 times first, long enough to reach the next operation.
    # Measured on two cores, #27 at pocket scale: 81 ms a step where sleeping at once takes 133; with
    # two other jobs on the cores 198, where spinning without end takes 548.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
}

# GPUs that this process may use; 0 where there are none.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    fi
}
