import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


@pytest.fixture
def lock(tmp_path):
    """The lock of an operator's build, in a cache of the test's own."""
    folder = tmp_path / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    return folder / "lock"


def clear_stale_locks(lock):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(lock.parents[2])}
    command = [LAUNCH / "clear_stale_locks.sh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


def exported(**changes):
    """PROCESSES and OMP_NUM_THREADS as launch/env.sh leaves them, with `changes` to the environment before it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PROCESSES", "OMP_NUM_THREADS")}
    script = f". {LAUNCH / 'env.sh'} && echo $PROCESSES $OMP_NUM_THREADS"
    output = subprocess.check_output(["bash", "-euc", script], env={**environment, **changes}, text=True)
    return tuple(int(number) for number in output.split())


def test_the_lock_of_a_killed_build_is_removed(lock):
    assert f"removed the stale build lock {lock}" in clear_stale_locks(lock)
    assert not lock.exists()
    assert clear_stale_locks(lock) == ""


def test_the_lock_of_a_living_build_stays(lock):
    with open(lock):
        assert clear_stale_locks(lock) == ""
    assert lock.exists()


def test_a_lock_stays_while_a_compiler_works_in_its_folder(lock):
    compiler = subprocess.Popen(["cat"], cwd=lock.parent, stdin=subprocess.PIPE)
    try:
        assert clear_stale_locks(lock) == ""
    finally:
        compiler.communicate()
    assert lock.exists()


def test_the_cores_are_shared_out_among_the_processes():
    cores = len(os.sched_getaffinity(0))
    assert exported(PROCESSES="1") == (1, cores)
    assert exported(PROCESSES=str(2 * cores)) == (2 * cores, 1)
    assert exported(PROCESSES="1", OMP_NUM_THREADS="7") == (1, 7)


def test_a_recipe_must_be_named():
    done = subprocess.run([LAUNCH / "pretrain.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/pretrain.sh RECIPE")
