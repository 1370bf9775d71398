# Sourced by everything that launches: the environment that the processes of one machine inherit.
# PROCESSES is kept where it is set already.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# deepspeed itself, and the ninja that it compiles its operators with.
export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# One process for each GPU; without any two, which show every collective at work.
if [ -z "${PROCESSES:-}" ]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    PROCESSES=$((gpus > 0 ? gpus : 2))
fi
export PROCESSES
