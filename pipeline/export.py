"""Turn a checkpoint into a model folder for transformers: python -m pipeline.export runs/demo exported/demo

The folder holds weights, config.json, tokenizer, the code of the model, the data's manifest and a model card. It opens
with transformers' Auto classes and trust_remote_code=True where nothing but torch and transformers is installed; that
it does, and computes what the checkpoint's model computes, is proved before it gets its name.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep.files import json_bytes
from data_prep.recipes import run_command, settings_from_dict
from pipeline.checkpoint import TrainState, read_state
from pipeline.config import RunConfig
from pipeline.corpus import open_folders
from pipeline.metrics import METRICS_FILE, read_metrics
from pipeline.model import best_checkpoint, fine_tuned_model, is_fine_tuned, open_data, trained_model
from pipeline.model_card import describe_model, describe_task_model
from pipeline.model_folder import CARD, DTYPES, ExportError, refuse_to_replace, write_model_folder

DATA_MANIFEST = "data_manifest.json"


def export(
    given: Path, output: Path, *, dtype: str = "float32", shards: Sequence[str] = (), overwrite: bool = False
) -> None:
    """Export the checkpoint that `given` names (see best_checkpoint) to `output`, whole or not at all.

    Args:
        dtype: of the weights, a name in DTYPES; amplitudes stay in fp32.
        shards: where the shards of the training lie now, if not where its recipe says; no row of them is read.
        overwrite: replace an earlier export.

    Raises ValueError for input that cannot be exported, ExportError where the proof fails.
    """
    refuse_to_replace(output, overwrite)
    checkpoint = best_checkpoint(given)
    state = read_state(checkpoint)
    if is_fine_tuned(state):
        _export_fine_tuned(checkpoint, state, output, dtype, shards)
        return
    config = settings_from_dict(RunConfig, state.recipe)
    manifests, tokenizer = open_data(open_folders(config.data, shards or None), state)
    model = trained_model(config, tokenizer, checkpoint).to(DTYPES[dtype])
    card = describe_model(model, tokenizer, state, manifests, _read_run(checkpoint, state.step))
    parts = {folder: asdict(manifest) for folder, manifest in manifests.items()}
    data = json_bytes(parts if config.data.mixture else next(iter(parts.values()))).decode()
    write_model_folder(model, tokenizer, output, {CARD: card, DATA_MANIFEST: data})


def _export_fine_tuned(checkpoint: Path, state: TrainState, output: Path, dtype: str, shards: Sequence[str]) -> None:
    if shards:
        raise ValueError(
            f"--shards {shards[0]} has no effect on a fine-tuned run, which has its tokenizer: leave it out"
        )
    model, tokenizer = fine_tuned_model(checkpoint)
    model = model.to(DTYPES[dtype])
    card = describe_task_model(model, state, _read_run(checkpoint, state.step))
    write_model_folder(model, tokenizer, output, {CARD: card})


def _read_run(checkpoint: Path, last_step: int) -> list[dict]:
    """What the run has measured up to the checkpoint; nothing where the checkpoint lies outside a run."""
    path = checkpoint.resolve().parent.parent / METRICS_FILE
    return [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where the proof fails; 2 for input that cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "checkpoint", type=Path, help="a run, for its newest checkpoint (of a fine-tuned one its best); or a checkpoint"
    )
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    parser.add_argument(
        "--shards",
        action="append",
        default=[],
        metavar="FOLDER",
        help="the run's shards, where they have moved; repeated, of a mixture",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    try:
        return run_command(lambda: _run(options))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> None:
    settings = {"dtype": options.dtype, "shards": options.shards, "overwrite": options.overwrite}
    export(options.checkpoint, options.output, **settings)
    print(f"exported to {options.output}; the folder opens by itself and gives the checkpoint's outputs to the bit")


if __name__ == "__main__":
    sys.exit(main())
