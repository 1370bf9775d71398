"""What a fine-tuning comes to: the files of each seed, and one table over all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import read_json, write_json
from pipeline.evaluation import firing_values
from pipeline.glue import write_submission
from pipeline.task_metrics import baseline_metrics
from pipeline.task_trainer import TaskTrainer
from pipeline.tasks import TRAIN, VALIDATION

RESULT, RESULTS = "result.json", "results.json"
PREDICTIONS = "predictions"
SPIKES = {"firing_rate": "firing rate", "spikes_per_token": "spikes per token"}


def measure_seed(trainer: TaskTrainer, truncated: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """What the model of the engine, the best one, makes of every split but that it learned from.

    All ranks take part; the first one writes the predictions, for GLUE's test sets as its server takes them.
    """
    data, state = trainer.corpus.data, trainer.state
    result: dict[str, Any] = {
        "seed": trainer.config.seed,
        "task": data.task.name,
        "data": trainer.corpus.identity(),
        "chosen_by": data.task.metrics[0],
        "num_timesteps": trainer.stack.config.num_timesteps,
        "steps": state.step,
        "best_step": state.search.best_step,
        "rows": {split: len(examples) for split, examples in data.splits.items()},
        "truncated": dict(truncated),
        "metrics": {},
        "baseline": {},
    }
    for split, examples in data.splits.items():
        if split == TRAIN:
            continue
        predictions = trainer.predictions(split)
        if metrics := trainer.metrics_of(split, predictions):
            result["metrics"][split] = metrics
            result["baseline"][split] = baseline_metrics(data.task, data.splits[TRAIN], examples)
        if split == VALIDATION:
            result |= firing_values(trainer.stack, predictions.stats)
        if trainer.world.is_main:
            (folder / PREDICTIONS).mkdir(exist_ok=True)
            write_submission(folder / PREDICTIONS, data.task, split, predictions.of(data.task), examples.ids)
    return result


def summarize(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The results of all seeds together, which are written to the folder of the fine-tuning."""
    results = [read_json(folder / f"seed-{seed}" / RESULT) for seed in seeds]
    first = results[0]
    summary = {
        "name": folder.name,
        "task": first["task"],
        "chosen_by": first["chosen_by"],
        "num_timesteps": first["num_timesteps"],
        "seeds": list(seeds),
        "rows": first["rows"],
        "truncated": first["truncated"],
        "best_steps": [result["best_step"] for result in results],
        "metrics": {
            split: {name: _spread([result["metrics"][split][name] for result in results]) for name in metrics}
            for split, metrics in first["metrics"].items()
        },
        "baseline": first["baseline"],
        **{name: _spread([result[name] for result in results]) for name in SPIKES if name in first},
    }
    write_json(folder / RESULTS, summary)
    return summary


def describe_results(summary: Mapping[str, Any]) -> str:
    """The summary as a table: a line for each metric of each split."""
    seeds = summary["seeds"]
    chosen, timesteps = summary["chosen_by"], f"T={summary['num_timesteps']}"
    lines = [
        f"{summary['name']}: {summary['task']}, {timesteps}, {len(seeds)} seed(s), each at its step of best {chosen}",
        f"  {'':<40}{'mean':>9}{'spread':>9}{'baseline':>10}  by seed {', '.join(map(str, seeds))}",
    ]
    for split in sorted(summary["metrics"], key=_place):
        metrics = summary["metrics"][split]
        for name in sorted(metrics, key=lambda name: (name != chosen, name)):
            lines.append(_line(f"{split} {name}", metrics[name], summary["baseline"][split][name]))
    lines += [_line(label, summary[name]) for name, label in SPIKES.items() if name in summary]
    return "\n".join(lines)


def _place(split: str) -> tuple[bool, str]:
    """Validation first: the best checkpoint is chosen by it."""
    return not split.startswith(VALIDATION), split


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; none of one value) over the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}


def _line(label: str, values: Mapping[str, Any], baseline: float | None = None) -> str:
    spread = "-" if values["spread"] is None else f"{values['spread']:.4f}"
    beside = "" if baseline is None else f"{baseline:.4f}"
    each = " ".join(f"{value:.4f}" for value in values["values"])
    return f"  {label:<40}{values['mean']:>9.4f}{spread:>9}{beside:>10}  {each}"
