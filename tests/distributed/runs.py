"""Tiny trainings on real shards, under every ZeRO stage, that several test modules look at: the fixture `runs`."""

import json
import random

import torch

from tests.launcher import launch

STEPS = 6
COMBINATIONS = [(stage, precision) for stage in (2, 3) for precision in ("fp32", "bf16")]
"""Stages and precisions with a run that was stopped and resumed, resumed-<stage>-<precision>, beside a whole one."""


def run_arguments(shards, runs, name, stage, precision, *more):
    """The command line of a training of STEPS steps in <runs>/<name>."""
    return [
        *("--recipe", "tests/distributed/tiny.yaml", "--data.shards", str(shards), "--output", str(runs)),
        *("--name", name, "--training.total_steps", str(STEPS)),
        *("--engine.ds_config", f"ds_configs/zero{stage}.json", "--engine.precision", precision, *more),
    ]


def train_runs(shards, folder):
    """Trains whole-1-fp32 and, for COMBINATIONS, an uninterrupted run and one stopped at a random step and resumed."""
    stop = random.SystemRandom().randint(1, STEPS - 1)
    print(f"stopped after step {stop}")
    first, second = [run_arguments(shards, folder, "whole-1-fp32", 1, "fp32")], []
    for stage, precision in COMBINATIONS:
        name = f"{stage}-{precision}"
        first.append(run_arguments(shards, folder, f"whole-{name}", stage, precision))
        resumed = run_arguments(shards, folder, f"resumed-{name}", stage, precision)
        first.append([*resumed, "--training.stop_after_step", str(stop)])
        second.append(resumed)
    for part, jobs in (("first", first), ("second", second)):
        (folder / f"{part}.json").write_text(json.dumps(jobs))
        launch("tests/distributed/pretrain_worker.py", folder / f"{part}.json")


def assert_same_end(whole, other, steps=STEPS):
    """Both runs' last checkpoints hold the same bits in every file of DeepSpeed's."""
    whole, other = (run / f"checkpoints/step{steps:08d}" for run in (whole, other))
    files = sorted(path.name for path in whole.glob("*.pt"))
    assert files == sorted(path.name for path in other.glob("*.pt")) and len(files) >= 3
    assert sum(_assert_equal(_load(whole / name), _load(other / name), name) for name in files) > 20


def _load(path):
    return torch.load(path, weights_only=False)  # noqa: S614 (written by this test)


def _assert_equal(ours, theirs, where):
    """Compares nested containers to the bit; returns the number of tensors."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), where
        return 1
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        return sum(_assert_equal(ours[key], theirs[key], f"{where}/{key}") for key in ours)
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        return sum(_assert_equal(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    return 0
