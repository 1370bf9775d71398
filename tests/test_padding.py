"""Encoders compute nothing for padding: the same as with it, but for the order of sums."""

import pytest
import torch
import torch.nn.functional as F

from models.amplitudes import calibrate_amplitudes
from models.modeling import SpikeLMForPreTraining, SpikeLMModel
from models.positions import TokenPlaces
from tests.tiny import make_batch, make_model

NEURONS = {
    "elastic": {"kind": "elastic", "reset": "normalized", "amplitude": "tracked"},
    "lif": {"kind": "lif"},
    "none": {"kind": "none"},
}
MASKS = {
    "right": [[1] * 10, [1] * 4 + [0] * 6, [1] * 7 + [0] * 3],
    "left": [[0] * 5 + [1] * 5, [1] * 10, [0] * 9 + [1]],
    "anywhere": [[1, 0] * 5, [0] * 10, [0, 1, 1, 0, 0, 1, 1, 1, 0, 1]],
}


def train_step(neuron, mask, mode, with_padding):
    """Hidden states, losses, statistics and gradients of one step, in fp64."""
    model = make_model(NEURONS[neuron], model_class=SpikeLMForPreTraining).double()
    batch = make_batch() | {"attention_mask": torch.tensor(mask)}
    is_padding = batch["attention_mask"] == 0
    batch["labels"] = batch["labels"].masked_fill(is_padding, -100)
    batch["next_sentence_label"] = batch["next_sentence_label"].masked_fill(is_padding[:, 0], -100)
    with pytest.MonkeyPatch.context() as patch:
        if with_padding:
            patch.setattr(TokenPlaces, "of", classmethod(lambda cls, visible: None))
        calibrate_amplitudes(model, batch)
        model.train().model.stack.set_checkpointing(mode, 2)
        output = model(**batch, output_hidden_states=True)
        output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, gradients, ~is_padding


@pytest.mark.parametrize("mode", ["none", "timestep"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("neuron", NEURONS)
def test_a_step_is_the_same_without_padding(neuron, mask, mode):
    (alone, gradients, visible), (padded, expected, _) = (
        train_step(neuron, mask, mode, with_padding) for with_padding in (False, True)
    )
    assert len(alone.hidden_states) == 3
    for ours, theirs in zip(alone.hidden_states[1:], padded.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours[visible], theirs[visible], rtol=1e-12, atol=1e-12)
        assert not ours[~visible].any() and theirs[~visible].all()
    torch.testing.assert_close(alone.spike_stats, padded.spike_stats, rtol=1e-6, atol=0)
    torch.testing.assert_close(alone.loss, padded.loss, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


def test_a_neuron_that_counts_padding_gets_it():
    model, batch = make_model({"count_padding": True}), make_batch()
    calibrate_amplitudes(model, batch)
    hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert hidden[batch["attention_mask"] == 0].all()


def test_rows_of_padding_alone_and_models_without_layers_are_computed_as_they_are():
    visible = torch.tensor(MASKS["anywhere"]).bool()
    assert TokenPlaces.of(torch.zeros_like(visible)) is None and TokenPlaces.of(torch.ones_like(visible)).are_all
    model = make_model({"kind": "none"}, num_hidden_layers=0, model_class=SpikeLMModel)
    batch = make_batch()
    hidden = model(batch["input_ids"], visible).last_hidden_state
    assert torch.equal(hidden, model.embeddings(batch["input_ids"]))


def test_a_mask_that_hides_nothing_is_none_to_the_attention(monkeypatch):
    model, batch, masks = make_model(), make_batch((10, 10, 10)), []
    attend = F.scaled_dot_product_attention

    def note(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    calibrate_amplitudes(model, batch)
    assert masks == [None] * len(masks) != []


def test_packing_and_padding_are_inverse_and_carry_gradients():
    places = TokenPlaces.of(visible := torch.tensor(MASKS["anywhere"]).bool())
    x = torch.randn(4, 3, 10, 2, dtype=torch.float64, requires_grad=True)
    packed = places.pack(x)
    assert torch.equal(packed[:, 0], x[:, visible])
    assert torch.equal(places.pad(packed), x * visible[None, :, :, None])
    places.pad(packed).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * visible[None, :, :, None])
