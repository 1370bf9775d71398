"""`make chaos` in small: every kind of process is killed once, each at another point of the smallest run."""

import pytest

from tests.chaos.chaos import PATIENCE, Campaign, summary
from tests.distributed.runs import run_arguments

AIMS = (
    ("deepspeed", "saving", "rank 1"),
    ("deepspeed", "starting", "launch.py"),
    ("pretrain.sh", "starting", "pretrain.sh"),
    ("pretrain.sh", "loading", "deepspeed"),
    ("pretrain.sh", "stepping", "rank 0"),
    ("mpirun", "evaluating", "mpirun"),
)
"""Launched by what, in which phase, which part of the job is killed."""


@pytest.fixture
def campaign(runs, tiny_shards, tmp_path):
    more = ("--checkpoint.every", "1", "--engine.timeout_minutes", "0.5")
    return Campaign(
        lambda name: run_arguments(tiny_shards, tmp_path, name, 2, "fp32", *more), tmp_path, runs / "whole-2-fp32"
    )


def test_a_run_survives_every_kill_and_ends_as_if_there_had_been_none(campaign):
    for launcher, phase, victim in AIMS:
        # A phase may be over before the kill: then the kill counts, but the aim is taken again.
        for _ in range(PATIENCE):
            campaign.strike(launcher, in_phase(phase), only(victim))
            if campaign.faults or (phase, victim) in [(hit.phase, hit.victim) for hit in campaign.hits]:
                break
        else:
            campaign.fault(f"{PATIENCE} kills have not hit {victim} while {phase}")
    campaign.finish()
    print(summary(campaign.hits))
    assert not campaign.faults
    assert not campaign.shared_memory()


def in_phase(phase):
    """Whether a job is in that phase; in the loop, once there is a checkpoint to go on from."""

    def is_time(job, watch):
        if watch.start() is None:
            return watch.phase(job.parts()) == phase
        return watch.saved() > 0 and watch.phase() == phase

    return is_time


def only(victim):
    return lambda names: victim if victim in names else None
