"""python -m pipeline.convert: a LLaMA becomes a spiking model, and is told what that costs."""

import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, BertConfig, GemmaConfig, LlamaConfig, LlamaForCausalLM

from data_prep.tokenization import load_tokenizer
from models.config import NeuronConfig
from models.warm_start import llama_config, llama_differences
from pipeline.convert import main
from pipeline.documents import text_documents

TEXT = "The old house stands by the river. Its garden is green in summer, and quiet.\n"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def llama(tmp_path, causal_shards):
    """Folder of a tiny LLaMA with a tokenizer, and a text beside it."""
    tokenizer = load_tokenizer(causal_shards / "tokenizer")
    torch.manual_seed(0)
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=512, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2, **SHAPE, **special
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    return tmp_path


def convert(folder, *more):
    words = [folder / "llama", folder / "spiking", "--text", folder / "text.txt", *more]
    return main([str(word) for word in words])


def test_the_card_tells_the_losses_before_and_after(llama, capsys):
    assert convert(llama, "--num-timesteps", "2", "--windows", "3", "--batch-size", "2") == 0
    printed = capsys.readouterr().out
    header, card = (llama / "spiking" / "README.md").read_text().removeprefix("---\n").split("---\n\n", 1)
    assert yaml.safe_load(header)["pipeline_tag"] == "text-generation" and card in printed
    (row,) = [line for line in printed.splitlines() if "next-token loss" in line]
    before, after = (float(cell) for cell in row.split("|")[2:4])
    (ids,) = text_documents([str(llama / "text.txt")], "text", load_tokenizer(llama / "llama"))
    ids = torch.from_numpy(ids)[None, : 64 + 63 + 63]
    losses = []
    for model in (
        LlamaForCausalLM.from_pretrained(llama / "llama"),
        AutoModelForCausalLM.from_pretrained(llama / "spiking"),
    ):
        total, parts = 0.0, [ids[:, start : start + 64] for start in (0, 63, 126)]
        with torch.no_grad():
            for part in parts:
                total += float(model(input_ids=part, labels=part).loss) * (part.shape[1] - 1)
        losses.append(total / sum(part.shape[1] - 1 for part in parts))
    assert (before, after) == (pytest.approx(losses[0], abs=1e-4), pytest.approx(losses[1], abs=1e-4))
    assert before != after
    config = json.loads((llama / "spiking" / "config.json").read_text())
    assert (config["neuron"]["num_timesteps"], config["eos_token_id"]) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BertConfig().to_dict(), "config.json has model_type 'bert': only llama and mistral compute as ours do"),
        (GemmaConfig(**SHAPE).to_dict(), "config.json has model_type 'gemma'"),  # weights of the same names
        ({**LlamaConfig(**SHAPE).to_dict(), "attention_bias": True}, "asks for attention_bias True, which our decoder"),
        ({**LlamaConfig(**SHAPE).to_dict(), "head_dim": 16}, "asks for head_dim 16"),
    ],
    ids=["bert", "gemma", "bias", "wide heads"],
)
def test_other_models_are_refused(settings, message, llama, capsys):
    (llama / "llama" / "config.json").write_text(json.dumps(settings))
    assert convert(llama) == 2
    assert message in capsys.readouterr().err
    assert not (llama / "spiking").exists()


def test_a_text_without_tokens_is_refused(llama, capsys):
    (llama / "text.txt").write_text("\n")
    assert convert(llama) == 2
    assert "no document with two tokens" in capsys.readouterr().err


def test_rotations_are_those_of_older_configurations_too():
    old = {**LlamaConfig(**SHAPE).to_dict(), "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    del old["rope_parameters"]
    rope = llama_config(old, NeuronConfig()).rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500.0, "linear", 2.0)


def test_what_a_configuration_leaves_out_is_llamas_not_ours():
    left_out = llama_config({"model_type": "llama", **SHAPE}, NeuronConfig())
    theirs = LlamaConfig(**SHAPE)
    for name in ("tie_word_embeddings", "pad_token_id", "max_position_embeddings", "rms_norm_eps", "vocab_size"):
        assert getattr(left_out, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps is 1e-06, the checkpoint's 1e-05"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2, the checkpoint's 3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2, the checkpoint's 4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is .*500000.0"),
    ],
)
def test_a_decoder_that_would_compute_otherwise_than_its_checkpoint_is_told(changes, message):
    ours = llama_config(LlamaConfig(**SHAPE).to_dict(), NeuronConfig())
    assert llama_differences(ours, LlamaConfig(**SHAPE).to_dict()) == []
    (found,) = llama_differences(ours, LlamaConfig(**{**SHAPE, **changes}).to_dict())
    assert re.search(message, found)


@pytest.mark.parametrize("option", ["--batch-size", "--windows", "--num-timesteps", "--window"])
def test_numbers_that_cannot_be_are_refused_at_once(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), str(tmp_path / "new"), "--text", "x", option, "0"])
    assert exit_.value.code == 2 and "'0' is not a whole number" in capsys.readouterr().err


def test_torn_weights_and_foreign_tokenizers_are_refused(llama, causal_shards, capsys):
    weights = llama / "llama" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert convert(llama) == 2
    assert "is no whole safetensors file" in capsys.readouterr().err
    weights.write_bytes(whole)
    settings = json.loads((llama / "llama" / "config.json").read_text())
    (llama / "llama" / "config.json").write_text(json.dumps({**settings, "vocab_size": 300}))
    assert convert(llama) == 2
    assert "the tokenizer has 512 ids, the model 300" in capsys.readouterr().err
