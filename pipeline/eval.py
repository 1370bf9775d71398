"""Measures a trained model on text that it was not trained on: python -m pipeline.eval runs/decoder-tiny

MODEL is a run, a checkpoint, or an exported folder. Decoders are measured on whole documents, in windows that overlap;
encoders on the held-out rows, whose masked tokens they are to find.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.files import write_json
from data_prep.manifest import Manifest
from data_prep.recipes import run_command
from data_prep.shards import ShardReader
from models.amplitudes import keep_timesteps, spiking_stack
from pipeline.config import DataSettings, ObjectiveSettings, RunConfig
from pipeline.corpus import open_folders
from pipeline.documents import HELDOUT, check_shards, heldout_documents, text_documents
from pipeline.evaluation import (
    Tally,
    bits_per_byte,
    firing_values,
    perplexity,
    strided_windows,
    tally_batches,
    window_batches,
)
from pipeline.loader import JoinedRows, heldout_batches
from pipeline.model import open_model
from pipeline.objectives import MaskedTokens, SpecialTokens
from pipeline.options import count, usable_device
from pipeline.shard_cache import ShardFolder


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The measures that the command prints; a description of model and data comes first."""
    model, tokenizer, run = open_model(options.model, options.shards)
    if options.num_timesteps is not None:
        keep_timesteps(model, options.num_timesteps)
    model.to(usable_device(options.device))
    if options.shards and options.text:
        raise ValueError("--shards and --text: give one of them to measure on")
    data = run.data if run else DataSettings()
    shards = open_folders(data, options.shards or (list(data.weights) if run and not options.text else []))
    if model.config.traits.causal:
        tally, found = _measure_documents(model, tokenizer, shards, run, options)
    else:
        tally, found = _measure_rows(model, tokenizer, shards, run, options)
    values = tally.values()
    if (loss := values.get("causal_lm_loss")) is not None:
        values["perplexity"] = perplexity(loss)
        values["bits_per_byte"] = bits_per_byte(float(tally.sums[1, 0]), found["bytes"])
    spikes = firing_values(spiking_stack(model), tally.stats)
    return {
        "model": str(options.model),
        "num_timesteps": model.config.num_timesteps,
        **found,
        "targets": int(tally.sums[0, 0]),
        **values,
        **spikes,
    }


def _measure_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[ShardFolder],
    run: RunConfig | None,
    options: argparse.Namespace,
) -> tuple[Tally, dict[str, Any]]:
    """Every token of every document but its first, each once."""
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
    tally = tally_batches(model, batches, ("causal_lm",))
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
) -> tuple[Tally, dict[str, Any]]:
    """Masked tokens, and sentence pairs where the model has a head for them, of the held-out rows as in epoch 0."""
    for name in ("text", "window", "stride"):
        if getattr(options, name):
            raise ValueError(f"--{name} has no effect on an encoder, which is measured on the rows of --shards")
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
    return tally_batches(model, batches, objective.losses), found


def _in_order_of_training(shards: Sequence[ShardFolder]) -> list[ShardReader]:
    """The held-out rows of each folder: in the order that numbers, and so masks, rows as in training."""
    folders = sorted(shards, key=lambda folder: Manifest.load(folder.root).indexes["train"])
    return [folder.reader(HELDOUT) for folder in folders]


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
    "firing_rate": "firing rate, mean over sites",
    "spikes_per_token": "spikes per token, all timesteps",
}


def describe(values: dict[str, Any]) -> str:
    """The measures as a table."""
    sizes = ", ".join(
        f"{values[name]:,} {name}" for name in ("documents", "rows", "targets", "bytes") if name in values
    )
    lines = [f"{values['model']}, T={values['num_timesteps']}, on {values['data']}: {sizes}"]
    lines += [f"  {label:<38}{values[name]:.4f}" for name, label in NAMES.items() if name in values]
    rates = values.get("firing_rate_by_site", {})
    return "\n".join([*lines, *(f"    {site:<36}{rate:.4f}" for site, rate in rates.items())])


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
        "--num-timesteps", type=count, metavar="T", help="fewer spike timesteps than it was trained with"
    )
    parser.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures there, too")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    values = evaluate(options)
    print(describe(values))
    if options.json:
        write_json(options.json, values)


if __name__ == "__main__":
    sys.exit(main())
