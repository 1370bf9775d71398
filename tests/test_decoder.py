"""The spiking decoder: what each token sees, padding, packed documents, rotations, its head, saving, checkpointing."""

import json
import warnings

import pytest
import torch
from decoders import clear_lif_threshold, each_kind, each_neuron, make_decoder, positions_of, ready_decoder, token_ids
from tiny import CONFIG, make_batch, project_by_fire
from torch.nn.functional import cross_entropy, linear, pad
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.amplitudes import BlockNeurons, SpikeStats, keep_timesteps, update_amplitudes
from models.auto import save_with_code
from models.config import PRESETS, SpikeLMConfig, preset
from models.layers import SITES
from models.modeling import (
    AUTO_CLASSES,
    SpikeLMForCausalLM,
    SpikeLMForMaskedLM,
    SpikeLMForPreTraining,
    SpikeLMForSequenceClassification,
    SpikeLMModel,
)
from models.positions import document_ids, rotary_angles, rotate


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def seen_by_each_token(model, **inputs):
    """[L, L]: whether the logits at the row's token have a gradient, exactly not 0, towards the column's embedding."""
    embeddings = model.get_input_embeddings()(token_ids(rows=1)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **inputs).logits[0]
    rows = [torch.autograd.grad(each.square().sum(), embeddings, retain_graph=True)[0][0] for each in logits]
    return torch.stack([(row != 0).any(-1) for row in rows])


@pytest.fixture
def lif_between_rounding_errors(monkeypatch):
    clear_lif_threshold(monkeypatch)


needs_clear_thresholds = pytest.mark.usefixtures("lif_between_rounding_errors")


# What a token sees


@each_neuron
@pytest.mark.parametrize("explicit", [False, True], ids=["without a mask", "with a mask"])
def test_no_token_sees_its_future(settings, explicit):
    model, ids = ready_decoder(settings), token_ids()
    inputs = {"attention_mask": torch.ones_like(ids)} if explicit else {}
    logits, reached = model(ids, **inputs).logits, 0
    for changed in (1, 9, 23):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 7) % CONFIG["vocab_size"]
        found = model(other, **inputs).logits
        assert torch.equal(found[:, :changed], logits[:, :changed])
        assert (found != logits)[:, changed].any(-1).all()
        reached += (found != logits)[:, changed + 1 :].any(-1).sum()
    assert reached > 0


@each_neuron
def test_no_gradient_reaches_the_future_or_another_document(settings):
    model = ready_decoder(settings)
    seen = seen_by_each_token(model)
    causal = torch.ones(24, 24).tril().bool()
    assert not seen[~causal].any() and seen[causal].float().mean() > 0.5 and seen[23, 0]
    lengths = (7, 1, 16)
    packed = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    seen = seen_by_each_token(model, position_ids=positions_of(*lengths))
    assert not seen[~packed].any() and seen[packed].float().mean() > 0.5 and seen[6, 0] and seen[23, 8]


@each_neuron
def test_no_document_sees_another_one_of_its_row(settings):
    model, ids = ready_decoder(settings), token_ids()
    positions = torch.cat([positions_of(10, 14), positions_of(4, 20)])
    logits = model(ids, position_ids=positions).logits
    other = ids.clone()
    other[0, :10] = (ids[0, :10] + 7) % CONFIG["vocab_size"]
    other[1, 4:] = (ids[1, 4:] + 7) % CONFIG["vocab_size"]
    found = model(other, position_ids=positions).logits
    unchanged = torch.ones(2, 24, dtype=torch.bool)
    unchanged[0, :10] = unchanged[1, 4:] = False
    assert torch.equal(found[unchanged], logits[unchanged])
    assert (found != logits)[~unchanged].any(-1).all()


@each_neuron
@needs_clear_thresholds
def test_a_packed_document_has_the_logits_that_it_has_alone(settings):
    model, ids = ready_decoder(settings).double(), token_ids(rows=1)
    packed = model(ids, position_ids=positions_of(10, 5, 9)).logits
    alone = torch.cat([model(part).logits for part in ids.split([10, 5, 9], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-12)
    whole = model(ids).logits
    torch.testing.assert_close(whole[:, :10], alone[:, :10], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(whole[:, 10:], alone[:, 10:], atol=1e-2)


@each_neuron
@pytest.mark.parametrize("left", [1, 6])
@needs_clear_thresholds
def test_left_padding_changes_no_logit(settings, left):
    """In float64: sums over a padded row are taken in another order, whose rounding in fp32 may flip a spike."""
    model, ids = ready_decoder(settings).double(), token_ids()
    expected = model(ids)
    for filler in (0, 17):
        padded = pad(ids, (left, 2), value=filler)
        mask = pad(torch.ones_like(ids), (left, 2))
        for positions in (None, (mask.cumsum(-1) - 1).clamp(min=0), (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)):
            found = model(padded, mask, position_ids=positions)
            assert found.logits.isfinite().all()
            torch.testing.assert_close(found.logits[:, left:-2], expected.logits, atol=1e-12, rtol=1e-12)
            assert torch.equal(found.spike_stats[..., 1:], expected.spike_stats[..., 1:])
    unmasked = model(pad(ids, (left, 0), value=17)).logits[:, left:]
    assert not torch.allclose(unmasked, expected.logits, atol=1e-2)


@each_kind
@needs_clear_thresholds
def test_padding_between_tokens_is_passed_over(kind):
    model, ids = ready_decoder({"kind": kind}).double(), token_ids()
    gap = torch.full((2, 3), 17)
    padded = torch.cat([ids[:, :10], gap, ids[:, 10:]], dim=1)
    mask = torch.cat([torch.ones(2, 10), torch.zeros(2, 3), torch.ones(2, 14)], dim=1)
    for positions in (None, (mask.cumsum(-1).long() - 1).masked_fill(mask == 0, 0)):
        found = model(padded, mask, position_ids=positions).logits[mask == 1]
        torch.testing.assert_close(found, model(ids).logits.flatten(0, 1), atol=1e-12, rtol=1e-12)


@each_kind
@needs_clear_thresholds
def test_rows_padded_differently_have_the_gradients_that_they_have_alone(kind):
    model, ids = ready_decoder({"kind": kind}).double(), token_ids(rows=1)
    model(ids, labels=ids).causal_lm_loss_sum.backward()
    expected = gradients(model)
    model.zero_grad()
    rows = torch.cat([pad(ids, (8, 0)), pad(ids, (3, 5)), torch.zeros(1, 32, dtype=torch.long)])
    mask = (rows != 0).long()
    labels = torch.where((mask == 1) & (mask.cumsum(-1) > 1), rows, -100)
    output = model(rows, mask, labels=labels)
    output.causal_lm_loss_sum.backward()
    assert output.causal_lm_count == 2 * 23
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, 2 * expected[name], atol=1e-9, rtol=1e-9, msg=lambda text, n=name: n + text
        )


def test_a_visible_token_at_position_0_begins_a_document():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 0, 1], [0, 0, 0, 1, 0, 2]])
    visible = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]]).bool()
    expected = torch.tensor([[1, 1, 1, 2, 2, 3], [0, 0, 0, 0, 1, 1], [-1, -1, 1, 1, -1, 1]])
    assert torch.equal(document_ids(positions, visible), expected)
    counted_on = document_ids(positions, visible, torch.tensor([[2], [0], [1]]))
    assert torch.equal(counted_on, expected + torch.tensor([[2], [0], [1]]) * visible)


def test_only_distances_matter_to_rotary_positions():
    model, ids = ready_decoder({"kind": "none"}).double(), token_ids(rows=1)
    torch.testing.assert_close(
        model(ids, position_ids=torch.arange(100, 124)[None]).logits, model(ids).logits, atol=1e-4, rtol=0
    )  # the angles are fp32
    assert not torch.allclose(model(ids, position_ids=2 * torch.arange(24)[None]).logits, model(ids).logits, atol=0.1)


# The flow through a layer


def test_sites_fire_in_the_order_of_the_flow(monkeypatch):
    """Keys are rotated before they are spiked, keys and values are spiked before they are shared, and so on."""
    model, fire, fired = ready_decoder({"num_timesteps": 2}, num_hidden_layers=1), BlockNeurons.fire, {}

    def fire_and_remember(neurons, site, x, **options):
        fired[SITES[site]] = (x, fire(neurons, site, x, **options), options)
        return fired[SITES[site]][1]

    monkeypatch.setattr(BlockNeurons, "project", project_by_fire)
    monkeypatch.setattr(BlockNeurons, "fire", fire_and_remember)
    positions = positions_of(11, 13)
    with torch.no_grad():
        hidden = model.model(token_ids(rows=1), position_ids=positions).last_hidden_state
    layer, (D, shared, F) = model.model.stack.layers[0], (16, 8, 32)
    assert tuple(fired) == SITES
    embedded = model.get_input_embeddings()(token_ids(rows=1)).expand(2, 1, 24, D)
    torch.testing.assert_close(fired["qkv"][0], layer.attention_norm(embedded))
    q, k, v = linear(fired["qkv"][1], layer.attention.qkv.weight).split([D, shared, shared], dim=-1)
    rotary = rotary_angles(model.config, positions)
    assert torch.equal(fired["key"][0], rotate(k, rotary)) and torch.equal(fired["value"][0], v)
    assert fired["key"][2] == fired["value"][2] == {"memoryless": True}
    heads = [x.unflatten(-1, (-1, 4)).transpose(2, 3) for x in (rotate(q, rotary), fired["key"][1], fired["value"][1])]
    keys, values = (x.repeat_interleave(2, dim=2) for x in heads[1:])
    documents = torch.block_diag(torch.ones(11, 11).tril(), torch.ones(13, 13).tril()).bool()
    scores = (heads[0] @ keys.mT / 2).masked_fill(~documents, -torch.inf)
    context = (scores.softmax(-1) @ values).transpose(2, 3).flatten(3)
    torch.testing.assert_close(fired["attention_output"][0], context)
    summed = embedded + linear(fired["attention_output"][1], layer.attention.output.weight)
    torch.testing.assert_close(fired["mlp_up"][0], layer.mlp_norm(summed))
    gate, up = linear(fired["mlp_up"][1], layer.mlp.up.weight).split([F, F], dim=-1)
    torch.testing.assert_close(fired["mlp_down"][0], torch.nn.functional.silu(gate) * up)
    last = summed + linear(fired["mlp_down"][1], layer.mlp.down.weight)
    torch.testing.assert_close(hidden, model.model.stack.norm(last.mean(0)))


def test_calibration_measures_each_site_on_what_its_forerunners_fire():
    """With all the amplitudes that it finds in place, every neuron's mean |m| is still alpha / k."""
    batch = {"input_ids": token_ids(), "position_ids": torch.cat([positions_of(10, 14), positions_of(24)])}
    model = ready_decoder(batch=batch)
    stack = model.model.stack
    assert stack.amplitudes.shape == (12, 4) and stack.site_names[:6] == [f"layer0.{site}" for site in SITES]
    k = torch.tensor([model.config.neuron.frequency_of(name) for name in stack.site_names])[:, None]
    measured = k * SpikeStats(model(**batch).spike_stats).mean_membrane
    torch.testing.assert_close(measured.float(), stack.amplitudes, rtol=1e-6, atol=0)
    elsewhere = ready_decoder(batch={"input_ids": token_ids(seed=8)})
    assert not torch.allclose(elsewhere.model.stack.amplitudes, stack.amplitudes, rtol=1e-3)


def test_keys_and_values_are_measured_before_they_are_shared():
    stats = ready_decoder()(token_ids()).spike_stats
    per_token = dict(zip(SITES, (16, 8, 8, 16, 16, 32), strict=True))
    assert stats[:6, 0, 1].tolist() == [2 * 24 * per_token[site] for site in SITES]


def test_padding_counts_in_no_statistic():
    model, batch = ready_decoder(), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    stats = model(ids, mask).spike_stats
    assert stats[0, 0, 1] == mask.sum() * CONFIG["hidden_size"]
    assert torch.equal(stats, model(torch.where(mask == 1, ids, 31), mask).spike_stats)


# Rotations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotations_are_those_of_llama_at_fp32_whatever_the_models_dtype(dtype):
    model = ready_decoder().to(dtype)
    config, positions = model.config, torch.arange(2000, 2024)[None]
    angles = []
    hook = model.model.stack.layers[0].register_forward_pre_hook(
        lambda _, arguments: angles.append(arguments[2].rotary)
    )
    model(token_ids(rows=1), position_ids=positions)
    hook.remove()
    ((cos, sin),) = angles
    assert cos.dtype == sin.dtype == torch.float32
    llama = LlamaRotaryEmbedding(LlamaConfig(hidden_size=16, num_attention_heads=4, max_position_embeddings=12))
    their_cos, their_sin = llama(torch.zeros(1), positions)
    assert torch.equal(cos[:, :, 0], their_cos[..., :2]) and torch.equal(sin[:, :, 0], their_sin[..., :2])

    x = torch.randn(3, 1, 24, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads = x.to(torch.float64).unflatten(-1, (2, 4))
    expected, _ = apply_rotary_pos_emb(heads, heads, their_cos, their_sin, unsqueeze_dim=2)
    rotated = rotate(x, rotary_angles(config, positions))
    assert rotated.dtype == dtype
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    assert float((rotated.double() - expected.flatten(-2)).abs().max()) <= 4 * precision


def test_rotations_in_bf16_are_rounded_once():
    rotary = rotary_angles(make_decoder().config, torch.arange(500, 524)[None])
    x = torch.randn(1, 1, 24, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(rotate(x, rotary), rotate(x.float(), rotary).to(torch.bfloat16))
    rounded = tuple(each.to(torch.bfloat16) for each in rotary)
    assert not torch.equal(rotate(x, rotary), rotate(x, rounded))


# The head


@each_kind
def test_loss_sum_count_and_logits(kind):
    model, ids = ready_decoder({"kind": kind}), token_ids()
    labels = torch.where(ids % 3 == 0, -100, ids)
    labels[0, 0], labels[1, 0] = 5, -100
    plain, output = model(ids), model(ids, labels=labels)
    counted = labels[:, 1:] != -100
    assert plain.logits.shape == (2, 24, CONFIG["vocab_size"]) and plain.loss is None
    assert plain.causal_lm_loss_sum is None and plain.causal_lm_count is None
    torch.testing.assert_close(output.logits, plain.logits[:, :-1][counted], rtol=1e-5, atol=1e-5)
    expected = cross_entropy(plain.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert output.causal_lm_count == counted.sum()
    torch.testing.assert_close(output.causal_lm_loss_sum, expected * counted.sum(), rtol=1e-6, atol=0)
    whole_step = model(ids, labels=labels, num_items_in_batch=torch.tensor(200))
    torch.testing.assert_close(whole_step.loss, output.causal_lm_loss_sum / 200)
    assert isinstance(model(ids, labels=labels, return_dict=False), tuple)


def test_the_loss_is_transformers():
    ids = token_ids()
    labels = torch.where(ids % 3 == 0, -100, ids)
    model = ready_decoder()
    expected = LlamaForCausalLM.loss_function.fget(model)(model(ids).logits, labels, CONFIG["vocab_size"])
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=1e-6, atol=0)


@each_kind
@pytest.mark.parametrize("rows", [2, 0])
def test_a_batch_without_counted_targets_has_loss_0_and_a_backward(kind, rows):
    model, ids = ready_decoder({"kind": kind}), token_ids()[:rows]
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 7  # nothing predicts the first token
    output = model(ids, labels=labels)
    assert output.loss.item() == 0 and output.causal_lm_count == 0
    output.loss.backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@each_kind
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_learns_and_a_few_steps_lower_the_loss(kind, tied):
    model, ids = ready_decoder({"kind": kind}, tie_word_embeddings=tied), token_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if kind != "lif" else 3e-2)
    losses = []
    for _ in range(8):
        output = model(ids, labels=ids)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        assert all(gradient.isfinite().all() and (gradient != 0).any() for gradient in gradients(model).values())
        optimizer.step()
        update_amplitudes(model, SpikeStats(output.spike_stats))
    assert losses[-1] < 0.8 * losses[0]


ENCODER_HEADS = [SpikeLMForMaskedLM, SpikeLMForPreTraining, SpikeLMForSequenceClassification]


@pytest.mark.parametrize(
    ("model_class", "family", "message"),
    [
        (SpikeLMForCausalLM, "bert", "SpikeLMForCausalLM needs a decoder, but family is 'bert', an encoder: .* llama"),
        *(
            (head, "llama", f"{head.__name__} needs an encoder, but family is 'llama', a decoder: .* family bert")
            for head in ENCODER_HEADS
        ),
    ],
)
def test_a_head_on_the_wrong_kind_of_stack_is_refused(tmp_path, model_class, family, message):
    config = SpikeLMConfig(**CONFIG, family=family)
    SpikeLMModel(config).save_pretrained(tmp_path)
    for make in (lambda: model_class(config), lambda: model_class.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=message):
            make()


def test_what_a_decoder_does_not_have():
    model, ids = ready_decoder(), token_ids()
    with pytest.raises(ValueError, match="token_type_ids: this model has no segments"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    bare = make_decoder(model_class=SpikeLMModel)
    assert bare.pooler is None and set(AUTO_CLASSES) >= {"AutoModelForCausalLM"}
    names = [name for name, _ in model.named_parameters()]
    assert not any("bias" in name or "position" in name or "type" in name for name in names)


# Saving, checkpointing, shapes


@each_kind
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_decoder_saved_in_bf16_computes_the_same_with_exact_amplitudes(tmp_path, kind, tied):
    model, ids = ready_decoder({"kind": kind}, tie_word_embeddings=tied), token_ids()
    exact = model.model.stack.amplitudes.clone()
    assert kind != "elastic" or not torch.equal(exact, exact.to(torch.bfloat16).float())
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = SpikeLMForCausalLM.from_pretrained(tmp_path)
    stack = loaded.model.stack
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert stack.amplitudes.dtype == torch.float32 and torch.equal(stack.amplitudes, exact) and stack.calibrated
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied == loaded.config.tie_word_embeddings
    assert loaded.config.to_json_string() == model.config.to_json_string()
    ours, theirs = model(ids, labels=ids), loaded(ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.spike_stats, theirs.spike_stats)
    assert ours.logits.dtype == torch.bfloat16 and ours.loss.dtype == torch.float32


@each_kind
def test_checkpointing_changes_nothing_but_memory(kind):
    results, forwards, ids = [], [], token_ids()
    for mode in ("none", "layer"):
        model = ready_decoder({"kind": kind}, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.model.stack.set_checkpointing(mode)
        calls = []
        model.model.stack.layers[0].mlp.up.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(9)
        loss = model(ids, position_ids=positions_of(9, 15), labels=ids).loss
        loss.backward()
        results.append((loss, gradients(model), torch.get_rng_state()))
        forwards.append(len(calls))
    (loss, plain, generator), (other_loss, checkpointed, other_generator) = results
    assert forwards == [1, 2]
    assert torch.equal(loss, other_loss) and torch.equal(generator, other_generator)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    model.eval()
    assert not torch.equal(model(ids, position_ids=positions_of(9, 15), labels=ids).loss, loss)  # dropout was on


@pytest.mark.parametrize("kind", ["elastic", "lif"])
def test_the_first_timesteps_alone_are_a_model_of_fewer(kind):
    whole, ids = ready_decoder({"kind": kind}), token_ids()
    fewer = ready_decoder({"kind": kind, "num_timesteps": 3})  # calibrated on the same text: equal as far as it goes
    keep_timesteps(whole, 3)
    ours, theirs = whole(ids, use_cache=True), fewer(ids, use_cache=True)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.spike_stats, theirs.spike_stats)
    ours, theirs = (
        model(ids, past_key_values=first.past_key_values) for model, first in ((whole, ours), (fewer, theirs))
    )
    assert torch.equal(ours.logits, theirs.logits)
    assert whole.config.to_json_string() == fewer.config.to_json_string()
    assert whole.state_dict().keys() == fewer.state_dict().keys()


def test_a_decoder_without_layers_is_a_twin_that_trains():
    model, ids = ready_decoder(num_hidden_layers=0), token_ids()
    model(ids, labels=ids).loss.backward()
    assert all((gradient != 0).any() for gradient in gradients(model).values())


def test_every_layer_keeps_the_same_mask_for_the_backward():
    model, ids = ready_decoder(num_hidden_layers=3), token_ids()
    masks = []
    for layer in model.model.stack.layers:
        layer.attention.register_forward_pre_hook(lambda _, arguments: masks.append(arguments[2].mask))
    model(ids, position_ids=positions_of(24))
    assert len(masks) == 3 and len({mask.data_ptr() for mask in masks}) == 1
    assert masks[0].shape == (4 * 2, 1, 24, 24)


@pytest.mark.parametrize("model_class", [SpikeLMForPreTraining, SpikeLMForCausalLM])
def test_a_folder_with_our_code_names_the_classes_that_fit_it(tmp_path, monkeypatch, model_class):
    decoders, is_decoder = {"AutoModel", "AutoModelForCausalLM"}, model_class is SpikeLMForCausalLM
    for registered in (SpikeLMConfig, model_class):
        monkeypatch.setattr(registered, "_auto_class", registered._auto_class)  # taken back after the test
    config = SpikeLMConfig(**CONFIG, family="llama" if is_decoder else "bert")
    save_with_code(model_class(config), AUTO_CLASSES, tmp_path)
    named = set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) - {"AutoConfig"}
    assert named == (decoders if is_decoder else set(AUTO_CLASSES) - {"AutoModelForCausalLM"})
    assert (tmp_path / "positions.py").exists()


PARAMETERS = {"decoder-124m": 124e6, "decoder-350m": 350e6, "decoder-1.3b": 1.3e9, "decoder-7b": 6.7e9}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_presets_have_the_sizes_that_they_are_named_for(name, parameters):
    config = preset(name)
    with torch.device("meta"):
        ours = SpikeLMForCausalLM(config)
        shape = {
            field: getattr(config, field) for field in ("tie_word_embeddings", "num_key_value_heads", *PRESETS[name])
        }
        theirs = LlamaForCausalLM(LlamaConfig(**{k: value for k, value in shape.items() if k != "family"}))
    assert ours.num_parameters() == theirs.num_parameters() == pytest.approx(parameters, rel=0.03)
    assert config.hidden_size // config.num_attention_heads in (64, 128)


def test_the_tiny_preset_shares_keys_and_values():
    config = preset("decoder-tiny", vocab_size=99)
    assert (config.family, config.num_attention_heads, config.num_key_value_heads) == ("llama", 4, 2)
