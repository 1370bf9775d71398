"""Counted operations: the literature's figures, and every site against spikes that were counted one by one."""

import pytest
import torch
from decoders import ready_decoder, token_ids

from models.amplitudes import BlockNeurons, SpikeStats, calibrate_amplitudes
from models.config import preset
from models.energy import (
    ENERGY_TABLES,
    Operations,
    Passed,
    ordinary_operations,
    other_operations,
    products_behind,
    spiking_operations,
)
from models.layers import ATTENTION_OUTPUT, KEY, MLP_DOWN, MLP_UP, QKV, SITES, VALUE
from tests.tiny import make_batch, make_model, project_by_fire

FP32 = ENERGY_TABLES["45nm-fp32"]


def energy(operations):
    return sum(each.joules(FP32) for each in operations.values())


def test_bert_base_has_the_published_energy():
    config = preset("encoder-base")
    ordinary = ordinary_operations(config, Passed.in_rows([128], causal=False)).joules(FP32)
    assert ordinary == pytest.approx(51.4e-3, abs=0.05e-3)


@pytest.mark.parametrize(("T", "rate", "less"), [(1, 0.40, 12.9), (4, 0.35, 3.7)])
def test_published_firing_rates_save_what_is_published(T, rate, less):
    config = preset("encoder-base", neuron={"num_timesteps": T})
    passed = Passed.in_rows([128], causal=False)
    spiking = spiking_operations(config, torch.full((12 * len(SITES), T), rate), passed)
    assert ordinary_operations(config, passed).joules(FP32) / energy(spiking) == pytest.approx(less, rel=0.015)


def counted_additions(model, inputs, monkeypatch):
    """By site: for every spike of a token that is no padding, the sums that it is added to."""
    config, fired = model.config, []
    fire = BlockNeurons.fire

    def fire_and_remember(*args, **options):
        fired.append(fire(*args, **options))
        return fired[-1]

    monkeypatch.setattr(BlockNeurons, "fire", fire_and_remember)
    monkeypatch.setattr(BlockNeurons, "project", project_by_fire)
    stats = SpikeStats(model(**inputs).spike_stats)
    L, D, heads = inputs["input_ids"].shape[1], config.hidden_size, config.num_attention_heads
    shared = D * (config.num_key_value_heads or heads) // heads
    rows = config.intermediate_size * (2 if config.traits.gated_mlp else 1)
    targets = {QKV: D + 2 * shared, ATTENTION_OUTPUT: D, MLP_UP: rows, MLP_DOWN: D}
    seen_by = torch.arange(L, 0, -1) if config.traits.causal else torch.full((L,), L)
    additions = []
    for number, spikes in enumerate(fired):
        per_token = (spikes != 0).sum(-1).double()
        site = number % len(SITES)
        if site in (KEY, VALUE):  # each query head that shares them, of each token that sees them
            additions.append(float((per_token * seen_by * (D // shared)).sum()))
        else:
            additions.append(float(per_token.sum() * targets[site]))
    return dict(zip(model.model.stack.site_names, additions, strict=True)), stats


@pytest.mark.parametrize("kind", ["elastic", "lif"])
def test_additions_of_an_encoder_are_those_of_each_spike(kind, monkeypatch):
    batch = make_batch((10, 10))
    model = make_model({"kind": kind, "num_timesteps": 3})
    calibrate_amplitudes(model, batch)
    expected, stats = counted_additions(model, batch, monkeypatch)
    passed = Passed.in_rows([10, 10], causal=False)
    found = spiking_operations(model.config, stats.firing_rate, passed)
    assert {name: each.additions for name, each in found.items()} == pytest.approx(expected)
    assert not any(each.multiply_accumulates for each in found.values())
    assert sum(value > 0 for value in expected.values()) > len(SITES)


def test_additions_of_a_decoder_are_those_of_each_spike(monkeypatch):
    model, ids = ready_decoder(), token_ids()
    expected, stats = counted_additions(model, {"input_ids": ids}, monkeypatch)
    found = spiking_operations(model.config, stats.firing_rate, Passed.in_rows([24, 24], causal=True))
    for name, each in found.items():
        # Early tokens are seen by more queries than late ones; the count takes spikes as spread evenly.
        exact = not name.endswith(("key", "value"))
        assert each.additions == pytest.approx(expected[name], rel=1e-9 if exact else 0.1), name


def test_an_ordinary_transformer_multiplies_everything():
    config = preset("encoder-base", neuron={"kind": "none"})
    passed = Passed.in_rows([128, 64], causal=False)
    found = spiking_operations(config, torch.zeros(0, 1), passed)
    assert sum(found.values(), Operations()) == ordinary_operations(config, passed)
    assert len(found) == 12 * len(SITES)
    others = other_operations(config, passed)
    assert "neurons" not in others and "amplitudes" not in others


def test_products_are_those_of_the_weights():
    model = ready_decoder(num_hidden_layers=1)
    products = products_behind(model.config, Passed.in_rows([7, 3], causal=True))
    weights = [module.weight.numel() for module in model.model.stack.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(products.values()) - products["key"] - products["value"] == 10 * sum(weights)
    assert products["key"] == products["value"] == (28 + 6) * model.config.hidden_size


def test_what_does_not_spike_grows_with_timesteps_and_head():
    passed = Passed.in_rows([128], causal=False, predictions=19)
    once, often = (other_operations(preset("encoder-base", neuron={"num_timesteps": T}), passed) for T in (1, 4))
    per_timestep = {"softmax", "activation", "norms", "residuals", "biases", "neurons", "amplitudes"}
    assert set(once) == per_timestep | {"mean over timesteps", "embeddings", "head"}
    for name in per_timestep:
        assert often[name] == once[name].times(4)
    assert often["head"] == once["head"]
    D, V = 768, 30522
    assert once["head"].multiply_accumulates == 19 * (D * D + D * V + 3 * D) + D * D
    # Elements of the membranes of a layer: qkv, attention_output, mlp_up, mlp_down; its keys and values have none.
    assert once["neurons"].multiply_accumulates == 12 * 128 * (3 * D + 4 * D)


def test_a_head_over_rows_costs_its_weights_and_biases():
    config = preset("encoder-base")
    with_head, without = (
        other_operations(config, Passed.in_rows([128, 64], causal=False, classes=classes)) for classes in (3, 0)
    )
    assert with_head.pop("head") == without.pop("head") + Operations(2 * 3 * 768, 2 * 3)
    assert with_head == without


def test_energies_of_the_tables():
    operations = Operations(2e12, 3e12)
    joules = {name: operations.joules(table) for name, table in ENERGY_TABLES.items()}
    assert joules == pytest.approx({"45nm-fp32": 11.9, "45nm-fp16": 4.2, "45nm-int8": 0.55})
