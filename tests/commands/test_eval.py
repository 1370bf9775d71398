"""python -m pipeline.eval: what it measures is what training measured, and what a hand would count."""

import json
import shutil

import pytest

from data_prep import build_shards
from data_prep.manifest import Manifest
from data_prep.sources import is_heldout
from data_prep.tokenization import load_tokenizer
from models.amplitudes import BlockNeurons
from pipeline.documents import check_shards
from pipeline.eval import main
from pipeline.export import main as export
from pipeline.metrics import read_metrics
from pipeline.shard_cache import ShardFolder


@pytest.fixture
def measure(tmp_path, capsys):
    """measure(*arguments): the measures that the command writes, after a look at what it prints."""

    def run(*arguments):
        assert main([*map(str, arguments), "--device", "cpu", "--json", str(tmp_path / "measures.json")]) == 0
        values = json.loads((tmp_path / "measures.json").read_text())
        assert f"{values['unigram_entropy']:.4f}" in capsys.readouterr().out
        return values

    return run


def test_an_encoder_gives_the_heldout_losses_of_its_training(measure, runs):
    run = runs / "whole-2-fp32"
    trained = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "heldout"][-1]
    values = measure(run)
    for name in ("masked_lm_loss", "next_sentence_loss", "masked_lm_accuracy", "unigram_entropy"):
        assert values[name] == pytest.approx(trained[name], rel=1e-5)
    # One of the two ranks had no row left at the end and gave the neurons one token of its own, of more than 10,000.
    assert values["firing_rate"] == pytest.approx(trained["firing_rate"], rel=1e-4)
    assert (
        values["num_timesteps"] == 4 and values["firing_rate_by_site"].keys() == trained["firing_rate_by_site"].keys()
    )


def test_energy_is_that_of_the_measured_rates(measure, runs):
    values = measure(runs / "whole-2-fp32", "--energy-table", "45nm-fp16")
    sites, others = values["energy_by_site"], values["energy_of_others"]
    assert sites.keys() == values["firing_rate_by_site"].keys() and {"softmax", "neurons", "head"} < others.keys()
    assert values["energy_of_layers"] == pytest.approx(sum(sites.values()))
    assert values["energy"] == pytest.approx(sum(sites.values()) + sum(others.values()))
    D, rate = 32, values["firing_rate_by_site"]["layer0.attention_output"]
    assert sites["layer0.attention_output"] == pytest.approx(1e-6 * 0.4 * D * D * 4 * rate)
    linears = 8 * D * D * len(sites) / 6  # of a token, attention apart: the tiny MLP is twice as wide
    assert values["energy_of_ordinary_layers"] > 1e-6 * 1.5 * linears


def test_layers_are_proved_to_multiply_spikes_alone(runs, capsys, monkeypatch, tmp_path):
    check = [str(runs / "whole-decoder"), "--check-spikes", "--device", "cpu"]
    assert main([*check, "--text", "a.txt"]) == 2
    assert "--text has no effect with --check-spikes" in capsys.readouterr().err
    assert main([*check, "--json", str(tmp_path / "check.json")]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["faults"] == found["silent"] == [] and len(found["spiking"]) == 6 * 2
    assert "products are of spikes alone" in (said := capsys.readouterr().out) and "lm_head" in said
    fire = BlockNeurons.fire
    monkeypatch.setattr(BlockNeurons, "fire", lambda *args, **options: fire(*args, **options) + 1e-3 * args[2])
    assert main(check) == 1
    assert "not of spikes: keys of layer 0: sees" in capsys.readouterr().out


def test_a_decoder_is_measured_on_whole_documents(measure, runs, causal_shards, tmp_path):
    values = measure(runs / "whole-decoder", "--window", "32")
    counts = Manifest.load(causal_shards).counts["heldout"]
    assert (values["documents"], values["bytes"]) == (counts.documents, counts.bytes)
    assert values["targets"] == counts.tokens + counts.documents  # all but the begin of text, and the end
    assert values["bits_per_byte"] * counts.bytes == pytest.approx(
        values["causal_lm_loss"] * values["targets"] / 0.6931471805599453
    )
    trained = [line for line in read_metrics(runs / "whole-decoder/metrics.jsonl") if line["kind"] == "heldout"][-1]
    # Rows cut a document anywhere and predict nothing from before the cut: near, but not the same.
    assert values["causal_lm_loss"] == pytest.approx(trained["causal_lm_loss"], rel=0.02)
    assert export([str(runs / "whole-decoder"), str(tmp_path / "exported")]) == 0
    exported = measure(tmp_path / "exported", "--shards", causal_shards, "--window", "32")
    assert exported["causal_lm_loss"] == pytest.approx(values["causal_lm_loss"], rel=1e-6)
    fewer = measure(tmp_path / "exported", "--shards", causal_shards, "--window", "32", "--num-timesteps", "1")
    assert fewer["num_timesteps"] == 1 and fewer["causal_lm_loss"] != exported["causal_lm_loss"]


def test_text_is_measured_document_by_document(measure, runs, causal_shards, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "One small text."}\n{"body": ""}\n{"body": "Another, é."}\n')
    values = measure(runs / "whole-decoder", "--text", tmp_path / "a.jsonl", "--text-field", "body")
    assert (values["documents"], values["bytes"]) == (2, 15 + 12)
    assert "shards" not in values["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["whole-decoder", "--stride", "40", "--window", "32"], "--window 32 and --stride 40: the model has"),
        (["whole-decoder", "--num-timesteps", "9"], "num_timesteps is 9, but the model has amplitudes for 4"),
        (["whole-2-fp32", "--window", "16"], "--window has no effect on an encoder"),
        (["none"], "none does not exist: name a run, as runs/NAME, or one of its checkpoints"),
        (["whole-decoder", "--device", "foo"], "--device foo"),
        (["whole-decoder", "--text", "a", "--shards", "b"], "--shards and --text: give one"),
        (["whole-decoder", "--text", "none.txt"], "none.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(arguments, message, runs, capsys):
    assert main([str(runs / arguments[0]), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_shards_of_another_tokenizer_or_layout_are_refused(runs, tiny_shards, causal_shards, tmp_path, capsys):
    for run, shards in (("whole-decoder", tiny_shards), ("whole-2-fp32", causal_shards)):
        assert main([str(runs / run), "--shards", str(shards)]) == 2
        assert f"{shards} was made with another tokenizer" in capsys.readouterr().err
    tokenizer, pairs = load_tokenizer(causal_shards / "tokenizer"), tmp_path / "pairs"
    shutil.copytree(causal_shards, pairs)
    manifest = json.loads((pairs / "manifest.json").read_text())
    manifest["origin"]["settings"]["layout"] = "pairs"
    (pairs / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has rows in the layout pairs, but this model needs causal"):
        check_shards(ShardFolder(str(pairs), pairs), tokenizer, "causal")


def test_other_held_out_rows_of_the_same_tokenizer_can_be_measured(measure, runs, causal_shards, tmp_path):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"Text {n}."}) + "\n" for n in range(60)))
    arguments = ["--layout", "causal", "--row_length", "32", "--heldout_fraction", "0.5", "--overwrite"]
    tokenizer = ["--tokenizer", str(_without_record(causal_shards / "tokenizer", tmp_path / "tokenizer"))]
    shards = ["--input", str(tmp_path / "other.jsonl"), "--output", str(tmp_path / "shards")]
    assert build_shards.main([*arguments, *tokenizer, *shards]) == 0
    values = measure(runs / "whole-decoder", "--shards", tmp_path / "shards")
    assert values["documents"] == Manifest.load(tmp_path / "shards").counts["heldout"].documents > 10
    texts = [json.dumps({"text": text}) for text in (f"Text {n}." for n in range(60)) if is_heldout(text, 0.5)]
    (tmp_path / "same.jsonl").write_text("\n".join(texts))
    same = measure(runs / "whole-decoder", "--text", tmp_path / "same.jsonl")
    for name in ("documents", "bytes", "targets", "causal_lm_loss", "bits_per_byte"):
        assert same[name] == pytest.approx(values[name], rel=1e-6)


def _without_record(tokenizer, copy):
    """A copy of a tokenizer's folder that does not say what it was trained on."""
    shutil.copytree(tokenizer, copy)
    (copy / "training.json").unlink(missing_ok=True)
    return copy
