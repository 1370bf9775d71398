import errno
import fcntl
import multiprocessing
import os
from contextlib import closing
from dataclasses import replace

import pytest

from pipeline.checkpoint import CheckpointError
from pipeline.run_folder import RunFolder
from tests.distributed import reference
from tests.ranks import wait_for


@pytest.fixture
def config(tmp_path):
    return replace(reference.config(), name="run", output=str(tmp_path / "runs"))


@pytest.fixture
def folder(config):
    with closing(RunFolder(config)) as folder:
        yield folder


@pytest.fixture
def other_job(config, tmp_path):
    """Another process that works in the run's folder until it is killed."""
    process = multiprocessing.get_context("fork").Process(target=work_in, args=(config, tmp_path / "ready"))
    process.start()
    wait_for((tmp_path / "ready").exists)
    yield process
    process.kill()
    process.join()


def work_in(config, ready):
    RunFolder(config).open()
    ready.touch()
    while True:
        os.read(os.pipe()[0], 1)


def contents(folder):
    return sorted(path.name for path in folder.path.iterdir())


def finish(folder, step=10):
    folder.open()
    folder.save_recipe()
    folder.finish(step)
    folder.close()


def test_a_job_that_could_not_start_leaves_no_trace(folder, tmp_path):
    assert not folder.open()
    assert folder.path.is_dir()
    folder.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_stays(folder):
    folder.path.mkdir(parents=True)
    folder.open()
    folder.close()
    assert contents(folder) == []


def test_what_is_in_the_folder_stays_as_it_is(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "metrics.jsonl").write_text("{}\n")
    assert not folder.open()
    folder.close()
    assert contents(folder) == ["metrics.jsonl"]
    assert (folder.path / "metrics.jsonl").read_text() == "{}\n"


def test_two_jobs_never_work_in_one_folder(folder, other_job):
    with pytest.raises(ValueError, match=rf"run is in use by process {other_job.pid} on .*--name"):
        folder.open()
    folder.close()
    with pytest.raises(ValueError, match="in use"):  # the refused job has not opened it to others
        folder.open()


def test_a_folder_is_free_again_when_its_job_is_killed(folder, other_job):
    other_job.kill()
    other_job.join()
    assert not folder.open()


def test_a_folder_is_free_again_when_its_job_has_ended(folder, config):
    finish(folder)
    second = RunFolder(config)
    assert second.open()
    second.close()
    assert folder.open()


def test_the_second_job_is_refused_by_an_owner_that_has_not_yet_written_its_name(folder):
    folder.path.mkdir(parents=True)
    with open(folder.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process"):
            folder.open()


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_lock_that_its_owner_has_just_removed_locks_nothing(folder, monkeypatch, made_anew):
    flock, removed = fcntl.flock, []

    def after_its_removal(lock, operation):
        if not removed:
            removed.append(folder.path / ".lock")
            removed[0].unlink()
            if made_anew:
                removed[0].touch()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", after_its_removal)
    folder.open()
    with open(folder.path / ".lock") as lock, pytest.raises(BlockingIOError):
        flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_without_locks_the_user_is_told_and_the_job_goes_on(folder, monkeypatch, capsys):
    def cannot(lock, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", cannot)
    assert not folder.open()
    assert capsys.readouterr().out == (
        f"{folder.path / '.lock'} cannot be locked here (No locks available): start no second job here\n"
    )


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path, config, output):
    (tmp_path / "file").touch()
    folder = RunFolder(replace(config, output=str(tmp_path / output)))
    with pytest.raises(ValueError, match=r"run cannot be written to \(Not a directory\): change `output`"):
        folder.open()
    folder.close()


def test_a_finished_run_is_finished_for_the_same_recipe(folder, config, capsys):
    finish(folder)
    assert (folder.path / "DONE").read_text() == "10\n"
    assert contents(folder) == ["DONE", "recipe.yaml"]
    capsys.readouterr()
    # What does not decide training may differ.
    again = RunFolder(replace(config, logging=replace(config.logging, every=3)))
    with closing(again):
        assert again.open()
    told = capsys.readouterr().out
    assert told.startswith(f"{folder.path} is finished. See it: python -m pipeline.report {folder.path}. ")
    assert "--training.total_steps N" in told


def test_a_finished_run_is_not_another_recipes(folder, config):
    finish(folder)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    other = RunFolder(replace(config, seed=config.seed + 1))
    with closing(other), pytest.raises(CheckpointError, match=r"run cannot be resumed by this recipe(.|\n)*seed: "):
        other.open()
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_run_is_finished_wholly_or_not_at_all(folder, monkeypatch):
    def cannot(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.open()
    folder.save_recipe()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", cannot)
        folder.finish(10)
    folder.close()
    assert contents(folder) == ["recipe.yaml"]
    assert not folder.open()


def test_resume_never_needs_an_empty_folder(config):
    folder = RunFolder(replace(config, resume="never"))
    assert not folder.open()
    folder.save_recipe()
    folder.close()
    with closing(folder), pytest.raises(CheckpointError, match=r"resume is never, but .*run is not empty"):
        folder.open()
    assert contents(folder) == ["recipe.yaml"]
