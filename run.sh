#!/usr/bin/env bash
# From a fresh clone to a trained GPT: environment, data, launch. ./run.sh --help explains.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./tools/env.sh

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
  RESTARTS=3   after a rank died, start all ranks again, up to that many times;
               goes with --checkpoint_every N --resume auto
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
restarts="${RESTARTS:-0}"
[[ "$restarts" =~ ^[0-9]+$ ]] || die "RESTARTS: expected a whole number from 0, got $restarts"
if [ "$gpus" = 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores="$(nproc)"
    export OMP_NUM_THREADS="$((cores / nproc_here > 0 ? cores / nproc_here : 1))"
fi

if [ "$nnodes" = 1 ] && [ "$nproc_here" = 1 ]; then
    exec python train_gpt.py "$@"
fi

# With a store of its own a restarted group cannot meet the addresses of ranks that are dead.
[ "$restarts" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [ "$nnodes" != 1 ]; then
    [ -n "${NODE_RANK:-}" ] || die "NNODES=$nnodes needs NODE_RANK (0 to $((nnodes - 1)))"
    [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$nnodes needs MASTER_ADDR (the host of NODE_RANK 0)"
    [[ "$NODE_RANK" =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$nnodes" ] \
        || die "NODE_RANK: expected 0 to $((nnodes - 1)), got $NODE_RANK"
fi

# Wrong options, missing data and too many ranks are said once, before any rank starts.
WORLD_SIZE="$((nproc_here * nnodes))" python train_gpt.py --prepare "$@"
if [ "$nnodes" = 1 ]; then
    exec python tools/launch.py --standalone --max_restarts "$restarts" --nproc_per_node "$nproc_here" \
        train_gpt.py "$@"
fi
exec python tools/launch.py --nnodes "$nnodes" --node_rank "$NODE_RANK" --nproc_per_node "$nproc_here" \
    --max_restarts "$restarts" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" train_gpt.py "$@"
