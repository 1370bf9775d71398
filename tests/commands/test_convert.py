"""python -m pipeline.convert: a LLaMA becomes a spiking model, and is told what that costs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM

from data_prep.tokenization import load_tokenizer
from models.config import NeuronConfig
from models.warm_start import llama_config
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
    assert (llama / "spiking" / "README.md").read_text() in printed
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
        (BertConfig().to_dict(), "config.json has no rms_norm_eps: it is of no LLaMA-shaped model"),
        ({**LlamaConfig(**SHAPE).to_dict(), "attention_bias": True}, "asks for attention_bias True, which our decoder"),
        ({**LlamaConfig(**SHAPE).to_dict(), "head_dim": 16}, "asks for head_dim 16"),
    ],
    ids=["bert", "bias", "wide heads"],
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
