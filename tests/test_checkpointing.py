"""Checkpointing across timesteps: the same forward, the same gradients but for the order of sums, less kept."""

import pytest
import torch
from tiny import make_batch, make_model

from models import layers
from models.amplitudes import SpikeStats, calibrate_amplitudes, update_amplitudes
from models.modeling import SpikeLMForCausalLM, SpikeLMForPreTraining
from pipeline.tracing import LiveBytes
from tests.bench.bench_layer import bytes_kept

T = 5
LLAMA = {"family": "llama", "model_class": SpikeLMForCausalLM, "num_key_value_heads": 1}
FAMILIES = {"bert": {"model_class": SpikeLMForPreTraining}, "llama": LLAMA}
# Weights so large that lif neurons behind the attention, whose input is an average of spikes, fire at all.
LIF_SCALE = {"bert": 1.0, "llama": 3.0}
NEURONS = {
    "frozen": {"kind": "elastic", "amplitude": "frozen", "num_timesteps": T},
    "tracked": {"kind": "elastic", "amplitude": "tracked", "num_timesteps": T, "reset": "normalized"},
    "lif": {"kind": "lif", "num_timesteps": T},
    "none": {"kind": "none"},
}
each_case = pytest.mark.parametrize(
    ("family", "neuron"), [(family, neuron) for family in FAMILIES for neuron in NEURONS]
)


def inputs_of(family):
    """A batch with padding; the decoder's rows hold two documents."""
    batch = make_batch()
    if family == "bert":
        return batch
    positions = torch.cat([torch.arange(4), torch.arange(6)]).expand(3, 10)
    return {**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, "position_ids": positions}


def ready_model(family, neuron, dtype=torch.float32, dropout=0.0):
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    scale = {"initializer_range": LIF_SCALE[family]} if neuron == "lif" else {}
    model = make_model(NEURONS[neuron], **FAMILIES[family], **dropouts, **scale).to(dtype)
    calibrate_amplitudes(model, inputs_of(family))
    return model.train()


def train_step(model, family):
    """Output, gradients, generator state and moved amplitudes of one step."""
    torch.manual_seed(9)
    output = model(**inputs_of(family))
    output.loss.backward()
    update_amplitudes(model, SpikeStats(output.spike_stats))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, gradients, torch.get_rng_state(), model.model.stack.amplitudes


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_cells_change_forward_and_gradients_by_rounding_only(family, neuron, dtype, tolerance):
    whole, expected, _, amplitudes = train_step(ready_model(family, neuron, dtype), family)
    for cell in (1, 2, T):
        model = ready_model(family, neuron, dtype)
        model.model.stack.set_checkpointing("timestep", cell)
        output, gradients, _, moved = train_step(model, family)
        # A product of fewer rows may sum in another order.
        for ours, theirs in ((output.loss, whole.loss), (output.logits, whole.logits), (moved, amplitudes)):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert torch.equal(output.spike_stats[..., 1:], whole.spike_stats[..., 1:]), "spikes flip"
        parted = {name: float((gradients[name] - g).norm() / g.norm()) for name, g in expected.items() if g.any()}
        assert {name: value for name, value in parted.items() if not value < tolerance} == {}
        assert len(parted) > 10 and (cell < T or not any(parted.values()))


@each_case
def test_what_cells_drop_out_they_drop_out_again(family, neuron, monkeypatch):
    results = []
    for recomputed in (True, False):
        model = ready_model(family, neuron, dropout=0.3)
        model.model.stack.set_checkpointing("timestep", 2)
        if not recomputed:
            for layer in model.model.stack.layers:
                layer.gradient_checkpointing = False
            monkeypatch.setattr(layers, "checkpoint", lambda run, *arguments, use_reentrant: run(*arguments))
        results.append(train_step(model, family))
    (output, gradients, generator, moved), (plain, expected, plain_generator, plain_moved) = results
    assert torch.equal(output.loss, plain.loss) and torch.equal(output.spike_stats, plain.spike_stats)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert torch.equal(generator, plain_generator) and torch.equal(moved, plain_moved)
    assert not torch.equal(output.loss, ready_model(family, neuron)(**inputs_of(family)).loss)  # dropout was on


@pytest.mark.parametrize(
    ("arguments", "forwards"),
    [
        (["none"], [T]),
        (["layer"], [T, T]),
        # All cells; again those before the last, for what goes into each; and each just before its own backward.
        (["timestep"], [1, 1, 1, 1, 1] + [1, 1, 1, 1] + [1, 1, 1, 1, 1]),
        (["timestep", 2], [2, 2, 1] + [2, 2] + [1, 2, 2]),
        (["timestep", T], [T, T]),
        (["timestep", 9], [T, T]),
    ],
    ids=str,
)
def test_the_backward_runs_a_layer_again_and_then_cell_after_cell(arguments, forwards):
    model, seen = ready_model("bert", "frozen"), []
    model.model.stack.layers[0].mlp.up.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model.model.stack.set_checkpointing(*arguments)
    train_step(model, "bert")
    assert seen == forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_keep_no_more_than_their_layers_inputs(family):
    kept = {}
    for mode in ("none", "layer", "timestep"):
        model = ready_model(family, "tracked")
        model.model.stack.set_checkpointing(mode)
        kept[mode] = bytes_kept(lambda model=model: model(**inputs_of(family)).loss)
    assert kept["timestep"] == kept["layer"] < 0.3 * kept["none"]


def test_within_a_layer_only_one_cell_is_whole_at_a_time():
    """Of the cells before, what goes into them is kept: the backward holds their carries, not their codes."""
    kept, peak = {}, {}
    for cell in (None, 2, 1):
        model = ready_model("bert", "frozen")
        (layer, *_), stack = model.model.stack.layers, model.model.stack
        layer.timesteps_per_cell = cell
        x_TBLD = torch.randn(T, 8, 10, 16, requires_grad=True)

        def forward(layer=layer, stack=stack, x_TBLD=x_TBLD):
            return layer(x_TBLD, stack.amplitudes[:6])[0]

        kept[cell] = bytes_kept(forward)
        live = LiveBytes("cpu")
        with live:
            forward().sum().backward()
        peak[cell] = live.peak
    D, F, tokens = 16, 32, 80
    boundary = 4 * tokens * (3 * D + F)
    assert kept[1] - kept[2] == 2 * boundary  # four instead of two
    assert peak[1] < peak[2] < 0.85 * peak[None]


def test_cells_are_for_training_only():
    model, seen = ready_model("bert", "tracked"), []
    model.model.stack.set_checkpointing("timestep")
    model.model.stack.layers[0].mlp.up.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.no_grad():
        model(**inputs_of("bert"))
    model.eval()(**inputs_of("bert")).loss.backward()
    before = model.model.stack.amplitudes.clone()
    calibrate_amplitudes(model.train(), inputs_of("bert"))
    assert seen == [T, T, T] and torch.equal(model.model.stack.amplitudes, before)


def test_cells_of_no_timestep_are_refused():
    with pytest.raises(ValueError, match="timesteps_per_cell is 0: a cell needs at least 1 timestep"):
        ready_model("bert", "frozen").model.stack.set_checkpointing("timestep", 0)
