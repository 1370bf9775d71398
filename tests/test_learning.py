"""The learning benchmark's own arithmetic, and that its tables are those of its results."""

from dataclasses import replace

import pytest

from tests.bench.learning.report import TABLES, describe, group, recovered, tables
from tests.bench.learning.results import Result, read_results
from tests.bench.learning.timing import read_times
from tests.bench.learning.variants import EVERYTHING, NOTHING, RECIPES, VARIANTS, run_config

LIF = "lif T=4"
RESULT = Result(
    recipe="causal",
    variant=NOTHING,
    overrides=VARIANTS[NOTHING].overrides,
    seed=0,
    command="",
    commit="",
    torch="",
    rows="these",
    tokens=2_000_000,
    operations=3e12,
    loss=4.0,
    unigram_entropy=5.0,
    firing_rate=None,
    spikes_per_token=None,
    rates=[],
)


def results(seed, nothing=None, everything=None, lif=None):
    losses = {NOTHING: nothing, EVERYTHING: everything, LIF: lif}
    return [
        replace(RESULT, variant=name, overrides=VARIANTS[name].overrides, seed=seed, loss=loss)
        for name, loss in losses.items()
        if loss is not None
    ]


def test_the_recovered_share_is_between_no_layers_and_the_twin():
    """Their means: 4.25 and 3.25 nat."""
    runs = group([*results(0, 4.0, 3.0, 3.75), *results(1, 4.5, 3.5, 3.5)])["causal"]
    assert recovered(runs, LIF) == [0.5, 0.75]
    assert recovered(runs, NOTHING) == [0.25, -0.25] and recovered(runs, EVERYTHING) == [1.25, 0.75]
    table = describe(runs, {"machine": "this", "relative": {LIF: 3.456}})
    (row,) = [line.split(" | ") for line in table.splitlines() if LIF in line]
    assert row[:4] == [f"| {LIF}", "2", "3.625 ± 0.177", "62.5 ± 17.7"] and row[-1] == "3.46 |"
    assert table.endswith("CPU time a token, as a multiple of the twin's: this.\n")


def test_losses_on_other_rows_than_the_last_are_not_in_the_table():
    others = [replace(result, rows="others") for result in results(0, lif=9.0)]
    runs = group([*others, *results(0, 4.0, 3.0), *results(1, lif=3.5)])["causal"]
    assert recovered(runs, LIF) == [0.5] and f"| {LIF} | 1 | 3.500 |" in describe(runs, {})
    assert recovered(group([*results(0, 4.0, 3.0), *others])["causal"], LIF) == []


def test_a_repeated_run_replaces_the_first_and_one_of_another_neuron_does_not():
    runs = group([*results(0, 4.0, 3.0, 3.75), *results(0, lif=3.5)])["causal"]
    assert recovered(runs, LIF) == [0.5]
    earlier = [replace(result, overrides="--model.neuron.kind lif") for result in results(0, lif=3.5)]
    assert recovered(group([*results(0, 4.0, 3.0, 3.75), *earlier])["causal"], LIF) == [0.25]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_is_a_run_of_the_same_samples(recipe):
    twin = run_config(recipe, EVERYTHING)
    for name, variant in VARIANTS.items():
        config = run_config(recipe, name)
        assert config.training.total_steps == variant.length * twin.training.total_steps
        assert config.schedule.warmup_steps == variant.length * twin.schedule.warmup_steps
        training = replace(config.training, total_steps=twin.training.total_steps, firing_penalty=0.0)
        schedule = replace(config.schedule, warmup_steps=twin.schedule.warmup_steps)
        assert replace(config, model=twin.model, training=training, schedule=schedule) == twin


def test_the_committed_tables_are_those_of_the_committed_results():
    written = TABLES.read_text(encoding="utf-8") if TABLES.exists() else ""
    assert tables(group(read_results()), read_times()) == written, "run python -m tests.bench.bench_learning --report"
