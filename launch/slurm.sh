#!/usr/bin/env bash
# Pretrains under SLURM: sbatch launch/slurm.sh launch/recipes/encoder-base.yaml [--field value ...], from the repository.
# One task a machine starts DeepSpeed's launcher there, without ssh; that starts one process for each GPU. Adapt the lines below.
#SBATCH --job-name=spikelm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
# Two minutes before the time limit all processes are told, and when the job is preempted: enough for a step and a save?
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

slots=${SLURM_GPUS_ON_NODE:-${PROCESSES:-2}}
mkdir -p runs
HOSTFILE=$(mktemp "$PWD/runs/.hosts-XXXXXX")
trap 'rm -f "$HOSTFILE"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$slots/" >"$HOSTFILE"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export HOSTFILE MASTER_ADDR MASTER_PORT

# SIGTERM reaches launch/pretrain.sh on every machine, which turns it into a checkpoint and exit code 75. This script outlasts it,
# and srun must not hear it, since it would give the step up.
trap : TERM
code=0
setsid srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_PROCID exec launch/pretrain.sh "$@"' pretrain "$@" || code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" # goes on from the checkpoint, when there is room again
fi
exit "$code"
