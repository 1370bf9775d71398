"""The models and their heads: saving, losses, padding, checkpointing, and the twins (no spikes, no layers)."""

import math
import warnings

import pytest
import torch
from tiny import CONFIG, make_batch, make_model, rows_of
from torch.nn.functional import cross_entropy

from models.amplitudes import SpikeStats, calibrate_amplitudes, update_amplitudes
from models.modeling import SpikeLMForMaskedLM, SpikeLMForPreTraining, SpikeLMModel

LABELS = ("labels", "next_sentence_label")
KINDS = [{"kind": "elastic"}, {"kind": "lif"}, {"kind": "none"}]
each_kind = pytest.mark.parametrize("neuron", KINDS, ids=lambda neuron: neuron["kind"])


def inputs_of(batch):
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def ready_model(neuron=None, **overrides):
    model = make_model(neuron, **overrides)
    calibrate_amplitudes(model, inputs_of(make_batch()))
    return model


def sharp_model(neuron):
    """With weights so large that lif neurons behind the attention, whose input is an average of spikes, fire at all."""
    return ready_model(neuron, initializer_range=1.0 if neuron["kind"] == "lif" else 0.3)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_kind
@pytest.mark.parametrize("model_class", [SpikeLMForPreTraining, SpikeLMForMaskedLM, SpikeLMModel])
def test_a_saved_model_computes_the_same(tmp_path, neuron, model_class):
    model, inputs = ready_model(neuron, model_class=model_class), inputs_of(make_batch())
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0.7  # training moves the pad's row, through the tied decoder
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.config.neuron == model.config.neuron
    for ours, theirs in zip(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_pretrained_model_opens_with_fewer_heads(tmp_path):
    model, inputs = ready_model(), inputs_of(make_batch())
    model.save_pretrained(tmp_path)
    expected = model(**inputs)
    assert torch.equal(SpikeLMForMaskedLM.from_pretrained(tmp_path)(**inputs).logits, expected.logits)
    bare = SpikeLMModel.from_pretrained(tmp_path)(**inputs)
    assert torch.equal(bare.last_hidden_state, model.model(**inputs).last_hidden_state)


def test_the_decoder_is_tied_to_the_word_embeddings(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    for one in (model, SpikeLMForPreTraining.from_pretrained(tmp_path)):
        assert one.mlm_head.decoder.weight is one.model.embeddings.word_embeddings.weight
    untied = make_model(tie_word_embeddings=False)
    assert untied.mlm_head.decoder.weight is not untied.model.embeddings.word_embeddings.weight


def test_weights_are_initialised_as_configured():
    model = make_model(hidden_size=64, vocab_size=500, initializer_range=0.02)
    for weight in (model.model.embeddings.word_embeddings.weight[1:], model.model.stack.layers[0].attention.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert (model.model.embeddings.word_embeddings.weight[0] == 0).all()
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))


@each_kind
def test_shapes_with_and_without_labels(neuron):
    model, batch = ready_model(neuron), make_batch()
    counted, T = int((batch["labels"] != -100).sum()), model.config.num_timesteps
    sites = len(model.model.stack.site_names)
    assert sites == (0 if neuron["kind"] == "none" else 12)
    labelled, plain = model(**batch), model(**inputs_of(batch))
    assert labelled.logits.shape == (counted, CONFIG["vocab_size"])
    assert plain.logits.shape == (3, 10, CONFIG["vocab_size"])
    assert torch.equal(plain.logits.argmax(-1)[batch["labels"] != -100], labelled.logits.argmax(-1))
    assert plain.loss is None and plain.masked_lm_loss_sum is None and plain.next_sentence_loss_sum is None
    assert labelled.next_sentence_logits.shape == plain.next_sentence_logits.shape == (3, 2)
    assert labelled.spike_stats.shape == (sites, T, 5) and labelled.spike_stats.dtype == torch.float64
    bare = model.model(**inputs_of(batch))
    assert bare.last_hidden_state.shape == (3, 10, CONFIG["hidden_size"])
    assert bare.pooler_output.shape == (3, CONFIG["hidden_size"])
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_the_loss_is_the_mean_over_counted_targets_of_each_objective():
    model, batch = ready_model(), make_batch()
    plain, output = model(**inputs_of(batch)), model(**batch)
    tokens = cross_entropy(plain.logits.flatten(0, 1), batch["labels"].flatten())
    sentences = cross_entropy(plain.next_sentence_logits, batch["next_sentence_label"])
    torch.testing.assert_close(output.loss, tokens + sentences, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.masked_lm_loss_sum, tokens * (batch["labels"] != -100).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.next_sentence_loss_sum, sentences * 3, rtol=1e-6, atol=0)


def test_each_objective_is_optional():
    model, batch = ready_model(), make_batch()
    both = model(**batch)
    tokens = model(**{name: value for name, value in batch.items() if name != "next_sentence_label"})
    sentences = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert tokens.next_sentence_loss_sum is None and sentences.masked_lm_loss_sum is None
    assert torch.equal(tokens.loss + sentences.loss, both.loss)
    uncounted = model(**{**batch, "next_sentence_label": torch.tensor([0, -100, -100])})
    alone = cross_entropy(both.next_sentence_logits[:1], batch["next_sentence_label"][:1])
    torch.testing.assert_close(uncounted.loss - tokens.loss, alone, rtol=1e-5, atol=0)


@each_kind
@pytest.mark.parametrize("rows", [3, 0])
def test_a_batch_without_counted_targets_has_loss_0_and_a_backward(neuron, rows):
    model, batch = ready_model(neuron), rows_of(make_batch(), slice(0, rows))
    nothing = {"labels": torch.full((rows, 10), -100), "next_sentence_label": torch.full((rows,), -100)}
    output = model(**{**batch, **nothing})
    assert output.loss.item() == 0
    output.loss.backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@each_kind
def test_every_parameter_learns(neuron):
    model = sharp_model(neuron)
    model(**make_batch()).loss.backward()
    assert all(gradient.isfinite().all() and (gradient != 0).any() for gradient in gradients(model).values())


@pytest.mark.parametrize("neuron", [*KINDS, {"reset": "normalized", "num_timesteps": 8}, {"num_timesteps": 1}], ids=str)
def test_a_few_steps_lower_the_loss(neuron):
    model, batch = ready_model(neuron), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        output = model(**batch)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        update_amplitudes(model, SpikeStats(output.spike_stats))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("length", [13, 40])
def test_rows_longer_than_the_positions_are_refused(length):
    model = make_model({"kind": "none"})
    with pytest.raises(ValueError, match=f"sequences of {length} tokens, but max_position_embeddings is 12"):
        model(torch.ones(1, length, dtype=torch.long))


def test_ids_and_embeddings_exclude_each_other():
    model, ids = ready_model(model_class=SpikeLMModel), make_batch()["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids).last_hidden_state
    assert torch.equal(model(inputs_embeds=embeddings).last_hidden_state, expected)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**arguments)


def test_positions_and_segments_matter_and_default_to_the_obvious():
    model, ids = ready_model(model_class=SpikeLMModel), make_batch()["input_ids"]
    default = model(ids).last_hidden_state
    positions, segments = torch.arange(10).expand(3, 10), torch.zeros_like(ids)
    assert torch.equal(model(ids, token_type_ids=segments, position_ids=positions).last_hidden_state, default)
    assert not torch.equal(model(ids, position_ids=positions + 1).last_hidden_state, default)
    assert not torch.equal(model(ids, token_type_ids=segments + 1).last_hidden_state, default)


@each_kind
def test_checkpointing_changes_nothing_but_memory(neuron):
    results, forwards = [], []
    for mode in ("none", "layer"):
        model = ready_model(neuron, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.model.stack.set_checkpointing(mode)
        calls = []
        model.model.stack.layers[0].mlp.up.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(9)
        loss = model(**make_batch()).loss
        loss.backward()
        results.append((loss, gradients(model), torch.get_rng_state()))
        forwards.append(len(calls))
    (loss, plain, generator), (other_loss, checkpointed, other_generator) = results
    assert forwards == [1, 2]
    assert torch.equal(loss, other_loss) and torch.equal(generator, other_generator)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_checkpointing_is_for_training_only_and_can_be_taken_back():
    model, calls = ready_model(), []
    model.model.stack.layers[0].mlp.up.register_forward_hook(lambda *_: calls.append(1))
    model.model.stack.set_checkpointing("layer")
    model.eval()(**make_batch()).loss.backward()
    model.model.stack.set_checkpointing("none")
    model.train()(**make_batch()).loss.backward()
    assert len(calls) == 2
    with pytest.raises(ValueError, match="checkpointing is 'cells': use none, layer or timestep"):
        model.model.stack.set_checkpointing("cells")


@each_kind
def test_more_padding_changes_no_visible_logit(neuron):
    model, inputs = sharp_model(neuron), inputs_of(make_batch())
    longer = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in inputs.items()}
    longer["input_ids"][:, 10:] = 17
    visible = inputs["attention_mask"].bool()
    short, long = model(**inputs), model(**longer)
    torch.testing.assert_close(long.logits[:, :10][visible], short.logits[visible], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long.next_sentence_logits, short.next_sentence_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long.spike_stats, short.spike_stats, rtol=1e-5, atol=0)
    unmasked = model(**{**longer, "attention_mask": torch.ones_like(longer["attention_mask"])})
    assert not torch.allclose(unmasked.logits[:, :10][visible], short.logits[visible], atol=1e-2)


@each_kind
def test_a_row_of_nothing_but_padding_spoils_no_gradient(neuron):
    model, batch = ready_model(neuron), make_batch()
    batch["attention_mask"][2] = 0
    batch["labels"][2] = -100
    output = model(**batch)
    output.loss.backward()
    assert output.logits.isfinite().all() and output.spike_stats.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@each_kind
def test_a_model_without_layers_is_a_twin_that_trains(tmp_path, neuron):
    model, batch = ready_model(neuron, num_hidden_layers=0), make_batch()
    output = model(**batch)
    output.loss.backward()
    assert all((gradient != 0).any() for gradient in gradients(model).values())
    assert update_amplitudes(model, SpikeStats(output.spike_stats)).firing_rate.shape == (0, model.config.num_timesteps)
    embedded = model.model.embeddings(batch["input_ids"], batch["token_type_ids"])
    assert torch.equal(model.model(**inputs_of(batch)).last_hidden_state, embedded)
    model.model.stack.set_checkpointing("layer")
    model.save_pretrained(tmp_path)
    assert torch.equal(SpikeLMForPreTraining.from_pretrained(tmp_path)(**batch).loss, output.loss)


def test_a_model_made_in_inference_mode_works():
    with torch.inference_mode():
        model, batch = make_model(), make_batch()
        with pytest.raises(RuntimeError, match="not calibrated"):
            model(**batch)
        calibrate_amplitudes(model, batch)
        assert torch.equal(model(**batch).loss, ready_model()(**batch).loss)


@each_kind
def test_bf16_weights_give_bf16_hidden_states_and_fp32_losses(neuron):
    model, batch = ready_model(neuron).to(torch.bfloat16), make_batch()
    output = model(**batch)
    output.loss.backward()
    assert model.model(**inputs_of(batch)).last_hidden_state.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    expected = ready_model(neuron)(**batch).loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.2)


def test_sinusoidal_positions_tell_neighbours_apart_from_the_start():
    model = make_model(position_init="sinusoidal", hidden_size=32, max_position_embeddings=40)
    table = model.model.embeddings.position_embeddings.weight
    assert table.requires_grad
    similarity = torch.nn.functional.cosine_similarity(table[20], table, dim=-1)
    assert similarity.argmax() == 20
    assert similarity[21] > similarity[23] > similarity[26]
    torch.testing.assert_close(similarity[19], similarity[21])
    scale = 2 * model.config.initializer_range
    torch.testing.assert_close(table[0, :4], torch.tensor([0.0, scale, 0.0, scale]))
    assert float(table.detach()[39, -2] / scale) == pytest.approx(math.sin(39 / 40 ** (30 / 32)), abs=1e-6)
    with pytest.raises(ValueError, match="position_init is 'learned'"):
        make_model(position_init="learned")
