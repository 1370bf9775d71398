"""Windows over documents, and the sums that measures are made of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.amplitudes import calibrate_amplitudes, keep_timesteps
from models.modeling import SpikeLMForCausalLM
from pipeline.evaluation import bits_per_byte, strided_windows, tally_batches, window_batches
from tests.tiny import make_model

CPU = torch.device("cpu")


def decoder(num_timesteps=2, kind="elastic"):
    """A tiny calibrated decoder in fp64, and ids of a document of 12 tokens."""
    family = {"family": "llama", "hidden_dropout_prob": None, "attention_probs_dropout_prob": None}
    neuron = {"kind": kind, "num_timesteps": num_timesteps}
    model = make_model(neuron, SpikeLMForCausalLM, **family).double().eval()
    ids = torch.randint(1, 50, (1, 12), generator=torch.Generator().manual_seed(3))
    calibrate_amplitudes(model, {"input_ids": ids})
    return model, ids[0].numpy()


@given(num_tokens=st.integers(0, 40), length=st.integers(2, 12), data=st.data())
def test_every_token_but_the_first_is_a_target_once_and_sees_what_it_may(num_tokens, length, data):
    stride = data.draw(st.integers(1, length - 1))
    ids = np.arange(num_tokens)
    targets = []
    for window in strided_windows(ids, length, stride):
        assert len(window.ids) <= length and (np.diff(window.ids) == 1).all()
        for place in range(window.first_target, len(window.ids)):
            targets.append(int(window.ids[place]))
            assert place >= min(targets[-1], length - stride)
    assert targets == list(range(1, num_tokens))


@pytest.mark.parametrize("stride", [0, 4])
def test_windows_that_would_show_a_target_nothing_are_refused(stride):
    with pytest.raises(ValueError, match=f"a stride of {stride} and windows of 4: use a stride from 1 to 3"):
        next(strided_windows(np.arange(9), 4, stride))


def test_one_window_gives_the_loss_of_the_whole_document():
    model, ids = decoder()
    tally = tally_batches(model, window_batches(strided_windows(ids, 12, 6), 4, CPU), ("causal_lm",))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    targets = torch.from_numpy(ids[1:])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    right = (logits.argmax(-1) == targets).sum()
    torch.testing.assert_close(
        tally.sums[:, 0], torch.tensor([11, expected, right]).double(), rtol=1e-6, atol=0
    )  # losses are summed in fp32
    share = np.bincount(ids[1:])[np.bincount(ids[1:]) > 0] / 11
    values = tally.values()
    assert values["causal_lm_loss"] == pytest.approx(float(expected) / 11)
    assert values["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_are_measured_alike_alone_and_padded(batch_size):
    model, ids = decoder()
    windows = list(strided_windows(ids, 5, 3))
    tally = tally_batches(model, window_batches(windows, batch_size, CPU), ("causal_lm",))
    loss = 0.0
    for window in windows:
        with torch.no_grad():
            log_shares = model(torch.from_numpy(window.ids)[None]).logits[0].log_softmax(-1)
        places = range(window.first_target, len(window.ids))
        loss -= sum(float(log_shares[place - 1, window.ids[place]]) for place in places)
    assert tally.sums[:2, 0].tolist() == pytest.approx([11, loss], rel=1e-6)


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


def test_fewer_timesteps_are_the_first_of_the_others():
    short, ids = decoder(num_timesteps=2)
    long, _ = decoder(num_timesteps=4)
    long.model.stack.amplitudes[:, :2] = short.model.stack.amplitudes
    keep_timesteps(long, 2)
    inputs = torch.from_numpy(ids)[None]
    with torch.no_grad():
        ours, theirs = long(inputs), short(inputs)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.spike_stats, theirs.spike_stats)
    assert long.config.num_timesteps == 2
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"num_timesteps is {wrong}, but the model has amplitudes for 2"):
            keep_timesteps(long, wrong)
