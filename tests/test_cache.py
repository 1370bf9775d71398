"""The packed cache: what comes out of it is what neurons fire, to the bit, in 2 bits a timestep."""

import copy

import pytest
import torch
from decoders import each_kind, make_decoder, ready_decoder, token_ids
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from models.amplitudes import BlockNeurons
from models.cache import GROWTH, SpikeCache, pack, unpack
from models.config import NeuronConfig
from models.layers import KEY, SITES, VALUE
from models.modeling import SpikeLMForMaskedLM
from models.neuron import run_lif, run_memoryless

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AMPLITUDES = st.sampled_from([0.0, 1e-7, 1e-5, 0.3, 1.0, 1.7320508, 77.77, 3e5])  # in fp16 the last one is infinite
sizes = st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 5), st.integers(1, 11))


def cached_spikes(spikes, worth):
    return unpack(pack(spikes), worth, spikes.shape[-1])


def membranes(shape, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    chosen = torch.randint(24, shape, generator=generator)
    return torch.where(chosen < 4, odd[chosen.clamp(max=3)], x)


@given(sizes, st.sampled_from(DTYPES), st.lists(AMPLITUDES, min_size=9, max_size=9), st.integers(0, 99))
def test_what_an_elastic_neuron_fires_comes_back_to_the_bit(shape, dtype, amplitudes, seed):
    alpha = torch.tensor(amplitudes[: shape[0]])
    x = membranes(shape, seed, scale=2 * alpha.double().view(-1, 1, 1, 1)).to(dtype)
    spikes = run_memoryless(x, alpha)
    neurons = BlockNeurons(NeuronConfig(num_timesteps=shape[0]), alpha.expand(len(SITES), -1), None)
    assert pack(spikes).shape == (*shape[:3], -(-shape[3] // 4)) and pack(spikes).dtype == torch.uint8
    torch.testing.assert_close(
        cached_spikes(spikes, neurons.worth(KEY, dtype)), spikes, rtol=0, atol=0, equal_nan=True, check_dtype=True
    )


@given(sizes, st.sampled_from(DTYPES), st.integers(0, 99))
def test_what_a_lif_neuron_fires_comes_back_to_the_bit(shape, dtype, seed):
    spikes, _ = run_lif(membranes(shape, seed, scale=2.0).to(dtype), memoryless=True)
    neurons = BlockNeurons(NeuronConfig(kind="lif", num_timesteps=shape[0]), torch.empty(0, shape[0]), None)
    found = cached_spikes(spikes, neurons.worth(VALUE, dtype))
    torch.testing.assert_close(found, spikes, rtol=0, atol=0, equal_nan=True, check_dtype=True)


def test_a_byte_holds_four_neighbours_the_first_in_its_lowest_bits():
    spikes = torch.tensor([0.0, 1, -1, torch.nan, -1, 0]).view(1, 1, 1, 6)
    assert pack(spikes).flatten().tolist() == [0b11_10_01_00, 0b00_00_00_10]


def fired_keys_and_values(monkeypatch):
    """A list that every forward after this adds to: what each layer's keys and values fire, (k, v) by layer."""
    fire, fired = BlockNeurons.fire, []

    def fire_and_remember(neurons, site, x, **options):
        spikes = fire(neurons, site, x, **options)
        if site == KEY:
            fired.append([spikes])
        elif site == VALUE:
            fired[-1].append(spikes)
        return spikes

    monkeypatch.setattr(BlockNeurons, "fire", fire_and_remember)
    return fired


@pytest.mark.parametrize("settings", [{"num_timesteps": 1}, {"num_timesteps": 3}, {"kind": "lif", "num_timesteps": 4}])
def test_a_cache_holds_the_codes_that_an_uncached_forward_fires(settings, monkeypatch):
    model, ids, found = ready_decoder(settings).double(), token_ids(length=70), set()
    cache = SpikeCache(model.config)
    with torch.no_grad():
        for chunk in ids.split([5, 1, 60, 1, 3], dim=1):
            model(chunk, past_key_values=cache)
        fired = fired_keys_and_values(monkeypatch)
        model(ids)
    one = torch.ones(model.config.num_timesteps)
    for layer, spikes in zip(cache.layers, fired, strict=True):
        for codes, expected in zip((layer.keys, layer.values), spikes, strict=True):
            held = unpack(codes[:, :, :70], one, expected.shape[-1])
            assert torch.equal(held, expected.sign().float())
            found |= set(held.flatten().tolist())
    assert found == ({0.0, 1.0} if settings.get("kind") == "lif" else {-1.0, 0.0, 1.0})


@pytest.mark.parametrize(("num_timesteps", "bits"), [(1, 2), (3, 6), (4, 8), (6, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_element_takes_two_bits_a_timestep_whatever_its_dtype(num_timesteps, bits, dtype):
    model, B, S = ready_decoder({"num_timesteps": num_timesteps}).to(dtype), 3, 100
    with torch.no_grad():
        cache = model(token_ids(B, S), use_cache=True).past_key_values
    elements = (
        model.config.num_hidden_layers * 2 * B * 128 * 2 * 4
    )  # layers, k and v, rows, storage, heads, their width
    assert S <= 128 == 2 * GROWTH
    assert sum(layer.nbytes for layer in cache.layers) == elements * bits / 8
    assert cache.nbytes == elements * bits / 8 + B * S * 8  # and the tokens' documents, once for all layers
    print(f"T={num_timesteps}: {elements * bits // 8} bytes, {bits / 16} of ordinary keys and values in bf16")


def test_without_spikes_keys_and_values_are_kept_as_they_are():
    model = ready_decoder({"kind": "none"}).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(token_ids(3, 64), use_cache=True).past_key_values
    assert sum(layer.nbytes for layer in cache.layers) == 2 * 2 * 3 * 64 * 8 * 2
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_storage_grows_seldom_and_only_what_is_new_is_written():
    model, addresses = ready_decoder({"num_timesteps": 2}), set()
    with torch.no_grad():
        cache = model(token_ids(1, 3), use_cache=True).past_key_values
        for token in token_ids(1, 3 * GROWTH - 3).split(1, dim=1):
            model(token, past_key_values=cache)
            addresses.add((cache.layers[0].keys.data_ptr(), cache.layers[0].keys.shape[2]))
    assert sorted(size for _, size in addresses) == [GROWTH, 2 * GROWTH, 3 * GROWTH]
    assert cache.get_seq_length() == cache.layers[1].get_seq_length() == 3 * GROWTH


# What generate does to a cache


def filled(kind="elastic"):
    """A decoder, a batch with padding, and the cache of all but its last token."""
    model, ids = ready_decoder({"kind": kind}).double(), token_ids(rows=4, length=9)
    mask = torch.arange(9).expand(4, 9) >= torch.tensor([[0], [3], [5], [1]])
    with torch.no_grad():
        cache = model(ids[:, :-1], mask[:, :-1], use_cache=True).past_key_values
    return model, ids, mask, cache


def last_logits(model, ids, mask, cache):
    with torch.no_grad():
        return model(ids[:, -1:], mask, past_key_values=cache).logits[:, -1]


@each_kind
@pytest.mark.parametrize(
    ("method", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0, 3]), [2, 0, 0, 3]),
        ("batch_select_indices", torch.tensor([3, 1]), [3, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_rows_are_chosen_and_repeated(kind, method, argument, rows):
    model, ids, mask, cache = filled(kind)
    expected = last_logits(model, ids, mask, copy.deepcopy(cache))
    getattr(cache, method)(argument)
    found = last_logits(model, ids[rows], mask[rows], cache)
    torch.testing.assert_close(found, expected[rows], rtol=1e-12, atol=1e-12)
    assert cache.get_seq_length() == 9


@each_kind
def test_tokens_are_forgotten_and_others_seen_instead(kind):
    model, ids, mask, cache = filled(kind)
    expected = last_logits(model, ids, mask, copy.deepcopy(cache))
    other = last_logits(model, (ids + 1) % 50, mask, cache)
    assert cache.is_croppable and not torch.allclose(other, expected, atol=1e-2)
    cache.crop(0)
    cache.crop(-1)
    assert cache.get_seq_length() == 8
    torch.testing.assert_close(last_logits(model, ids, mask, cache), expected, rtol=1e-12, atol=1e-12)
    cache.crop(-4)
    with torch.no_grad():
        model(ids[:, 5:8], mask[:, :8], past_key_values=cache)
    torch.testing.assert_close(last_logits(model, ids, mask, cache), expected, rtol=1e-12, atol=1e-12)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="tokens_to_remove is 3: give minus the number of tokens to forget"):
        cache.crop(3)


def test_a_reset_cache_holds_nothing():
    model, ids, mask, cache = filled()
    expected = last_logits(model, ids, mask, copy.deepcopy(cache))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    with torch.no_grad():
        found = model(ids, mask, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_empty_cache_bears_everything():
    cache = SpikeCache(make_decoder().config)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    cache.crop(-1)
    assert (cache.get_seq_length(), cache.nbytes, cache.is_compileable) == (0, 0, False)
    assert cache.get_max_length() == -1 and cache.get_mask_sizes(3, 0) == (3, 0)


def test_a_cache_begun_in_inference_mode_goes_on_outside_of_it():
    model, ids, mask, _ = filled()
    with torch.inference_mode():
        cache = model(ids[:, :-1], mask[:, :-1], use_cache=True).past_key_values
    expected = model(ids, mask).logits[:, -1]
    torch.testing.assert_close(last_logits(model, ids, mask, cache), expected, rtol=1e-12, atol=1e-12)


def test_an_encoder_has_no_cache():
    encoder = make_model(model_class=SpikeLMForMaskedLM)
    with pytest.raises(ValueError, match="family bert is an encoder, which keeps nothing"):
        SpikeCache(encoder.config)
