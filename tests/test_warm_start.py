"""Weights, and amplitudes where there are any, from BERT's and the released SpikeLM's checkpoints."""

import weakref

import pytest
import torch
from tiny import CONFIG, make_batch, make_model
from transformers import BertConfig, BertForPreTraining, LlamaConfig, LlamaForCausalLM

from models.amplitudes import calibrate_amplitudes
from models.modeling import SpikeLMForCausalLM, SpikeLMModel
from models.warm_start import CheckpointTensors, load_bert, load_llama

RELEASED_SITES = (
    "attention.self.query.act_clip_val",
    "attention.self.clip_key",
    "attention.self.clip_value",
    "attention.output.dense.act_clip_val",
    "intermediate.dense.act_clip_val",
    "output.dense.act_clip_val",
)


@pytest.fixture
def bert():
    """A tiny BERT of the shape of tiny.CONFIG, as a checkpoint."""
    torch.manual_seed(7)
    return dict(BertForPreTraining(BertConfig(**CONFIG)).state_dict())


def released_amplitudes(T=4, layers=2):
    """Amplitudes named as the released code saves them, all different, and the table they make."""
    table = torch.arange(layers * len(RELEASED_SITES) * T, dtype=torch.float32).view(-1, T) / 16 + 0.5
    tensors = {}
    for layer in range(layers):
        for site, name in enumerate(RELEASED_SITES):
            for t in range(T):
                alpha = table[layer * len(RELEASED_SITES) + site, t]
                copies = ("query", "key", "value") if "query" in name else ("query",)
                for which in copies:
                    tensors[f"bert.encoder.layer.{layer}.{name.replace('query', which)}.{t}"] = alpha.clone()
    return tensors, table


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_weight_of_bert_arrives(bert):
    model = make_model({"kind": "none"})
    before = weights(model)
    report = load_bert(model, bert)
    assert not report.missing and not report.unused and not report.remarks
    assert not any(
        torch.equal(before[name], now)
        for name, now in weights(model).items()
        if "weight" in name and "norm" not in name
    )
    qkv = model.model.stack.layers[1].attention.qkv
    for index, which in enumerate(("query", "key", "value")):
        rows = slice(16 * index, 16 * (index + 1))
        assert torch.equal(qkv.weight[rows], bert[f"bert.encoder.layer.1.attention.self.{which}.weight"])
        assert torch.equal(qkv.bias[rows], bert[f"bert.encoder.layer.1.attention.self.{which}.bias"])


def test_names_without_prefix_and_with_the_old_names_of_norms(bert):
    """BertModel's own state dict has no prefix; TensorFlow's age said gamma and beta."""
    expected = make_model({"kind": "none"})
    load_bert(expected, bert)
    bare = {name.removeprefix("bert."): tensor for name, tensor in bert.items()}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in bert.items()
    }
    assert "embeddings.LayerNorm.bias" in bare and "bert.embeddings.LayerNorm.beta" in old
    for tensors in (bare, old):
        model = make_model({"kind": "none"}, seed=5)
        report = load_bert(model, tensors)
        assert not report.missing and not report.unused
        assert same(weights(model), weights(expected))


def test_what_a_checkpoint_lacks_beside_the_encoder_is_reported(bert):
    headless = {name: tensor for name, tensor in bert.items() if not name.startswith("cls.")}
    model = make_model({"kind": "none"})
    before = weights(model)
    report = load_bert(model, {**headless, "bert.adapter.weight": torch.ones(1)})
    assert report.unused == ["bert.adapter.weight"]
    assert "mlm_head.dense.weight" in report.missing and "next_sentence_head.bias" in report.missing
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in report.missing)
    assert not any("stack" in name or "embeddings" in name for name in report.missing)


def test_buffers_of_old_checkpoints_are_known(bert):
    extra = {
        "bert.embeddings.position_ids": torch.arange(12),
        "bert.encoder.layer.0.output.dense.weight_clip_val": torch.ones(2),
    }
    assert not load_bert(make_model({"kind": "none"}), {**bert, **extra}).unused


def test_surplus_layers_are_reported(bert):
    report = load_bert(make_model({"kind": "none"}, num_hidden_layers=1), bert)
    assert report.unused and all(name.startswith("bert.encoder.layer.1.") for name in report.unused)


def _drop_layer(bert):
    return {name: tensor for name, tensor in bert.items() if ".layer.1." not in name}


def _drop_keys(bert):
    return {name: tensor for name, tensor in bert.items() if ".layer.1.attention.self.key.weight" not in name}


def _drop_embeddings(bert):
    return {name: tensor for name, tensor in bert.items() if "embeddings." not in name}


def _widen(bert):
    return {**bert, "bert.encoder.layer.1.output.dense.weight": torch.zeros(16, 64)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_layer, r"layers\.1\.mlp\.up\.bias: the checkpoint has none"),
        (_drop_keys, r"layers\.1\.attention\.qkv\.weight: the checkpoint has none"),
        (_drop_embeddings, r"model\.embeddings\.word_embeddings\.weight: the checkpoint has none"),
        (_drop_embeddings, r"model\.embeddings\.norm\.bias: the checkpoint has none"),
        (_widen, r"layers\.1\.mlp\.down\.weight: the checkpoint has \(16, 64\), the model \(16, 32\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(bert, spoil, message):
    model = make_model()
    calibrate_amplitudes(model, make_batch())
    before, table = weights(model), model.model.stack.amplitudes.clone()
    with pytest.raises(ValueError, match=message):
        load_bert(model, spoil(bert))
    assert same(weights(model), before)
    assert torch.equal(model.model.stack.amplitudes, table) and model.model.stack.calibrated


def test_released_amplitudes_make_the_table(bert):
    model, (tensors, table) = make_model(), released_amplitudes()
    report = load_bert(model, {**bert, **tensors})
    assert not report.missing and not report.unused and not report.remarks
    assert torch.equal(model.model.stack.amplitudes, table)
    assert model(**make_batch()).loss.isfinite()


def test_a_bare_encoder_takes_a_released_checkpoint(bert):
    model, (tensors, table) = make_model(model_class=SpikeLMModel), released_amplitudes()
    report = load_bert(model, {**bert, **tensors})
    assert torch.equal(model.stack.amplitudes, table)
    assert not report.missing and all(name.startswith("cls.") for name in report.unused)


def test_a_stack_alone_needs_no_embeddings(bert):
    whole, stack = make_model({"kind": "none"}), make_model({"kind": "none"}, seed=5).model.stack
    load_bert(whole, bert)
    report = load_bert(stack, _drop_embeddings(bert))
    assert not report.missing
    assert same(weights(stack), weights(whole.model.stack))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up\.bias: the checkpoint has none"):
        load_bert(stack, _drop_layer(bert))


def test_an_untied_decoder_is_remarked_where_there_is_a_head(bert):
    untied = {**bert, "cls.predictions.decoder.weight": bert["cls.predictions.decoder.weight"] + 1}
    model = make_model({"kind": "none"})
    report = load_bert(model, untied)
    assert report.remarks == [
        "cls.predictions.decoder.weight: differs from the word embeddings, which are taken in its place"
    ]
    assert torch.equal(model.mlm_head.decoder.weight, bert["bert.embeddings.word_embeddings.weight"])
    assert not load_bert(make_model({"kind": "none"}, model_class=SpikeLMModel), untied).remarks


def test_copies_that_differ_are_remarked_and_querys_is_taken(bert):
    model, (tensors, table) = make_model(), released_amplitudes()
    name = "bert.encoder.layer.1.attention.self.query.act_clip_val.2"
    tensors[name.replace("query", "value")] += 1
    report = load_bert(model, {**bert, **tensors})
    assert len(report.remarks) == 1 and report.remarks[0].startswith(name) and "value's copy" in report.remarks[0]
    assert torch.equal(model.model.stack.amplitudes, table)


def test_amplitudes_that_are_all_1_are_the_released_mark_of_no_calibration(bert):
    model, (tensors, _) = make_model(), released_amplitudes()
    site = {name: torch.tensor(1.0) for name in tensors if ".layer.1.attention.self.clip_key." in name}
    report = load_bert(model, {**bert, **tensors, **site})
    assert "calibrate_amplitudes is needed" in report.remarks[0]
    with pytest.raises(RuntimeError, match="not calibrated"):
        model(**make_batch())


@pytest.mark.parametrize("T", [1, 4])
def test_one_amplitude_of_exactly_1_is_a_value_like_any_other(bert, T):
    model, (tensors, table) = make_model({"num_timesteps": T}), released_amplitudes()
    table[7, 0] = tensors["bert.encoder.layer.1.attention.self.clip_key.0"].fill_(1.0)
    assert not load_bert(model, {**bert, **tensors}).remarks
    assert torch.equal(model.model.stack.amplitudes, table[:, :T])


def test_fewer_timesteps_take_the_first_amplitudes(bert):
    model, (tensors, table) = make_model({"num_timesteps": 2}), released_amplitudes()
    report = load_bert(model, {**bert, **tensors})
    assert not report.remarks and not report.unused
    assert torch.equal(model.model.stack.amplitudes, table[:, :2])


def test_more_timesteps_need_calibration(bert):
    model, (tensors, _) = make_model({"num_timesteps": 5}), released_amplitudes()
    report = load_bert(model, {**bert, **tensors})
    assert "calibrate_amplitudes is needed" in report.remarks[0] and not report.unused
    assert not model.model.stack.calibrated
    calibrate_amplitudes(model, make_batch())
    assert model(**make_batch()).loss.isfinite()


def test_new_weights_make_old_amplitudes_invalid(bert):
    model = make_model()
    calibrate_amplitudes(model, make_batch())
    load_bert(model, bert)
    with pytest.raises(RuntimeError, match="not calibrated"):
        model(**make_batch())


def test_neurons_without_amplitude_ignore_them(bert):
    tensors, _ = released_amplitudes()
    for kind in ("lif", "none"):
        model = make_model({"kind": kind})
        assert not load_bert(model, {**bert, **tensors}).unused
        assert model(**make_batch()).loss.isfinite()


LLAMA = {name: CONFIG[name] for name in CONFIG if "dropout" not in name} | {"num_key_value_heads": 1}


def llama(tied=False, **overrides):
    """A tiny LLaMA with random weights."""
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **overrides}, tie_word_embeddings=tied, pad_token_id=0))


def decoder(tied=False, **overrides):
    none = {"hidden_dropout_prob": None, "attention_probs_dropout_prob": None, "num_key_value_heads": 1}
    shape = {**none, "family": "llama", "tie_word_embeddings": tied, **overrides}
    return make_model(model_class=SpikeLMForCausalLM, seed=1, **shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"], ids=["one file", "many files"])
def test_a_saved_llama_is_taken_whole(tmp_path, tied, max_shard_size):
    theirs, ours = llama(tied), decoder(tied)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    calibrate_amplitudes(ours, {"input_ids": torch.arange(10)[None]})
    report = load_llama(ours, CheckpointTensors(tmp_path))
    assert (report.missing, report.unused, report.remarks) == ([], [], [])
    assert not ours.model.stack.calibrated and ours.model.stack.amplitudes.isnan().all()
    mlp, weights = ours.model.stack.layers[1].mlp, theirs.state_dict()
    gate, up = (weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(mlp.up.weight, torch.cat([gate, up]))
    assert torch.equal(ours.lm_head.weight, weights["lm_head.weight"])


def test_a_tied_checkpoint_fills_an_untied_model():
    weights = {name: tensor for name, tensor in llama(tied=True).state_dict().items() if name != "lm_head.weight"}
    ours = decoder()
    load_llama(ours, weights)
    assert torch.equal(ours.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"tied": False}, {"tied": True}, "set the model's tie_word_embeddings to false"),
        ({"attention_bias": True}, {}, r"no place for model\.layers\.0\.self_attn\.k_proj\.bias.* and 5 more"),
        ({"num_hidden_layers": 3}, {}, r"no place for model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, {}, r"model\.stack\.layers\.1\.mlp\.up\.weight: the checkpoint has none"),
        ({"intermediate_size": 48}, {}, r"mlp\.up\.weight: the checkpoint has \(96, 16\), the model \(64, 16\)"),
    ],
)
def test_a_llama_of_another_shape_is_refused_before_anything_is_copied(theirs, ours, message):
    model = decoder(**ours)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_llama(model, llama(**theirs).state_dict())
    assert all(map(torch.equal, before, model.parameters()))


class Watched(CheckpointTensors):
    """Counts the tensors that are alive when another is read."""

    alive, most = (), 0

    def __getitem__(self, name):
        self.alive = [tensor for tensor in self.alive if tensor() is not None]
        self.most = max(self.most, 1 + len(self.alive))
        tensor = super().__getitem__(name)
        self.alive.append(weakref.ref(tensor))
        return tensor


def test_a_checkpoint_on_disk_is_read_parameter_by_parameter(tmp_path):
    theirs, ours = llama(tied=False), decoder()
    theirs.save_pretrained(tmp_path)
    tensors = Watched(tmp_path)
    assert load_llama(ours, tensors).missing == []
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert tensors.most == 3  # of q, k and v
    assert tensors.shape("lm_head.weight") == tuple(theirs.lm_head.weight.shape)


def test_a_folder_without_safetensors_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        CheckpointTensors(tmp_path)
