"""Tells how a pretraining run went: python -m pipeline.report RUN_DIR [--compare TWIN_DIR]

Reads RUN_DIR/metrics.jsonl, prints a short table and draws RUN_DIR/plots/curves.png, with a dotted line where a phase
on samples of another length ends. The held-out loss is judged by two lines: the unigram entropy of the same targets,
which a model reaches that knows how frequent every token is and no context, and the last held-out loss of a twin with
no layers that was trained alike.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from data_prep.recipes import run_command
from pipeline.metrics import METRICS_FILE, read_metrics

TARGETS = {"masked_lm": "masked-token", "causal_lm": "next-token", "next_sentence": "next-sentence"}
"""What a run may predict, by the prefix of its losses and accuracies; tokens' losses are judged, in nats per token."""

ENTROPY = "unigram_entropy"
"""The first line to beat, in nats per token."""

NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it: the records of metrics.jsonl by kind, in the order of their steps."""

    folder: Path
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    health: list[dict[str, Any]]
    phases: list[tuple[int, int]]
    """Of every phase before the last one its last step and the length of its samples."""

    @property
    def loss(self) -> str:
        """The key of the judged loss."""
        return _token_loss(self.heldout[-1])

    @property
    def finished(self) -> bool:
        return (self.folder / "DONE").exists()

    @property
    def last_step(self) -> int:
        return max(record["step"] for record in self.train + self.heldout)

    @property
    def has_spikes(self) -> bool:
        return "firing_rate" in self.heldout[-1]

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint; None where there is none yet."""
        latest = self.folder / "checkpoints" / "latest"
        return latest.parent / latest.read_text(encoding="utf-8").strip() if latest.exists() else None


def load_run(folder: Path) -> Run:
    """Raises ValueError, with what to do, where the folder holds no run or the run has measured nothing yet."""
    path = folder / METRICS_FILE
    if not path.exists() and not (folder / "recipe.yaml").exists():
        raise ValueError(f"there is no run in {folder}: give the folder of a run, as runs/demo")
    records = read_metrics(path) if path.exists() else []
    train = [record for record in records if record["kind"] == "train"]
    heldout = [record for record in records if record["kind"] == "heldout" and _token_loss(record)]
    if not train:
        raise ValueError(f"{path} holds no logged step yet: start the run, or wait for its first logged step")
    if not heldout and any(record["kind"] == "heldout" for record in records):
        raise ValueError(
            f"{folder} is a fine-tuning, which is measured by its task: see {folder.parent / 'results.json'}, "
            f"tensorboard --logdir {folder / 'tensorboard'} and python -m pipeline.eval {folder}"
        )
    if not heldout:
        raise ValueError(
            f"{path} holds no held-out loss of tokens yet: wait for the run's first evaluation, or run it again"
        )
    health = [record for record in records if record["kind"] == "health"]
    return Run(folder, train, heldout, health, _earlier_phases(folder / "recipe.yaml"))


def _earlier_phases(recipe: Path) -> list[tuple[int, int]]:
    """As Run.phases has them; none where the run has no recipe (any more)."""
    if not recipe.exists():
        return []
    phases = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"].get("phases", [])
    ends = accumulate(phase["steps"] for phase in phases)
    return [(end, phase["sample_length"]) for end, phase in zip(ends, phases, strict=True)]


def _token_loss(record: dict[str, Any]) -> str | None:
    return next((f"{name}_loss" for name in ("masked_lm", "causal_lm") if f"{name}_loss" in record), None)


def check_comparable(run: Run, twin: Run) -> None:
    """ValueError where the two were measured on different targets: then neither loss says anything about the other."""
    ours, theirs = (each.heldout[-1][ENTROPY] for each in (run, twin))
    if run.loss != twin.loss or not math.isclose(ours, theirs, rel_tol=1e-6):
        raise ValueError(
            f"{twin.folder} was evaluated on other targets (unigram entropy {theirs:.4f}) than {run.folder} "
            f"({ours:.4f}): train the twin on the same shards with the same seed and masking"
        )


def describe(run: Run, twin: Run | None, plot: Path) -> str:
    """The whole report as text."""
    state = "finished" if run.finished else "NOT finished"
    sections = [
        [f"{run.folder}: {state}, at step {run.last_step}"],
        [_line("phase", f"to step {end}", f"on samples of {length} tokens") for end, length in run.phases],
        _loss_lines(run, twin),
        _firing_lines(run),
        _health_lines(run),
        [_line("speed", _speed(run)), *_data_wait_lines(run)],
        _places(run, plot),
        _next_steps(run, twin),
    ]
    return "\n".join(line for section in sections for line in section)


def _line(name: str, *cells: str) -> str:
    return f"  {name:<38}" + "".join(f"{cell:<24}" for cell in cells).rstrip()


def _loss_lines(run: Run, twin: Run | None) -> list[str]:
    first, last, loss = run.heldout[0], run.heldout[-1], run.loss
    lines = [
        _line("held-out, at step", f"{first['step']}", f"{last['step']}"),
        _line(f"{_named(loss)} (nat/token)", f"{first[loss]:.4f}", f"{last[loss]:.4f}"),
        _to_beat("unigram entropy of the same targets", last[ENTROPY], last[loss]),
    ]
    if twin is not None:
        lines.append(_to_beat(f"{twin.folder.name}, step {twin.last_step}", twin.heldout[-1][loss], last[loss]))
        if twin.last_step != run.last_step or not twin.finished:
            lines.append(f"    the twin stands at step {twin.last_step}: train both equally long before judging")
    for name in TARGETS:
        if (key := f"{name}_accuracy") in first and key in last:
            lines.append(_line(_named(key), f"{first[key]:.1%}", f"{last[key]:.1%}"))
    return lines


def _named(key: str) -> str:
    """A loss or an accuracy as people call it."""
    name, _, measure = key.rpartition("_")
    return f"{TARGETS[name]} {measure}"


def _to_beat(name: str, bound: float, loss: float) -> str:
    verdict = f"below by {bound - loss:.4f}" if loss < bound else f"NOT below (above by {loss - bound:.4f})"
    return _line(f"  {name}", f"{bound:.4f}", verdict)


def _firing_lines(run: Run) -> list[str]:
    if not run.has_spikes:
        return [_line("firing rate", "no spiking layers")]
    first, last = run.heldout[0], run.heldout[-1]
    return [
        _line("firing rate, mean over sites", f"{first['firing_rate']:.3f}", f"{last['firing_rate']:.3f}"),
        _line("  lowest to highest site", _spread(first), _spread(last)),
    ]


def _health_lines(run: Run) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    for record in run.health:
        for text in record["warnings"]:  # a resumed run tells once more what it finds, by the values of then
            site, _, fault = text.partition(",")
            found.setdefault((site, NUMBER.sub("", fault)), f"    from step {record['step']}: {text}")
    return [_line("faults of neurons", str(len(found))), *found.values()] if found else []


def _spread(record: dict[str, Any]) -> str:
    rates = record["firing_rate_by_site"].values()
    return f"{min(rates):.3f} to {max(rates):.3f}"


def _speed(run: Run) -> str:
    speeds = [record["tokens_per_second"] for record in run.train]
    return f"{statistics.median(speeds):,.0f} tokens/s (median of {len(speeds)} logged steps)"


def _data_wait_lines(run: Run) -> list[str]:
    shares = [record["data_wait"] for record in run.train if "data_wait" in record]
    return [_line("waiting for data", f"{statistics.median(shares):.1%} of that time")] if shares else []


def _places(run: Run, plot: Path) -> list[str]:
    return [
        _line("checkpoint", str(run.checkpoint or "none yet")),
        _line("metrics", str(run.folder / METRICS_FILE)),
        _line("plot", str(plot)),
    ]


def _next_steps(run: Run, twin: Run | None) -> list[str]:
    unfinished = [each.folder.name for each in (run, twin) if each is not None and not each.finished]
    if unfinished:
        return [f"next: wait for {' and '.join(unfinished)}, or start what no longer runs again by the same command"]
    return [
        f"next: see every number by tensorboard --logdir {run.folder / 'tensorboard'}",
        "      train longer, as a run of its own: launch/pretrain.sh RECIPE --name NAME --training.total_steps N",
    ]


def draw(run: Run, twin: Run | None, path: Path) -> None:
    """The losses over the lines to beat and, for a spiking run, the firing rates below them; a PNG at `path`."""
    import matplotlib  # only here, so that an error in the arguments is told at once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = 2 if run.has_spikes else 1
    figure, axes = pyplot.subplots(
        rows, 1, figsize=(10, 3.2 + 2.8 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    _draw_losses(axes[0, 0], run, twin)
    if run.has_spikes:
        _draw_firing_rates(axes[1, 0], run)
    for end in [end for end, _ in run.phases if end < run.last_step]:
        for each in axes[:, 0]:
            each.axvline(end, color="gray", linestyle=":", linewidth=1.2)
    axes[-1, 0].set_xlabel("optimizer step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]


def _draw_losses(axes: Any, run: Run, twin: Run | None) -> None:
    axes.plot(*_curve(run.train, run.loss), color="tab:blue", alpha=0.35, linewidth=1, label="training")
    axes.plot(*_curve(run.heldout, run.loss), color="tab:blue", marker="o", markersize=4, label="held-out")
    entropy = run.heldout[-1][ENTROPY]
    axes.axhline(entropy, color="black", linestyle="--", linewidth=1.2, label=f"unigram entropy\n{entropy:.3f}")
    if twin is not None:
        color = "tab:orange"
        steps, losses = _curve(twin.heldout, run.loss)
        axes.plot(
            steps, losses, color=color, marker="s", markersize=3, linewidth=1, label=f"{twin.folder.name}:\nheld-out"
        )
        axes.axhline(losses[-1], color=color, linestyle="--", linewidth=1.2, label=f"its last\n{losses[-1]:.3f}")
    _finish_axes(axes, f"{run.folder.name}: {_named(run.loss)}", "loss (nat/token)")


def _draw_firing_rates(axes: Any, run: Run) -> None:
    records = [record for record in run.train if "firing_rate_by_site" in record]
    sites = list(records[-1]["firing_rate_by_site"]) if records else []
    colors: dict[str, str] = {}  # one for each kind of site: the same in every layer
    for site in sites:
        kind = site.rpartition(".")[2]
        label = None if kind in colors else kind.replace("_", " ")
        color = colors.setdefault(kind, f"C{len(colors)}")
        rates = [record["firing_rate_by_site"].get(site, math.nan) for record in records]
        axes.plot([record["step"] for record in records], rates, color=color, linewidth=0.9, label=label)
    axes.plot(*_curve(run.train, "firing_rate"), color="black", linewidth=2, label="mean")
    axes.set_ylim(bottom=0)
    title = "firing rate: a color for each kind of site, a line for each layer"
    _finish_axes(axes, title, "firing rate\n(spikes per neuron and timestep)")


def _finish_axes(axes: Any, title: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)  # beside the curves, never over them


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of the run, as runs/demo")
    parser.add_argument(
        "--compare", type=Path, metavar="TWIN_DIR", help="folder of a run beside it, such as the twin with no layers"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: report(options.run_dir, options.compare))


def report(run_dir: Path, twin_dir: Path | None) -> None:
    """Print the table and write the plot of the run in `run_dir`, beside its twin where one is given."""
    run = load_run(run_dir)
    twin = load_run(twin_dir) if twin_dir else None
    if twin is not None:
        check_comparable(run, twin)
    plot = run.folder / "plots" / "curves.png"
    draw(run, twin, plot)
    print(describe(run, twin, plot))


if __name__ == "__main__":
    sys.exit(main())
