#!/usr/bin/env bash
# One node, or several by hand: run the same line on each, with its own NODE_RANK.
#   scripts/torchrun.sh --config configs/qwen_image_21/grpo_t2i.yaml
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 scripts/torchrun.sh --config ... --trainer.num_nodes=2   (and NODE_RANK=1 there)
# Checks the run before it takes the GPUs. SETTINGS FOR THE DOCTOR go into DOCTOR, such as "--device H100-80GB".
set -euo pipefail

GPUS=${GPUS:-8}
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
HEAD=${HEAD:-127.0.0.1}
PORT=${PORT:-29500}
PATIENCE=${PATIENCE:-900}  # seconds between SIGTERM and SIGKILL: longer than a step and a save
RESTARTS=${RESTARTS:-0}  # each goes on from the newest checkpoint of this job

if [[ "$NODE_RANK" == 0 ]]; then
    # shellcheck disable=SC2086
    python train.py doctor "$@" --trainer.devices="$GPUS" ${DOCTOR:-}
fi

# A rank that died must not leave the others waiting for the default half hour in silence.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Restarted ranks meet at a store of their own: in the shared one lie the addresses of those that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

exec torchrun \
    --nnodes="$NODES" --node_rank="$NODE_RANK" --nproc_per_node="$GPUS" \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD:$PORT" --rdzv_id="${RUN_ID:-flow_rl}" \
    --max_restarts="$RESTARTS" --shutdown_timeout="$PATIENCE" \
    train.py fit "$@" --trainer.devices="$GPUS"
