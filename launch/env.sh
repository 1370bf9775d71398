# Sourced by everything that launches: the environment that the processes of one machine inherit.
# PROCESSES and MASTER_PORT are kept where they are set already.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# deepspeed itself, and the ninja that it compiles its operators with.
export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# Two processes show every collective at work; a machine with a single GPU can hold only one.
if [ -z "${PROCESSES:-}" ]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    PROCESSES=$((gpus == 1 ? 1 : 2))
fi
export PROCESSES

# Where the processes of a run meet: a port of its own, so that runs can share the machine.
export MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 20000))}
