"""Tiny decoders with shared keys and values, of every kind of neuron, and rows of tokens for them."""

import pytest
import torch
from tiny import CONFIG, make_model

from models import amplitudes, neuron
from models.amplitudes import calibrate_amplitudes
from models.modeling import SpikeLMForCausalLM

NEURONS = [
    {"kind": "elastic", "num_timesteps": 1},
    {"kind": "elastic", "num_timesteps": 4},
    {"kind": "lif", "num_timesteps": 1},
    {"kind": "lif", "num_timesteps": 4},
    {"kind": "none"},
]
each_neuron = pytest.mark.parametrize("settings", NEURONS, ids=lambda n: f"{n['kind']}-T{n.get('num_timesteps', 1)}")
each_kind = pytest.mark.parametrize("kind", ["elastic", "lif", "none"])
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2}
LIF_SCALE = {"initializer_range": 3.0}  # so that attention is so sharp that lif neurons behind it fire at all


def make_decoder(settings=None, seed=0, model_class=SpikeLMForCausalLM, **overrides):
    scale = LIF_SCALE if (settings or {}).get("kind") == "lif" else {}
    return make_model(settings, model_class, seed, family="llama", **{**SHAPE, **scale, **overrides})


def ready_decoder(settings=None, batch=None, **overrides):
    model = make_decoder(settings, **overrides)
    calibrate_amplitudes(model, batch or {"input_ids": token_ids()})
    return model


def token_ids(rows=2, length=24, seed=3):
    return torch.randint(1, CONFIG["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def positions_of(*lengths):
    """position_ids [1, L] of a row that holds documents of these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def clear_lif_threshold(monkeypatch):
    """Where all values that a token sees are spikes, attention gives 1 up to rounding: just lif's threshold."""
    for module in (neuron, amplitudes):
        monkeypatch.setattr(module, "LIF_THRESHOLD", 0.9)
