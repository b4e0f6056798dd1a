#!/usr/bin/env bash
# From a fresh clone to a trained GPT: environment, data, launch. ./run.sh --help explains.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh

for argument in "$@"; do
    case "$argument" in
        -h | --help)
            cat <<'TEXT'
./run.sh [OPTIONS]   train a GPT on what this machine has

It makes .venv from requirements.txt (once), gets the data that the recipe
needs, and starts train_gpt.py: on every GPU there is, or, without one, at
pocket scale on the CPU. OPTIONS are passed on to train_gpt.py.

  NPROC=4      processes on this machine (default: the number of GPUs, or 1)
  NNODES=2 NODE_RANK=0 MASTER_ADDR=host [MASTER_PORT=29500]
               several machines: the same call on each, NODE_RANK counting up
  PYTHON=python3.12   the interpreter that .venv is made with
  NO_VENV=1    use the python on PATH as it is
TEXT
            if [ -x .venv/bin/python ] || [ "${NO_VENV:-}" = 1 ]; then
                setup_environment
                echo
                exec python train_gpt.py --help
            fi
            echo
            echo "The options of train_gpt.py are listed here once .venv exists."
            exit 0 ;;
    esac
done

setup_environment
gpus="$(count_gpus)"
nproc_here="${NPROC:-$((gpus > 0 ? gpus : 1))}"
nnodes="${NNODES:-1}"
[[ "$nproc_here" =~ ^[1-9][0-9]*$ ]] || die "NPROC: expected a whole number from 1, got $nproc_here"
[[ "$nnodes" =~ ^[1-9][0-9]*$ ]] || die "NNODES: expected a whole number from 1, got $nnodes"
if [ "$gpus" = 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores="$(nproc)"
    export OMP_NUM_THREADS="$((cores / nproc_here > 0 ? cores / nproc_here : 1))"
fi

if [ "$nnodes" = 1 ] && [ "$nproc_here" = 1 ]; then
    exec python train_gpt.py "$@"
fi

# Wrong options and missing data are said once, before any rank starts.
python train_gpt.py --prepare "$@"
if [ "$nnodes" = 1 ]; then
    exec torchrun --standalone --nproc_per_node "$nproc_here" train_gpt.py "$@"
fi
[ -n "${NODE_RANK:-}" ] || die "NNODES=$nnodes needs NODE_RANK (0 to $((nnodes - 1)))"
[ -n "${MASTER_ADDR:-}" ] || die "NNODES=$nnodes needs MASTER_ADDR (the host of NODE_RANK 0)"
exec torchrun --nnodes "$nnodes" --node_rank "$NODE_RANK" --nproc_per_node "$nproc_here" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" train_gpt.py "$@"
