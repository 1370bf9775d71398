"""Tables and plots of what the runs in learning.jsonl have learned.

R, the recovered share, is (L_none - L) / (L_none - L_twin), with held-out losses L: what a variant's layers are worth
as a share of what ordinary layers are worth. Both ends of the scale are means over seeds: R's spread is the variant's.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines

from tests.bench.learning.results import ROOT, Result
from tests.bench.learning.timing import read_times
from tests.bench.learning.variants import EVERYTHING, NOTHING, VARIANTS, variants_of

FOLDER = ROOT / "tests" / "bench" / "learning"
TABLES = FOLDER / "tables.md"
MOST_UNDRAWN = 6

Runs = dict[str, dict[int, Result]]
"""One recipe's results by variant and seed."""


def write_report(results: Sequence[Result]) -> str:
    """Write tables.md and, where many neurons were tried, a plot of a recipe into this folder; returns the tables."""
    by_recipe = group(results)
    for recipe, runs in by_recipe.items():
        if len(variants_of(recipe)) > MOST_UNDRAWN:
            draw(runs, FOLDER / f"{recipe}.png")
    TABLES.write_text(text := tables(by_recipe, read_times()), encoding="utf-8")
    return text


def group(results: Iterable[Result]) -> dict[str, Runs]:
    """By recipe and variant those that still are what they were, on the last one's rows; of repeated runs the last."""
    current = [result for result in results if result.is_current]
    rows = {result.recipe: result.rows for result in current}
    by_recipe: dict[str, Runs] = {}
    for result in current:
        if result.rows == rows[result.recipe]:
            runs = by_recipe.setdefault(result.recipe, {name: {} for name in VARIANTS})
            runs[result.variant][result.seed] = result
    return {recipe: {name: seeds for name, seeds in runs.items() if seeds} for recipe, runs in by_recipe.items()}


def tables(by_recipe: Mapping[str, Runs], times: Mapping[str, Mapping[str, Any]]) -> str:
    """One section for each recipe."""
    return "\n".join(f"## {name}\n\n{describe(runs, times.get(name, {}))}" for name, runs in by_recipe.items())


def recovered(runs: Runs, variant: str) -> list[float]:
    """R of each seed; none where one of the ends of the scale is missing."""
    if not {NOTHING, EVERYTHING} <= runs.keys():
        return []
    nothing, everything = (statistics.mean(each.loss for each in runs[end].values()) for end in (NOTHING, EVERYTHING))
    return [(nothing - each.loss) / (nothing - everything) for each in runs[variant].values()]


COLUMNS = ("", "seeds", "held-out loss, nat", "R, %", "firing rate", "spikes/token", "tokens, M", "TFLOP", "CPU time")


def describe(runs: Runs, times: Mapping[str, Any]) -> str:
    """The table, in Markdown: means over seeds, standard deviations behind the sign, CPU time a token by the twin's."""
    relative = times.get("relative", {})
    rows = []
    for name, seeds in runs.items():
        results, shares = list(seeds.values()), recovered(runs, name)
        spiking = [result for result in results if result.firing_rate is not None]
        rows.append(
            [
                name,
                str(len(results)),
                _spread([result.loss for result in results], 3),
                _spread([100 * share for share in shares], 1),
                _spread([result.firing_rate for result in spiking], 3),
                _spread([result.spikes_per_token for result in spiking], 0),
                f"{results[0].tokens / 1e6:.2f}",
                f"{results[0].operations / 1e12:.1f}",
                f"{relative[name]:.2f}" if name in relative else "-",
            ]
        )
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
    return f"{text}\nCPU time a token, as a multiple of the twin's: {times['machine']}.\n" if times else text


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{round(statistics.mean(values), digits) + 0.0:,.{digits}f}"  # not -0.0
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def draw(runs: Runs, path: Path) -> None:
    """R against spikes and against operations, and the firing rate over the training."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (spikes, work, rates) = pyplot.subplots(1, 3, figsize=(20, 5.5), constrained_layout=True)
    _draw_shares(spikes, runs, lambda result: result.spikes_per_token)
    _draw_shares(work, runs, lambda result: result.operations / 1e12)
    spikes.set(xlabel="spikes per token", ylabel="recovered share R, %", title="what a spike buys")
    work.set(xlabel="training, TFLOP", ylabel="recovered share R, %", title="what computation buys", xscale="log")
    work.tick_params(axis="x", which="minor", labelbottom=False)  # over a decade or two they overlap
    for name, seeds in runs.items():
        curve = next(iter(seeds.values())).rates
        if curve:
            rates.plot(*zip(*curve, strict=True), color=color_of(name))
    rates.set(xlabel="step", ylabel="firing rate, mean over sites", title="firing while training")
    handles = [matplotlib.lines.Line2D([], [], marker="o", linestyle="", color=color_of(name)) for name in runs]
    figure.legend(handles, list(runs), loc="outside right center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def color_of(variant: str) -> tuple[float, ...]:
    """The same in all panels and plots."""
    return matplotlib.colormaps["tab20"](list(VARIANTS).index(variant) % 20)


def _draw_shares(axes: Any, runs: Runs, across: Callable[[Result], float | None]) -> None:
    for name, seeds in runs.items():
        shares, places = [100 * share for share in recovered(runs, name)], [*map(across, seeds.values())]
        if not shares or None in places:
            continue
        place = statistics.mean(places)
        spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
        axes.errorbar(place, statistics.mean(shares), yerr=spread, fmt="o", capsize=3, color=color_of(name))
    axes.grid(alpha=0.3)
