"""Generation: what a decoder computes from its cache is what it computes from whole rows, token for token."""

import os
import subprocess
import sys

import pytest
import torch
from decoders import clear_lif_threshold, each_kind, each_neuron, positions_of, ready_decoder, token_ids
from tiny import make_model
from torch.nn.functional import pad
from transformers import DynamicCache

from models.amplitudes import BlockNeurons
from models.auto import save_with_code
from models.cache import SpikeCache
from models.config import SpikeLMConfig
from models.layers import KEY
from models.modeling import AUTO_CLASSES, SpikeLMForCausalLM, SpikeLMForMaskedLM

WIDE = {"max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
ENDS = [3, 20, 37]  # so that rows end at different times
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "returns": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(autouse=True)
def lif_between_rounding_errors(monkeypatch):
    clear_lif_threshold(monkeypatch)


def decoder(settings=None, **overrides):
    """In float64, where rounding flips no spike."""
    return ready_decoder(settings, max_position_embeddings=64, **overrides).double().eval()


def mixed_rows(rows=4, length=12):
    """Rows of different lengths, padded on the left."""
    ids, lengths = token_ids(rows, length), torch.tensor([12, 5, 1, 9])
    mask = (torch.arange(length) >= length - lengths[:rows, None]).long()
    return ids * mask, mask


def generate(model, ids, mask, seed=0, max_new_tokens=16, **options):
    torch.manual_seed(seed)
    settings = {"pad_token_id": 0, "eos_token_id": ENDS, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **{**settings, **options})


# Cached and uncached


@each_neuron
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_the_same_with_a_cache_as_without(settings, way):
    model, (ids, mask) = decoder(settings), mixed_rows()
    cached = generate(model, ids, mask, **WAYS[way])
    uncached = generate(model, ids, mask, use_cache=False, **WAYS[way])
    assert type(cached.past_key_values) is SpikeCache and uncached.past_key_values is None
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # transformers hands them out in fp32
    assert len(cached.logits) > 5


@each_neuron
def test_a_row_generates_what_it_generates_alone(settings):
    model, (ids, mask) = decoder(settings), mixed_rows()
    together = generate(model, ids, mask, eos_token_id=None).sequences
    for row, kept in enumerate(mask.bool()):
        alone = generate(model, ids[row : row + 1, kept], mask[row : row + 1, kept], eos_token_id=None)
        assert torch.equal(alone.sequences[0], together[row, 12 - int(kept.sum()) :])


@each_neuron
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [1, 4, 6, 1], [11, 1]], ids=str)
def test_logits_of_chunks_are_those_of_the_whole(settings, sizes):
    model, (ids, mask) = decoder(settings), mixed_rows()
    expected, counted = model(ids, mask), mask.bool()
    for given in (None, mask.cumsum(-1) - 1, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)):
        cache, logits, stats, end = SpikeCache(model.config), [], 0, 0
        for chunk in ids.split(sizes, dim=1):
            begin, end = end, end + chunk.shape[1]
            position_ids = None if given is None else given[:, begin:end]
            output = model(chunk, mask[:, :end], position_ids=position_ids, past_key_values=cache)
            assert output.past_key_values is cache and output.logits.isfinite().all()
            logits.append(output.logits)
            stats = stats + output.spike_stats
        torch.testing.assert_close(torch.cat(logits, 1)[counted], expected.logits[counted], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats, expected.spike_stats, rtol=1e-12, atol=1e-12)  # each token counted once


@each_kind
@pytest.mark.parametrize("size", [1, 5, 11, 12, 40])
def test_a_prompt_may_be_taken_up_in_chunks(kind, size):
    model, (ids, mask) = decoder({"kind": kind}), mixed_rows()
    expected = generate(model, ids, mask).sequences
    assert torch.equal(generate(model, ids, mask, prefill_chunk_size=size).sequences, expected)


@each_kind
def test_generation_goes_on_where_it_has_stopped(kind):
    model, (ids, mask) = decoder({"kind": kind}), mixed_rows()
    whole = generate(model, ids, mask, eos_token_id=None)
    part = generate(model, ids, mask, eos_token_id=None, max_new_tokens=8)
    mask = pad(mask, (0, 8), value=1)
    rest = generate(
        model, part.sequences, mask, max_new_tokens=8, eos_token_id=None, past_key_values=part.past_key_values
    )
    assert torch.equal(rest.sequences, whole.sequences)


@each_kind
@pytest.mark.parametrize("guesser", ["lookup", "another model"])
def test_guessed_tokens_are_taken_back_from_the_cache(kind, guesser):
    """The cache is cropped where the model says otherwise than what was guessed."""
    model, ids = decoder({"kind": kind}), token_ids(rows=1)
    other = {"assistant_model": decoder({"kind": kind}, seed=1)}
    options = {"prompt_lookup_num_tokens": 3} if guesser == "lookup" else other
    expected = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    found = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(found, expected)


def test_embeddings_may_stand_for_the_prompt():
    model, (ids, mask) = decoder(), mixed_rows()
    embedded = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=9, pad_token_id=0)
    assert torch.equal(found, generate(model, ids, mask, eos_token_id=None, max_new_tokens=9).sequences[:, 12:])


@pytest.mark.parametrize("settings", [{"num_timesteps": 1}, {"num_timesteps": 4}, {"kind": "none"}], ids=str)
def test_rounding_in_fp32_changes_few_tokens(settings):
    """Sums over other shapes round otherwise, and a spike may flip: what that changes is counted and printed."""
    model, ids = ready_decoder(settings, **WIDE), token_ids(rows=5)
    cached, uncached = (
        generate(model, ids, None, use_cache=use, eos_token_id=None, max_new_tokens=24).sequences[:, 24:]
        for use in (True, False)
    )
    same = cached == uncached
    until = same.long().cumprod(-1).sum(-1)  # behind its first differing token a row is another text
    print(f"{settings}: {int((~same).sum())} of {same.numel()} tokens differ; equal up to {until.tolist()} of 24")
    assert until.float().mean() > 12


def test_hidden_states_of_every_step_are_handed_out():
    model, (ids, mask) = decoder(), mixed_rows()
    states = generate(model, ids, mask, output_hidden_states=True, max_new_tokens=3, eos_token_id=None).hidden_states
    assert [[state.shape[1] for state in step] for step in states] == [[12] * 3, [1] * 3, [1] * 3]


def test_a_twin_without_layers_generates():
    model, (ids, mask) = decoder(num_hidden_layers=0), mixed_rows()
    cached, uncached = (generate(model, ids, mask, use_cache=use).sequences for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", ["elastic", "lif"])
def test_a_key_that_is_not_finite_is_seen_by_all_later_tokens(kind, monkeypatch):
    """A code for it is kept as well: silence would hide it."""
    model, ids, fire = ready_decoder({"kind": kind}), token_ids(), BlockNeurons.fire
    cache = SpikeCache(model.config)

    def fire_once_not_finite(neurons, site, x, **options):
        if site == KEY:
            x = x.clone()
            x[0, 1, 3, 5] = torch.inf
        return fire(neurons, site, x, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BlockNeurons, "fire", fire_once_not_finite)
        model(ids[:, :6], past_key_values=cache)
    logits = model(ids[:, 6:8], past_key_values=cache).logits
    assert logits[0].isfinite().all() and logits[1].isnan().any(-1).all()


# Documents


@each_neuron
def test_packed_documents_do_not_see_each_other_in_a_cache_either(settings):
    model, ids = decoder(settings), token_ids()
    positions = torch.cat([positions_of(10, 5, 9), positions_of(4, 20)])
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 12] = mask[1, 2] = 0
    expected = model(ids, mask, position_ids=positions).logits
    for sizes in ([24], [3, 9, 12], [10, 14], [12] + [1] * 12):
        cache, logits, end = SpikeCache(model.config), [], 0
        for chunk in ids.split(sizes, dim=1):
            begin, end = end, end + chunk.shape[1]
            output = model(chunk, mask[:, :end], position_ids=positions[:, begin:end], past_key_values=cache)
            logits.append(output.logits)
        counted = mask.bool()
        torch.testing.assert_close(torch.cat(logits, 1)[counted], expected[counted], rtol=1e-12, atol=1e-12)
    cache.batch_select_indices(torch.tensor([0]))
    going_on = model(ids[1:, :3], past_key_values=cache).logits  # in the last document, where nothing says otherwise
    alone = torch.cat([ids[:1, 15:], ids[1:, :3]], dim=1)
    torch.testing.assert_close(going_on, model(alone).logits[:, -3:], rtol=1e-12, atol=1e-12)


@each_kind
def test_what_is_generated_belongs_to_the_last_document_of_its_row(kind):
    model, ids = decoder({"kind": kind}), token_ids(rows=1)
    packed = generate(model, ids, None, position_ids=positions_of(10, 5, 9), eos_token_id=None)
    alone, unpacked = (generate(model, rows, None, eos_token_id=None) for rows in (ids[:, 15:], ids))
    assert torch.equal(packed.sequences[:, 15:], alone.sequences)
    torch.testing.assert_close(packed.logits[1:], alone.logits[1:], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(packed.logits[1], unpacked.logits[1], atol=1e-2)


def test_padding_stays_padding_when_no_mask_repeats_it():
    model, (ids, mask) = decoder(), mixed_rows()
    cache = model(ids[:, :-2], mask[:, :-2], use_cache=True).past_key_values
    found = model(ids[:, -2:], past_key_values=cache).logits
    mask[:, -2:] = 1  # without a mask new tokens are no padding
    torch.testing.assert_close(found, model(ids, mask).logits[:, -2:], rtol=1e-12, atol=1e-12)


@each_kind
def test_a_mask_may_hide_tokens_that_the_cache_holds(kind):
    """In one layer, where no other token has seen them."""
    model, ids = decoder({"kind": kind}, num_hidden_layers=1), token_ids()
    cache, positions = model(ids[:, :-2], use_cache=True).past_key_values, torch.arange(24)[None]
    mask = (positions >= 5).long().expand(2, 24)
    found = model(ids[:, -2:], mask, position_ids=positions[:, -2:], past_key_values=cache).logits
    expected = model(ids[:, 5:], position_ids=positions[:, 5:]).logits[:, -2:]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# Where this project is not installed

ELSEWHERE = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).double()
ids, mask = torch.tensor(json.loads(sys.argv[2]))
found = model.generate(ids, attention_mask=mask, max_new_tokens=20, num_beams=2, return_dict_in_generate=True)
assert "models" not in sys.modules
print(type(found.past_key_values).__name__, found.sequences.tolist())
"""


def test_a_folder_with_our_code_generates_by_itself(tmp_path, monkeypatch):
    for registered in (SpikeLMConfig, SpikeLMForCausalLM):
        monkeypatch.setattr(registered, "_auto_class", registered._auto_class)  # taken back after the test
    model, (ids, mask) = decoder(), mixed_rows()
    save_with_code(model, AUTO_CLASSES, tmp_path / "folder")
    home = {name: str(tmp_path / "home") for name in ("HOME", "HF_HOME", "HF_MODULES_CACHE")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path / "folder"), str([ids.tolist(), mask.tolist()])],
        cwd=tmp_path,
        env={**os.environ, **home, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, num_beams=2)
    assert result.stdout.strip() == f"SpikeCache {expected.tolist()}"


# Arguments


@each_kind
def test_logits_are_computed_only_where_they_are_kept(kind, monkeypatch):
    model, ids = decoder({"kind": kind}), token_ids()
    logits, seen = model(ids).logits, []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    for kept, expected in ((0, logits), (1, logits[:, -1:]), (5, logits[:, -5:]), (99, logits)):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, rtol=1e-12, atol=1e-12)
    chosen = torch.tensor([3, 17, 4])
    found = model(ids, logits_to_keep=chosen).logits
    torch.testing.assert_close(found, logits[:, chosen], rtol=1e-12, atol=1e-12)
    assert seen == [24, 1, 5, 24, 3]
    seen.clear()
    model.generate(ids, max_new_tokens=3, pad_token_id=0)
    assert seen == [1, 1, 1]


def test_a_cache_is_begun_only_where_it_is_asked_for():
    model, ids = ready_decoder(), token_ids()
    assert model(ids).past_key_values is None and model(ids, use_cache=False).past_key_values is None
    assert "past_key_values" not in model(ids, use_cache=True, labels=ids)
    cache = model(ids, use_cache=True).past_key_values
    assert model(ids[:, :1], use_cache=False, past_key_values=cache).past_key_values is cache
    assert model.model(ids, use_cache=True).past_key_values.get_seq_length() == 24
    assert model(ids, use_cache=True, return_dict=False)[1].get_seq_length() == 24


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("mode", ["layer", "timestep"])
def test_training_with_checkpointing_keeps_no_cache(mode, labels):
    model, ids = ready_decoder().train(), token_ids()
    given = {"labels": ids} if labels else {}
    model.model.stack.set_checkpointing(mode)
    output = model(ids, use_cache=True, **given)
    assert output.past_key_values is None
    (output.loss if labels else output.logits.sum()).backward()
    with pytest.raises(ValueError, match="past_key_values: with checkpointing a layer would add its tokens twice"):
        model(ids, past_key_values=SpikeCache(model.config))
    with torch.no_grad():  # nothing runs again, as in texts that are looked at while training
        assert model(ids, use_cache=True).past_key_values.get_seq_length() == 24
    assert model.eval()(ids, use_cache=True).past_key_values.get_seq_length() == 24


def test_what_cannot_work_is_refused():
    model, ids = ready_decoder(), token_ids()
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 2 columns, but there are 24 cached and 2 new tokens"):
        model(ids[:, :2], torch.ones(2, 2), past_key_values=cache)
    for given in ({"past_key_values": cache}, {"logits_to_keep": 1}, {"logits_to_keep": torch.tensor([1])}):
        with pytest.raises(ValueError, match="labels: the loss is that of whole rows; leave past_key_values and"):
            model(ids, labels=ids, **given)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache: pass a SpikeCache, or leave it out"):
        model(ids, past_key_values=DynamicCache())
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation is '{kind}': keys and values are packed"):
            model.generate(ids, cache_implementation=kind, max_new_tokens=2)
    encoder = make_model(model_class=SpikeLMForMaskedLM)
    with pytest.raises(ValueError, match="family bert is an encoder, which keeps nothing"):
        encoder(ids[:, :4], use_cache=True)
    assert model(ids[:, :2], past_key_values=cache).logits.isfinite().all()
