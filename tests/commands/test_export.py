"""Checkpoints of every ZeRO stage become folders that open anywhere and compute what was trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import pipeline

from data_prep.files import hash_file
from data_prep.recipes import settings_from_dict
from data_prep.tokenization import load_tokenizer
from models.auto import save_with_code
from models.modeling import AUTO_CLASSES, SpikeLMForCausalLM, SpikeLMForMaskedLM, SpikeLMForPreTraining
from pipeline import model_folder
from pipeline.checkpoint import read_state, read_weights, resolve_checkpoint
from pipeline.config import RunConfig
from pipeline.corpus import open_corpus
from pipeline.export import main
from pipeline.metrics import read_metrics
from pipeline.model_folder import ExportError, probe_batch, prove
from pipeline.objectives import count_targets, loss_sums
from tests.distributed.runs import STEPS
from tests.tiny import OneProcess, make_model

STRANGER = Path(__file__).with_name("stranger.py")
EXPORTS = {  # name: run and options
    "zero1": ("whole-1-fp32", []),
    "zero2": ("whole-2-fp32", []),
    "zero3": ("resumed-3-fp32", []),
    "zero3-bf16": ("whole-3-bf16", ["--dtype", "bfloat16"]),
}


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Folder with the EXPORTS."""
    folder = tmp_path_factory.mktemp("exports")
    for name, (run, options) in EXPORTS.items():
        assert main([str(runs / run), str(folder / name), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def strangers_view(exports, tmp_path_factory):
    """What stranger.py, which cannot import this project, finds out about each export: from another directory, with an
    empty home."""
    folder = tmp_path_factory.mktemp("stranger")
    home = folder / "home"
    home.mkdir()
    save_file(
        probe_batch(SpikeLMForPreTraining.from_pretrained(exports / "zero2").config), folder / "probe.safetensors"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", str(STRANGER), str(exports), str(folder), str(torch.get_num_threads()), *EXPORTS],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_the_folder_computes_the_same_bits_in_a_process_without_this_project(name, exports, strangers_view):
    model = SpikeLMForPreTraining.from_pretrained(exports / name)
    model.model.stack.set_spike_backend("torch", torch.device("cpu"))
    with torch.no_grad():
        ours = model(**load_file(strangers_view / "probe.safetensors"))
    theirs = load_file(strangers_view / f"{name}.safetensors")
    assert ours.logits.std() > 0.01
    for field in ("logits", "next_sentence_logits", "spike_stats"):
        assert torch.equal(ours[field], theirs[field]), field


@pytest.mark.parametrize("name", EXPORTS)
def test_every_auto_class_opens_it_there(name, strangers_view):
    facts = json.loads((strangers_view / f"{name}.json").read_text())
    assert facts["classes"] == {
        "AutoConfig": "SpikeLMConfig",
        "AutoModel": "SpikeLMModel",
        "AutoModelForMaskedLM": "SpikeLMForMaskedLM",
        "AutoModelForPreTraining": "SpikeLMForPreTraining",
        "AutoModelForSequenceClassification": "SpikeLMForSequenceClassification",
    }
    assert facts["modules"] == ["transformers_modules"]


@pytest.mark.parametrize("name", EXPORTS)
def test_fill_mask_and_a_step_of_classification_work_there(name, strangers_view):
    facts = json.loads((strangers_view / f"{name}.json").read_text())
    assert len(facts["fill_mask"]) == 5
    assert facts["fill_mask"][0]["score"] > facts["fill_mask"][4]["score"] > 0
    assert "[MASK]" not in facts["fill_mask"][0]["sequence"]
    before, after = facts["classification_losses"]
    assert after < before
    assert facts["saved_again"] == "SpikeLMForSequenceClassification"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_its_heldout_loss_is_the_one_that_the_trained_engine_measured(name, exports, runs):
    run = runs / EXPORTS[name][0]
    measured = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "heldout"][-1]
    assert measured["step"] == STEPS
    config = settings_from_dict(RunConfig, read_state(resolve_checkpoint(run)).recipe)
    model = SpikeLMForPreTraining.from_pretrained(exports / name).eval()
    tally = torch.zeros(2, 2, dtype=torch.float64)
    corpus = open_corpus(config, OneProcess())
    names = corpus.objective.losses
    for batch in corpus.heldout_batches():
        with torch.no_grad():
            output = model(**batch.tensors)
        tally += torch.stack([loss_sums(output, names), count_targets(batch.tensors, names)])
    losses = (tally[0] / tally[1]).tolist()
    assert losses == pytest.approx([measured["masked_lm_loss"], measured["next_sentence_loss"]], rel=1e-5)


def test_amplitudes_are_those_of_the_checkpoint_and_the_weights_have_the_type_asked_for(exports, runs):
    for name, (run, options) in EXPORTS.items():
        weights = load_file(exports / name / "model.safetensors")
        amplitudes = weights.pop("model.stack.amplitudes")
        saved = read_weights(resolve_checkpoint(runs / run))
        assert amplitudes.dtype == torch.float32 and torch.equal(amplitudes, saved["model.stack.amplitudes"])
        assert weights.pop("model.stack.calibrated")
        dtype = torch.bfloat16 if options else torch.float32
        assert all(torch.equal(tensor, saved[key].to(dtype)) for key, tensor in weights.items())
        assert set(saved) - set(weights) == {
            "mlm_head.decoder.weight",  # tied to the word embeddings
            "model.stack.amplitudes",
            "model.stack.calibrated",
        }


def test_the_weights_are_those_that_deepspeed_has_trained(exports, runs):
    trained = torch.load(resolve_checkpoint(runs / "whole-2-fp32") / "mp_rank_00_model_states.pt", weights_only=False)
    weights = load_file(exports / "zero2" / "model.safetensors")
    assert len(weights) > 20
    assert all(torch.equal(tensor, trained["module"][name]) for name, tensor in weights.items())


def test_a_folder_is_complete_and_describes_itself(exports, runs):
    folder = exports / "zero3"
    modules = "auto amplitudes cache config layers loss modeling neuron outputs positions spike_linear spike_ops stack"
    code = {f"{name}.py" for name in modules.split()}
    assert {path.name for path in folder.iterdir()} == code | {
        "README.md",
        "config.json",
        "data_manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())  # for colleagues, too
    card = (folder / "README.md").read_text()
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    recipe = body.split("```yaml\n")[1].split("```")[0]
    state = read_state(resolve_checkpoint(runs / "resumed-3-fp32"))
    assert yaml.safe_load(recipe) == state.recipe
    lines = read_metrics(runs / "resumed-3-fp32" / "metrics.jsonl")
    heldout = [line for line in lines if line["kind"] == "heldout"][-1]
    assert f"| heldout | 6 | masked_lm_loss | {heldout['masked_lm_loss']:.4f} |" in body
    assert f"| all | {heldout['firing_rate']:.4f} |" in body
    assert "| layer1.mlp_down |" in body and "Pretrained for 6 steps on 96 samples by 2 process(es)." in body
    manifest = json.loads((folder / "data_manifest.json").read_text())
    assert manifest["tokenizer_fingerprint"] in body and f"{manifest['counts']['train']['rows']:,}" in body


def test_a_decoder_is_exported_as_one(runs, tmp_path):
    folder = tmp_path / "decoder"
    assert main([str(runs / "resumed-decoder"), str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 3, 0)
    model = SpikeLMForCausalLM.from_pretrained(folder).eval()
    names, tally = ("causal_lm",), torch.zeros(2, 1, dtype=torch.float64)
    run_config = settings_from_dict(RunConfig, read_state(resolve_checkpoint(runs / "resumed-decoder")).recipe)
    for batch in open_corpus(run_config, OneProcess()).heldout_batches():
        with torch.no_grad():
            tally += torch.stack([loss_sums(model(**batch.tensors), names), count_targets(batch.tensors, names)])
    measured = [line for line in read_metrics(runs / "resumed-decoder" / "metrics.jsonl") if line["kind"] == "heldout"]
    assert float(tally[0] / tally[1]) == pytest.approx(measured[-1]["causal_lm_loss"], rel=1e-5)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "SpikeLM decoder" in card and "MASK" not in card
    writer = pipeline("text-generation", model=model, tokenizer=load_tokenizer(folder))
    options = {"max_new_tokens": 8, "do_sample": False}
    (ids,), (text,) = writer("The capital of", return_tensors=True, **options), writer("The capital of", **options)
    whole = writer.tokenizer.decode(ids["generated_token_ids"], skip_special_tokens=True)
    assert text["generated_text"] == whole and whole.startswith("The capital of")


def test_an_earlier_export_is_replaced_only_when_told_to(exports, runs, tmp_path, capsys):
    output = tmp_path / "export"
    shutil.copytree(exports / "zero2", output)
    (output / "stale").touch()
    checkpoint = resolve_checkpoint(runs / "whole-2-fp32")
    assert main([str(checkpoint), str(output)]) == 2
    assert capsys.readouterr().err == f"error: {output} exists: name another folder, or replace it by --overwrite\n"
    assert main([str(checkpoint), str(output), "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"export"} and not (output / "stale").exists()
    assert hash_file(output / "model.safetensors") == hash_file(exports / "zero2" / "model.safetensors")
    (tmp_path / "mine").mkdir()
    assert main([str(checkpoint), str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "is no export of ours" in capsys.readouterr().err and (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [("weight", "computes other logits"), ("amplitude", "computes other logits"), ("code", "does not open")],
)
def test_what_the_proof_refuses_is_not_exported(damage, message, exports, runs, tmp_path, capsys, monkeypatch):
    write, options = model_folder._write, []

    def write_and_damage(model, tokenizer, folder):
        write(model, tokenizer, folder)
        if damage == "code":
            (folder / "layers.py").write_text("from models.layers import SpikeBlock, block_sites")
            return
        weights = load_file(folder / "model.safetensors")
        weights["model.stack.amplitudes" if damage == "amplitude" else "mlm_head.dense.weight"][0, 0] *= 1.001
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    if damage == "weight":
        shutil.copytree(exports / "zero1", tmp_path / "export")
        options = ["--overwrite"]
    before = {path: hash_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(model_folder, "_write", write_and_damage)
    assert main([str(runs / "whole-2-fp32"), str(tmp_path / "export"), *options]) == 1
    assert message in capsys.readouterr().err
    assert before == {path: hash_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(list(tmp_path.iterdir())) == (1 if before else 0)


@pytest.mark.parametrize("neuron", [{"kind": "lif"}, {"kind": "none"}], ids=str)
def test_a_model_with_another_neuron_and_without_sentence_pairs_is_proved(neuron, tmp_path):
    model = make_model(neuron, model_class=SpikeLMForMaskedLM)
    save_with_code(model, AUTO_CLASSES, tmp_path)
    prove(model, tmp_path)
    with torch.no_grad():
        model.mlm_head.norm.bias[3] += 1e-3
    with pytest.raises(ExportError, match="computes other logits than"):
        prove(model, tmp_path)


def test_moved_shards_are_named_and_others_refused(runs, tiny_shards, tmp_path, capsys):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(runs / "whole-2-fp32", run)
    (run / "metrics.jsonl").unlink()
    checkpoint = resolve_checkpoint(run)
    state = json.loads((checkpoint / "train_state.json").read_text())
    state["recipe"]["data"]["shards"] = str(tmp_path / "gone")
    _rewrite(checkpoint, state)
    assert main([str(run), str(tmp_path / "export")]) == 2
    assert f"the run's shards {tmp_path / 'gone'} do not exist: give" in capsys.readouterr().err
    shutil.copytree(tiny_shards, moved, ignore=shutil.ignore_patterns("*.tar"))
    assert main([str(run), str(tmp_path / "export"), "--shards", str(moved)]) == 0
    assert "## Losses\n\nNot recorded." in (tmp_path / "export" / "README.md").read_text()
    state["data"]["fingerprint"] = "0" * 32
    _rewrite(checkpoint, state)
    assert main([str(run), str(tmp_path / "other"), "--shards", str(moved)]) == 2
    assert f"the run was not trained on the shards in {moved}" in capsys.readouterr().err


def test_an_incomplete_checkpoint_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "export")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no intact checkpoint")


def _rewrite(checkpoint, state):
    """Change a checkpoint's train_state.json as if it had been saved so."""
    (checkpoint / "train_state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    path = checkpoint / "train_state.json"
    manifest["files"]["train_state.json"] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
