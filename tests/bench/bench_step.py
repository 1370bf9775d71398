"""A whole training step against transformers' BERT on T times the batch: time, tokens a second, memory.

    python -m tests.bench.bench_step --layers 2 --rows 2      (a quick try; on a GPU: --rows 64 --precision bf16)

Forward, backward and AdamW of a masked language model; 15 % of the positions count. Tokens are those that are no
padding. Memory is what a step has at its peak, over the weights and states of all models. MFU is the share of the
device's peak (--peak-tflops) that the layers' products of those tokens make up, over T timesteps where they are
spiking, and the head's of those that count: once behind spikes, whose mean over timesteps the head sees. transformers'
BERT makes the logits of all positions; a row tells what is left of the ratio where its head, too, sees no others.

Legend: B batch, L tokens, D width, V vocabulary, T spike timesteps.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from models.amplitudes import SpikeStats, calibrate_amplitudes, update_amplitudes
from models.config import SpikeLMConfig, preset
from models.modeling import SpikeLMForMaskedLM
from pipeline.config import EngineSettings
from pipeline.engine import keep_heap
from tests.bench.tables import format_table, machine, median_and_spread, ratio_and_spread, record, seconds

MASKED = 0.15
LOGITS_AT_ONCE = EngineSettings().logits_at_once
BASE, SAME = "BERT, T times the batch", "BERT, same batch"
LEAN = f"{BASE}, head where it counts"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all variants, print one table, and with --record keep the raw figures."""
    options = _parse(arguments)
    torch.manual_seed(0)
    keep_heap()  # as training does
    device, dtype = torch.device(options.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    config = preset(
        options.preset,
        neuron={"num_timesteps": options.timesteps},
        num_hidden_layers=options.layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = _batch(config.vocab_size, options, device)
    steps = build_steps(config, batch, device, dtype)
    taken = seconds(steps, options.rounds, device)
    tokens = int(batch["attention_mask"].sum())
    counted = int((batch["labels"] != -100).sum())
    rows = []
    for name, values in taken.items():
        median, times = statistics.median(values), options.timesteps if name in (BASE, LEAN) else 1
        figures = [median_and_spread(values), *(ratio_and_spread(values, taken[base]) for base in (BASE, LEAN))]
        figures += [f"{times * tokens / median:,.0f}", _peak(steps[name], device)]
        passes = 1 if name == SAME else options.timesteps
        work = passes * layer_operations(config, tokens, options.tokens) + times * head_operations(config, counted)
        share = work / median / (options.peak_tflops * 1e12) if options.peak_tflops else None
        rows.append([name, *figures, "-" if share is None else f"{share:.0%}"])
    setting = f"{options.preset} layers={options.layers} B={options.rows} L={options.tokens} T={options.timesteps}"
    setting += f" padding={options.padding:g}" if options.padding else ""
    unit = "CPU-s" if device.type == "cpu" else "s"
    print(f"A training step, {setting}, {options.precision}; {options.rounds} alternations; {machine(device)}")
    columns = ["model", f"{unit}, median (range)", "by T x BERT", "its head lean"]
    columns += [f"tokens/{unit}", "over states, GB", "MFU"]
    print(format_table(columns, rows))
    if options.record:
        record("step", f"{setting} {options.precision}", unit, taken, device)


def layer_operations(config: SpikeLMConfig, tokens: int, length: int) -> float:
    """Of the layers' products in a step on so many tokens in rows of `length`, over one timestep: 6 for each weight."""
    D, F = config.hidden_size, config.intermediate_size
    return 6 * tokens * config.num_hidden_layers * (4 * D * D + 2 * D * F + 2 * length * D)


def head_operations(config: SpikeLMConfig, counted: int) -> float:
    """Of the head's products in a step in which so many positions count."""
    return 6 * counted * config.hidden_size * (config.hidden_size + config.vocab_size)


def build_steps(
    config: SpikeLMConfig, batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """A training step of each model, by name."""
    many = {name: tensor.repeat(config.num_timesteps, 1) for name, tensor in batch.items()}
    spiking = SpikeLMForMaskedLM(config).to(device, dtype)
    calibrate_amplitudes(spiking, batch)
    lean = SpikeLMForMaskedLM(config).to(device, dtype)
    calibrate_amplitudes(lean, batch)
    lean.model.stack.set_checkpointing("none", recompute_hidden=True)
    lean.logits_at_once = spiking.logits_at_once = LOGITS_AT_ONCE
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    same = {name: getattr(config, name) for name in (*names, "max_position_embeddings")}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertForMaskedLM(BertConfig(**same, **dropout, attn_implementation="sdpa")).to(device, dtype)
    return {
        "spiking": _step(spiking, batch),
        "spiking, hidden recomputed": _step(lean, batch),
        BASE: _step(bert, many),
        LEAN: _step(_LeanBert(bert), many),
        SAME: _step(bert, batch),
    }


class _LeanBert(nn.Module):
    """transformers' BERT, whose head sees the positions that count, and no others."""

    def __init__(self, bert: BertForMaskedLM) -> None:
        super().__init__()
        self.model = bert

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> MaskedLMOutput:
        hidden_BLD = self.model.bert(input_ids, attention_mask).last_hidden_state
        counted_BL = labels != -100
        logits_NV = self.model.cls(hidden_BLD[counted_BL])
        return MaskedLMOutput(loss=F.cross_entropy(logits_NV.float(), labels[counted_BL]))


def _step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)

    def step() -> None:
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, SpikeLMForMaskedLM):
            update_amplitudes(model, SpikeStats(output.spike_stats))

    return step


def _batch(vocab_size: int, options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Rows from full to empty enough that, in the mean, the share `padding` of them is padding."""
    ids = torch.randint(5, vocab_size, (options.rows, options.tokens), device=device)
    lengths = torch.linspace(1, max(0.0, 1 - 2 * options.padding), options.rows) * options.tokens
    visible = torch.arange(options.tokens, device=device) < lengths.round().to(device)[:, None]
    counted = (torch.rand(ids.shape, device=device) < MASKED) & visible
    return {"input_ids": ids, "labels": ids.where(counted, -100), "attention_mask": visible.long()}


def _peak(step: Callable[[], None], device: torch.device) -> str:
    if device.type == "cpu":
        return "-"
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 1e9:.2f}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="encoder-base", help="whose sizes")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="rows in the batch, B")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row, L")
    parser.add_argument("--timesteps", type=int, default=4, help="spike timesteps, T")
    parser.add_argument("--padding", type=float, default=0.0, help="share of the positions that are padding, up to 0.5")
    parser.add_argument("--peak-tflops", type=float, help="of the device in this precision, for the MFU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all variants")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="append the raw figures to results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
