"""The commands that people type: however two processes are launched, a run ends with the same bits."""

import time

import pytest

from pipeline.metrics import read_metrics
from tests.distributed.modes import MODES, run_all
from tests.distributed.runs import STEPS, assert_same_end, run_arguments


@pytest.mark.parametrize("mode", ["hostfile", "no_ssh", "mpirun"])
def test_a_run_ends_as_under_any_other_launcher(mode, hosts, runs, tiny_shards):
    arguments, logins = run_arguments(tiny_shards, runs, f"by-{mode}", 2, "fp32"), hosts.logins()
    output = run_all(MODES[mode](arguments, hosts))
    assert "starting afresh, 2 process(es)" in output
    assert (hosts.logins() > logins) == (mode == "hostfile")
    _assert_it_ended_like_the_whole_run(runs, f"by-{mode}", hosts)


def test_two_hosts_by_pdsh_train_save_and_resume(hosts, runs, tiny_shards):
    arguments, logins = run_arguments(tiny_shards, runs, "by-pdsh", 2, "fp32"), hosts.logins()
    output = run_all(MODES["pdsh"]([*arguments, "--training.stop_after_step", "3"], hosts))
    assert "localhost: by-pdsh: starting afresh, 2 process(es)" in output and "stopped at step 3" in output
    assert hosts.logins() >= logins + 3  # is the first there, and then both
    assert not (runs / "by-pdsh" / "DONE").exists()
    output = run_all(MODES["pdsh"](arguments, hosts))
    assert "resuming from" in output and "step00000003" in output
    _assert_it_ended_like_the_whole_run(runs, "by-pdsh", hosts)


def _assert_it_ended_like_the_whole_run(runs, name, hosts):
    whole, run = runs / "whole-2-fp32", runs / name
    assert (run / "DONE").read_text() == f"{STEPS}\n"
    assert _losses(run) == _losses(whole)
    assert_same_end(whole, run)
    deadline = time.monotonic() + 30
    while (left := hosts.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _losses(run):
    """[step, loss] of all steps, each as often as it was written."""
    return [[line["step"], line["loss"]] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
