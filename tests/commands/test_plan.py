"""python -m pipeline.plan: what it says, and that what it advises helps."""

import re
import shlex

import pytest

from data_prep.manifest import Manifest
from pipeline.plan import main

ENCODER = ["--recipe", "launch/recipes/encoder-base.yaml"]
NO_SPIKES = ["--model.preset", "encoder-tiny", "--model.neuron.kind", "none"]  # one timestep: quickly traced
SIZES = ["--vocab-size", "1000", "--sample-length", "64", "--reserve", "0"]
PEAK = re.compile(r"([\d.]+) (?:of [\d.]+ )?GiB at the peak")


@pytest.fixture
def plan(capsys):
    """plan(*arguments): what the command prints, and the GiB of the peaks that it names."""

    def run(*arguments):
        assert main([*ENCODER, *NO_SPIKES, *map(str, arguments)]) == 0
        printed = capsys.readouterr().out
        return printed, [float(peak) for peak in PEAK.findall(printed)]

    return run


def test_it_tells_memory_and_days_of_a_recipe_that_fits(plan):
    printed, (peak,) = plan("--memory", 80, *SIZES)
    assert "encoder-base: encoder-tiny, 575,978 parameters (2 layer(s), D=128, V=1000), T=1" in printed
    assert f"It fits: {peak:.3f} of 80.00 GiB" in printed
    together = next(line for line in printed.splitlines() if line.startswith("together"))
    assert max(map(float, together.split()[1:])) == peak
    assert re.search(r"^timestep +\d", printed, re.MULTILINE)
    assert "3.277 B tokens in 100,000 steps" in printed


def test_days_are_operations_by_what_all_devices_do(plan):
    days = [
        float(re.search(r"([\d.e+-]+) days", plan("--memory", 80, *SIZES, *arguments)[0])[1])
        for arguments in ([], ["--peak-tflops", 98.9], ["--mfu", 0.2], ["--devices", 4])
    ]
    assert days == pytest.approx([days[0], 10 * days[0], 2 * days[0], 2 * days[0]], rel=0.01)


@pytest.mark.parametrize(
    ("memory", "advised"),
    [
        (0.22, ["--engine.checkpointing layer"]),
        (0.2, ["--training.micro_batch_size 16", "--engine.checkpointing layer"]),
        (0.15, ["--engine.ds_config ds_configs/zero3.json"]),
    ],
)
def test_what_it_advises_makes_the_recipe_fit(plan, memory, advised):
    arguments = ["--memory", memory, *SIZES]
    printed, (_, promised) = plan(*arguments)
    assert "It does not fit" in printed
    change = re.search(r"The cheapest change: (.*)", printed)[1]
    assert all(option in change for option in advised)
    printed, (peak,) = plan(*arguments, *change.split())
    assert "It fits" in printed and peak == promised


def test_instead_of_offloading_it_counts_the_devices_that_hold_all(plan):
    large = ["--memory", 9, "--model.preset", "decoder-7b", *SIZES]
    printed, _ = plan(*large)
    assert "The cheapest change: --engine.ds_config ds_configs/zero3_offload.json" in printed
    assert re.search(r"It then needs \d+ GiB of each machine's own memory", printed)
    devices, promised, change = re.search(r"Without it: (\d+) devices, ([\d.]+) GiB .* each, by (.*)", printed).groups()
    printed, (peak,) = plan(*large, "--nodes", int(devices) // 8, *change.split())
    assert "It fits" in printed and peak == float(promised)
    assert "Neither a setting nor more devices make it fit" in plan(*large, "--memory", 0.3)[0]
    assert "Libraries alone are assumed to take 2.00 GiB" in plan(*large, "--reserve", 2, "--memory", 1.5)[0]


PHASED = ["--schedule.warmup_steps", "9", "--model.preset", "decoder-tiny", "--training.total_steps", "100"]
PHASED += ["--data.phases", '{"steps":90,"sample_length":16,"global_batch_size":2048,"micro_batch_size":256}']


def test_the_largest_phase_decides_memory_and_all_of_them_time(plan):
    decoder = PHASED[:6]
    last, (own,) = plan("--memory", 80, *SIZES, *decoder)
    printed, (peak,) = plan("--memory", 80, *SIZES, *PHASED)
    assert peak == own and "Memory is that of the phase which needs the most, on samples of 64 tokens" in printed
    assert (
        "90 steps: 2048 rows of 16 tokens a step, 256 at once,\n10 steps: 512 rows of 64 tokens a step, 64" in printed
    )
    assert "3.277 M tokens in 100 steps" in printed
    first, _ = plan("--memory", 80, "--vocab-size", 1000, "--sample-length", 16, "--reserve", 0, *decoder[:4],
        "--training.total_steps", 90, "--training.global_batch_size", 2048,
        "--training.micro_batch_size", 256)  # fmt: skip
    operations = [float(re.search(r"steps: ([\d.e+]+) operations", text)[1]) for text in (first, last, printed)]
    assert operations[2] == pytest.approx(operations[0] + operations[1] / 10, rel=0.01)
    large = [word.replace('"micro_batch_size":256', '"micro_batch_size":1024') for word in PHASED]
    printed, (peak,) = plan("--memory", 80, "--devices", 2, *SIZES, *large)
    assert peak > own and "on samples of 16 tokens" in printed


def test_the_micro_batches_of_phases_that_it_advises_make_the_recipe_fit(plan):
    """Options of phases stand for those of the recipe."""
    arguments = ["--memory", 0.1, *SIZES, *PHASED[:6]]
    printed, (peak, promised) = plan(*arguments, *PHASED[6:])
    change = re.search(r"The cheapest change: (.*)", printed)[1]
    assert "--training.micro_batch_size" in change and "--data.phases" in change and promised < peak
    fitting, (now,) = plan(*arguments, *shlex.split(change))
    assert "It fits" in fitting and now == promised


def test_vocabulary_and_sample_length_are_those_of_the_shards(plan, causal_shards):
    decoder = ["--model.preset", "decoder-tiny", "--data.shards", causal_shards, "--data.sample_length", 32]
    printed, _ = plan("--memory", 80, *decoder)
    assert f"V={Manifest.load(causal_shards).vocab_size})" in printed and "rows of 32 tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data/encoder-base holds no manifest.json yet"),
        (["--vocab-size", "1000"], "give --sample-length NUMBER, or build the shards"),
        (
            ["--vocab-size", "1000", "--sample-length", "1024"],
            "samples of 1024 tokens, but the model has 512 positions",
        ),
        ([*SIZES, "--devices", "3"], "training.global_batch_size 512 is not divisible"),
        ([*SIZES, "--devices", "0"], "--devices is 0: it must be positive"),
        ([*SIZES, "--engine.precision", "fp8"], "engine.precision: 'fp8' should be 'fp32' or 'bf16'"),
        ([*SIZES, "--memori", "3"], "memori: unknown field"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments, message, capsys):
    assert main([*ENCODER, "--memory", "80", *arguments]) == 2
    assert message in capsys.readouterr().err
