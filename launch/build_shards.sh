#!/usr/bin/env bash
# Builds shards by several processes: launch/build_shards.sh RECIPE [--field value ...]. Paths are seen from the repository.
#   on this machine, one process a core        launch/build_shards.sh launch/recipes/data/demo.yaml
#   fewer or more                              PROCESSES=4 launch/build_shards.sh RECIPE
#   on several machines that share the folders MPI_HOSTFILE=hosts launch/build_shards.sh RECIPE
# Interrupted or killed, the same line goes on, with any number of processes. Under SLURM, inside a job's script:
#   srun --mpi=pmix --cpu-bind=none python -m data_prep.build_shards --recipe RECIPE
# MPI_HOSTFILE is mpirun's own file: a line `NAME slots=CORES` for each machine.
set -euo pipefail
asked=${PROCESSES:-}
PROCESSES=${PROCESSES:-$(nproc)}
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
case ${1:-} in '' | -h | --help) exec python -m data_prep.build_shards --help ;; esac
if [ "${1#--}" = "$1" ]; then
    [ -f "$1" ] || { echo "error: no recipe $1 in $root: launch/recipes/data has some" >&2; exit 2; }
    set -- --recipe "$@"
fi
[ "$(id -u)" -ne 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
where=(-n "$PROCESSES" --oversubscribe)
if [ -n "${MPI_HOSTFILE:-}" ]; then
    where=(${asked:+-n "$asked"} --hostfile "$MPI_HOSTFILE" -x PATH -x PYTHONPATH -x OMP_NUM_THREADS)
fi
# Unbound: mpirun would hold a small number of processes each on one core, whatever else works there.
export OMP_NUM_THREADS=1
exec mpirun "${where[@]}" --bind-to none python -m data_prep.build_shards "$@"
