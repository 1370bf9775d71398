import os
import subprocess
import time

import pytest

from pipeline import build_locks
from pipeline.build_locks import HOUR, clear_stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of an operator's build, in a cache of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "torch_extensions"))
    folder = tmp_path / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    return folder / "lock"


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_lock_of_a_killed_build_is_removed(lock, capsys):
    clear_stale_locks()
    assert not lock.exists()
    assert capsys.readouterr() == ("", f"removed the stale build lock {lock}\n")
    clear_stale_locks()
    assert capsys.readouterr() == ("", "")


def test_the_lock_of_a_living_build_stays(lock, capsys):
    with open(lock):
        clear_stale_locks()
    assert lock.exists()
    assert capsys.readouterr().err == ""
    clear_stale_locks()
    assert not lock.exists()


def test_a_lock_stays_while_a_compiler_works_in_its_folder(lock):
    compiler = subprocess.Popen(["cat"], cwd=lock.parent, stdin=subprocess.PIPE)
    try:
        clear_stale_locks()
    finally:
        compiler.communicate()
    assert lock.exists()


def test_a_living_build_is_found_through_a_link_to_the_cache(lock, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(lock.parents[2])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "link"))
    with open(lock):
        clear_stale_locks()
    assert lock.exists()


def test_on_a_network_file_system_a_young_lock_may_be_another_machines(lock, monkeypatch):
    monkeypatch.setattr(build_locks, "is_on_network", lambda folder: True)
    age(lock, HOUR / 2)
    clear_stale_locks()
    assert lock.exists()
    age(lock, 2 * HOUR)
    clear_stale_locks()
    assert not lock.exists()


def test_other_files_stay(lock):
    (lock.parent / "build.ninja").touch()
    (lock.parents[1] / "sub" / "lock").mkdir(parents=True)
    clear_stale_locks()
    assert (lock.parent / "build.ninja").exists()
    assert (lock.parents[1] / "sub" / "lock").is_dir()


def test_without_a_cache_there_is_nothing_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    clear_stale_locks()
    assert capsys.readouterr() == ("", "")
