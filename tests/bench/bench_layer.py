"""Our layer against the ordinary one: CPU time of forward and backward, and bytes kept for the backward.

    python -m tests.bench.bench_layer --rows 2 --tokens 64      (a quick try; without arguments BERT-base at B=8, L=128)

T timesteps pass through every weight of a spiking layer, so its measure is the ordinary layer on T times the batch.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from models import amplitudes
from models.config import SpikeLMConfig, preset
from models.layers import SITES, SpikeBlock
from models.stack import build_block
from pipeline.tracing import LiveBytes
from tests.bench.tables import cpu_seconds, format_table, machine, median_and_spread

ORDINARY_T = "ordinary, T times the batch"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all variants and print one table."""
    options = _parse(arguments)
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.dropout}
    config = preset(options.preset, neuron={"num_timesteps": options.timesteps}, **dropout)
    variants = build_variants(config, options.rows, options.tokens)
    kept = {name: bytes_kept(forward) for name, forward in variants.items()}
    seconds = cpu_seconds({name: _training_pass(forward) for name, forward in variants.items()}, options.rounds)
    base_seconds = statistics.median(seconds[ORDINARY_T])
    rows = [
        [
            name,
            median_and_spread(seconds[name]),
            f"{statistics.median(seconds[name]) / base_seconds:.2f}",
            f"{kept[name] / 1e6:.1f}",
            f"{kept[name] / kept[ORDINARY_T]:.2f}",
        ]
        for name in variants
    ]
    print(
        f"One layer of {options.preset}: B={options.rows}, L={options.tokens}, T={options.timesteps}, fp32, "
        f"dropout {options.dropout}; forward and backward, {options.rounds} alternations; {machine()}"
    )
    print(format_table(["layer", "CPU-s, median (range)", "ratio", "kept for backward, MB", "ratio"], rows))


def build_variants(config: SpikeLMConfig, rows: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The forward pass of each kind of layer, in training mode, by name."""
    x_TBLD = torch.randn(config.num_timesteps, rows, tokens, config.hidden_size, requires_grad=True)
    many, few = (x.detach().clone().requires_grad_() for x in (x_TBLD.flatten(0, 1), x_TBLD[0]))
    ordinary = _ordinary_layer(config)
    spiking, alphas = _spiking_layer(config, x_TBLD)

    def without_statistics() -> Tensor:
        nothing = torch.zeros(len(amplitudes.STATISTICS), dtype=torch.float64)
        with mock.patch.object(amplitudes, "_measure", lambda *_: nothing):
            return spiking(x_TBLD, alphas)[0]

    return {
        "spiking": lambda: spiking(x_TBLD, alphas)[0],
        "spiking, nothing measured": without_statistics,
        ORDINARY_T: lambda: ordinary(many),
        "ordinary, same batch": lambda: ordinary(few),
    }


def bytes_kept(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages made by the forward that live on when only its graph is left, for the backward."""
    live = LiveBytes("cpu")
    with live:
        graph = forward().grad_fn
    assert graph is not None
    return live.live


def _spiking_layer(config: SpikeLMConfig, x_TBLD: Tensor) -> tuple[SpikeBlock, Tensor]:
    """A layer, and its amplitudes calibrated on x."""
    layer = build_block(config)
    alphas = torch.full((len(SITES), config.num_timesteps), float("nan"))
    with torch.no_grad():
        layer.eval()(x_TBLD, alphas, calibrate=True)
    return layer.train(), alphas


def _ordinary_layer(config: SpikeLMConfig) -> BertLayer:
    shape = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
    same = {name: getattr(config, name) for name in (*shape, "hidden_dropout_prob", "attention_probs_dropout_prob")}
    return BertLayer(BertConfig(**same, attn_implementation="sdpa")).train()


def _training_pass(forward: Callable[[], Tensor]) -> Callable[[], None]:
    gradient = torch.randn_like(forward())
    return lambda: forward().backward(gradient)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows in the batch, B")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row, L")
    parser.add_argument("--timesteps", type=int, default=4, help="spike timesteps, T")
    parser.add_argument("--preset", default="encoder-base", help="whose layer to measure")
    parser.add_argument("--dropout", type=float, default=0.0, help="where it is not 0, CPUs have no fused attention")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all variants")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
