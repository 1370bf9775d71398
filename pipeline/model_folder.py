"""Folders that transformers opens: written whole with the code of the model and proved, and read without that code."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME

from data_prep.files import sync_file, sync_folder
from data_prep.tokenization import load_tokenizer, vocabulary_size
from models.amplitudes import spiking_stack
from models.auto import auto_class_name, save_with_code
from models.config import SpikeLMConfig
from models.modeling import AUTO_CLASSES, SpikeLMPreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CARD = "README.md"
LONGEST_PROBE = 512  # tokens, where positions are rotated: longer ones use no other weights
PROBE = Path(__file__).with_name("probe.py")


class ExportError(RuntimeError):
    """The folder does not compute what the checkpoint's model computes; nothing was exported."""


def write_model_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, files: dict[str, str]
) -> None:
    """Write the model to `output`, in place of an earlier folder, whole or not at all; `files` are put beside it.

    Raises ExportError where the folder does not open by itself and compute what `model` computes, to the bit.
    """
    with _whole_folder(output) as folder:
        _write(model, tokenizer, folder)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        prove(model, folder)


def read_model_folder(folder: Path, dtype: str | None = None) -> tuple[SpikeLMPreTrainedModel, PreTrainedTokenizerFast]:
    """The model in `folder` and its tokenizer. No code of the folder is run, and nothing is fetched.

    Args:
        dtype: of the weights, a name in DTYPES; None: as they are.

    Raises ValueError where the folder does not hold a whole, calibrated model of ours and its tokenizer.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"there is no model in {folder}: give a folder that pipeline.export has made")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not isinstance(config, SpikeLMConfig):
        raise ValueError(f"{folder} holds a model of type {config.model_type}, not {SpikeLMConfig.model_type}")
    tokenizer = load_tokenizer(folder)
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {vocabulary_size(tokenizer)} ids, the model {config.vocab_size}: "
            "they are not of one export"
        )
    return _read_weights(folder, config, dtype).eval(), tokenizer


def _read_weights(folder: Path, config: SpikeLMConfig, dtype: str | None) -> SpikeLMPreTrainedModel:
    heads = {head.__name__: head for head in AUTO_CLASSES.values()}
    head = next((heads[name] for name in config.architectures or () if name in heads), None)
    if head is None:
        raise ValueError(f"{folder / CONFIG_NAME} names no model of ours: architectures is {config.architectures}")
    options = {"config": config, "dtype": dtype or "auto", "local_files_only": True, "trust_remote_code": False}
    try:
        model, report = head.from_pretrained(folder, output_loading_info=True, **options)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {str(error).splitlines()[0]}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights in {folder} lack {', '.join(missing)}: export the model again")
    if not spiking_stack(model).calibrated:
        raise ValueError(f"the model in {folder} is not calibrated: export one that was trained")
    return model


def refuse_to_replace(output: Path, overwrite: bool) -> None:
    """ValueError where something is in the place of `output` that may not be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists: name another folder, or replace it by --overwrite")
    config = output / CONFIG_NAME
    if not config.is_file() or f'"{SpikeLMConfig.model_type}"' not in config.read_text(encoding="utf-8"):
        raise ValueError(f"{output} is no export of ours, so --overwrite leaves it alone: name another folder")


def prove(model: PreTrainedModel, folder: Path) -> None:
    """Open `folder` in a new process without our code and compare all outputs on a probe batch with `model`'s.

    They must be equal to the bit. Raises ExportError where they are not, or the folder does not open.
    """
    inputs, stack = probe_batch(model.config), spiking_stack(model)
    # As the folder, which carries nothing compiled: other backends sum statistics in another order.
    stack.set_spike_backend("torch", stack.amplitudes.device)
    with torch.no_grad():
        expected = dict(model.eval()(**inputs))
    stack.set_spike_backend("auto", stack.amplitudes.device)
    with TemporaryDirectory() as scratch:
        found = _run_elsewhere(folder, auto_class_name(model, AUTO_CLASSES), inputs, Path(scratch))
    differing = [name for name, tensor in expected.items() if name not in found or not torch.equal(tensor, found[name])]
    if differing:
        raise ExportError(f"the exported model computes other {', '.join(differing)} than the checkpoint's")


def probe_batch(config: SpikeLMConfig) -> dict[str, Tensor]:
    """Two rows of random tokens that use every learned position and every segment; the second one half padding."""
    length = (
        min(config.max_position_embeddings, LONGEST_PROBE) if config.traits.causal else config.max_position_embeddings
    )
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


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    save_with_code(model, AUTO_CLASSES, folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors lets nobody but the owner read what it writes
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


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
