#!/usr/bin/env bash
# Pretrains on this machine: launch/pretrain.sh RECIPE [--field value ...]
# Paths are seen from the repository. PROCESSES=n sets the number of processes.
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: launch/pretrain.sh RECIPE [--field value ...], for example launch/recipes/demo.yaml" >&2
    exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
[ -f "$1" ] || { echo "error: no recipe $1 in $root: launch/recipes has some" >&2; exit 2; }
launch/clear_stale_locks.sh
exec deepspeed --log_level warning --num_gpus "$PROCESSES" --master_port "$MASTER_PORT" pipeline/pretrain.py --recipe "$@"
