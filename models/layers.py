"""One spiking transformer layer in BERT's shape: attention and MLP, each linear layer behind a neuron.

Legend: T spike timesteps (first), B batch, L tokens, D width, H heads, K width of a head, F width of the MLP.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .amplitudes import BlockNeurons
from .config import NeuronConfig, SpikeLMConfig

SITES = ("qkv", "key", "value", "attention_output", "mlp_up", "mlp_down")
"""The neurons of a block in the order of the flow: each has its row in the amplitude table."""

QKV, KEY, VALUE, ATTENTION_OUTPUT, MLP_UP, MLP_DOWN = range(len(SITES))


class SpikeAttention(nn.Module):
    """Self-attention on spikes: one neuron and one product for q, k, v; keys and values are spiked once more.

    Queries and softmax stay real. Keys and values fire without membrane, after their projection.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_TBLD: Tensor, neurons: BlockNeurons, mask_B11L: Tensor | None) -> Tensor:
        q, k, v = self.qkv(neurons.fire(QKV, x_TBLD)).chunk(3, dim=-1)
        k = neurons.fire(KEY, k, memoryless=True)
        v = neurons.fire(VALUE, v, memoryless=True)
        # A view of q would keep the real k and v alive until the backward.
        context = self._attend(q.contiguous(), k, v, mask_B11L)
        return self.output(neurons.fire(ATTENTION_OUTPUT, context))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask_B11L: Tensor | None) -> Tensor:
        T, B, L, D = q.shape
        q, k, v = (x.reshape(T * B, L, self.num_heads, D // self.num_heads).transpose(1, 2) for x in (q, k, v))
        mask = None if mask_B11L is None else mask_B11L.repeat(T, 1, 1, 1)
        dropout = self.dropout if self.training else 0.0
        context_THLK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return context_THLK.transpose(1, 2).reshape(T, B, L, D)


class SpikeMLP(nn.Module):
    """Two linear layers, each behind a neuron, with the activation between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[activation]
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x_TBLD: Tensor, neurons: BlockNeurons) -> Tensor:
        hidden_TBLF = self.activation(self.up(neurons.fire(MLP_UP, x_TBLD)))
        return self.down(neurons.fire(MLP_DOWN, hidden_TBLF))


class SpikeBlock(GradientCheckpointingLayer):
    """One post-norm layer. It keeps nothing between calls: amplitudes come in, statistics go out."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.neuron: NeuronConfig = config.neuron
        self.attention = SpikeAttention(
            config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob
        )
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SpikeMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x_TBLD: Tensor,
        amplitudes: Tensor,
        mask_B11L: Tensor | None = None,
        counted_BL: Tensor | None = None,
        calibrate: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns the hidden states [T, B, L, D] and the sums of SpikeStats [sites, T, 5].

        Args:
            amplitudes: this block's rows of the table, [sites, T].
            mask_B11L: True where a token may be attended to.
            counted_BL: True where a token counts in the statistics.
            calibrate: fill `amplitudes` in, site after site.
        """
        neurons = BlockNeurons(self.neuron, amplitudes, counted_BL, calibrate)
        x_TBLD = self.attention_norm(x_TBLD + self.dropout(self.attention(x_TBLD, neurons, mask_B11L)))
        x_TBLD = self.mlp_norm(x_TBLD + self.dropout(self.mlp(x_TBLD, neurons)))
        return x_TBLD, neurons.stats().to(x_TBLD.device)


def block_sites(neuron: NeuronConfig) -> tuple[str, ...]:
    """The sites of a block with this kind of neuron: none for the ordinary transformer."""
    return () if neuron.kind == "none" else SITES
