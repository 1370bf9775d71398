"""Turns a LLaMA-shaped model into a spiking one: python -m pipeline.convert LLAMA_FOLDER OUTPUT --text FILE

The weights are taken as they are; the amplitudes are measured on the text. What the model loses by that is printed and
written on the card: its loss on the same text before, as an ordinary network, and after. To win it back, train on, with
model.warm_start naming the same folder.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from data_prep.files import read_json
from data_prep.recipes import run_command
from data_prep.tokenization import load_tokenizer, vocabulary_size
from models.amplitudes import calibrate_amplitudes, spiking_stack
from models.config import NeuronConfig
from models.modeling import SpikeLMForCausalLM
from models.warm_start import CheckpointTensors, llama_config, load_llama
from pipeline.documents import text_documents
from pipeline.evaluation import Tally, firing_values, perplexity, strided_windows, tally_batches, window_batches
from pipeline.model_card import CODE, DECODER_USAGE, block, hub_header, table
from pipeline.model_folder import CARD, DTYPES, ExportError, refuse_to_replace, write_model_folder
from pipeline.options import bounded, count, positive, usable_device

LOSSES = ("causal_lm",)

USAGE = f"{CODE}\n\n{block('python', DECODER_USAGE)}"


def convert(options: argparse.Namespace) -> str:
    """Convert, and return the report."""
    refuse_to_replace(options.output, options.overwrite)
    settings = read_json(options.llama / "config.json")
    plain = llama_config(settings, NeuronConfig(kind="none"))
    tokenizer, tensors = load_tokenizer(options.llama), CheckpointTensors(options.llama)
    neuron = NeuronConfig(num_timesteps=options.num_timesteps, frequency=options.frequency, reset=options.reset)
    device = usable_device(options.device)
    batches = _batches(options, tokenizer, settings, device)
    ordinary = SpikeLMForCausalLM(plain).eval()
    if vocabulary_size(tokenizer) > ordinary.config.vocab_size:
        raise ValueError(
            f"{options.llama}: the tokenizer has {vocabulary_size(tokenizer)} ids, the model "
            f"{ordinary.config.vocab_size}: they do not belong together"
        )
    load_llama(ordinary.to(device), tensors)
    before = tally_batches(ordinary, batches, LOSSES)
    del ordinary
    spiking = SpikeLMForCausalLM(llama_config(settings, neuron)).eval().to(device)
    load_llama(spiking, tensors)
    calibrate_amplitudes(spiking, batches[0])
    after = tally_batches(spiking, batches, LOSSES)
    report = describe(options, spiking, len(batches[0]["input_ids"]), before, after)
    card = f"{hub_header(spiking)}\n\n{report}"
    write_model_folder(spiking.to("cpu", DTYPES[options.dtype]), tokenizer, options.output, {CARD: card})
    return report


def _batches(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, settings: dict[str, object], device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """At most --windows windows of the text, in batches; the first batch calibrates."""
    length = min(options.window, int(settings.get("max_position_embeddings", options.window)))
    documents = text_documents(options.text, options.text_field, tokenizer)
    windows = chain.from_iterable(strided_windows(ids, length, length - 1) for ids in documents)
    chosen = [window for window, _ in zip(windows, range(options.windows), strict=False)]
    if not chosen:
        raise ValueError(f"{documents.source} holds no document with two tokens: nothing to calibrate on")
    return list(window_batches(chosen, options.batch_size, device))


def describe(
    options: argparse.Namespace, model: SpikeLMForCausalLM, calibrated_on: int, before: Tally, after: Tally
) -> str:
    """The report, which is the new folder's card, too: what was done, and the losses in fp32 before and after."""
    values = [tally.values() for tally in (before, after)]
    losses, accuracies = ([each[f"causal_lm_{name}"] for each in values] for name in ("loss", "accuracy"))
    rows = [
        ["next-token loss (nat/token)", *(f"{loss:.4f}" for loss in losses)],
        ["perplexity", *(f"{perplexity(loss):.4g}" for loss in losses)],
        ["next-token accuracy", *(f"{share:.4f}" for share in accuracies)],
        ["unigram entropy (nat/token)", *(f"{each['unigram_entropy']:.4f}" for each in values)],
    ]
    rates, neuron = firing_values(spiking_stack(model), after.stats), model.config.neuron
    done = (
        f"The weights of {options.llama.name} with elastic spiking neurons over {neuron.num_timesteps} timesteps "
        f"(frequency {neuron.frequency}, reset {neuron.reset}) before every linear layer. Their amplitudes were "
        f"measured on the first {calibrated_on} windows of {', '.join(options.text)}, these losses, in fp32, on "
        f"{int(before.sums[0, 0]):,} tokens of it:"
    )
    measured = table(("", "before, without spikes", "after, with spikes"), rows)
    rate = f"Firing rate, mean over sites: {rates['firing_rate']:.4f}."
    return "\n\n".join([f"# {options.output.name}", done, measured, rate, USAGE]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where the new folder does not open; 2 for input that cannot be converted."""
    length = bounded(int, lambda value: value >= 2, "a whole number from 2 on")
    parser = argparse.ArgumentParser(prog="python -m pipeline.convert", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "llama", type=Path, metavar="LLAMA_FOLDER", help="config.json, tokenizer, weights in safetensors"
    )
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--text", action="append", required=True, help="text to measure on, as data_prep reads it")
    parser.add_argument("--text-field", default="text", help="key of the text in a JSON line (default: text)")
    parser.add_argument("--num-timesteps", type=count, default=4, metavar="T", help="spike timesteps (default: 4)")
    parser.add_argument("--frequency", type=positive, metavar="K", help="larger: fewer spikes (default: the neuron's)")
    parser.add_argument("--reset", choices=("released", "normalized"), help="of the membranes (default: the neuron's)")
    parser.add_argument("--window", type=length, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=count, default=64, help="windows to measure on at most (default: 64)")
    parser.add_argument("--batch-size", type=count, default=16, help="windows at once (default: 16)")
    parser.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier folder of ours")
    options = parser.parse_args(arguments)
    try:
        return run_command(lambda: print(convert(options)))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
