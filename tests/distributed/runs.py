"""Tiny trainings on real shards, under every ZeRO stage, that several test modules look at: the fixture `runs`."""

import json
import random

import torch

from tests.launcher import launch

STEPS = 6
RESUMED = {
    "2-fp32": ("masked_lm", 2, "fp32"),
    "2-bf16": ("masked_lm", 2, "bf16"),
    "3-fp32": ("masked_lm", 3, "fp32"),
    "3-bf16": ("masked_lm", 3, "bf16"),
    "decoder": ("causal_lm", 3, "fp32"),
    "phases": ("causal_lm", 2, "fp32"),
}
"""Objectives, stages and precisions with a run that was stopped and resumed, resumed-<name>, beside whole-<name>."""

DECODER = ("--model.preset", "decoder-tiny", "--data.sample_length", "32")
PHASE = "{steps: 3, sample_length: 16, global_batch_size: 32, micro_batch_size: 4}"
"""Of the run phases: what comes before three steps of the recipe's own."""


def run_arguments(shards, runs, name, stage, precision, *more):
    """The command line of a training of STEPS steps in <runs>/<name>."""
    return [
        *("--recipe", "tests/distributed/tiny.yaml", "--data.shards", str(shards), "--output", str(runs)),
        *("--name", name, "--training.total_steps", str(STEPS)),
        *("--engine.ds_config", f"ds_configs/zero{stage}.json", "--engine.precision", precision, *more),
    ]


def train_runs(pairs, causal_rows, folder):
    """Trains whole-1-fp32 and, for each of RESUMED, a run that nothing stops and one stopped anywhere and resumed."""
    stop = random.SystemRandom().randint(1, STEPS - 1)
    print(f"stopped after step {stop}")
    first, second = [run_arguments(pairs, folder, "whole-1-fp32", 1, "fp32")], []
    for name, (objective, stage, precision) in RESUMED.items():
        shards, more = (causal_rows, DECODER) if objective == "causal_lm" else (pairs, ())
        more += ("--data.phases", PHASE) if name == "phases" else ()
        first.append(run_arguments(shards, folder, f"whole-{name}", stage, precision, *more))
        resumed = run_arguments(shards, folder, f"resumed-{name}", stage, precision, *more)
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
