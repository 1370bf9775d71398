"""Turn a checkpoint into a model folder for transformers: python -m pipeline.export runs/demo exported/demo

The folder holds weights, config.json, tokenizer, the code of the model, the data's manifest and a model card. It opens
with transformers' Auto classes and trust_remote_code=True where nothing but torch and transformers is installed; that
it does, and computes what the checkpoint's model computes, is proved before it gets its name.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.files import sync_file, sync_folder, write_json
from data_prep.recipes import run_command, settings_from_dict
from models.auto import auto_class_name, save_with_code
from models.config import SpikeLMConfig
from models.modeling import AUTO_CLASSES
from pipeline.checkpoint import read_state, resolve_checkpoint
from pipeline.config import RunConfig
from pipeline.metrics import METRICS_FILE, read_metrics
from pipeline.model import open_data, trained_model
from pipeline.model_card import describe_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA_MANIFEST = "data_manifest.json"
PROBE = Path(__file__).with_name("probe.py")


class ExportError(RuntimeError):
    """The folder does not compute what the checkpoint's model computes; nothing was exported."""


def export(
    given: Path, output: Path, *, dtype: str = "float32", shards: Path | None = None, overwrite: bool = False
) -> None:
    """Export the checkpoint that `given` names (see resolve_checkpoint) to `output`, whole or not at all.

    Args:
        dtype: of the weights, a name in DTYPES; amplitudes stay in fp32.
        shards: where the shards of the training lie now, if not where its recipe says; no row of them is read.
        overwrite: replace an earlier export.

    Raises ValueError for input that cannot be exported, ExportError where the proof fails.
    """
    _refuse_to_replace(output, overwrite)
    checkpoint = resolve_checkpoint(given)
    state = read_state(checkpoint)
    config = settings_from_dict(RunConfig, state.recipe)
    manifest, tokenizer = open_data(shards or Path(config.data.shards), state)
    model = trained_model(config, tokenizer, checkpoint).to(DTYPES[dtype])
    card = describe_model(model, tokenizer, state, manifest, _read_run(checkpoint, state.step))
    with _whole_folder(output) as folder:
        _write(model, tokenizer, folder)
        write_json(folder / DATA_MANIFEST, asdict(manifest))
        (folder / "README.md").write_text(card, encoding="utf-8")
        prove(model, folder)


def prove(model: PreTrainedModel, folder: Path) -> None:
    """Open `folder` in a new process without our code and compare all outputs on a probe batch with `model`'s.

    They must be equal to the bit. Raises ExportError where they are not, or the folder does not open.
    """
    inputs = probe_batch(model.config)
    with torch.no_grad():
        expected = dict(model.eval()(**inputs))
    with TemporaryDirectory() as scratch:
        found = _run_elsewhere(folder, auto_class_name(model, AUTO_CLASSES), inputs, Path(scratch))
    differing = [name for name, tensor in expected.items() if name not in found or not torch.equal(tensor, found[name])]
    if differing:
        raise ExportError(f"the exported model computes other {', '.join(differing)} than the checkpoint's")


def probe_batch(config: SpikeLMConfig) -> dict[str, Tensor]:
    """Two rows of random tokens that use every position, and every segment there is; the second one half padding."""
    length = config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(length).expand(2, length)
    batch = {
        "input_ids": torch.randint(config.vocab_size, (2, length), generator=generator),
        "attention_mask": (position < torch.tensor([[length], [(length + 1) // 2]])).long(),
    }
    if config.type_vocab_size is not None:
        batch["token_type_ids"] = (position >= length // 3).long().clamp(max=config.type_vocab_size - 1)
    return batch


def _run_elsewhere(folder: Path, auto_class: str, inputs: dict[str, Tensor], scratch: Path) -> dict[str, Tensor]:
    """What the model in `folder` gives for `inputs` in a process that starts in, and has as its home, `scratch`."""
    save_file(inputs, scratch / "inputs.safetensors")
    # As many threads as here: how a sum is divided among them decides its rounding.
    arguments = [folder.resolve(), auto_class, scratch, torch.get_num_threads()]
    home = {name: str(scratch) for name in ("HOME", "HF_HOME", "HF_MODULES_CACHE")}
    result = subprocess.run(
        [sys.executable, "-I", str(PROBE), *map(str, arguments)],
        cwd=scratch,
        env={**os.environ, **home, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ExportError(f"the exported folder does not open in a process of its own:\n{result.stderr.strip()}")
    return load_file(scratch / "outputs.safetensors")


def _read_run(checkpoint: Path, last_step: int) -> list[dict]:
    """What the run has measured up to the checkpoint; nothing where the checkpoint lies outside a run."""
    path = checkpoint.resolve().parent.parent / METRICS_FILE
    return [record for record in read_metrics(path) if record["step"] <= last_step] if path.exists() else []


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    save_with_code(model, AUTO_CLASSES, folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors lets nobody but the owner read what it writes
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _refuse_to_replace(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists: name another folder, or replace it by --overwrite")
    if not (output / DATA_MANIFEST).is_file():
        raise ValueError(f"{output} is no export of ours, so --overwrite leaves it alone: name another folder")


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A new folder that takes the name `output`, in place of what has it, after the body; removed where that raises."""
    output = output.resolve()
    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed export
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.iterdir():
            sync_file(path)
        if output.exists():
            shutil.rmtree(output)
        os.replace(unfinished, output)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    sync_folder(output.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where the proof fails; 2 for input that cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a run, as runs/demo, for its newest checkpoint; or a checkpoint")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="the run's shards, where they have moved")
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
