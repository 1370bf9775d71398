"""Our layer against the ordinary one: CPU time of forward and backward, and bytes kept for the backward.

    python -m tests.bench.bench_layer --rows 2 --tokens 64      (a quick try; without arguments BERT-base at B=8, L=128)

T timesteps pass through every weight of a spiking layer, so its measure is the ordinary layer on T times the batch.
"nothing summed up" leaves out the statistics' last sums, not what encode counts while it has each element at hand.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from models.amplitudes import STATISTICS, BlockNeurons
from models.config import SpikeLMConfig, preset
from models.layers import SITES, SpikeBlock
from models.spike_ops import resolve_backend
from models.stack import build_block
from pipeline.engine import keep_heap
from pipeline.tracing import LiveBytes
from tests.bench.tables import format_table, machine, median_and_spread, ratio_and_spread, record, seconds
from tests.tiny import fire_plainly, project_by_fire

ORDINARY_T, ORDINARY = "ordinary, T times the batch", "ordinary, same batch"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all variants, print one table, and with --record keep the raw figures."""
    options = _parse(arguments)
    torch.manual_seed(0)
    keep_heap()  # as training does
    device = torch.device(options.device)
    dropout = {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.dropout}
    config = preset(options.preset, neuron={"num_timesteps": options.timesteps}, **dropout)
    variants = build_variants(config, options.rows, options.tokens, device)
    kept = {name: bytes_kept(forward) for name, forward in variants.items()}
    taken = seconds({name: _training_pass(forward) for name, forward in variants.items()}, options.rounds, device)
    rows = [
        [
            name,
            median_and_spread(taken[name]),
            ratio_and_spread(taken[name], taken[ORDINARY_T]),
            f"{kept[name] / 1e6:.1f}",
            f"{kept[name] / kept[ORDINARY]:.2f}",
        ]
        for name in variants
    ]
    setting = f"{options.preset} B={options.rows} L={options.tokens} T={options.timesteps} dropout={options.dropout}"
    print(
        f"One layer, {setting}, fp32 but where bf16 is said; forward and backward, {options.rounds} alternations; "
        f"{machine(device)}"
    )
    unit = "CPU-s" if device.type == "cpu" else "s"
    columns = [f"{unit}, median (range)", "by T x ordinary", "kept for backward, MB", "by ordinary"]
    print(format_table(["layer", *columns], rows))
    if options.record:
        record("layer", setting, unit, taken, device)
        record("layer", setting, "bytes kept", {name: [size] for name, size in kept.items()}, device)


def build_variants(
    config: SpikeLMConfig, rows: int, tokens: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """The forward pass of each kind of layer, in training mode, by name."""
    x_TBLD = torch.randn(config.num_timesteps, rows, tokens, config.hidden_size, device=device, requires_grad=True)
    many, few = (x.detach().clone().requires_grad_() for x in (x_TBLD.flatten(0, 1), x_TBLD[0]))
    ordinary = _ordinary_layer(config).to(device)
    spiking, alphas = _spiking_layer(config, x_TBLD)
    narrow_ordinary, many_narrow = deepcopy(ordinary).bfloat16(), many.detach().bfloat16().requires_grad_()
    narrow, x_narrow = _spiking_layer(config, x_TBLD)[0].bfloat16(), x_TBLD.detach().bfloat16().requires_grad_()

    # Inputs are copied, so that they count where they are kept, and nowhere else.
    def spike(layer: SpikeBlock, x: Tensor, recompute: bool = False, backend: str = "auto") -> Tensor:
        layer.mlp.up.recompute, layer.spike_backend = recompute, backend
        return layer(x.clone(), alphas)[0]

    def plainly() -> Tensor:
        with mock.patch.multiple(BlockNeurons, fire=fire_plainly, project=project_by_fire):
            return spiking(x_TBLD.clone(), alphas)[0]

    nothing = torch.zeros(config.num_timesteps, len(STATISTICS), dtype=torch.float64, device=device)

    def without_statistics() -> Tensor:
        with mock.patch.object(BlockNeurons, "_count", lambda neurons, *_: neurons._sums.append(nothing)):
            return spike(spiking, x_TBLD)

    def activation_apart() -> Tensor:
        with mock.patch.object(BlockNeurons, "fuse_activations", lambda *_: False):
            return spike(spiking, x_TBLD)

    fuses = resolve_backend("auto", device) == "triton"
    return {
        "spiking": partial(spike, spiking, x_TBLD),
        **({"spiking, activation in a launch of its own": activation_apart} if fuses else {}),
        "spiking, hidden recomputed": partial(spike, spiking, x_TBLD, recompute=True),
        "spiking, bf16": partial(spike, narrow, x_narrow),
        "spiking, bf16, hidden recomputed": partial(spike, narrow, x_narrow, recompute=True),
        "spiking, plain torch": partial(spike, spiking, x_TBLD, backend="torch"),
        "spiking, plain autograd": plainly,
        "spiking, nothing summed up": without_statistics,
        ORDINARY_T: lambda: ordinary(many.clone()),
        "ordinary, T times the batch, bf16": lambda: narrow_ordinary(many_narrow.clone()),
        ORDINARY: lambda: ordinary(few.clone()),
    }


def bytes_kept(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages made by the forward that live on when only its graph is left, for the backward."""
    counters = [LiveBytes("cpu"), LiveBytes("cuda")]
    with counters[0], counters[1]:
        graph = forward().grad_fn
    assert graph is not None
    return sum(counter.live for counter in counters)


def _spiking_layer(config: SpikeLMConfig, x_TBLD: Tensor) -> tuple[SpikeBlock, Tensor]:
    """A layer, and its amplitudes calibrated on x."""
    layer = build_block(config).to(x_TBLD.device)
    alphas = torch.full((len(SITES), config.num_timesteps), float("nan"), device=x_TBLD.device)
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="append the raw figures to results.csv")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all variants")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
