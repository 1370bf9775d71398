"""Every product of a layer is of spikes, in every preset; and a neuron that is missing is found."""

import pytest
import torch
from decoders import ready_decoder

from models.amplitudes import BlockNeurons, calibrate_amplitudes
from models.config import PRESETS, preset
from models.layers import KEY, MLP_DOWN, QKV, VALUE
from models.modeling import SpikeLMForCausalLM, SpikeLMForPreTraining
from pipeline.model_folder import probe_batch
from pipeline.spike_check import check_spikes
from tests.tiny import make_batch, make_model

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_tiny_form_multiplies_spikes_alone(name):
    shared = {"num_key_value_heads": 2} if preset(name).num_key_value_heads else {}
    config = preset(name, **TINY, **shared)
    model = (SpikeLMForCausalLM if config.traits.causal else SpikeLMForPreTraining)(config)
    inputs = probe_batch(config)
    calibrate_amplitudes(model, inputs)
    found = check_spikes(model.eval(), inputs)
    assert found.faults == () and len(found.spiking) == 2 * (4 + 2)
    heads = {"lm_head"} if config.traits.causal else {"model.pooler", "mlm_head.dense", "mlm_head.decoder"}
    assert heads <= set(found.real) and "queries" in found.real


def test_spikes_of_lif_neurons_pass_and_no_neurons_are_refused():
    model, batch = make_model({"kind": "lif"}).eval(), make_batch()
    assert check_spikes(model, batch).faults == ()
    with pytest.raises(ValueError, match="of kind none"):
        check_spikes(make_model({"kind": "none"}), batch)


@pytest.mark.parametrize(
    ("site", "fault"),
    [(QKV, "attention.qkv"), (MLP_DOWN, "mlp.down"), (KEY, "keys of layer 1"), (VALUE, "values of layer 1")],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_missing_neuron_is_named(site, fault, family, monkeypatch):
    if family == "bert":
        model, batch = make_model(), make_batch()
        calibrate_amplitudes(model, batch)
    else:
        model, batch = ready_decoder(), {"input_ids": torch.arange(1, 25)[None]}
    last = model.model.stack.layers[-1]
    project, fire = BlockNeurons.project, BlockNeurons.fire

    def project_without(neurons, at, x, weight, bias, *others):
        if at == site and weight is {QKV: last.attention.qkv, MLP_DOWN: last.mlp.down}[at].weight:
            project(neurons, at, x, weight, bias, *others)  # for its statistics
            return torch.nn.functional.linear(x, weight, bias)
        return project(neurons, at, x, weight, bias, *others)

    def fire_without(neurons, at, x, **options):
        fired.append(fire(neurons, at, x, **options))
        return x if at == site and len(fired) > 2 else fired[-1]  # the last layer's alone

    fired = []
    name = "fire" if site in (KEY, VALUE) else "project"
    monkeypatch.setattr(BlockNeurons, name, fire_without if name == "fire" else project_without)
    (line,) = check_spikes(model.eval(), batch).faults
    assert fault in line and "different sizes at timestep 1, not 0 and one amplitude" in line


def test_a_layer_that_multiplies_elsewhere_is_named():
    model, batch = make_model(), make_batch()
    calibrate_amplitudes(model, batch)
    down = model.model.stack.layers[0].mlp.down
    down.forward = lambda x, neurons, site: neurons.fire(site, x) @ down.weight.t()
    assert check_spikes(model.eval(), batch).faults == ("model.stack.layers.0.mlp.down: no product of it was seen",)
