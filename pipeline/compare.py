"""Tells what fine-tuned variants of a model come to: python -m pipeline.compare --variant NAME RUN TUNED SCRATCH ...

Each variant is a name and three folders of runs: its pretraining, its fine-tuning (pipeline.finetune), and the same
fine-tuning from random weights. Prints a table, and writes it and a plot of it. launch/compare.sh makes such runs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import atomic_file, read_json
from data_prep.recipes import run_command
from pipeline.metrics import METRICS_FILE, read_metrics
from pipeline.task_results import RESULTS
from pipeline.tasks import TEST, VALIDATION

TABLE, PLOT = "compare.md", "compare.png"
LOSS, ENTROPY = "masked_lm_loss", "unigram_entropy"  # what is fine-tuned are encoders


@dataclass(frozen=True)
class Variant:
    """A model that was pretrained and fine-tuned, and what its fine-tunings came to (task_results.summarize)."""

    name: str
    heldout_loss: float
    """At the end of pretraining, in nats per masked token."""
    unigram_entropy: float
    """Of the same tokens: whose differ were measured on others."""
    tuned: dict[str, Any]
    scratch: dict[str, Any]

    @property
    def split(self) -> str:
        """The rows that are compared by: test rows where they have labels, since those chose no checkpoint."""
        return TEST if TEST in self.tuned["metrics"] else VALIDATION

    def metric(self, of: dict[str, Any]) -> dict[str, Any]:
        """Mean and spread over seeds of the metric that chooses checkpoints."""
        return of["metrics"][self.split][self.tuned["chosen_by"]]

    @property
    def trivial(self) -> float:
        """The same metric of the trivial answer."""
        return self.tuned["baseline"][self.split][self.tuned["chosen_by"]]


def read_variant(name: str, pretrained: str, tuned: str, scratch: str) -> Variant:
    """Raises ValueError, with the remedy, where one of the runs has not come to an end."""
    run = Path(pretrained)
    if not (run / "DONE").exists():
        raise ValueError(f"{pretrained} is no finished run: its command again goes on")
    last = [record for record in read_metrics(run / METRICS_FILE) if record["kind"] == "heldout"][-1]
    return Variant(name, last[LOSS], last[ENTROPY], _read_results(tuned), _read_results(scratch))


def refuse_others(variants: Sequence[Variant]) -> None:
    """ValueError where the variants were measured on other tokens, or fine-tuned on other rows or by other seeds."""
    first = variants[0]
    for variant in variants:
        if not math.isclose(variant.unigram_entropy, first.unigram_entropy, rel_tol=1e-6):
            raise ValueError(
                f"{variant.name} was pretrained on other tokens (unigram entropy {variant.unigram_entropy:.4f}) than "
                f"{first.name} ({first.unigram_entropy:.4f}): pretrain all by one recipe"
            )
        for summary in (variant.tuned, variant.scratch):
            for key in ("task", "rows", "seeds", "chosen_by", "baseline"):
                if summary[key] != first.tuned[key]:
                    raise ValueError(
                        f"{summary['name']}: {key} is {summary[key]}, but {first.tuned[key]} in "
                        f"{first.tuned['name']}: compare fine-tunings by one recipe"
                    )


def describe(variants: Sequence[Variant]) -> str:
    """The table, in Markdown: means over seeds, standard deviations behind the sign."""
    first = variants[0]
    metric, seeds = first.tuned["chosen_by"], first.tuned["seeds"]
    head = [
        "",
        "T",
        "held-out loss, nat",
        f"{metric}, {first.split}",
        "from scratch",
        "gain",
        "firing rate",
        "spikes/token",
    ]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for variant in variants:
        tuned, scratch = variant.metric(variant.tuned), variant.metric(variant.scratch)
        rows.append(
            [
                variant.name,
                str(variant.tuned["num_timesteps"]),
                f"{variant.heldout_loss:.3f}",
                _spread(tuned),
                _spread(scratch),
                f"{tuned['mean'] - scratch['mean']:+.4f}",
                _spread(variant.tuned.get("firing_rate"), 3),
                _spread(variant.tuned.get("spikes_per_token"), 0),
            ]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    told = f"{len(seeds)} seed(s): {', '.join(map(str, seeds))}; the trivial answer's {metric} is {first.trivial:.4f}."
    return f"{table}\n\n{told}\n"


def draw(variants: Sequence[Variant], path: Path) -> None:
    """The metric of each variant, fine-tuned and from scratch, and beside it against its spikes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = variants[0]
    metric = f"{first.tuned['chosen_by']}, {first.split}"
    figure, (bars, spikes) = pyplot.subplots(1, 2, figsize=(15, 4.5), constrained_layout=True)
    for offset, label, kind in ((-0.2, "pretrained", "tuned"), (0.2, "from scratch", "scratch")):
        values = [variant.metric(getattr(variant, kind)) for variant in variants]
        places = [place + offset for place in range(len(variants))]
        errors = [value["spread"] or 0.0 for value in values]
        bars.bar(places, [value["mean"] for value in values], 0.4, yerr=errors, capsize=3, label=label)
    bars.axhline(first.trivial, color="gray", linestyle=":", label="trivial answer")
    bars.set(ylabel=metric, title="what pretraining is worth")
    bars.set_xticks(range(len(variants)), [variant.name for variant in variants], rotation=15)
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    for variant in variants:
        if "spikes_per_token" in variant.tuned:
            value = variant.metric(variant.tuned)
            place = variant.tuned["spikes_per_token"]["mean"]
            spikes.errorbar(place, value["mean"], yerr=value["spread"] or 0.0, fmt="o", capsize=3, label=variant.name)
        else:
            spikes.axhline(variant.metric(variant.tuned)["mean"], linestyle="--", color="gray", label=variant.name)
    spikes.set(xlabel="spikes per token", ylabel=metric, title="what a spike buys")
    spikes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def compare(variants: Sequence[Variant], output: Path) -> str:
    """Write table and plot into the folder `output`; returns the table."""
    refuse_others(variants)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / TABLE) as file:
        file.write((text := describe(variants)).encode())
    draw(variants, output / PLOT)
    return text


def _read_results(folder: str) -> dict[str, Any]:
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{path} does not exist: finish the fine-tuning of that name first")
    return read_json(path)


def _spread(values: dict[str, Any] | None, digits: int = 4) -> str:
    if values is None:
        return "-"
    mean = f"{values['mean']:,.{digits}f}"
    return mean if values["spread"] is None else f"{mean} ± {values['spread']:,.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status 2 where runs are missing or cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--variant",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "PRETRAINED", "TUNED", "SCRATCH"),
        help="a name and three folders of runs; may be repeated",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="(default: runs/compare)")
    options = parser.parse_args(arguments)
    return run_command(lambda: print(compare([read_variant(*each) for each in options.variant], options.output)))


if __name__ == "__main__":
    sys.exit(main())
