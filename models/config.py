"""Configuration of neurons and models, and the presets.

SpikeLM: Xing et al., "SpikeLM: Towards General Spike-Driven Language Modeling via Elastic Bi-Spiking Mechanisms",
ICML 2024.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

DEFAULT_LEAK = {"elastic": 0.25, "lif": 0.5, "none": None}


@dataclass(frozen=True)
class NeuronConfig:
    """What stands in front of every linear layer.

    Equations are in `models.neuron`. Fields left at None are filled in by the kind of neuron.
    Raises ValueError, naming the field and its value, for a combination that cannot work.
    """

    kind: Literal["elastic", "lif", "none"] = "elastic"
    """elastic: ternary spikes times an amplitude; lif: binary leaky integrate-and-fire; none: ordinary transformer."""

    num_timesteps: int | None = None
    """Spike timesteps T. Unset: 4, or 1 for kind none."""

    leak: float | None = None
    """Share of the membrane that a timestep hands on. Unset: 0.25 (elastic), 0.5 (lif), none (none)."""

    frequency: float = 2.0
    """k in alpha = k * mean|m|: a neuron fires where |m| > k/2 * mean|m|, so a larger k means fewer spikes."""

    amplitude: Literal["frozen", "tracked"] = "tracked"
    """frozen: the calibrated alpha for ever, as released; tracked: a running mean of k * mean|m|, moved once a step."""

    momentum: float = 0.99
    """Share of the old alpha that a tracked amplitude keeps at each optimizer step."""

    reset: Literal["released", "normalized"] = "released"
    """What a spike leaves of the membrane: m*leak*(alpha-o) (released, for T <= 4); m*leak*(1-|s|) (normalized)."""

    count_padding: bool = False
    """Whether padding counts in amplitudes and firing rates, as it did in the released code (parity only)."""

    def __post_init__(self) -> None:
        if self.kind not in DEFAULT_LEAK:
            raise ValueError(f"neuron.kind is {self.kind!r}: use one of {', '.join(DEFAULT_LEAK)}")
        if self.num_timesteps is None:
            object.__setattr__(self, "num_timesteps", 1 if self.kind == "none" else 4)
        if self.leak is None:
            object.__setattr__(self, "leak", DEFAULT_LEAK[self.kind])
        if faults := self._faults():
            raise ValueError("; ".join(faults))

    def _faults(self) -> list[str]:
        faults = []
        if self.num_timesteps < 1:
            faults.append(f"neuron.num_timesteps is {self.num_timesteps}: at least 1 is needed")
        if self.kind == "none" and self.num_timesteps > 1:
            faults.append(
                f"neuron.num_timesteps is {self.num_timesteps} with kind 'none', which has no timesteps: use 1"
            )
        if self.leak is not None and not 0 <= self.leak <= 1:
            faults.append(f"neuron.leak is {self.leak}: it lies between 0 and 1")
        if not 0 < self.frequency < math.inf:
            faults.append(f"neuron.frequency is {self.frequency}: it must be positive (the published value is 2)")
        if not 0 <= self.momentum < 1:
            faults.append(f"neuron.momentum is {self.momentum}: it lies between 0 and below 1 (a usual value is 0.99)")
        if self.amplitude not in ("frozen", "tracked"):
            faults.append(f"neuron.amplitude is {self.amplitude!r}: use frozen or tracked")
        if self.reset not in ("released", "normalized"):
            faults.append(f"neuron.reset is {self.reset!r}: use released or normalized")
        return faults


_LEAST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 1,
}


class SpikeLMConfig(PreTrainedConfig):
    """One stack of spiking layers in BERT's shape, with transformers' names for everything both have.

    `neuron` may be given as a NeuronConfig or as a dict of its fields; config.json holds the dict.
    Raises ValueError, naming field and value, for a shape, activation or padding token that cannot work.
    """

    model_type = "spikelm"
    keys_to_ignore_at_inference = ["spike_stats", "masked_lm_loss_sum", "next_sentence_loss_sum"]  # no predictions

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = 0
    hidden_act: str = "gelu"
    mlm_head_act: str = "gelu"  # the released SpikeLM has relu here and gelu in its layers
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # before a classification head; None: hidden_dropout_prob
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    position_init: Literal["normal", "sinusoidal"] = "normal"  # sinusoidal: small models find neighbours far sooner
    tie_word_embeddings: bool = True
    neuron: NeuronConfig | dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.neuron, NeuronConfig):
            self.neuron = _neuron_of(self.neuron or {})
        if faults := self._faults():
            raise ValueError("; ".join(faults))
        super().__post_init__(**kwargs)

    def _faults(self) -> list[str]:
        faults = []
        for name, least in _LEAST_SIZES.items():
            if getattr(self, name) < least:
                faults.append(f"{name} is {getattr(self, name)}: at least {least} is needed")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            faults.append(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}: "
                "change one of them"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            faults.append(f"pad_token_id is {self.pad_token_id}: vocab_size {self.vocab_size} has no such token")
        for name in ("hidden_act", "mlm_head_act"):
            if getattr(self, name) not in ACT2FN:
                faults.append(f"{name} is {getattr(self, name)!r}: use one of {', '.join(ACT2FN)}")
        if self.position_init not in ("normal", "sinusoidal"):
            faults.append(f"position_init is {self.position_init!r}: use normal or sinusoidal")
        return faults

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(output.get("neuron"), NeuronConfig):
            output["neuron"] = asdict(output["neuron"])
        return output

    @property
    def num_timesteps(self) -> int:
        """Spike timesteps T."""
        return self.neuron.num_timesteps


def _neuron_of(settings: dict[str, Any]) -> NeuronConfig:
    known = [field.name for field in fields(NeuronConfig)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"neuron has no field {', '.join(unknown)}: known are {', '.join(known)}")
    return NeuronConfig(**settings)


PRESETS: dict[str, dict[str, Any]] = {
    "encoder-tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": 128,
    },
    # BERT-base and BERT-large: Devlin et al. 2019, section 3.
    "encoder-base": {},
    "encoder-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


def preset(name: str, *, neuron: NeuronConfig | dict | None = None, **overrides: Any) -> SpikeLMConfig:
    """The configuration of that name in PRESETS, with fields replaced by `overrides`; ValueError if unknown."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: known are {', '.join(PRESETS)}")
    return SpikeLMConfig(**{**PRESETS[name], **overrides}, neuron=neuron)
