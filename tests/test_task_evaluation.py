"""python -m pipeline.eval on models with a head for a task: metrics by timesteps, as a hand would find them."""

import json

import numpy as np
import pytest
import torch

from data_prep.tokenization import load_tokenizer
from models.amplitudes import SpikeStats, calibrate_amplitudes, keep_timesteps
from models.config import SITES, preset
from models.energy import ENERGY_TABLES, Passed, ordinary_operations
from models.modeling import SpikeLMForMaskedLM, SpikeLMForSequenceClassification
from pipeline.eval import main
from tests.toy_task import ENCODER, SIZES, finetune_arguments, make_rows, make_tokenizer, write_task

ROWS = make_rows(SIZES["validation"], 1)


def save_model(folder, model_class=SpikeLMForSequenceClassification, **fields):
    """A calibrated model of random weights, and the toy task's tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = model_class(preset("encoder-tiny", **{**ENCODER, "vocab_size": len(tokenizer), **fields}))
    texts = [row["text"] for row in ROWS]
    calibrate_amplitudes(model.eval(), dict(tokenizer(texts, padding=True, return_tensors="pt")))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Folder of the toy task, its recipe toy.yaml, and the models classifier/, pretrained/ and regressor/."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    finetune_arguments(folder, folder, "toy")
    save_model(folder / "classifier", id2label={0: "bad", 1: "good"}, problem_type="single_label_classification")
    save_model(folder / "pretrained", SpikeLMForMaskedLM)
    save_model(folder / "regressor", id2label={0: "LABEL_0"}, problem_type="regression")
    return folder


def by_hand(folder, num_timesteps):
    """Predicted classes, mean loss and statistics of the validation rows, one forward a row, which has no padding."""
    model, tokenizer = SpikeLMForSequenceClassification.from_pretrained(folder).eval(), load_tokenizer(folder)
    keep_timesteps(model, num_timesteps)
    predicted, losses, stats = [], [], []
    for row in ROWS:
        label = torch.tensor([["bad", "good"].index(row["label"])])
        with torch.no_grad():
            output = model(**tokenizer(row["text"], return_tensors="pt"), labels=label)
        predicted.append(int(output.logits.argmax()))
        losses.append(float(output.loss))
        stats.append(output.spike_stats)
    return np.array(predicted), np.mean(losses), SpikeStats(sum(stats))


def test_measures_by_timesteps_are_those_of_each_row_alone(task, tmp_path, capsys):
    written = tmp_path / "measures.json"
    arguments = ["--task-recipe", str(task / "toy.yaml"), "--device", "cpu", "--json", str(written)]
    for number in (2, 4, 1):
        arguments += ["--num-timesteps", str(number)]
    assert main([str(task / "classifier"), *arguments, "--batch-size", "5"]) == 0
    measured, printed = json.loads(written.read_text()), capsys.readouterr().out
    assert [values["num_timesteps"] for values in measured] == [4, 2, 1]
    labels = np.array([["bad", "good"].index(row["label"]) for row in ROWS])
    lengths = [len(row["text"].split()) + 2 for row in ROWS]
    for values in measured:
        predicted, loss, stats = by_hand(task / "classifier", values["num_timesteps"])
        assert values["accuracy"] == np.mean(predicted == labels) and values["baseline_accuracy"] == 0.5
        assert values["classification_loss"] == pytest.approx(loss, rel=1e-5)
        assert values["spikes_per_token"] == pytest.approx(stats.spikes_per_token(ENCODER["hidden_size"]), rel=1e-5)
        rates = [values["firing_rate_by_site"][f"layer0.{site}"] for site in SITES]
        assert rates == pytest.approx(stats.firing_rate.mean(1).tolist())
        config = SpikeLMForSequenceClassification.from_pretrained(task / "classifier").config
        ordinary = ordinary_operations(config, Passed.in_rows(lengths, causal=False))
        expected = 1e6 * ordinary.joules(ENERGY_TABLES["45nm-fp32"]) / sum(lengths)
        assert values["energy_of_ordinary_layers"] == pytest.approx(expected)
        assert f"{values['accuracy']:.4f}" in printed
    assert len({values["classification_loss"] for values in measured}) == 3
    assert [values["rows"] for values in measured] == [32] * 3 and "T=4         T=2         T=1" in printed


def test_one_number_of_timesteps_is_written_alone(task, tmp_path):
    path = tmp_path / "measures.json"
    recipe = ["--task-recipe", str(task / "toy.yaml"), "--split", "test", "--device", "cpu", "--json", str(path)]
    assert main([str(task / "classifier"), *recipe]) == 0
    values = json.loads(path.read_text())
    assert (values["num_timesteps"], values["rows"], values["truncated"]) == (4, SIZES["test"], 0)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("classifier", ["--split", "dev"], "--split dev: is not there in task own; use one of train, validation, test"),
        ("classifier", ["--window", "8"], "--window has no effect on a fine-tuned model, which is measured on its"),
        ("classifier", ["--num-timesteps", "8"], "num_timesteps is 8, but the model has amplitudes for 4"),
        ("regressor", [], "regressor gives a number, but task own asks for bad, good: name the task that it"),
        ("pretrained", [], "--task-recipe has no effect on a model that was not fine-tuned: leave it out"),
    ],
)
def test_what_cannot_be_measured_is_told(task, model, more, message, capsys):
    assert main([str(task / model), "--task-recipe", str(task / "toy.yaml"), *more]) == 2
    assert message in capsys.readouterr().err


def test_an_export_needs_a_recipe_that_names_its_rows(task, capsys):
    assert main([str(task / "classifier")]) == 2
    assert "does not say where the rows of its task are: name a recipe by --task-recipe" in capsys.readouterr().err


def test_what_a_classifier_multiplies_is_checked_over_one_number_of_timesteps(task, capsys):
    check = [str(task / "classifier"), "--check-spikes", "--device", "cpu"]
    assert main([*check, "--num-timesteps", "2"]) == 0
    assert "classifier" in capsys.readouterr().out.partition("real by design")[2]
    assert main([*check, "--num-timesteps", "2", "--num-timesteps", "1"]) == 2
    assert "--check-spikes looks at one number of timesteps" in capsys.readouterr().err
