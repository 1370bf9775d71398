import multiprocessing
import os
import time

import pytest

from data_prep import work_folder
from data_prep.ranks import Ranks
from data_prep.work_folder import LOCK_NAME, WORK_FOLDER, only_job


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(work_folder, "LOCK_SECONDS", 0.0)


def test_a_second_job_is_refused_while_the_first_lives(tmp_path):
    with only_job(tmp_path / "a", Ranks()):
        message = rf"a is being built by process {os.getpid()} on .*: wait for its end, or choose another --output"
        with pytest.raises(ValueError, match=message), only_job(tmp_path / "a", Ranks()):
            pytest.fail("two jobs")
        assert (tmp_path / "a" / WORK_FOLDER / LOCK_NAME).exists()
        with only_job(tmp_path / "b", Ranks()):
            pass
    assert list((tmp_path / "a").iterdir()) == []
    with only_job(tmp_path / "a", Ranks()):
        pass


def test_a_job_that_fails_leaves_its_work_and_no_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt), only_job(tmp_path, Ranks()):
        (tmp_path / WORK_FOLDER / "plan.json").touch()
        raise KeyboardInterrupt
    assert (tmp_path / WORK_FOLDER / "plan.json").exists()
    with only_job(tmp_path, Ranks()):
        pass
    assert not (tmp_path / WORK_FOLDER).exists()


def hold(folder, others):
    """A rank that stays: the first, or another one of the same job."""
    if others:
        lock = work_folder._join_lock(folder / WORK_FOLDER / LOCK_NAME, None)
        assert lock
    else:
        work_folder._take_lock(folder / WORK_FOLDER / LOCK_NAME)
    (folder / "holds").touch()
    time.sleep(600)


@pytest.mark.parametrize("others", [False, True])
def test_a_killed_job_leaves_no_lock_once_all_its_ranks_are_dead(tmp_path, others):
    path = tmp_path / WORK_FOLDER / LOCK_NAME
    os.close(work_folder._take_lock(path))
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, others))
    process.start()
    while not (tmp_path / "holds").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="is being built by process"):
        work_folder._take_lock(path)
    process.kill()
    process.join()
    os.close(work_folder._take_lock(path))


def test_a_lock_that_its_owner_has_just_removed_is_none(tmp_path, monkeypatch):
    path = tmp_path / WORK_FOLDER / LOCK_NAME
    real, gone = os.open, []

    def open_and_lose(*arguments):
        lock = real(*arguments)
        if not gone:
            gone.append(path.unlink())
        return lock

    monkeypatch.setattr(os, "open", open_and_lose)
    os.close(work_folder._take_lock(path))
    assert path.exists()


def test_where_files_cannot_be_locked_it_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(work_folder.fcntl, "flock", no_locks)
    with only_job(tmp_path, Ranks()):
        pass
    assert "files cannot be locked here (No locks available): start no second job" in capsys.readouterr().out


def test_files_that_are_missing_are_found_by_a_list(tmp_path):
    (tmp_path / WORK_FOLDER).mkdir()
    paths = [work_folder.record_path(tmp_path, unit) for unit in range(3)]
    paths[1].touch()
    assert work_folder.missing(tmp_path, paths) == [0, 2]
