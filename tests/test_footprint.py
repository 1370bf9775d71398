"""What a recipe needs: traced passes are those of real tensors, and predictions are near what real engines take."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data_prep.recipes import settings_from_dict
from models.amplitudes import calibrate_amplitudes
from pipeline.config import RunConfig
from pipeline.footprint import (
    Cluster,
    Data,
    Work,
    changed,
    count_parameters,
    empty_model,
    footprint,
    held_states,
    pass_bytes,
    recomputed_forwards,
    step_work,
)
from pipeline.model import draw_weights
from pipeline.tracing import LiveBytes, kernels_of
from tests.bench.bench_plan import batch_of, in_fresh_processes, predict

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 64}
DATA = Data(vocab_size=1000, sample_length=32)
BUCKET = 1000
TWO_TIMESTEPS = {"num_timesteps": 2}


@pytest.fixture
def small(tmp_path):
    """small(...): a recipe for models of 4 layers; `zero` are fields of its ds_config's zero_optimization."""

    def make(preset="encoder-tiny", processes=1, accumulation=1, zero=None, neuron=None, objective=None, **engine):
        mechanics = {"stage": 2, "reduce_bucket_size": BUCKET, **(zero or {})}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"zero_optimization": mechanics}))
        training = {"total_steps": 10, "global_batch_size": 2 * accumulation * processes, "micro_batch_size": 2}
        return settings_from_dict(
            RunConfig,
            {
                "name": "small",
                "model": {"preset": preset, "overrides": {**SHAPE, "num_hidden_layers": 4}, "neuron": neuron or {}},
                "data": {"shards": "none"},
                "objective": objective or {},
                "schedule": {"warmup_steps": 1},
                "engine": {"ds_config": str(path), **engine},
                "training": training,
                "evaluation": {"every": 0, "micro_batch_size": 1},
                "checkpoint": {"every": 5},
            },
        )

    return make


def with_layers(config, layers):
    return changed(config, "model", overrides={**SHAPE, "num_hidden_layers": layers})


def cluster(devices=1, kind="cpu"):
    return Cluster(nodes=1, devices=devices, memory=0, reserve=0, kind=kind)


def test_live_bytes_are_those_of_storages_that_live():
    weight = torch.zeros(10, 100, requires_grad=True)
    live = LiveBytes("cpu")
    with live:
        x = torch.zeros(5, 10)
        y = (x @ weight).view(500)
        assert (live.live, live.peak) == (200 + 2000, 200 + 2000)
        torch.zeros(1000)
        assert (live.live, live.restart_peak(), live.peak) == (2200, 6200, 2200)
        del x, y
        torch.zeros(7, device="meta")
        weight.detach()
    assert (live.live, live.peak) == (0, 2200)


@pytest.mark.parametrize("preset", ["encoder-tiny", "decoder-tiny"])
@pytest.mark.parametrize(
    ("mode", "precision", "penalty"),
    [("none", "fp32", 0.1), ("none", "bf16", 0.0), ("layer", "fp32", 0.0), ("timestep", "bf16", 0.1)],
)
def test_a_traced_pass_takes_what_a_real_one_takes(small, preset, mode, precision, penalty):
    """Dropout included. More layers are traced than real ones: the fourth is the third's like."""
    config = small(preset, neuron=TWO_TIMESTEPS, checkpointing=mode, precision=precision)
    config = changed(config, "training", firing_penalty=penalty)
    traced = pass_bytes(config, DATA, "cpu")
    model = empty_model(config, DATA.vocab_size)
    draw_weights(model)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.model.stack.set_checkpointing(mode)
    model.model.stack.train_firing_rate(penalty > 0)
    model.logits_at_once = config.engine.logits_at_once
    batch = batch_of(config, DATA.sample_length, 1)
    calibrate_amplitudes(model, batch)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    live = LiveBytes("cpu")
    with live:
        output = model.train()(**{name: tensor.clone() for name, tensor in batch.items()})
        (output.loss + penalty * output.firing_sum if penalty else output.loss).backward()
    assert live.peak == pytest.approx(traced.peak, rel=0.01)


@pytest.mark.parametrize("preset", ["encoder-tiny", "decoder-tiny"])
def test_on_gpus_the_activation_takes_no_memory_of_its_own(small, preset):
    """The kernel of the neuron behind it computes it. What is kept is the same: its input."""
    fused, apart = (pass_bytes(small(preset, spike_backend=backend), DATA, "gpu") for backend in ("auto", "torch"))
    output = 4 * 2 * DATA.sample_length * SHAPE["intermediate_size"] * 4  # T, B, L, F and bytes
    assert apart.forward - fused.forward == pytest.approx(output, rel=0.1)
    assert fused.kept == apart.kept


def test_peaks_with_more_layers_are_those_of_a_longer_trace(small, monkeypatch):
    for mode in ("none", "layer", "timestep"):
        config = small("decoder-tiny", neuron=TWO_TIMESTEPS, checkpointing=mode)
        three = pass_bytes(with_layers(config, 3), DATA, "gpu")
        monkeypatch.setattr("pipeline.footprint.TRACED_LAYERS", 5)
        five = pass_bytes(with_layers(config, 5), DATA, "gpu")
        monkeypatch.undo()
        assert replace(three.with_layers(2), embeddings=five.embeddings) == five
        assert three.embeddings == pytest.approx(five.embeddings, rel=0.01)


def test_on_gpus_no_weights_of_the_attention_are_kept(small):
    def kept(device, length):
        return pass_bytes(with_layers(small(), 1), Data(1000, length), device).kept

    assert kept("gpu", 64) == pytest.approx(2 * kept("gpu", 32), rel=0.02)
    assert kept("cpu", 64) > 2.2 * kept("cpu", 32)  # its dropout needs them there
    attention, dropout = F.scaled_dot_product_attention, F.dropout
    with pytest.raises(KeyError), kernels_of("gpu"):
        assert F.scaled_dot_product_attention is not attention
        raise KeyError
    assert (F.scaled_dot_product_attention, F.dropout) == (attention, dropout)


def test_shared_weights_count_once(small):
    config = small("decoder-tiny")
    tied = count_parameters(empty_model(config, 1000))
    apart = changed(config, "model", overrides={**config.model.overrides, "tie_word_embeddings": False})
    assert count_parameters(empty_model(apart, 1000)) == tied + 1000 * 64
    assert (
        count_parameters(empty_model(changed(config, "model", preset="decoder-7b", overrides={}), 32000)) == 6738415616
    )


@pytest.mark.parametrize(
    ("zero", "precision", "accumulation", "expected"),
    [
        ({"stage": 1}, "bf16", 1, {"weights": 2.0, "optimizer": 3.0}),
        ({"stage": 1}, "bf16", 2, {"weights": 2.0, "optimizer": 3.0, "gradients": 2.0}),
        ({"stage": 2}, "bf16", 2, {"weights": 2.0, "optimizer": 3.0, "gradients": 0.5}),
        ({"stage": 2}, "fp32", 1, {"weights": 4.0, "optimizer": 3.0}),
        ({"stage": 3}, "bf16", 1, {"weights": 0.5, "optimizer": 3.0, "gradients": 0.5, "gathered": 2.0}),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "bf16", 1, {"weights": 0.5, "gathered": 2.0}),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16", 2, {"weights": 2.0}),
    ],
)
def test_states_are_divided_as_the_stage_says(small, zero, precision, accumulation, expected):
    """Bytes a weight, on one of four GPUs."""
    config = small(processes=4, accumulation=accumulation, zero=zero, precision=precision)
    model = empty_model(config, DATA.vocab_size)
    weights = count_parameters(model)
    standing = dict(held_states(config, DATA, cluster(4, "gpu")).standing)
    standing.pop("buckets", None)
    assert {name: size / weights for name, size in standing.items()} == pytest.approx(expected, rel=1e-4)


def test_layers_that_run_again_let_go_of_gathered_weights(small):
    config = small(processes=4, zero={"stage": 3}, precision="bf16", checkpointing="layer")
    layer = empty_model(config, 500).model.stack.layers[0]
    assert held_states(config, Data(500, 32), cluster(4)).standing["gathered"] == 2 * count_parameters(layer)


def test_products_of_elastic_neurons_let_go_of_gathered_weights_and_others_do_not(small):
    gathered = {}
    for kind in ("elastic", "lif"):
        config = small(processes=4, zero={"stage": 3}, precision="bf16", neuron={"kind": kind})
        gathered[kind] = held_states(config, Data(500, 32), cluster(4)).standing["gathered"]
    model = empty_model(config, 500)
    assert gathered == {
        "elastic": 2 * count_parameters(model.model.stack.layers[0]),
        "lif": 2 * count_parameters(model),
    }


def test_what_is_recomputed_of_the_mlp_is_work(small):
    plain = step_work(config := small(), DATA)
    again = step_work(changed(config, "engine", recompute_hidden=True), DATA)
    rows, T = config.training.global_batch_size, config.model.neuron.num_timesteps
    layers = empty_model(config, DATA.vocab_size).model.stack.layers
    products = 2 * rows * DATA.sample_length * T * sum(layer.mlp.up.weight.numel() for layer in layers)
    assert again.recomputed - plain.recomputed == products > 0
    assert again.layers == plain.layers


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_needs_an_fp32_gradient_and_space_of_what_a_process_updates(small, stage):
    config = small(processes=4, zero={"stage": stage}, precision="bf16")
    weights = count_parameters(empty_model(config, DATA.vocab_size))
    step = {part: size / weights for part, size in held_states(config, DATA, cluster(4, "gpu")).step.items()}
    assert step.pop("buckets", 0) == pytest.approx(2 * BUCKET / weights if stage == 3 else 0)
    expected = {"weights": 0.5 if stage == 3 else 2, "optimizer": (12 + 4) / 4, "gradients": (2 + 4) / 4}
    assert step == pytest.approx(expected, rel=1e-4)


def test_buckets_are_one_or_two_and_what_is_summed_over_processes(small):
    largest = 1000 * 64  # the word embeddings, of their own more than a bucket

    def buckets(processes, **zero):
        config = small(processes=processes, zero=zero, precision="bf16")
        return held_states(config, DATA, cluster(processes)).backward["buckets"]

    assert buckets(1) == 2 * BUCKET and buckets(1, overlap_comm=True) == 4 * BUCKET
    assert buckets(2) == 2 * (BUCKET + largest)
    assert buckets(2, reduce_bucket_size=100_000) == 2 * 200_000


def test_what_is_offloaded_rests_on_the_host(small):
    offloaded = {"device": "cpu"}
    config = small(zero={"stage": 3, "offload_optimizer": offloaded, "offload_param": offloaded}, precision="bf16")
    gpu, cpu = footprint(config, DATA, cluster(kind="gpu")), footprint(config, DATA, cluster(kind="cpu"))
    weights = count_parameters(empty_model(config, DATA.vocab_size))
    assert {part: size / weights for part, size in gpu.host.items()} == {"weights": 2, "gradients": 6, "optimizer": 12}
    assert cpu.host == {} and cpu.moments["step"]["optimizer"] == 12 * weights


@pytest.mark.parametrize(
    ("mode", "cell", "forwards"),
    [("none", 1, 0), ("layer", 1, 1), ("timestep", 1, 1.8), ("timestep", 2, 1.8), ("timestep", 5, 1)],
)
def test_operations_are_those_of_a_count_by_hand(small, mode, cell, forwards):
    config = small(checkpointing=mode, checkpointing_timesteps=cell, neuron={"num_timesteps": 5}, accumulation=3)
    assert recomputed_forwards(config, 5) == forwards
    D, F, V, L, layers, T, rows = 64, 256, 1000, 32, 4, 5, 6
    products = 2 * rows * L * T * layers * (4 * D * D + 2 * D * F)
    scores = rows * T * layers * 4 * L * L * D
    head = 6 * rows * round(0.15 * (L - 3)) * (D * D + D * V)
    assert step_work(config, DATA) == Work(3 * products, forwards * (products + scores), 3 * scores, head)


@pytest.mark.parametrize(
    "case",
    [
        {
            "preset": "encoder-tiny",
            "ds_config": "zero2",
            "precision": "bf16",
            "checkpointing": "layer",
            "accumulation": 2,
        },
        {"preset": "decoder-tiny", "ds_config": "zero3", "precision": "bf16", "checkpointing": "layer", "processes": 2},
    ],
    ids=str,
)
def test_predictions_are_near_what_a_real_step_takes(case):
    measured = in_fresh_processes(case)["counted"]
    assert predict(case) == pytest.approx(measured, rel=0.03)
