"""Text from an exported decoder: python -m pipeline.generate exported/decoder --prompt "The capital of"

One prompt's text is shown as it comes. Prompts from a file, in batches of similar length, become JSON lines of prompt,
text (what follows the prompt), tokens (new ones), and the tokens_per_second and spikes_per_token of their batch.
The next token is the most probable one, unless a temperature, top-p or top-k asks for sampling.

Spikes per token: spikes of either sign at all sites and timesteps, for every token that the model has seen: those of
prompts, of all beams, and of rows that wait at their end for longer ones.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from data_prep.files import atomic_file
from data_prep.recipes import run_command
from models.amplitudes import SpikeStats, keep_timesteps, spiking_stack
from models.modeling import SpikeLMForCausalLM
from models.outputs import SpikeLMCausalLMOutput
from pipeline.model_folder import DTYPES, read_model_folder
from pipeline.options import bounded, count, positive, usable_device

DEFAULT_NEW_TOKENS = 64
INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class Search:
    """How the next tokens are found. Raises ValueError, naming the option, for what cannot work or has no effect."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and not self.samples:
            raise ValueError(f"--seed {self.seed}: nothing is drawn: give --temperature, --top-p or --top-k as well")
        if self.num_return_sequences > self.num_beams and (self.num_beams > 1 or not self.samples):
            raise ValueError(
                f"--num-return-sequences {self.num_return_sequences}: this search finds {self.num_beams}: sample by "
                f"--temperature, or give --num-beams {self.num_return_sequences}"
            )

    @property
    def samples(self) -> bool:
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k))

    @property
    def finds_one(self) -> bool:
        """Whether there is one text, known token by token."""
        return self.num_beams == self.num_return_sequences == 1

    def options(self) -> dict[str, Any]:
        """For `generate`."""
        chosen = {"temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
            "do_sample": self.samples,
            **(chosen if self.samples else {}),
        }


@dataclass(frozen=True)
class Work:
    """What generating has taken and given: tokens are the new ones of all texts, stats are of all forwards."""

    tokens: int
    seconds: float
    stats: SpikeStats
    width: int  # elements of a token at the first site

    def __add__(self, other: "Work") -> "Work":
        tokens, seconds = self.tokens + other.tokens, self.seconds + other.seconds
        return Work(tokens, seconds, self.stats + other.stats, self.width)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def spikes_per_token(self) -> float | None:
        """None for a model that does not spike."""
        return self.stats.spikes_per_token(self.width) if len(self.stats.sums) else None


def open_decoder(
    folder: Path, *, dtype: str | None = None, device: str | None = None, num_timesteps: int | None = None
) -> tuple[SpikeLMForCausalLM, PreTrainedTokenizerBase]:
    """The decoder in `folder` and its tokenizer. No code of the folder is run, and nothing is fetched.

    Args:
        dtype: of the weights, a name in DTYPES; None: as they are.
        num_timesteps: run the first so many alone; None: all.

    Raises ValueError where the folder does not hold a whole, calibrated decoder and its tokenizer.
    """
    model, tokenizer = read_model_folder(folder, dtype)
    if not isinstance(model, SpikeLMForCausalLM):
        raise ValueError(
            f"{folder} holds an encoder (family {model.config.family}), which writes no text: give a decoder"
        )
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    if num_timesteps is not None:
        keep_timesteps(model, num_timesteps)
    return model.to(usable_device(device)).eval(), tokenizer


def read_prompts(path: Path, field: str) -> list[str]:
    """The prompts in a file: lines that are not empty or, from .jsonl, the `field` of each line's object.

    Raises ValueError, naming the line, for one that holds no prompt, and where there is none at all.
    """
    try:
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path} cannot be read: {error}: give a file of UTF-8 text") from error
    filled = [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]
    if not filled:
        raise ValueError(f"--prompts {path} holds no prompt: write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in filled]
    return [_prompt_in(line, field, f"{path}, line {number}") for number, line in filled]


def _prompt_in(line: str, field: str, place: str) -> str:
    try:
        prompt = json.loads(line)[field]
    except (ValueError, TypeError, KeyError, IndexError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: no JSON object with a text as its {field!r}: mend it, or name another --field")
    return prompt


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_positions: int) -> list[list[int]]:
    """The ids of each prompt. ValueError for one without any, and for one that leaves the model no position."""
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        name = f"prompt {number} ({prompt[:20]!r})"
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half a character, or bytes that are no UTF-8: mend it") from None
        encoded.append(tokenizer(prompt)["input_ids"])
        if not encoded[-1]:
            raise ValueError(f"{name} has no token: write something")
        if len(encoded[-1]) >= max_positions:
            raise ValueError(f"{name} has {len(encoded[-1])} tokens, the model {max_positions} positions: shorten it")
    return encoded


def fit(search: Search, encoded: Sequence[Sequence[int]], max_positions: int) -> Search:
    """`search` with so many new tokens as were asked for, or as there is room for where nothing was.

    Raises ValueError where they have no room behind the longest prompt.
    """
    longest = max(map(len, encoded))
    room = max_positions - longest
    if search.max_new_tokens is not None and search.max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {search.max_new_tokens}: the longest prompt has {longest} tokens, the model "
            f"{max_positions} positions: ask for {room} at most"
        )
    return replace(search, max_new_tokens=search.max_new_tokens or min(room, DEFAULT_NEW_TOKENS))


def batches_by_length(encoded: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The numbers of the prompts in each batch: neighbours in length, so that little is padding."""
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def complete(
    model: SpikeLMForCausalLM,
    encoded: Sequence[Sequence[int]],
    search: Search,
    streamer: TextStreamer | None = None,
) -> tuple[list[list[list[int]]], Work]:
    """New ids for every prompt, search.num_return_sequences times, without what follows an end of text."""
    length = max(map(len, encoded))
    pad_id = model.config.pad_token_id or 0
    rows = torch.tensor([[pad_id] * (length - len(ids)) + list(ids) for ids in encoded], device=model.device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    begin = time.perf_counter()
    with _stats_of(model) as stats:
        options = {"pad_token_id": pad_id, "streamer": streamer, **search.options()}
        found = model.generate(rows, attention_mask=mask, **options)[:, length:].tolist()
    seconds = time.perf_counter() - begin
    new = [_until_end(ids, _end_ids(model)) for ids in found]
    work = Work(sum(map(len, new)), seconds, stats, model.config.hidden_size)
    count = search.num_return_sequences
    return [new[first : first + count] for first in range(0, len(new), count)], work


@contextmanager
def _stats_of(model: SpikeLMForCausalLM) -> Iterator[SpikeStats]:
    """The statistics of every forward of the body."""
    sites, config = len(spiking_stack(model).site_names), model.config
    stats = SpikeStats.zeros(sites, config.num_timesteps, model.device)

    def add(module: nn.Module, inputs: Any, output: SpikeLMCausalLMOutput) -> None:
        stats.sums.add_(output.spike_stats)

    hook = model.register_forward_hook(add)
    try:
        yield stats
    finally:
        hook.remove()


def _end_ids(model: SpikeLMForCausalLM) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def _until_end(ids: list[int], end_ids: set[int]) -> list[int]:
    ends = (place for place, each in enumerate(ids, start=1) if each in end_ids)
    return ids[: next(ends, len(ids))]


def text_behind(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """What new ids add to the text of the prompt: a space that they begin with, which they lose alone, included."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *new_ids], skip_special_tokens=True)
    if whole.startswith(before):
        return whole.removeprefix(before)
    return tokenizer.decode(new_ids, skip_special_tokens=True)


def show(model: SpikeLMForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], search: Search) -> Work:
    """Print the prompt and, as it comes, what follows."""
    _, work = complete(model, [prompt_ids], search, TextStreamer(tokenizer, skip_special_tokens=True))
    return work


def complete_all(
    model: SpikeLMForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    search: Search,
    batch_size: int,
) -> Iterator[tuple[dict[int, list[dict[str, Any]]], Work]]:
    """Batch by batch: the records of each text by the number of its prompt, and the batch's work."""
    for batch in batches_by_length(encoded, batch_size):
        found, work = complete(model, [encoded[number] for number in batch], search)
        records = {
            number: [
                {
                    "prompt": prompts[number],
                    "text": text_behind(tokenizer, encoded[number], ids),
                    "tokens": len(ids),
                    "tokens_per_second": work.tokens_per_second,
                    "spikes_per_token": work.spikes_per_token,
                }
                for ids in texts
            ]
            for number, texts in zip(batch, found, strict=True)
        }
        yield records, work


def write_all(
    batches: Iterator[tuple[dict[int, list[dict[str, Any]]], Work]], num_prompts: int, output: Path | None
) -> Work:
    """Write the records of all batches in the order of the prompts; those there are where it ends early."""
    records: dict[int, list[dict[str, Any]]] = {}
    total = None
    try:
        for found, work in batches:
            records |= found
            total = work if total is None else total + work
    finally:
        _write(list(chain.from_iterable(records[number] for number in sorted(records))), output)
        if len(records) < num_prompts:
            print(f"\nended early: the texts of {len(records)} of {num_prompts} prompts are written", file=sys.stderr)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 for input that cannot work; 130 after Ctrl-C, which leaves the texts of finished batches."""
    try:
        return run_command(lambda: _run(_parse(arguments)))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.generate", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    share = bounded(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")
    add("model", type=Path, help="a decoder's folder, as exported/decoder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="a text to go on from; what follows is shown as it comes")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with a --field each")
    add("--field", metavar="NAME", help="of the prompt in each line of .jsonl (default: prompt)")
    add("--output", type=Path, metavar="FILE", help="new file for the JSON lines (default: standard output)")
    add("--max-new-tokens", type=count, metavar="N", help="(default: 64, or as many as there is room for)")
    add("--temperature", type=positive, metavar="X", help="sample from the probabilities to the power 1/X")
    add("--top-p", type=share, metavar="X", help="sample from the most probable tokens that have this share together")
    add("--top-k", type=count, metavar="N", help="sample from so many of the most probable tokens")
    add("--num-beams", type=count, default=1, metavar="N", help="search so many texts at once (default: 1)")
    add("--num-return-sequences", type=count, default=1, metavar="N", help="texts for each prompt (default: 1)")
    add("--seed", type=bounded(int, lambda value: value >= 0, "a whole number from 0 on"), help="(default: 0)")
    add("--batch-size", type=count, metavar="N", help="prompts in a batch (default: 8)")
    add("--num-timesteps", type=count, metavar="T", help="use the model's first timesteps alone (default: all)")
    add("--dtype", choices=DTYPES, help="type of the weights (default: as they are)")
    add("--device", help="(default: cuda where there is one, else cpu)")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    _refuse_without_effect(options)
    search = Search(**{field.name: getattr(options, field.name) for field in fields(Search)})
    single = options.prompts is None
    prompts = [options.prompt] if single else read_prompts(options.prompts, options.field or "prompt")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = open_decoder(
        options.model, dtype=options.dtype, device=device, num_timesteps=options.num_timesteps
    )
    encoded = encode_prompts(tokenizer, prompts, model.config.max_position_embeddings)
    search = fit(search, encoded, model.config.max_position_embeddings)
    torch.manual_seed(search.seed or 0)
    if single and search.finds_one and options.output is None:
        work = show(model, tokenizer, encoded[0], search)
    else:
        batches = complete_all(model, tokenizer, prompts, encoded, search, options.batch_size or 8)
        work = write_all(batches, len(prompts), options.output)
    spikes = "no spikes" if work.spikes_per_token is None else f"{work.spikes_per_token:,.0f} spikes per token"
    print(f"{work.tokens:,} new tokens, {work.tokens_per_second:,.1f} tokens/s, {spikes}", file=sys.stderr)


def _refuse_without_effect(options: argparse.Namespace) -> None:
    """ValueError for options that nothing would come of, and for a result that exists."""
    if options.field is not None and (options.prompts is None or options.prompts.suffix != ".jsonl"):
        raise ValueError(f"--field {options.field}: only a .jsonl file of --prompts has fields: leave it out")
    if options.batch_size is not None and options.prompts is None:
        raise ValueError(f"--batch-size {options.batch_size}: there is one prompt: leave it out")
    if options.output is not None and options.output.exists():
        raise ValueError(f"--output {options.output} exists: name another file")


def _write(records: Sequence[dict[str, Any]], output: Path | None) -> None:
    if not records:
        return
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if output is None:
        sys.stdout.write(lines)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as file:
        file.write(lines.encode())


if __name__ == "__main__":
    sys.exit(main())
