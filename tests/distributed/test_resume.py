"""An uninterrupted run and one that was stopped and resumed by new processes end with the same bits."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.metrics import read_metrics
from tests.distributed.runs import DECODER, PHASE, RESUMED, STEPS, assert_same_end, run_arguments
from tests.launcher import deepspeed_command, launch, started


@pytest.mark.parametrize("name", RESUMED)
def test_losses_are_bit_equal_and_each_step_stands_once(name, runs):
    whole, resumed = (read_metrics(runs / f"{kind}-{name}" / "metrics.jsonl") for kind in ("whole", "resumed"))
    heldout_loss = f"{RESUMED[name][0]}_loss"
    assert [line["step"] for line in resumed if line["kind"] == "train"] == list(range(1, STEPS + 1))
    for kind, fields in (("train", ("loss", "gradient_norm", "learning_rate")), ("heldout", (heldout_loss,))):
        ours, theirs = (
            {line["step"]: [line[field] for field in fields] for line in lines if line["kind"] == kind}
            for lines in (whole, resumed)
        )
        # The stopped run was evaluated where it stopped, too.
        assert ours == {step: theirs[step] for step in ours}


@pytest.mark.parametrize("name", RESUMED)
def test_weights_moments_and_amplitudes_are_bit_equal(name, runs):
    assert_same_end(runs / f"whole-{name}", runs / f"resumed-{name}")


def test_a_finished_run_says_so_and_changes_nothing(runs, tiny_shards, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (runs / "whole-2-fp32").rglob("*")}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([run_arguments(tiny_shards, runs, "whole-2-fp32", 2, "fp32")]))
    assert "is finished" in launch("tests/distributed/pretrain_worker.py", jobs, processes=1)
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "whole-2-fp32").rglob("*")}


def test_a_run_killed_in_the_middle_ends_as_if_it_had_not_been(runs, causal_shards):
    """In the second of two phases: what it loses and where it goes on lie there."""
    killed, whole = runs / "killed", runs / "whole-phases"
    more = (*DECODER, "--data.phases", PHASE, "--checkpoint.every", "1")
    arguments = run_arguments(causal_shards, runs, killed.name, 2, "fp32", *more)
    command = deepspeed_command("pipeline/pretrain.py", *arguments)
    with started(command) as process:
        _wait_for_step(killed / "metrics.jsonl", 4, process)
        os.kill(_rank_process(process, rank=1), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    assert not (killed / "DONE").exists()
    output = launch("pipeline/pretrain.py", *arguments)
    assert "resuming from" in output and "is finished" in output
    assert_same_end(whole, killed)
    assert _measured(killed) == _measured(whole)


def _measured(run):
    """The lines of metrics, without what is the clock's or the machine's; of faults a new process tells once more."""
    others = {"tokens_per_second": 0, "data_wait": 0, "peak_memory_bytes": 0}
    return [{**line, **others} for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "health"]


def _wait_for_step(metrics, step, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {seconds} s; exit code {process.poll()}")


def _rank_process(launcher, rank):
    """The pid of a rank among the launcher's process group."""
    for entry in Path("/proc").iterdir():
        # Any process may end while it is looked at.
        with suppress(ProcessLookupError, FileNotFoundError):
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == launcher.pid:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if f"--local_rank={rank}".encode() in words:
                    return int(entry.name)
    raise AssertionError(f"rank {rank} is not running")
