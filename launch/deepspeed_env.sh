#!/usr/bin/env bash
# Writes what the processes on other machines need of this one's environment: launch/deepspeed_env.sh [FILE], else .deepspeed_env.
# deepspeed looks for .deepspeed_env in the working folder and in $HOME, and sets it on every machine that it reaches by ssh, where
# a login knows nothing of .venv. Of this machine's variables it forwards only those that begin with PYTHON, UCX, MV2, MLFLOW
# and, with GPUs, NCCL. Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME first where a machine's name does not lead to the network
# between the machines.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# HF_TOKEN stays here: deepspeed would show it in its log and on command lines.
# One NAME=value a line, without comments or empty lines, which deepspeed cannot read; it puts the values into double quotes.
compgen -e | grep -E '^(PATH|PYTHONPATH|LD_LIBRARY_PATH|CUDA_HOME|TMPDIR|SPIKELM_JOB|(OMP|GLOO|NCCL|TORCH|HF|DS)_.*)$' |
    grep -vE '^(DS_ENV_FILE|HF_TOKEN)$' | while read -r name; do
    value=${!name}
    printf '%s=%s\n' "$name" "${value//[\\\$\"\`]/\\&}"
done >"${1:-$root/.deepspeed_env}"
