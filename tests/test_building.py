"""Models that are made without weights and then given them module by module."""

from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, OneProcess, make_batch, make_model
from torch import nn

from data_prep.manifest import TOKENIZER_FOLDER
from models.amplitudes import calibrate_amplitudes, spiking_stack
from models.config import SpikeLMConfig
from models.modeling import SpikeLMForCausalLM, SpikeLMForPreTraining
from models.warm_start import CheckpointTensors
from pipeline.config import EngineSettings, load_run_config
from pipeline.corpus import open_corpus, open_tokenizer
from pipeline.model import build_model, draw_weights, load_own, other_tokens, set_execution

LLAMA = {"family": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True}


def empty_model(model_class=SpikeLMForPreTraining, **overrides):
    with torch.device("meta"):
        return model_class(SpikeLMConfig(**{**CONFIG, "initializer_range": 0.02, **overrides}))


def drawn_model(finish=None, **overrides):
    model = empty_model(**overrides)
    torch.manual_seed(5)
    draw_weights(model, finish)
    return model


@pytest.mark.parametrize("overrides", [{}, {"model_class": SpikeLMForCausalLM, **LLAMA}], ids=["bert", "llama"])
def test_weights_are_drawn_as_configured(overrides):
    model = drawn_model(hidden_size=64, vocab_size=500, pad_token_id=0, **overrides)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        if parameter.dim() == 1:
            assert (parameter == expected).all(), name
        elif parameter.numel() > 1000:
            assert parameter[1:].std().item() == pytest.approx(0.02, rel=0.1), name
        assert parameter.requires_grad and not hasattr(parameter, "_is_hf_initialized")
    if not overrides:
        assert (model.get_input_embeddings().weight[0] == 0).all()
    assert model.model.stack.amplitudes.isnan().all() and not model.model.stack.calibrated


def test_a_drawn_model_works_and_saves(tmp_path):
    model = drawn_model()
    calibrate_amplitudes(model, make_batch())
    model.save_pretrained(tmp_path)
    assert torch.equal(SpikeLMForPreTraining.from_pretrained(tmp_path)(**make_batch()).loss, model(**make_batch()).loss)


def test_only_one_module_is_whole_at_a_time():
    whole, drawn, most = drawn_model(), {}, 0

    def finish(module):
        nonlocal most
        held = [parameter for parameter in made.parameters() if parameter.device.type != "meta"]
        most = max(most, sum(parameter.numel() for parameter in held))
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                drawn[id(parameter)] = parameter.data
                parameter.data = torch.empty(0)

    made = empty_model()
    torch.manual_seed(5)
    draw_weights(made, finish)
    assert sum(parameter.numel() for parameter in made.parameters()) == 0
    assert most == sum(p.numel() for p in whole.model.stack.layers[0].attention.qkv.parameters())  # the largest
    pairs = zip(made.parameters(), whole.parameters(), strict=True)
    assert all(torch.equal(drawn[id(ours)], theirs) for ours, theirs in pairs)
    assert isinstance(made.get_input_embeddings().weight, nn.Parameter)


def test_a_warm_start_tells_of_tokens_that_change_their_embeddings(tiny_shards, causal_shards, tmp_path):
    tokenizer = open_tokenizer(tiny_shards)[1]
    assert other_tokens(tiny_shards / TOKENIZER_FOLDER, tokenizer) == []
    assert other_tokens(tmp_path, tokenizer) == []  # weights alone
    (remark,) = other_tokens(causal_shards / TOKENIZER_FOLDER, tokenizer)
    assert f"of the shards' {len(tokenizer)} tokens have other ids" in remark
    assert str(causal_shards) in remark


def test_a_model_computes_as_the_recipe_says():
    model = drawn_model()
    engine = EngineSettings(
        checkpointing="timestep",
        checkpointing_timesteps=2,
        recompute_hidden=True,
        spike_backend="torch",
        logits_at_once=7,
    )
    set_execution(model, engine, torch.device("cpu"))
    for layer in model.model.stack.layers:
        assert layer.gradient_checkpointing and layer.timesteps_per_cell == 2
        assert layer.mlp.up.recompute and not layer.mlp.down.recompute and layer.spike_backend == "torch"
    assert model.logits_at_once == 7
    with pytest.raises(ValueError, match="'cpp' cannot run here"):
        set_execution(model, replace(engine, spike_backend="cpp"), torch.device("cuda"))


def exported(folder, **overrides):
    """A folder with the weights and amplitudes of a tiny encoder, as pipeline.export leaves them."""
    model = make_model(seed=1, **overrides)
    model.model.stack.amplitudes.fill_(0.5)
    model.model.stack.calibrated.fill_(True)
    model.save_pretrained(folder)
    return CheckpointTensors(folder), model.state_dict()


def test_an_exported_model_goes_on_with_more_positions(tmp_path):
    tensors, theirs = exported(tmp_path)
    model = make_model(seed=2, max_position_embeddings=20)
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_own(model, tensors)
    assert (report.missing, report.unused) == ([], [])
    assert report.remarks == ["positions from 12 on start from random weights"]
    positions = "model.embeddings.position_embeddings.weight"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[:12] if name == positions else tensor, theirs[name]), name
    assert torch.equal(model.state_dict()[positions][12:], drawn[positions][12:])


def test_an_exported_model_of_another_shape_is_refused(tmp_path):
    tensors, _ = exported(tmp_path, hidden_size=32)
    model = make_model()
    before = {name: tensor.nan_to_num(7.0) for name, tensor in model.state_dict().items()}  # no amplitudes yet
    with pytest.raises(ValueError, match=r"mlp_norm.weight is \[32\], expected \[16\].*: set model.preset"):
        load_own(model, tensors)
    assert all(torch.equal(tensor.nan_to_num(7.0), before[name]) for name, tensor in model.state_dict().items())


def test_half_an_exported_model_is_refused(tmp_path):
    tensors, _ = exported(tmp_path)
    half = {name: tensors[name] for name in tensors if "layers.1" not in name}
    half = type("Half", (dict,), {"shape": lambda self, name: tuple(self[name].shape)})(half)
    with pytest.raises(ValueError, match="layers.1.attention.qkv.weight is absent from it"):
        load_own(make_model(), half)


def test_a_run_starts_from_an_exported_model(tmp_path, tiny_shards):
    arguments = ["--recipe", "tests/distributed/tiny.yaml", "--data.shards", str(tiny_shards)]
    corpus = open_corpus(load_run_config(arguments), OneProcess())
    first, _ = build_model(load_run_config(arguments), corpus, OneProcess())
    first.save_pretrained(tmp_path)
    longer = ["--model.overrides.max_position_embeddings", "256", "--model.warm_start", str(tmp_path)]
    second, remarks = build_model(load_run_config([*arguments, *longer]), corpus, OneProcess())
    assert remarks == ["positions from 128 on start from random weights"]
    assert torch.equal(first.mlm_head.dense.weight, second.mlm_head.dense.weight)
    assert spiking_stack(second).calibrated == spiking_stack(first).calibrated
    spiking_stack(first).amplitudes.fill_(0.5)
    spiking_stack(first).calibrated.fill_(True)
    first.save_pretrained(tmp_path)
    for more, is_calibrated in (([], True), (["--model.neuron.leak", "0.5"], False)):
        third, remarks = build_model(load_run_config([*arguments, *longer, *more]), corpus, OneProcess())
        assert spiking_stack(third).calibrated == is_calibrated
        assert any("(leak): amplitudes are measured anew" in line for line in remarks) != is_calibrated
    other = ["--model.overrides.num_attention_heads", "1"]
    with pytest.raises(ValueError, match="num_attention_heads is 1, was [2-9]: set model.overrides"):
        build_model(load_run_config([*arguments, *longer, *other]), corpus, OneProcess())
