"""Configurations of neurons and models: defaults, faults named with their values, presets, the way to disk and back."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from models.config import PRESETS, NeuronConfig, SpikeLMConfig, preset
from models.modeling import SpikeLMForPreTraining


@pytest.mark.parametrize(("kind", "timesteps", "leak"), [("elastic", 4, 0.25), ("lif", 4, 0.5), ("none", 1, None)])
def test_the_kind_of_neuron_fills_in_timesteps_and_leak(kind, timesteps, leak):
    neuron = NeuronConfig(kind=kind)
    assert (neuron.num_timesteps, neuron.leak) == (timesteps, leak)
    assert NeuronConfig(kind=kind, num_timesteps=1, leak=0.1).leak == 0.1


def test_one_word_names_the_published_neuron():
    released = NeuronConfig(preset="released")
    assert (released.frequency, released.amplitude, released.reset, released.count_padding) == (
        2.0,
        "frozen",
        "released",
        True,
    )
    assert (released.num_timesteps, released.leak) == (4, 0.25)
    assert SpikeLMConfig(neuron="released").neuron == preset("encoder-tiny", neuron="released").neuron == released
    assert released.preset is None and replace(released, frequency=1.5).amplitude == "frozen"
    assert NeuronConfig(preset="released", num_timesteps=1, reset="normalized").reset == "normalized"
    assert SpikeLMConfig(neuron=SpikeLMConfig(neuron="released").to_dict()["neuron"]).neuron == released


def test_another_names_what_decoders_learn_best_with():
    decoder = NeuronConfig(preset="decoder")
    assert decoder == NeuronConfig(frequency=1.5, site_frequencies={"value": 0.8})
    decoder.site_frequencies["key"] = 1.0  # its own
    assert NeuronConfig(preset="decoder").site_frequencies == {"value": 0.8}
    assert NeuronConfig(preset="decoder", site_frequencies={"key": 1.0}).site_frequencies == {"key": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "izhikevich"}, "neuron.kind is 'izhikevich': use one of elastic, lif, none"),
        ({"kind": "none", "num_timesteps": 4}, "neuron.num_timesteps is 4 with kind 'none'"),
        ({"num_timesteps": 0}, "neuron.num_timesteps is 0: at least 1"),
        ({"leak": 1.5}, "neuron.leak is 1.5"),
        ({"leak": math.nan}, "neuron.leak is nan"),
        ({"frequency": 0.0}, "neuron.frequency is 0.0"),
        ({"frequency": math.nan}, "neuron.frequency is nan"),
        ({"frequency": math.inf}, "neuron.frequency is inf"),
        ({"site_frequencies": {"keys": 1.0}}, "neuron.site_frequencies has a site 'keys': use qkv, key, value"),
        ({"site_frequencies": {"key": -1.0}}, "neuron.site_frequencies.key is -1.0"),
        ({"momentum": 1.0}, "neuron.momentum is 1.0"),
        ({"amplitude": "wild"}, "neuron.amplitude is 'wild': use frozen or tracked"),
        ({"preset": "publishd"}, "neuron.preset is 'publishd': use decoder or released, or leave it out"),
        ({"reset": "hard"}, "neuron.reset is 'hard': use released or normalized"),
    ],
)
def test_a_neuron_that_cannot_work_is_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        NeuronConfig(**settings)


def test_all_faults_of_a_neuron_are_told_together():
    with pytest.raises(ValueError, match=r"num_timesteps is 0.*leak is 2.*reset is 'hard'"):
        NeuronConfig(num_timesteps=0, leak=2, reset="hard")


def test_an_unknown_field_of_the_neuron_is_refused():
    with pytest.raises(ValueError, match="neuron has no field timesteps: known are kind, preset, num_timesteps"):
        SpikeLMConfig(neuron={"timesteps": 4})


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 100 is no multiple of num_attention_heads 12"):
        SpikeLMConfig(hidden_size=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gleu"}, "hidden_act is 'gleu': use one of gelu, "),
        ({"mlm_head_act": "ReLU"}, "mlm_head_act is 'ReLU': use one of gelu, "),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1: at least 0 is needed"),
        *(
            ({name: 0}, f"{name} is 0: at least 1 is needed")
            for name in (
                "vocab_size",
                "hidden_size",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
            )
        ),
        ({"vocab_size": 10, "pad_token_id": 10}, "pad_token_id is 10: vocab_size 10 has no such token"),
        ({"pad_token_id": -1}, "pad_token_id is -1: vocab_size 30522 has no such token"),
        ({"position_init": "rotary", "hidden_act": "x"}, "hidden_act is 'x'.*; position_init is 'rotary': use normal"),
        ({"family": "gpt"}, "family is 'gpt': use one of bert, llama"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, but family bert has none: leave it out"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters is {'rope_theta': 5.0}, but family bert has none"),
        (
            {"family": "llama", "type_vocab_size": 2, "mlm_head_act": "gelu"},
            "mlm_head_act is 'gelu', but family llama has none.*; type_vocab_size is 2, but family llama has none",
        ),
        (
            {"family": "llama", "num_key_value_heads": 5},
            "num_attention_heads 12 is no multiple of num_key_value_heads 5: change one",
        ),
        ({"family": "llama", "num_key_value_heads": 0}, "num_key_value_heads is 0: at least 1 is needed"),
        (
            {"family": "llama", "hidden_size": 36},
            "hidden_size 36 gives 12 heads the odd width 3, but rotary positions turn pairs",
        ),
        (
            {"family": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters.rope_type is 'dynamic': use one of default, linear, llama3, yarn",
        ),
        (
            {"family": "llama", "rope_parameters": {"rope_type": "linear"}},
            "rope_parameters is {'rope_type': 'linear', .*: Missing required keys .*'factor'",
        ),
        (
            {"family": "llama", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5: whole heads are rotated, leave it out",
        ),
    ],
)
def test_a_model_that_cannot_work_is_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        SpikeLMConfig(**settings)


def test_a_model_may_have_no_layers_and_no_padding():
    config = SpikeLMConfig(num_hidden_layers=0, pad_token_id=None)
    assert (config.num_hidden_layers, config.pad_token_id) == (0, None)


def test_a_configuration_comes_back_from_disk(tmp_path):
    config = SpikeLMConfig(hidden_size=24, mlm_head_act="relu", neuron={"kind": "lif", "num_timesteps": 2})
    config.save_pretrained(tmp_path)
    loaded = SpikeLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.neuron == NeuronConfig(kind="lif", num_timesteps=2, leak=0.5)
    assert (loaded.mlm_head_act, loaded.num_timesteps) == ("relu", 2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoders_configuration_comes_back_from_disk(tmp_path, tied):
    rope = {"rope_type": "linear", "factor": 2.0}
    settings = {"num_key_value_heads": 3, "rope_parameters": rope, "tie_word_embeddings": tied, "pad_token_id": None}
    config = SpikeLMConfig(family="llama", **settings)
    config.save_pretrained(tmp_path)
    loaded = SpikeLMConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    assert (loaded.num_key_value_heads, loaded.tie_word_embeddings, loaded.pad_token_id) == (3, tied, None)
    assert loaded.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert rope == {"rope_type": "linear", "factor": 2.0}  # what was given is not written to


def test_the_family_fills_in_what_it_has():
    encoder, decoder = SpikeLMConfig(), SpikeLMConfig(family="llama")
    assert (encoder.hidden_act, encoder.hidden_dropout_prob, encoder.type_vocab_size) == ("gelu", 0.1, 2)
    assert (encoder.num_key_value_heads, encoder.rope_parameters, encoder.rms_norm_eps) == (None, None, None)
    assert (decoder.hidden_act, decoder.hidden_dropout_prob, decoder.type_vocab_size) == ("silu", 0.0, None)
    assert (decoder.num_key_value_heads, decoder.rms_norm_eps, decoder.layer_norm_eps) == (12, 1e-6, None)
    assert decoder.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (
        SpikeLMConfig(family="llama", rope_theta=500.0).rope_parameters["rope_theta"] == 500.0
    )  # as older files have it
    assert not encoder.traits.causal and decoder.traits.causal


def test_the_neuron_may_be_given_as_object_dict_or_not_at_all():
    assert SpikeLMConfig().neuron == NeuronConfig()
    assert SpikeLMConfig(neuron={}).neuron == NeuronConfig()
    assert SpikeLMConfig(neuron={"leak": 0.5}).neuron == SpikeLMConfig(neuron=NeuronConfig(leak=0.5)).neuron


def test_presets_take_overrides_and_unknown_ones_are_refused():
    config = preset("encoder-tiny", vocab_size=99, neuron={"kind": "none"})
    assert (config.vocab_size, config.hidden_size, config.neuron.kind) == (99, 128, "none")
    assert "vocab_size" not in PRESETS["encoder-tiny"]
    with pytest.raises(ValueError, match="unknown preset 'huge': known are encoder-tiny, encoder-base, encoder-large"):
        preset("huge")


@pytest.mark.parametrize(
    ("name", "bert"),
    [
        ("encoder-base", {}),
        (
            "encoder-large",
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        ),
    ],
)
def test_presets_have_berts_sizes(name, bert):
    with torch.device("meta"):
        ours, theirs = SpikeLMForPreTraining(preset(name)), BertForPreTraining(BertConfig(**bert))
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.config.num_attention_heads == theirs.config.num_attention_heads
