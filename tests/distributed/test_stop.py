"""SIGTERM to launch/pretrain.sh, however it launches: a checkpoint, exit code 75, nothing left, and the same end."""

import signal
import time
from contextlib import ExitStack

import pytest

from pipeline.ending import STOPPED
from pipeline.metrics import read_metrics
from tests.distributed.modes import MODES, by_script, run_all
from tests.distributed.runs import assert_same_end, run_arguments
from tests.launcher import launch, started

STEPS = 60
"""So many that a run is under way when it is told to stop."""
GONE_SECONDS = 30


def arguments(shards, folder, name):
    """A run that saves at its end and where it is stopped, and nowhere else."""
    more = ("--training.total_steps", str(STEPS), "--checkpoint.every", "1000", "--evaluation.every", "0")
    return [*run_arguments(shards, folder, name, 2, "fp32"), *more]


@pytest.fixture(scope="module")
def undisturbed(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    launch("pipeline/pretrain.py", *arguments(tiny_shards, folder, "whole"))
    return folder


@pytest.mark.parametrize("mode", ["local", *MODES])
def test_a_stopped_run_saves_leaves_and_goes_on(mode, undisturbed, hosts, tiny_shards):
    run, command = undisturbed / mode, arguments(tiny_shards, undisturbed, mode)
    with ExitStack() as stack:
        jobs = [stack.enter_context(started(one.command, **one.environment)) for one in by_script(mode, command, hosts)]
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

    assert f"step{step:08d}" in run_all(by_script(mode, command, hosts))
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"] == [
        *range(1, STEPS + 1)
    ]
    assert_same_end(undisturbed / "whole", run, STEPS)


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
