#!/usr/bin/env bash
# Pretrains: launch/pretrain.sh [RECIPE] [--field value ...]; with no recipe the demonstration. Paths are seen from the repository.
#   on this machine                     PROCESSES=4 launch/pretrain.sh RECIPE
#   on the machines of a hostfile       HOSTFILE=launch/hosts launch/pretrain.sh RECIPE       (by pdsh and ssh)
#   the same without ssh, on each one   HOSTFILE=launch/hosts NODE_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29500 launch/pretrain.sh RECIPE
#   by mpirun, on this machine          LAUNCHER=mpirun PROCESSES=4 launch/pretrain.sh RECIPE
# SIGTERM or Ctrl-C: a checkpoint after the step under way, then exit code 75; a second one kills. The other exit codes are those
# of pipeline/ending.py, whatever the launcher makes of them.
set -euo pipefail

main() { # read whole before anything begins: the file may change under a run of days
    . "$(dirname "${BASH_SOURCE[0]}")/env.sh"
    cd "$root"
    command=pipeline/${SPIKELM_COMMAND:-pretrain}.py # launch/finetune.sh names another
    case ${1:-} in -h | --help) exec python "$command" --help ;; esac
    if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
        [ -f "$1" ] || { echo "error: no recipe $1 in $root: launch/recipes${SPIKELM_COMMAND:+/$SPIKELM_COMMAND} has some" >&2; exit 2; }
        set -- --recipe "$@"
    fi

    # What this script and its processes tell each other: `stop` and `exit_code`. Under runs/, which all machines see.
    if [ -z "${SPIKELM_JOB:-}" ]; then
        for left in "$root/runs/.job@$HOSTNAME@"*; do # by scripts that were killed
            kill -0 "${left##*@}" 2>/dev/null || rm -rf "$left" || true
        done
        export SPIKELM_JOB=$root/runs/.job@$HOSTNAME@$$
        trap 'rm -rf "$SPIKELM_JOB"' EXIT
    fi
    mkdir -p "$SPIKELM_JOB"

    # Where the processes meet: a port of their own, so that runs can share a machine; alike on all machines.
    [ -n "${NODE_RANK:-}" ] && port=29500 || port=$((20000 + RANDOM % 20000))
    launcher=(deepspeed --log_level warning --master_port "${MASTER_PORT:-$port}")
    if [ "${LAUNCHER:-deepspeed}" = mpirun ]; then
        [ "$(id -u)" -ne 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        launcher=(mpirun -n "$PROCESSES" --oversubscribe --bind-to none python)
    elif [ -z "${HOSTFILE:-}" ]; then
        # deepspeed passes over CUDA_VISIBLE_DEVICES, unless it is said in its own words.
        if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then launcher+=(--include "localhost:$CUDA_VISIBLE_DEVICES"); else
            launcher+=(--num_gpus "$PROCESSES")
        fi
    elif [ -n "${NODE_RANK:-}" ]; then
        launcher+=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK")
        launcher+=(--master_addr "${MASTER_ADDR:?is not set: name the machine of NODE_RANK 0}")
    else
        launcher+=(--hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
        export DS_ENV_FILE=$SPIKELM_JOB/environment
        launch/deepspeed_env.sh "$DS_ENV_FILE"
    fi

    # In a session of its own: signals reach this script alone, which passes them on as a request.
    setsid "${launcher[@]}" "$command" "$@" &
    session=$!
    asked=
    stop() {
        if [ -z "$asked" ]; then
            asked=$SECONDS
            echo "stopping after the step under way; the same again kills" >&2
        elif [ $((SECONDS - asked)) -gt 2 ]; then # a supervisor may signal twice in a row
            pkill -KILL -s "$session" || true
        fi
        touch "$SPIKELM_JOB/stop"
    }
    trap stop INT TERM
    code=0
    while kill -0 "$session" 2>/dev/null; do
        wait "$session" && code=0 || code=$?
    done
    # A launcher that was killed leaves processes behind: tell them, wait for their end here, and for word of the others.
    touch "$SPIKELM_JOB/stop"
    is_over() {
        if pkill -0 -s "$session"; then return 1; fi
        [ -s "$SPIKELM_JOB/exit_code" ] || [ -z "${HOSTFILE:-}" ] || { [ "$code" -gt 0 ] && [ "$code" -lt 128 ]; }
    }
    for _ in $(seq 60); do
        is_over && break
        sleep 1
    done
    pkill -KILL -s "$session" || true

    if [ -s "$SPIKELM_JOB/exit_code" ]; then
        exit "$(<"$SPIKELM_JOB/exit_code")"
    fi
    echo "error: the launcher ended (exit code $code) before a process of the run could say why: see above" >&2
    exit $((code == 0 ? 1 : code))
}

main "$@"; exit
