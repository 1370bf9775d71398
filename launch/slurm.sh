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
#SBATCH --output=slurm-%j.log
# Five minutes before the time limit this script is told: enough for a step, an evaluation and a save?
#SBATCH --signal=B:TERM@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

slots=${SLURM_GPUS_ON_NODE:-${PROCESSES:-2}}
mkdir -p runs
HOSTFILE=$(mktemp "$PWD/runs/.hosts-XXXXXX")
trap 'rm -rf "$HOSTFILE" "$SPIKELM_JOB"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$slots/" >"$HOSTFILE"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
SPIKELM_JOB=$PWD/runs/.job@slurm@$SLURM_JOB_ID
export HOSTFILE MASTER_ADDR MASTER_PORT SPIKELM_JOB
rm -rf "$SPIKELM_JOB" # of the same job before it was requeued
mkdir "$SPIKELM_JOB"

# The file stops the processes of all machines after their step. Signals do so, too, but DeepSpeed's launcher makes 30 seconds of it.
trap 'touch "$SPIKELM_JOB/stop"' TERM
setsid srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'NODE_RANK=$SLURM_PROCID exec launch/pretrain.sh "$@"' pretrain "$@" &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do
    wait "$step" && code=0 || code=$?
done

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" # goes on from the checkpoint, when there is room again
fi
exit "$code"
