"""Configuration of neurons and models, and the presets.

SpikeLM: Xing et al., "SpikeLM: Towards General Spike-Driven Language Modeling via Elastic Bi-Spiking Mechanisms",
ICML 2024.
"""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

Site = Literal["qkv", "key", "value", "attention_output", "mlp_up", "mlp_down"]

SITES: tuple[Site, ...] = get_args(Site)
"""The neurons of a block in the order of the flow: each has its row in the amplitude table."""

DEFAULT_LEAK = {"elastic": 0.25, "lif": 0.5, "none": None}

_LEARNED_BEST: dict[str, Any] = {
    "frequency": 1.4,
    "site_frequencies": {},
    "amplitude": "tracked",
    "reset": "normalized",
    "count_padding": False,
}

NEURON_PRESETS: dict[str | None, dict[str, Any]] = {
    # What learned best for its spikes in the trials that tests/bench/README.md tells of, in encoders and in decoders.
    None: _LEARNED_BEST,
    "decoder": {**_LEARNED_BEST, "frequency": 1.5, "site_frequencies": {"value": 0.8}},
    # Xing et al. 2024, as their released code has it.
    "released": {
        "frequency": 2.0,
        "site_frequencies": {},
        "amplitude": "frozen",
        "reset": "released",
        "count_padding": True,
    },
}
"""What fields of NeuronConfig are where they are unset, by its `preset`."""


@dataclass(frozen=True)
class NeuronConfig:
    """What stands in front of every linear layer.

    Equations are in `models.neuron`. Fields left at None are filled in by the kind of neuron and by `preset`.
    Raises ValueError, naming the field and its value, for a combination that cannot work.
    """

    kind: Literal["elastic", "lif", "none"] = "elastic"
    """elastic: ternary spikes times an amplitude; lif: binary leaky integrate-and-fire; none: ordinary transformer."""

    preset: Literal["decoder", "released"] | None = None
    """decoder: fields that are unset take what decoders learn best with (frequency 1.5, of values 0.8); released: the
    published settings (frequency 2, amplitude frozen, reset released, padding counted). Only a way to give them: in a
    configuration that is whole it is null again."""

    num_timesteps: int | None = None
    """Spike timesteps T. Unset: 4, or 1 for kind none."""

    leak: float | None = None
    """Share of the membrane that a timestep hands on. Unset: 0.25 (elastic), 0.5 (lif), none (none)."""

    frequency: float | None = None
    """k in alpha = k * mean|m|: a neuron fires where |m| > k/2 * mean|m|, so a larger k means fewer spikes. Unset:
    1.4."""

    site_frequencies: dict[Site, float] | None = None
    """k of those of a block's sites that have another than `frequency`, by their names in SITES. Unset: none."""

    amplitude: Literal["frozen", "tracked"] | None = None
    """frozen: the calibrated alpha for ever; tracked: a running mean of k * mean|m|, moved once a step. Unset:
    tracked."""

    momentum: float = 0.99
    """Share of the old alpha that a tracked amplitude keeps at each optimizer step."""

    reset: Literal["released", "normalized"] | None = None
    """What a spike leaves of the membrane: m*leak*(1-|s|) (normalized); m*leak*(alpha-o) (released, for T <= 4). Unset:
    normalized."""

    count_padding: bool | None = None
    """Whether padding counts in amplitudes and firing rates, as it did in the released code (parity only). Unset:
    no."""

    def __post_init__(self) -> None:
        if self.kind not in DEFAULT_LEAK:
            raise ValueError(f"neuron.kind is {self.kind!r}: use one of {', '.join(DEFAULT_LEAK)}")
        if self.preset not in NEURON_PRESETS:
            names = " or ".join(filter(None, NEURON_PRESETS))
            raise ValueError(f"neuron.preset is {self.preset!r}: use {names}, or leave it out")
        for name, value in NEURON_PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, copy(value))
        object.__setattr__(self, "preset", None)  # spent: the fields say all, and may be replaced one by one
        if self.num_timesteps is None:
            object.__setattr__(self, "num_timesteps", 1 if self.kind == "none" else 4)
        if self.leak is None:
            object.__setattr__(self, "leak", DEFAULT_LEAK[self.kind])
        if faults := self._faults():
            raise ValueError("; ".join(faults))

    def changed(self, **settings: Any) -> "NeuronConfig":
        """The same with other fields; a preset among them stands for all of its own."""
        named = NEURON_PRESETS.get(settings.get("preset"), {}) if settings.get("preset") else {}
        return replace(self, **{**named, **settings})

    def frequency_of(self, site: str) -> float:
        """k of a site, given as in SITES or with its layer before it, `layer3.key`."""
        return self.site_frequencies.get(site.rpartition(".")[2], self.frequency)

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
        for site in self.site_frequencies.keys() - set(SITES):
            faults.append(f"neuron.site_frequencies has a site {site!r}: use {', '.join(SITES)}")
        named = {"frequency": self.frequency} | {f"site_frequencies.{k}": v for k, v in self.site_frequencies.items()}
        for name, frequency in named.items():
            if not 0 < frequency < math.inf:
                faults.append(f"neuron.{name} is {frequency}: it must be positive (the default is 1.4)")
        if not 0 <= self.momentum < 1:
            faults.append(f"neuron.momentum is {self.momentum}: it lies between 0 and below 1 (a usual value is 0.99)")
        if self.amplitude not in ("frozen", "tracked"):
            faults.append(f"neuron.amplitude is {self.amplitude!r}: use frozen or tracked")
        if self.reset not in ("released", "normalized"):
            faults.append(f"neuron.reset is {self.reset!r}: use released or normalized")
        return faults


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES: how a family's layers are built, and the settings that not all families have."""

    causal: bool
    """A decoder: a token sees itself and what stands before it in its document. Otherwise an encoder."""

    norm: Literal["layer", "rms"]

    norm_first: bool
    """Norms before attention and MLP, and one behind the last layer; otherwise behind each residual sum."""

    positions: Literal["learned", "rotary"]
    """learned: added to the embeddings; rotary: queries and keys are rotated (Su et al. 2021)."""

    gated_mlp: bool
    """activation(gate) * up (Shazeer 2020) instead of activation(up)."""

    bias: bool
    """Whether the layers' linear maps have one."""

    defaults: Mapping[str, Any]
    """Fields of SpikeLMConfig that differ among families: those this one has, and their values where unset."""


FAMILIES = {
    # Devlin et al. 2019: an encoder.
    "bert": Family(
        causal=False,
        norm="layer",
        norm_first=False,
        positions="learned",
        gated_mlp=False,
        bias=True,
        defaults={
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "type_vocab_size": 2,
            "mlm_head_act": "gelu",
            "layer_norm_eps": 1e-12,
            "position_init": "normal",
        },
    ),
    # Touvron et al. 2023: a decoder.
    "llama": Family(
        causal=True,
        norm="rms",
        norm_first=True,
        positions="rotary",
        gated_mlp=True,
        bias=False,
        defaults={
            "hidden_act": "silu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_key_value_heads": None,  # as many as num_attention_heads
            "rms_norm_eps": 1e-6,
            "rope_parameters": None,  # transformers' rope_type default, rope_theta 10,000
        },
    ),
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those of transformers whose frequencies depend on the configuration alone, not on the length of the input."""

_LEAST_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 1,
}


class SpikeLMConfig(PreTrainedConfig):
    """One stack of spiking layers in the shape of its family, with transformers' names for everything both have.

    Fields left at None are filled in by the family where it has them, and stay None where it has not.
    `neuron` may be given as a NeuronConfig, a dict of its fields, or the name of a preset of its own; config.json
    holds the dict.
    Raises ValueError, naming field and value, for a shape, activation, padding token or field that cannot work.
    """

    model_type = "spikelm"
    keys_to_ignore_at_inference = [  # no predictions
        "past_key_values",
        "spike_stats",
        "firing_sum",
        "masked_lm_loss_sum",
        "next_sentence_loss_sum",
        "causal_lm_loss_sum",
        "causal_lm_count",
    ]

    family: Literal["bert", "llama"] = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None  # fewer than heads: groups of query heads share keys and values
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int | None = None
    pad_token_id: int | None = 0
    hidden_act: str | None = None
    mlm_head_act: str | None = None  # the released SpikeLM has relu here and gelu in its layers
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    classifier_dropout: float | None = None  # before a classification head; None: hidden_dropout_prob
    layer_norm_eps: float | None = None
    rms_norm_eps: float | None = None
    initializer_range: float = 0.02
    # sinusoidal: small models find neighbours far sooner
    position_init: Literal["normal", "sinusoidal"] | None = None
    rope_parameters: dict[str, Any] | None = None  # rope_type, rope_theta and more, as in transformers
    tie_word_embeddings: bool = True
    neuron: NeuronConfig | dict | str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.neuron, NeuronConfig):
            self.neuron = _neuron_of(self.neuron or {})
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}: use one of {', '.join(FAMILIES)}")
        faults = self._fill_in_family()
        super().__post_init__(**kwargs)
        if self.traits.positions != "rotary":
            self.rope_parameters = None  # transformers fills them in for every model that knows the field
        if faults := faults + self._faults():
            raise ValueError("; ".join(faults))

    def _fill_in_family(self) -> list[str]:
        """Give unset fields the family's values; returns the fields that are set and that the family has not."""
        faults = []
        for name in sorted({name for family in FAMILIES.values() for name in family.defaults}):
            value = getattr(self, name)
            if name not in self.traits.defaults and value is not None:
                faults.append(f"{name} is {value!r}, but family {self.family} has none: leave it out")
            elif value is None:
                setattr(self, name, self.traits.defaults.get(name))
        if self.traits.positions == "rotary":
            if self.num_key_value_heads is None:
                self.num_key_value_heads = self.num_attention_heads
            self.rope_parameters = dict(self.rope_parameters or {})  # transformers writes into it
        return faults

    def _faults(self) -> list[str]:
        faults = []
        for name, least in _LEAST_SIZES.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                faults.append(f"{name} is {getattr(self, name)}: at least {least} is needed")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            faults.append(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}: "
                "change one of them"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            faults.append(f"pad_token_id is {self.pad_token_id}: vocab_size {self.vocab_size} has no such token")
        for name in ("hidden_act", "mlm_head_act"):
            if getattr(self, name) is not None and getattr(self, name) not in ACT2FN:
                faults.append(f"{name} is {getattr(self, name)!r}: use one of {', '.join(ACT2FN)}")
        if self.position_init not in ("normal", "sinusoidal", None):
            faults.append(f"position_init is {self.position_init!r}: use normal or sinusoidal")
        return faults + (self._rotary_faults() if self.traits.positions == "rotary" else [])

    def _rotary_faults(self) -> list[str]:
        faults = []
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if shared > 0 and heads % shared:
            faults.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {shared}: change one")
        if heads > 0 and self.hidden_size % heads == 0 and self.hidden_size // heads % 2:
            faults.append(
                f"hidden_size {self.hidden_size} gives {heads} heads the odd width {self.hidden_size // heads}, but "
                "rotary positions turn pairs: change one of them"
            )
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            faults.append(f"rope_parameters.rope_type is {rope_type!r}: use one of {', '.join(ROPE_TYPES)}")
        else:
            try:
                self.validate_rope()
            except KeyError as error:
                faults.append(f"rope_parameters is {self.rope_parameters}: {error.args[0]}")
        share = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if share != 1.0:
            faults.append(f"rope_parameters.partial_rotary_factor is {share}: whole heads are rotated, leave it out")
        return faults

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(output.get("neuron"), NeuronConfig):
            output["neuron"] = asdict(output["neuron"])
        return output

    @property
    def traits(self) -> Family:
        """How the family's layers are built."""
        return FAMILIES[self.family]

    @property
    def num_timesteps(self) -> int:
        """Spike timesteps T."""
        return self.neuron.num_timesteps


def _neuron_of(settings: dict[str, Any] | str) -> NeuronConfig:
    if isinstance(settings, str):
        return NeuronConfig(preset=settings)
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
    # Decoders. Where the source has two matrices of 4 D in its MLP, a gated MLP has three of 8/3 D, rounded up to a
    # multiple of 256 (Touvron et al. 2023, section 2.2): as many weights.
    "decoder-tiny": {
        "family": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
    },
    # GPT-2's smallest, 124 million parameters (Radford et al. 2019, table 2): the shape of GPT-3 Small, whose context
    # of 2,048 it has here (Brown et al. 2020, table 2.1).
    "decoder-124m": {
        "family": "llama",
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
    },
    # GPT-3 Medium: Brown et al. 2020, table 2.1.
    "decoder-350m": {
        "family": "llama",
        "vocab_size": 50257,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "max_position_embeddings": 2048,
    },
    # GPT-3 XL: the same table, whose 24 heads of 128 are more than its width of 2,048 holds: 16 here.
    "decoder-1.3b": {
        "family": "llama",
        "vocab_size": 50257,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
    },
    # LLaMA-7B: Touvron et al. 2023, table 2.
    "decoder-7b": {
        "family": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


def preset(name: str, *, neuron: NeuronConfig | dict | str | None = None, **overrides: Any) -> SpikeLMConfig:
    """The configuration of that name in PRESETS, with fields replaced by `overrides`; ValueError if unknown."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: known are {', '.join(PRESETS)}")
    return SpikeLMConfig(**{**PRESETS[name], **overrides}, neuron=neuron)
