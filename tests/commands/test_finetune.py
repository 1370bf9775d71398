"""deepspeed pipeline/finetune.py: what two processes learn, how it resumes, what it writes, what becomes of it."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers

from pipeline.eval import main as evaluate
from pipeline.export import main as export
from pipeline.metrics import read_metrics
from pipeline.model import open_model
from tests.distributed.cases import flip_bit
from tests.distributed.runs import assert_same_end
from tests.distributed.test_resume import _rank_process, _wait_for_step
from tests.launcher import BIN, ROOT, deepspeed_command, launch, run, started
from tests.toy_task import SIZES, finetune_arguments, make_rows, write_task

DROPOUT = {"hidden_dropout_prob": 0.1}


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory):
    """Folder of fine-tunings of the toy task by two processes, and, in output.txt, what they printed."""
    folder = tmp_path_factory.mktemp("finetuned")
    write_task(folder)
    never_better = ("--optimizer.learning_rate", "1e-12", "--selection.early_stopping", "2")
    jobs = [
        finetune_arguments(folder, folder, "two", seeds=(0, 1), epochs=8),
        finetune_arguments(folder, folder, "whole", "--selection.early_stopping", "3", **DROPOUT),
        finetune_arguments(folder, folder, "early", *never_better, epochs=5),
        # Once more, in parts that end between two evaluations, and at one.
        *(
            finetune_arguments(folder, folder, "parts", "--selection.early_stopping", "3", *stop, **DROPOUT)
            for stop in (("--training.stop_after_step", "6"), ("--training.stop_after_step", "8"), ())
        ),
        further(folder, "further-2"),
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "output.txt").write_text(launch("tests/distributed/finetune_worker.py", folder / "jobs.json"))
    return folder


def further(folder, name):
    """The command line of two steps from what two/seed-1 has learned, with its amplitudes."""
    start = ["--model.start", str(folder / "two/seed-1"), "--model.overrides", "{}"]
    afresh = ["--model.preset", "null", "--model.tokenizer", "null"]
    return finetune_arguments(folder, folder, name, *start, *afresh, "--training.stop_after_step", "2")


def lines_of(run, kind):
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def test_both_seeds_learn_the_task_and_one_table_tells(finetuned):
    results = json.loads((finetuned / "two/results.json").read_text())
    for split in ("validation", "test"):
        accuracy = results["metrics"][split]["accuracy"]
        assert results["baseline"][split]["accuracy"] == 0.5 and min(accuracy["values"]) > 0.8
        assert accuracy["mean"] == pytest.approx(np.mean(accuracy["values"]))
        assert accuracy["spread"] == pytest.approx(np.std(accuracy["values"], ddof=1))
    assert 0 < results["firing_rate"]["mean"] < 1 and results["spikes_per_token"]["mean"] > 1
    output = (finetuned / "output.txt").read_text()
    assert "2 seed(s), each at its step of best accuracy" in output and "validation accuracy" in output


def test_the_best_checkpoint_is_kept_and_measured(finetuned):
    for seed in (0, 1):
        run = finetuned / f"two/seed-{seed}"
        result = json.loads((run / "result.json").read_text())
        measured = {line["step"]: line["accuracy"] for line in lines_of(run, "heldout") if line["step"]}
        best = next(step for step, value in measured.items() if value == max(measured.values()))
        assert result["best_step"] == best and result["steps"] == 32
        assert result["metrics"]["validation"]["accuracy"] == max(measured.values())
        kept = {path.name for path in (run / "checkpoints").glob("step*")}
        assert kept == {f"step{best:08d}", "step00000032"}


def test_predictions_are_those_that_were_measured(finetuned):
    run = finetuned / "two/seed-1"
    result = json.loads((run / "result.json").read_text())
    for seed, split in ((1, "validation"), (2, "test")):
        lines = (run / f"predictions/{split}.tsv").read_text().splitlines()
        predicted = dict(line.split("\t") for line in lines[1:])
        labels = [row["label"] for row in make_rows(SIZES[split], seed)]
        right = np.mean([predicted[str(number)] == label for number, label in enumerate(labels)])
        assert lines[0] == "index\tprediction" and right == result["metrics"][split]["accuracy"]


def test_one_process_learns_as_two_do(finetuned):
    result = run([str(BIN / "python"), str(ROOT / "pipeline/finetune.py"), *further(finetuned, "further-1")])
    assert result.returncode == 0 and "stopped at step 2 of 12" in result.stdout, result.stdout
    assert not (finetuned / "further-1/results.json").exists()
    one, two = (finetuned / name / "seed-0" for name in ("further-1", "further-2"))
    first = [lines_of(run, "train")[0]["loss"] for run in (one, two)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    heldout = [lines_of(run, "heldout")[0] for run in (one, two)]
    for name in ("classification_loss", "accuracy", "macro_f1"):
        assert heldout[0][name] == pytest.approx(heldout[1][name], rel=1e-6)


def test_training_ends_where_nothing_gets_better(finetuned):
    run = finetuned / "early/seed-0"
    result = json.loads((run / "result.json").read_text())
    assert (result["best_step"], result["steps"]) == (4, 12)
    assert [line["step"] for line in lines_of(run, "heldout")] == [0, 4, 8, 12]
    assert (run / "DONE").read_text() == "12\n"


def test_a_fine_tuning_in_parts_ends_as_a_whole_one(finetuned):
    whole, parts = finetuned / "whole/seed-0", finetuned / "parts/seed-0"
    results = [json.loads((run / "result.json").read_text()) for run in (whole, parts)]
    assert results[0] == results[1]
    assert [line["loss"] for line in lines_of(whole, "train")] == [line["loss"] for line in lines_of(parts, "train")]
    assert_same_end(whole, parts, results[0]["steps"])


def test_a_fine_tuning_killed_in_the_middle_ends_as_if_it_had_not_been(finetuned):
    arguments = finetune_arguments(finetuned, finetuned, "killed", "--selection.early_stopping", "3", **DROPOUT)
    killed, whole = finetuned / "killed/seed-0", finetuned / "whole/seed-0"
    with started(deepspeed_command("pipeline/finetune.py", *arguments)) as process:
        _wait_for_step(killed / "metrics.jsonl", 7, process)
        for pid in [_rank_process(process, rank) for rank in (0, 1)]:  # both, so that none waits for the other
            os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    assert not (killed / "DONE").exists()
    resumed = run([str(ROOT / "launch/finetune.sh"), *arguments], PROCESSES="2")
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming from" in resumed.stdout and "validation accuracy" in resumed.stdout
    assert json.loads((killed / "result.json").read_text()) == json.loads((whole / "result.json").read_text())
    for kind, fields in (("train", ("loss", "gradient_norm")), ("heldout", ("classification_loss", "accuracy"))):
        ours, theirs = ([[line[name] for name in fields] for line in lines_of(run, kind)] for run in (killed, whole))
        assert ours == theirs
    assert_same_end(whole, killed, json.loads((whole / "result.json").read_text())["steps"])


def test_a_best_checkpoint_that_is_damaged_is_told_before_training_goes_on(finetuned, tmp_path):
    run_folder = shutil.copytree(finetuned / "early", tmp_path / "early") / "seed-0"
    for name in ("DONE", "result.json"):
        (run_folder / name).unlink()
    flip_bit(next((run_folder / "checkpoints/step00000004").rglob("*model_states.pt")))
    arguments = ["--recipe", str(finetuned / "early.yaml"), "--output", str(tmp_path)]
    never_better = ("--optimizer.learning_rate", "1e-12", "--selection.early_stopping", "2")
    result = run(deepspeed_command("pipeline/finetune.py", *arguments, *never_better))
    assert result.returncode != 0 and "Traceback" not in result.stdout, result.stdout
    assert re.search(r"error: .*step00000004.*damaged", result.stdout), result.stdout


def test_an_export_of_the_best_classifies_wherever_transformers_is(finetuned, tmp_path):
    run = finetuned / "two/seed-1"
    assert export([str(run), str(tmp_path / "exported")]) == 0
    auto_class = transformers.AutoModelForSequenceClassification
    model = auto_class.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert model.config.id2label == {0: "bad", 1: "good"}
    classify = transformers.pipeline("text-classification", str(tmp_path / "exported"), trust_remote_code=True)
    rows = make_rows(SIZES["validation"], 1)
    found = [each["label"] for each in classify([row["text"] for row in rows])]
    result = json.loads((run / "result.json").read_text())
    right = np.mean([label == row["label"] for label, row in zip(found, rows, strict=True)])
    assert right == result["metrics"]["validation"]["accuracy"]
    opened, tokenizer, config = open_model(run)
    assert config is None and tokenizer.cls_token == "[CLS]"
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    card = (tmp_path / "exported/README.md").read_text()
    assert "text-classification" in card and "it tells bad, good apart" in card


def test_a_seed_is_measured_on_its_own_rows_over_fewer_timesteps_too(finetuned, tmp_path, capsys):
    run, written = finetuned / "two/seed-1", tmp_path / "measures.json"
    result = json.loads((run / "result.json").read_text())
    timesteps = ["--num-timesteps", "1", "--num-timesteps", "4"]
    assert evaluate([str(run), *timesteps, "--device", "cpu", "--json", str(written)]) == 0
    whole, first = json.loads(written.read_text())
    metrics = result["metrics"]["validation"]
    assert metrics.items() <= whole.items() and (whole["num_timesteps"], first["num_timesteps"]) == (4, 1)
    best = next(line for line in lines_of(run, "heldout") if line["step"] == result["best_step"])
    assert whole["classification_loss"] == pytest.approx(best["classification_loss"], rel=1e-5)
    assert whole["classification_loss"] != pytest.approx(first["classification_loss"], rel=1e-3)
    assert first["energy_of_layers"] < whole["energy_of_layers"]
    rows = finetuned / "validation.jsonl"
    text = rows.read_text()
    rows.write_text(text.partition("\n")[2])
    try:
        assert evaluate([str(run)]) == 2
    finally:
        rows.write_text(text)
    assert "was fine-tuned on other rows than its recipe names now" in capsys.readouterr().err


def test_other_rows_are_refused_by_name(finetuned):
    rows = make_rows(SIZES["train"], 0)
    (finetuned / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    change = ("--selection.early_stopping", "3", "--task.train", str(finetuned / "other.jsonl"))
    arguments = finetune_arguments(finetuned, finetuned, "whole", *change, **DROPOUT)
    result = run([str(BIN / "python"), str(ROOT / "pipeline/finetune.py"), *arguments])
    assert result.returncode == 2 and "fingerprint: '" in result.stdout, result.stdout
    assert "in the checkpoint, 63 now" in result.stdout
