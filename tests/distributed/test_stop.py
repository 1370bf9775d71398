"""SIGTERM to launch/pretrain.sh, however it launches: a checkpoint, exit code 75, nothing left, and the same end."""

import json
import signal
import time
from contextlib import ExitStack

import pytest

from pipeline.ending import STOPPED
from pipeline.metrics import read_metrics
from tests.distributed.modes import MODES, by_script
from tests.distributed.runs import assert_same_end, run_arguments
from tests.launcher import launch, started

STEPS = 60
"""So many that a run is under way when it is told to stop."""
GONE_SECONDS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped")


def arguments(shards, folder, name):
    """A run that saves at its end and where it is stopped, and nowhere else."""
    more = ("--training.total_steps", str(STEPS), "--checkpoint.every", "1000", "--evaluation.every", "0")
    return [*run_arguments(shards, folder, name, 2, "fp32"), *more]


@pytest.mark.parametrize("mode", ["local", *MODES])
def test_a_run_that_is_told_to_stop_saves_and_leaves(mode, folder, hosts, tiny_shards):
    run = folder / mode
    with ExitStack() as stack:
        launches = by_script(mode, arguments(tiny_shards, folder, mode), hosts)
        jobs = [stack.enter_context(started(one.command, **one.environment)) for one in launches]
        _wait_for_a_step(run / "metrics.jsonl", jobs)
        told = time.monotonic()
        jobs[0].send_signal(signal.SIGTERM)
        outputs = [job.communicate(timeout=GONE_SECONDS)[0] for job in jobs]
        _wait_until_nothing_is_left(hosts, told)
    assert [job.returncode for job in jobs] == [STOPPED] * len(jobs), outputs
    step = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert step < STEPS and not (run / "DONE").exists()
    assert [path.name for path in (run / "checkpoints").glob("step*")] == [f"step{step:08d}"]
    assert f"stopped by launch/pretrain.sh at step {step} of {STEPS}" in "".join(outputs)


def test_stopped_runs_go_on_as_if_they_had_not_been(folder, tiny_shards):
    """All in one process group: what a launcher might change, the tests of launch modes look at."""
    names = ["local", *MODES]
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([arguments(tiny_shards, folder, name) for name in ("whole", *names)]))
    assert launch("tests/distributed/pretrain_worker.py", jobs).count("resuming from") == len(names)
    for name in names:
        lines = read_metrics(folder / name / "metrics.jsonl")
        assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
        assert_same_end(folder / "whole", folder / name, STEPS)


def _wait_for_a_step(metrics, jobs, seconds=180):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(job.poll() is None for job in jobs):
        if metrics.exists() and any(line["kind"] == "train" for line in read_metrics(metrics)):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step within {seconds} s; exit codes {[job.poll() for job in jobs]}")


def _wait_until_nothing_is_left(hosts, told):
    while left := hosts.processes():
        assert time.monotonic() < told + GONE_SECONDS, left
        time.sleep(0.1)
