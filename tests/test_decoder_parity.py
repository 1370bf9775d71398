"""The decoder without spikes against transformers' Llama, weight for weight."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.config import SpikeLMConfig
from models.modeling import SpikeLMForCausalLM
from models.warm_start import llama_names, load_llama

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
ROPES = {
    "default": None,
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20},
}


def both(*, rope="default", **overrides):
    """A Llama with random weights, norms included, and our decoder with a copy of them."""
    torch.manual_seed(0)
    shape = {**SHAPE, "tie_word_embeddings": False, **overrides}
    rope_parameters = None if ROPES[rope] is None else dict(ROPES[rope])
    theirs = LlamaForCausalLM(
        LlamaConfig(**shape, rope_parameters=rope_parameters, initializer_range=0.2, pad_token_id=None)
    )
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours = SpikeLMForCausalLM(
        SpikeLMConfig(family="llama", **shape, rope_parameters=ROPES[rope], neuron={"kind": "none"})
    )
    load_llama(ours, theirs.state_dict())
    return ours, theirs


def of_llama(name, tensors):
    """Llama's tensor for our parameter; the fused ones stand one below the other."""
    return torch.cat([tensors[each] for each in llama_names(name, tensors)])


def batch(left=0, right=0):
    """Four rows of 24 tokens; the last two have so many pads before and behind them."""
    input_ids = torch.randint(1, 97, (4, 24), generator=torch.Generator().manual_seed(1))
    position = torch.arange(24)
    inside = (position >= left) & (position < 24 - right)
    attention_mask = torch.stack([torch.ones(24), torch.ones(24), inside, inside]).long()
    labels = torch.where((attention_mask == 1) & (input_ids % 5 != 0), input_ids, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask}, labels


def compare(ours, theirs, inputs, labels, visible):
    """Largest differences of logits, loss and gradients; all within 1e-5."""
    # With a cache, which it makes by default, Llama does not look for documents in position_ids.
    logits = ours(**inputs).logits[visible], theirs(**inputs, use_cache=False).logits[visible]
    losses = ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels, use_cache=False).loss
    for loss in losses:
        loss.backward()
    theirs_by_name = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {"logits": logits, "loss": losses}
    found |= {name: (p.grad, of_llama(name, theirs_by_name)) for name, p in ours.named_parameters()}
    largest = {name: float((one - other).detach().abs().max()) for name, (one, other) in found.items()}
    print({name: f"{value:.1e}" for name, value in largest.items()})
    for name, (one, other) in found.items():
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_kind_none_equals_llama(tied, rope):
    ours, theirs = both(rope=rope, tie_word_embeddings=tied)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
    inputs, labels = batch(right=7)
    compare(ours, theirs, inputs, labels, inputs["attention_mask"].bool())


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_queries_share_keys_and_values_as_in_llama(shared):
    ours, theirs = both(num_key_value_heads=shared)
    inputs, labels = batch()
    visible = torch.ones(4, 24, dtype=torch.bool)
    compare(ours, theirs, {"input_ids": inputs["input_ids"]}, labels, visible)


def test_left_padding_equals_llamas_with_the_positions_that_generate_gives_it():
    ours, theirs = both()
    inputs, labels = batch(left=9)
    labels[2:, 9] = -100  # transformers would have the pad before it predict it
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    visible = inputs["attention_mask"].bool()
    compare(ours, theirs, {**inputs, "position_ids": positions}, labels, visible)
    assert torch.equal(ours(**inputs).logits, ours(**inputs, position_ids=positions).logits)


@pytest.mark.parametrize("rows", [1, 4], ids=["one row for all", "each row its own"])
def test_packed_documents_equal_llamas(rows):
    ours, theirs = both()
    inputs, labels = batch()
    lengths = [(10, 14), (1, 23), (8, 16), (5, 19)][:rows]
    positions = torch.stack([torch.cat([torch.arange(length) for length in pair]) for pair in lengths])
    packed = {"input_ids": inputs["input_ids"], "position_ids": positions}
    compare(ours, theirs, packed, labels, torch.ones(4, 24, dtype=torch.bool))
