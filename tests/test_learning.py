"""The learning benchmark's own arithmetic, and that its tables are those of its results."""

from dataclasses import replace

import pytest

from tests.bench.learning.results import Result, read_results
from tests.bench.learning.tables import TABLES, describe, group, recovered, tables
from tests.bench.learning.timing import read_times
from tests.bench.learning.variants import EVERYTHING, NOTHING, RECIPES, VARIANTS, run_config

RESULT = Result(
    recipe="causal",
    variant=NOTHING,
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


def results(seed, **losses):
    return [replace(RESULT, variant=name.replace("_", " "), seed=seed, loss=loss) for name, loss in losses.items()]


def test_the_recovered_share_is_between_no_layers_and_the_twin_of_the_same_seed():
    runs = group([*results(0, no_layers=4.0, twin=3.0, lif=3.75), *results(1, no_layers=4.5, twin=3.5, lif=3.5)])
    assert recovered(runs["causal"], "lif") == [0.25, 1.0]
    assert recovered(runs["causal"], NOTHING) == [0.0, 0.0] and recovered(runs["causal"], EVERYTHING) == [1.0, 1.0]
    row = describe(runs["causal"], {"lif": 3.456}).splitlines()[-1].split(" | ")
    assert row[:4] == ["| lif", "2", "3.625 ± 0.177", "62.5 ± 53.0"] and row[-1] == "3.46 |"


def test_losses_on_other_rows_are_not_compared():
    others = [replace(result, rows="others") for result in results(0, lif=3.75)]
    runs = group([*results(0, no_layers=4.0, twin=3.0), *others, *results(1, lif=3.5)])
    assert recovered(runs["causal"], "lif") == []


def test_a_repeated_run_replaces_the_first():
    runs = group([*results(0, no_layers=4.0, twin=3.0, lif=3.75), *results(0, lif=3.5)])
    assert recovered(runs["causal"], "lif") == [0.5]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_is_a_run_of_the_same_samples(recipe):
    configs = {name: run_config(recipe, name) for name in VARIANTS}
    for name, config in configs.items():
        assert config.data == configs[EVERYTHING].data
        assert replace(config, model=configs[EVERYTHING].model, training=config.training) == replace(
            configs[EVERYTHING], training=config.training, schedule=config.schedule
        )
        ratio = config.training.total_steps / configs[EVERYTHING].training.total_steps
        assert ratio == VARIANTS[name].length


def test_the_committed_tables_are_those_of_the_committed_results():
    assert tables(group(read_results()), read_times()) == TABLES.read_text(encoding="utf-8")
