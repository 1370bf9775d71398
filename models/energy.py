"""Operations of a forward and their energy, from firing rates: what papers on spiking networks count, and the rest.

A product with real numbers costs a multiply-accumulate. A product with spikes costs an addition wherever there is a
spike, at every timestep: what the spike is worth can be multiplied once, into the sum. So a linear layer behind a site,
or keys and values of attention, cost (products of the ordinary layer) x (firing rate, summed over timesteps) additions.

Legend: T spike timesteps, L tokens of a row, D width, F width of the MLP, S sites of the stack.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from .config import SpikeLMConfig
from .layers import ATTENTION_OUTPUT, KEY, MLP_DOWN, MLP_UP, QKV, SITES, VALUE, block_sites


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules of one operation in some technology."""

    multiply_accumulate: float
    addition: float


ENERGY_TABLES = {
    "45nm-fp32": EnergyTable(3.7 + 0.9, 0.9),
    "45nm-fp16": EnergyTable(1.1 + 0.4, 0.4),
    "45nm-int8": EnergyTable(0.2 + 0.03, 0.03),
}
"""Of 45 nm: a multiplication and an addition (Horowitz, "Computing's energy problem", ISSCC 2014)."""


@dataclass(frozen=True)
class Operations:
    """How many there are. A root, a quotient, an exponential and a comparison count as what they are closest to."""

    multiply_accumulates: float = 0.0
    additions: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(self.multiply_accumulates + other.multiply_accumulates, self.additions + other.additions)

    def times(self, number: float) -> Self:
        """So many times these."""
        return type(self)(number * self.multiply_accumulates, number * self.additions)

    def joules(self, table: EnergyTable) -> float:
        """Energy in J."""
        picojoules = table.multiply_accumulate * self.multiply_accumulates + table.addition * self.additions
        return picojoules * 1e-12


@dataclass(frozen=True)
class Passed:
    """What went through a model, over all of its forwards."""

    tokens: float
    """No padding among them."""

    pairs: float
    """Of a token and one that it may attend to, itself too."""

    predictions: float = 0.0
    """Tokens that the head over the vocabulary has seen."""

    rows: float = 0.0
    """Rows of which the pooler has seen the first token."""

    answers: float = 0.0
    """Logits of a head over whole rows: so many for each row as it has classes."""

    @classmethod
    def in_rows(cls, lengths: Iterable[int], causal: bool, predictions: float = 0.0, classes: int = 0) -> Self:
        """Rows of so many tokens each, one document in each, and the outputs of a head over whole rows."""
        lengths = list(lengths)
        pairs = sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
        return cls(sum(lengths), pairs, predictions, 0 if causal else len(lengths), len(lengths) * classes)


def products_behind(config: SpikeLMConfig, passed: Passed) -> dict[str, float]:
    """Products of one ordinary layer, each with its sum, behind each of the SITES.

    Behind keys stand the scores, behind values their weighted sum.
    """
    D, F = config.hidden_size, config.intermediate_size
    shared = _key_width(config)
    each = {
        QKV: passed.tokens * D * (D + 2 * shared),
        KEY: passed.pairs * D,
        VALUE: passed.pairs * D,
        ATTENTION_OUTPUT: passed.tokens * D * D,
        MLP_UP: passed.tokens * D * F * _ups(config),
        MLP_DOWN: passed.tokens * F * D,
    }
    return {SITES[site]: products for site, products in each.items()}


def ordinary_operations(config: SpikeLMConfig, passed: Passed) -> Operations:
    """Of the linear layers and the attention of an ordinary transformer of this shape."""
    return Operations(config.num_hidden_layers * sum(products_behind(config, passed).values()))


def spiking_operations(config: SpikeLMConfig, firing_rate_ST: Tensor, passed: Passed) -> dict[str, Operations]:
    """Of the linear layers and the attention, by site: `layer0.qkv` and so on.

    Args:
        firing_rate_ST: from models.amplitudes.SpikeStats, [S, T]. A neuron of kind none has no sites, and fires not at
            all: its products are multiplications.

    Rates are means over the tokens: where rows differ in length, or a token is seen by some only, the additions behind
    keys and values are those of spikes that are spread evenly.
    """
    products, layers = products_behind(config, passed), range(config.num_hidden_layers)
    if not block_sites(config.neuron):
        return {f"layer{layer}.{site}": Operations(number) for layer in layers for site, number in products.items()}
    spikes = firing_rate_ST.double().sum(1).tolist()
    names = [(layer, site) for layer in layers for site in SITES]
    return {
        f"layer{layer}.{site}": Operations(additions=rate * products[site])
        for (layer, site), rate in zip(names, spikes, strict=True)
    }


def other_operations(config: SpikeLMConfig, passed: Passed) -> dict[str, Operations]:
    """Of everything that does not spike, over all layers and timesteps, by what it is for."""
    D, T, tokens = config.hidden_size, config.num_timesteps, passed.tokens
    each_layer = _each_layer(config, passed)
    found = {name: operations.times(T * config.num_hidden_layers) for name, operations in each_layer.items()}
    found["mean over timesteps"] = Operations(tokens * D, (T - 1) * tokens * D)
    if config.traits.positions == "learned":
        found["embeddings"] = Operations(additions=2 * tokens * D) + _norm(config, tokens * D)
    else:
        found["norms"] += _norm(config, tokens * D)
    found["head"] = _head(config, passed)
    return found


def _each_layer(config: SpikeLMConfig, passed: Passed) -> dict[str, Operations]:
    """What a layer does at one timestep beside its products."""
    D, F, tokens, traits = config.hidden_size, config.intermediate_size, passed.tokens, config.traits
    scores = passed.pairs * config.num_attention_heads
    shared = _key_width(config)
    outputs = (D + 2 * shared) + D + _ups(config) * F + D  # of the linear layers, for each token
    found = {
        "softmax": Operations(3 * scores, scores),  # scaled, exponential, summed, divided
        "activation": Operations((3 if traits.gated_mlp else 2) * tokens * F),
        "norms": _norm(config, tokens * D).times(2),
        "residuals": Operations(additions=2 * tokens * D),
    }
    if traits.bias:
        found["biases"] = Operations(additions=tokens * outputs)
    if traits.positions == "rotary":
        found["rotation"] = Operations(2 * tokens * (D + shared), tokens * (D + shared))
    if block_sites(config.neuron):
        remembering, forgetting = tokens * (3 * D + F), tokens * 2 * shared
        # Leak and reset, charge, threshold; keys and values have the threshold alone.
        found["neurons"] = Operations(remembering, 2 * remembering + forgetting)
        if config.neuron.kind == "elastic":
            found["amplitudes"] = Operations(tokens * (outputs + D) + scores)
    return found


def _norm(config: SpikeLMConfig, elements: float) -> Operations:
    """LayerNorm: mean, variance, and one scaling and shift of the centred values; RMSNorm has squares and a scaling."""
    return Operations(3 * elements, 2 * elements) if config.traits.norm == "layer" else Operations(3 * elements)


def _head(config: SpikeLMConfig, passed: Passed) -> Operations:
    """Over the vocabulary, and, of encoders, what stands before it, the pooler, and a head over whole rows."""
    D, V = config.hidden_size, config.vocab_size
    if config.traits.causal:
        return Operations(passed.predictions * D * V)
    transform = Operations(passed.predictions * D * D) + _norm(config, passed.predictions * D)
    rows = Operations(passed.rows * D * D) + Operations(passed.answers * D, passed.answers)
    return transform + Operations(passed.predictions * D * V, passed.predictions * V) + rows


def _key_width(config: SpikeLMConfig) -> int:
    """Of all keys of a token, and of its values, which heads may share."""
    heads = config.num_attention_heads
    return config.hidden_size * (config.num_key_value_heads or heads) // heads


def _ups(config: SpikeLMConfig) -> int:
    return 2 if config.traits.gated_mlp else 1
