"""Measures a trained model on text that it was not trained on: python -m pipeline.eval runs/decoder-tiny

MODEL is a run, a checkpoint, or an exported folder. Decoders are measured on whole documents, in windows that overlap;
encoders on the held-out rows, whose masked tokens they are to find; fine-tuned models on the rows of their task.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.files import write_json
from data_prep.manifest import Manifest
from data_prep.recipes import run_command
from data_prep.shards import ShardReader
from models.amplitudes import keep_timesteps, spiking_stack
from models.energy import ENERGY_TABLES, Passed
from models.modeling import SpikeLMForSequenceClassification
from pipeline.config import DataSettings, ObjectiveSettings, RunConfig
from pipeline.corpus import open_folders
from pipeline.documents import HELDOUT, check_shards, heldout_documents, text_documents
from pipeline.evaluation import (
    Tally,
    bits_per_byte,
    energy_values,
    firing_values,
    perplexity,
    strided_windows,
    tally_batches,
    window_batches,
)
from pipeline.loader import JoinedRows, heldout_batches
from pipeline.model import open_model
from pipeline.model_folder import probe_batch
from pipeline.objectives import MaskedTokens, SpecialTokens
from pipeline.options import count, usable_device
from pipeline.shard_cache import ShardFolder
from pipeline.spike_check import check_spikes
from pipeline.task_evaluation import measure_task, open_task_rows
from pipeline.task_metrics import METRICS
from pipeline.tasks import VALIDATION


def evaluate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The measures that the command prints, for each number of timesteps; a description of model and data comes first.

    The last timesteps are taken from the model one after another: the most come first.
    """
    model, tokenizer, run = open_model(options.model, options.shards)
    model.to(usable_device(options.device))
    measure = _measure_of(model, tokenizer, run, options)
    found = []
    for number in sorted(set(options.num_timesteps or [model.config.num_timesteps]), reverse=True):
        keep_timesteps(model, number)
        description = {"model": str(options.model), "num_timesteps": number}
        found.append({**description, **measure(), "energy_table": options.energy_table})
    return found


def _measure_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: RunConfig | None, options: argparse.Namespace
) -> Callable[[], dict[str, Any]]:
    """What measures the model as it then is. Raises ValueError for options that have no effect on such a model."""
    if not isinstance(model, SpikeLMForSequenceClassification):
        _refuse(options, ("task_recipe", "split"), "on a model that was not fine-tuned")
        return partial(_measure_language, model, tokenizer, run, options)
    _refuse(options, ("shards", "text", "window", "stride"), "on a fine-tuned model, which is measured on its task")
    rows = open_task_rows(options.model, model, tokenizer, options.task_recipe, options.split or VALIDATION)
    return partial(measure_task, model, rows, options.batch_size, ENERGY_TABLES[options.energy_table])


def _measure_language(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: RunConfig | None, options: argparse.Namespace
) -> dict[str, Any]:
    if options.shards and options.text:
        raise ValueError("--shards and --text: give one of them to measure on")
    data = run.data if run else DataSettings()
    shards = open_folders(data, options.shards or (list(data.weights) if run and not options.text else []))
    measure = _measure_documents if model.config.traits.causal else _measure_rows
    lengths: list[int] = []
    tally, found = measure(model, tokenizer, shards, run, options, lengths)
    values = tally.values()
    if (loss := values.get("causal_lm_loss")) is not None:
        values["perplexity"] = perplexity(loss)
        values["bits_per_byte"] = bits_per_byte(float(tally.sums[1, 0]), found["bytes"])
    passed = Passed.in_rows(lengths, model.config.traits.causal, predictions=float(tally.sums[0, 0]))
    return {
        **found,
        "targets": int(tally.sums[0, 0]),
        **values,
        **firing_values(spiking_stack(model), tally.stats),
        **energy_values(model.config, tally.stats, passed, ENERGY_TABLES[options.energy_table]),
    }


def _refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """ValueError where one of the options is given, which has no effect then."""
    for name in names:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {why}: leave it out")


def _measure_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[ShardFolder],
    run: RunConfig | None,
    options: argparse.Namespace,
    lengths: list[int],
) -> tuple[Tally, dict[str, Any]]:
    """Every token of every document but its first, each once; `lengths` get the tokens of each window."""
    trained = run.data.sample_length if run else None
    length = options.window or trained or model.config.max_position_embeddings
    stride = options.stride or max(1, length // 2)
    if not 1 <= stride < length <= model.config.max_position_embeddings:
        raise ValueError(
            f"--window {length} and --stride {stride}: the model has {model.config.max_position_embeddings} positions; "
            "use a window of at most as many, and a smaller stride"
        )
    if options.text:
        documents = text_documents(options.text, options.text_field, tokenizer)
    elif shards:
        documents = heldout_documents(shards, tokenizer)
    else:
        raise ValueError("nothing to measure on: name texts by --text, or a folder of shards by --shards")
    windows = (window for ids in documents for window in strided_windows(ids, length, stride))
    batches = window_batches(
        tqdm(windows, unit=" windows", file=sys.stderr, mininterval=1),
        options.batch_size,
        model.device,
    )
    tally = tally_batches(model, _noting_lengths(batches, lengths), ("causal_lm",))
    if not tally.sums[0, 0]:
        raise ValueError(f"{documents.source} holds no document with two tokens: nothing to measure")
    found = {"data": documents.source, "documents": documents.num_documents, "bytes": documents.num_bytes}
    return tally, {**found, "window": length, "stride": stride}


def _measure_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[ShardFolder],
    run: RunConfig | None,
    options: argparse.Namespace,
    lengths: list[int],
) -> tuple[Tally, dict[str, Any]]:
    """Masked tokens, and sentence pairs where the model has a head for them, of the held-out rows as in epoch 0.

    `lengths` get the tokens of each row.
    """
    _refuse(options, ("text", "window", "stride"), "on an encoder, which is measured on the rows of --shards")
    if not shards:
        raise ValueError("nothing to measure on: name a folder of shards by --shards")
    counts = [check_shards(folder, tokenizer, "pairs").counts[HELDOUT] for folder in shards]
    settings = run.objective if run else ObjectiveSettings(next_sentence=hasattr(model, "next_sentence_head"))
    objective = MaskedTokens(run.seed if run else 0, settings, SpecialTokens.of(tokenizer))
    readers = _in_order_of_training(shards)
    rows = heldout_batches(JoinedRows(readers), objective.make_batch, batch_size=options.batch_size)
    batches = (
        {name: each.to(model.device) for name, each in batch.tensors.items()}
        for batch in tqdm(rows, unit=" batches", file=sys.stderr)
    )
    found = {
        "data": f"held-out rows of {', '.join(folder.name for folder in shards)}",
        "documents": sum(each.documents for each in counts),
        "rows": sum(map(len, readers)),
    }
    return tally_batches(model, _noting_lengths(batches, lengths), objective.losses), found


def _noting_lengths(batches: Iterable[dict[str, Tensor]], lengths: list[int]) -> Iterator[dict[str, Tensor]]:
    """The batches, after the tokens of each of their rows have been added to `lengths`."""
    for batch in batches:
        lengths += batch["attention_mask"].sum(1).tolist()
        yield batch


def _in_order_of_training(shards: Sequence[ShardFolder]) -> list[ShardReader]:
    """The held-out rows of each folder: in the order that numbers, and so masks, rows as in training."""
    folders = sorted(shards, key=lambda folder: Manifest.load(folder.root).indexes["train"])
    return [folder.reader(HELDOUT) for folder in folders]


METRIC_NAMES = {
    name: label
    for metric in METRICS
    for name, label in ((metric, metric.replace("_", " ")), (f"baseline_{metric}", "  of the trivial answer"))
}

NAMES = {
    "causal_lm_loss": "next-token loss (nat/token)",
    "causal_lm_accuracy": "next-token accuracy",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "masked_lm_loss": "masked-token loss (nat/token)",
    "masked_lm_accuracy": "masked-token accuracy",
    "next_sentence_loss": "next-sentence loss (nat/pair)",
    "next_sentence_accuracy": "next-sentence accuracy",
    "unigram_entropy": "unigram entropy of the same targets",
    "classification_loss": "loss of classes (nat/row)",
    "regression_loss": "squared error, mean over rows",
    **METRIC_NAMES,
    "firing_rate": "firing rate, mean over sites",
    "spikes_per_token": "spikes per token, all timesteps",
    "energy_of_layers": "energy of layers (uJ/token)",
    "energy_of_ordinary_layers": "  as an ordinary transformer's",
    "energy": "  with all that does not spike",
}


def describe(measured: Sequence[dict[str, Any]]) -> str:
    """The measures as a table, a column for each number of timesteps."""
    first = measured[0]
    sizes = ", ".join(
        f"{first[name]:,} {name}" for name in ("documents", "rows", "targets", "truncated", "bytes") if name in first
    )
    timesteps = [f"T={values['num_timesteps']}" for values in measured]
    head = f"{first['model']}, {', '.join(timesteps)}, on {first['data']}: {sizes}"
    rows = []
    for name, label in NAMES.items():
        if name in first:
            rows.append((f"  {label}", [values[name] for values in measured]))
        if name == "firing_rate":
            sites = [values.get("firing_rate_by_site", {}) for values in measured]
            rows += [(f"    {site}", [rates[site] for rates in sites]) for site in sites[0]]
    cells = [("", timesteps)] if len(measured) > 1 else []
    cells += [(label, [f"{value:.4f}" for value in values]) for label, values in rows]
    lines = [f"{label:<40}" + "".join(f"{cell:<12}" for cell in each) for label, each in cells]
    return "\n".join([head, *(line.rstrip() for line in lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for input that cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.eval", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, or an exported folder")
    parser.add_argument(
        "--shards",
        action="append",
        metavar="FOLDER",
        help="shards whose held-out part to measure on; repeatable (default: the run's own)",
    )
    parser.add_argument(
        "--text", action="append", help="text to measure a decoder on, as data_prep reads it; repeatable"
    )
    parser.add_argument("--text-field", default="text", help="key of the text in a JSON line (default: text)")
    parser.add_argument(
        "--window", type=count, help="tokens that a decoder sees at once (default: those of its run's samples, or all)"
    )
    parser.add_argument("--stride", type=count, help="tokens from window to window (default: half a window)")
    parser.add_argument("--batch-size", type=count, default=16, help="rows or windows at once (default: 16)")
    parser.add_argument(
        "--task-recipe",
        type=Path,
        metavar="FILE",
        help="recipe of pipeline.finetune that names the task's rows for a fine-tuned model (default: the run's own)",
    )
    parser.add_argument("--split", help="rows of the task to measure on (default: validation)")
    parser.add_argument(
        "--num-timesteps",
        type=count,
        action="append",
        metavar="T",
        help="fewer spike timesteps than it was trained with; repeatable, to compare",
    )
    parser.add_argument(
        "--energy-table",
        choices=ENERGY_TABLES,
        default=next(iter(ENERGY_TABLES)),
        help="what an operation costs (default: %(default)s)",
    )
    parser.add_argument(
        "--check-spikes",
        action="store_true",
        help="measure nothing; prove that layers multiply spikes alone (exit status 1: they do not)",
    )
    parser.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures there, too; of several T a list")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.check_spikes:
        return _check(options)
    measured = evaluate(options)
    print(describe(measured))
    if options.json:
        write_json(options.json, measured if len(measured) > 1 else measured[0])
    return 0


def _check(options: argparse.Namespace) -> int:
    """Look at what the model's layers multiply with on made-up text, and tell."""
    made_up = ("text", "window", "stride", "task_recipe", "split")
    _refuse(options, made_up, "with --check-spikes, which makes up its text")
    if len(options.num_timesteps or ()) > 1:
        raise ValueError("--num-timesteps: --check-spikes looks at one number of timesteps: give one")
    model, _, _ = open_model(options.model, options.shards)
    keep_timesteps(model, *(options.num_timesteps or [model.config.num_timesteps]))
    model.to(usable_device(options.device))
    found = check_spikes(model, {name: each.to(model.device) for name, each in probe_batch(model.config).items()})
    print(f"{len(found.spiking)} products are of spikes alone: linear layers, keys and values of the stack")
    print(f"real by design: {', '.join(found.real)}")
    if found.silent:
        print(f"no spike was seen of: {', '.join(found.silent)}")
    for line in found.faults:
        print(f"not of spikes: {line}")
    if options.json:
        write_json(options.json, asdict(found))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
