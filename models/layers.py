"""One spiking transformer layer: attention and MLP, each linear layer behind a neuron.

Legend: T spike timesteps (first), B batch, L tokens, D width, H heads, K width of a head, F width of the MLP.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .amplitudes import BlockNeurons
from .cache import SpikeCacheLayer
from .config import SITES, NeuronConfig
from .positions import WHOLE_ROWS, BatchLayout, TokenPlaces, rotate
from .spike_linear import Activation, FusedActivation
from .spike_ops import Backend

QKV, KEY, VALUE, ATTENTION_OUTPUT, MLP_UP, MLP_DOWN = range(len(SITES))

MEMBRANES = (QKV, ATTENTION_OUTPUT, MLP_UP, MLP_DOWN)
"""The sites whose membranes leave something to the next timestep."""


FUSED = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
}
"""Activations that the kernel of the neuron behind them can compute, and as which of spike_ops.ACTIVATIONS."""


@dataclass(frozen=True)
class NormSpec:
    """Which norm, and whether it stands before attention and MLP or behind the residual sum."""

    kind: Literal["layer", "rms"]
    eps: float
    first: bool


@dataclass(frozen=True)
class AttentionSpec:
    """How queries share keys and values, and what they see where no mask is given: all, or (causal) nothing later."""

    num_heads: int
    num_key_value_heads: int
    causal: bool
    bias: bool
    dropout: float


@dataclass(frozen=True)
class MLPSpec:
    """activation(up), or (gated) activation(gate) * up."""

    intermediate_size: int
    activation: str
    gated: bool
    bias: bool


def build_norm(spec: NormSpec, width: int) -> nn.Module:
    """A norm over the last axis."""
    return (nn.LayerNorm if spec.kind == "layer" else nn.RMSNorm)(width, eps=spec.eps)


class SpikeLinear(nn.Linear):
    """A linear layer behind the neuron of a site, and, where one is given, the activation behind it."""

    recompute = False
    """Make what the activation gets again in the backward, instead of keeping it."""

    def forward(
        self,
        x_TBLD: Tensor,
        neurons: BlockNeurons,
        site: int,
        activation: Activation | None = None,
        before: FusedActivation | None = None,
    ) -> Tensor:
        """activation(spikes W^T + b), [T, B, L, out_features or what the activation makes of them].

        `before` makes the neuron's input of x.
        """
        return neurons.project(site, x_TBLD, self.weight, self.bias, activation, self.recompute, before)


class SpikeAttention(nn.Module):
    """Self-attention on spikes: one neuron and one product for q, k, v; keys and values are spiked once more.

    Queries and softmax stay real. Keys and values fire without membrane, after their projection: keys when they have
    been rotated, both before they are repeated for the query heads that share them.
    """

    def __init__(self, hidden_size: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.sharing = spec.num_heads // spec.num_key_value_heads
        self.causal = spec.causal
        self.dropout = spec.dropout
        self.head_width = hidden_size // spec.num_heads
        shared = spec.num_key_value_heads * self.head_width
        self.widths = (hidden_size, shared, shared)
        self.qkv = SpikeLinear(hidden_size, sum(self.widths), bias=spec.bias)
        self.output = SpikeLinear(hidden_size, hidden_size, bias=spec.bias)

    def forward(
        self,
        x_TBLD: Tensor,
        neurons: BlockNeurons,
        layout: BatchLayout,
        cache: SpikeCacheLayer | None = None,
    ) -> Tensor:
        q, k, v = self.qkv(x_TBLD, neurons, QKV).split(self.widths, dim=-1)
        if layout.rotary is None:
            q = q.contiguous()  # a view of q would keep the real k and v alive until the backward
        else:
            q, k = rotate(q, layout.rotary), rotate(k, layout.rotary)
        k = neurons.fire(KEY, k, memoryless=True)
        v = neurons.fire(VALUE, v, memoryless=True)
        if cache is not None:
            k, v = cache.update(k, v, neurons.worth(KEY, k.dtype), neurons.worth(VALUE, v.dtype))
        for_heads = partial(self._for_heads, places=layout.places)
        k, v = for_heads(k), for_heads(v)
        with nullcontext() if cache is not None else neurons.keeping_codes({KEY: k, VALUE: v}, for_heads):
            context_TBLD = self._attend(q, k, v, layout)
        return self.output(context_TBLD, neurons, ATTENTION_OUTPUT)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout) -> Tensor:
        """What each token takes up, in the shape of q; keys and values are given head by head."""
        context_THLK = F.scaled_dot_product_attention(
            self._by_head(q, layout.places),
            k,
            v,
            attn_mask=layout.mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and layout.mask is None,
        )
        context_TBLD = context_THLK.transpose(1, 2).flatten(2).unflatten(0, (len(q), -1))
        return context_TBLD if layout.places is None else layout.places.pack(context_TBLD)

    def _by_head(self, x: Tensor, places: TokenPlaces | None) -> Tensor:
        """[T * B, H, L, K]; where tokens stand in one row, put back into the rows of the batch."""
        x = x if places is None else places.pad(x)
        T, B, L, D = x.shape
        return x.reshape(T * B, L, D // self.head_width, self.head_width).transpose(1, 2)

    def _for_heads(self, x: Tensor, places: TokenPlaces | None) -> Tensor:
        """Keys or values head by head, repeated for the query heads that share them."""
        by_head = self._by_head(x, places)
        # Not by enable_gqa, with which a mask leaves no fused kernel but the CPU's.
        return by_head.repeat_interleave(self.sharing, dim=1) if self.sharing > 1 else by_head


class SpikeMLP(nn.Module):
    """Two linear layers, each behind a neuron, with the activation between them; gate and up are one product.

    The activation is computed behind the first, or (FUSED, in Triton) by the kernel of the neuron before the second.
    """

    def __init__(self, hidden_size: int, spec: MLPSpec) -> None:
        super().__init__()
        self.gated = spec.gated
        self.up = SpikeLinear(hidden_size, (2 if spec.gated else 1) * spec.intermediate_size, bias=spec.bias)
        self.activation = ACT2FN[spec.activation]
        fused = FUSED.get(spec.activation)
        self.fused = None if fused is None else FusedActivation(fused, spec.gated)
        self.down = SpikeLinear(spec.intermediate_size, hidden_size, bias=spec.bias)

    def forward(self, x_TBLD: Tensor, neurons: BlockNeurons) -> Tensor:
        # What is made again is made of the first layer's weight, which only that layer's own backward is sure to have.
        if self.fused is not None and not self.up.recompute and neurons.fuse_activations(x_TBLD.device):
            return self.down(self.up(x_TBLD, neurons, MLP_UP), neurons, MLP_DOWN, before=self.fused)
        return self.down(self.up(x_TBLD, neurons, MLP_UP, self._activate), neurons, MLP_DOWN)

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(hidden)
        gate, hidden = hidden.chunk(2, dim=-1)
        return self.activation(gate) * hidden


class SpikeBlock(GradientCheckpointingLayer):
    """One layer. It keeps nothing between calls: amplitudes come in, statistics go out.

    With `timesteps_per_cell` set, training runs T in cells of so many timesteps, each of which hands the membranes'
    carries to the next, and keeps of a cell only what goes into it: the backward runs it again.
    """

    timesteps_per_cell: int | None = None
    spike_backend: Backend = "auto"
    trains_rate = False

    def __init__(
        self,
        hidden_size: int,
        neuron: NeuronConfig,
        norm: NormSpec,
        attention: AttentionSpec,
        mlp: MLPSpec,
        dropout: float,
    ) -> None:
        super().__init__()
        self.neuron = neuron
        self.norm_first = norm.first
        self.attention = SpikeAttention(hidden_size, attention)
        self.attention_norm = build_norm(norm, hidden_size)
        self.mlp = SpikeMLP(hidden_size, mlp)
        self.mlp_norm = build_norm(norm, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_TBLD: Tensor,
        amplitudes: Tensor,
        layout: BatchLayout = WHOLE_ROWS,
        calibrate: bool = False,
        cache: SpikeCacheLayer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the hidden states [T, B, L, D] and the sums of SpikeStats [sites, T, 5].

        Args:
            amplitudes: this block's rows of the table, [sites, T].
            layout: of the batch.
            calibrate: fill `amplitudes` in, site after site.
            cache: keys and values of the tokens before these, to which theirs are added.
        """
        if self._has_cells(len(x_TBLD)) and not calibrate:
            return self._run_cells(x_TBLD, amplitudes, layout)
        neurons = self._neurons(amplitudes, layout.counted_BL, calibrate)
        return self._run(x_TBLD, neurons, layout, cache), neurons.stats().to(x_TBLD.device)

    def _neurons(
        self,
        amplitudes: Tensor,
        counted_BL: Tensor | None,
        calibrate: bool = False,
        carries: dict[int, Tensor] | None = None,
    ) -> BlockNeurons:
        checkpointed = self.gradient_checkpointing and self.training
        return BlockNeurons(
            self.neuron,
            amplitudes,
            counted_BL,
            calibrate,
            carries,
            self.spike_backend,
            checkpointed=checkpointed,
            trains_rate=self.trains_rate,
        )

    def _run(
        self, x_TBLD: Tensor, neurons: BlockNeurons, layout: BatchLayout, cache: SpikeCacheLayer | None = None
    ) -> Tensor:
        if self.norm_first:
            x_TBLD = x_TBLD + self.dropout(self.attention(self.attention_norm(x_TBLD), neurons, layout, cache))
            return x_TBLD + self.dropout(self.mlp(self.mlp_norm(x_TBLD), neurons))
        x_TBLD = self.attention_norm(x_TBLD + self.dropout(self.attention(x_TBLD, neurons, layout, cache)))
        return self.mlp_norm(x_TBLD + self.dropout(self.mlp(x_TBLD, neurons)))

    def _has_cells(self, num_timesteps: int) -> bool:
        cell = self.timesteps_per_cell
        return cell is not None and cell < num_timesteps and self.training and torch.is_grad_enabled()

    def _run_cells(self, x_TBLD: Tensor, amplitudes: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor]:
        outputs, sums, carries = [], [], ()
        for x_cell, alphas in zip(
            x_TBLD.split(self.timesteps_per_cell), amplitudes.split(self.timesteps_per_cell, dim=1), strict=True
        ):
            part = layout.of_timesteps(len(x_cell) / len(x_TBLD))
            output, cell_sums, carries = checkpoint(self._cell, x_cell, alphas, part, *carries, use_reentrant=False)
            outputs.append(output)
            sums.append(cell_sums)
        return torch.cat(outputs), torch.cat(sums, dim=1)

    def _cell(
        self, x_TBLD: Tensor, amplitudes: Tensor, layout: BatchLayout, *carries: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        by_site = dict(zip(MEMBRANES, carries, strict=False))  # the first cell has none
        neurons = self._neurons(amplitudes, layout.counted_BL, carries=by_site)
        return self._run(x_TBLD, neurons, layout), neurons.stats().to(x_TBLD.device), list(by_site.values())


def block_sites(neuron: NeuronConfig) -> tuple[str, ...]:
    """The sites of a block with this kind of neuron: none for the ordinary transformer."""
    return () if neuron.kind == "none" else SITES
