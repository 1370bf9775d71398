"""The parts of fine-tuning: its settings, what it starts from, its rows, its losses, the search for the best."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.recipes import ConfigError
from models.amplitudes import spiking_stack
from models.auto import save_with_code
from models.config import NeuronConfig, SpikeLMConfig
from models.modeling import AUTO_CLASSES, SpikeLMForCausalLM, SpikeLMForMaskedLM, SpikeLMForSequenceClassification
from pipeline.checkpoint import Search
from pipeline.config import differences
from pipeline.ending import NonFiniteError
from pipeline.finetune import _prepare
from pipeline.finetune_config import StartSettings, load_finetune_config, task_run
from pipeline.loader import identity_differences
from pipeline.objectives import IGNORED, count_targets, loss_sums, without_targets
from pipeline.task_corpus import EncodedRows, TaskCorpus, TaskObjective
from pipeline.task_model import build_task_model, open_start, refuse_penalty
from pipeline.task_results import describe_results, summarize
from pipeline.task_trainer import predict
from pipeline.tasks import Examples, TaskData, own_task
from tests.tiny import CONFIG, OneProcess, make_model
from tests.toy_task import finetune_arguments, make_tokenizer, write_task

CLASSES = own_task(("bad", "good"), pairs=False)
NUMBERS = own_task((), pairs=False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_task(folder)
    return folder


@pytest.fixture
def recipe(toy):
    """recipe(*arguments): the settings of the toy fine-tuning with overrides."""
    return lambda *arguments: load_finetune_config(finetune_arguments(toy, toy / "runs", "toy", *arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An exported folder of a calibrated encoder without a pooler."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_model(model_class=SpikeLMForMaskedLM, initializer_range=0.1)
    stack = spiking_stack(model)
    stack.amplitudes.copy_(torch.rand(stack.amplitudes.shape) + 0.5)
    stack.calibrated.fill_(True)
    save_with_code(model, AUTO_CLASSES, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_all_faults_of_a_recipe_are_told_at_once(toy, recipe):
    wrong = {
        "--seeds": "3",
        "--model.start": str(toy / "none"),
        "--model.neuron": "{timesteps: 2}",
        "--task.label": "text",
        "--training.epochs": "null",
        "--training.micro_batch_size": "5",
        "--engine.ds_config": "none.json",
    }
    with pytest.raises(ConfigError) as caught:
        recipe("--seeds", "3", *(word for pair in wrong.items() for word in pair))
    for start in (
        "seeds: 3 stands there twice",
        "model.start: '",
        "model.neuron.timesteps: unknown field: known are",
        "task.text, task.text_pair, task.label: 'text' stands twice",
        "training.epochs: missing",
        "training.global_batch_size: 16 is not divisible",
        "engine.ds_config: 'none.json' cannot be read",
    ):
        assert any(fault.startswith(start) for fault in caught.value.faults), (start, caught.value.faults)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--model.preset", "null"], "model.start: neither is set"),
        (["--model.tokenizer", "none"], "model.tokenizer: 'none' is no folder"),
        (["--model.from_scratch"], "model.from_scratch: has no effect on encoder-tiny"),
        (["--model.preset", "bert"], "model.preset: 'bert' is unknown"),
    ],
)
def test_a_start_that_cannot_be_is_a_fault(recipe, arguments, fault):
    with pytest.raises(ConfigError) as caught:
        recipe(*arguments)
    assert any(line.startswith(fault) for line in caught.value.faults), caught.value.faults


def test_steps_follow_from_rows_and_epochs(recipe):
    run = task_run(recipe("--training.epochs", "2.5", "--selection.per_epoch", "2"), 7, 100, 16)
    assert (run.training.total_steps, run.evaluation.every, run.schedule.warmup_steps) == (16, 3, 2)
    assert (run.seed, run.name, run.data.sample_length) == (7, "seed-7", 16)
    sizes = {"global_batch_size": 16, "micro_batch_size": 4, "stop_after_step": 9}
    stopped = task_run(recipe("--training.stop_after_step", "9"), 7, 100, 16).training
    assert sizes.items() <= vars(stopped).items() and stopped.firing_penalty == 0
    assert task_run(recipe("--training.firing_penalty", "0.5"), 7, 100, 16).training.firing_penalty == 0.5
    other = task_run(recipe("--selection.early_stopping", "1", "--task.test", "null"), 7, 100, 16)
    assert differences(task_run(recipe(), 7, 100, 16), other) == ["selection.early_stopping: 0 in the run, 1 now"]
    glue = recipe()
    glue = replace(glue, task=replace(glue.task, name="mrpc"), training=replace(glue.training, epochs=None))
    assert task_run(glue, 0, 160, 16).training.total_steps == 200  # 20 epochs are published


def test_a_trained_body_is_copied_and_the_head_drawn_anew(recipe, trained):
    start = open_start(StartSettings(start=str(trained)))
    models = [build_task_model(start, CLASSES, task_run(recipe(), seed, 64, 12), OneProcess()) for seed in (0, 1)]
    (model, remarks), (other, _) = models
    assert remarks == [f"model.pooler.{name} starts from random weights" for name in ("bias", "weight")]
    own, theirs = model.state_dict(), start.model.state_dict()
    body = [name for name in own if name.startswith(("model.embeddings.", "model.stack."))]
    assert len(body) > 20 and all(torch.equal(own[name], theirs[name]) for name in body)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert model.config.id2label == {0: "bad", 1: "good"} and not any(p.is_meta for p in model.parameters())
    scratch = open_start(StartSettings(start=str(trained), from_scratch=True))
    fresh, _ = build_task_model(scratch, CLASSES, task_run(recipe(), 0, 64, 12), OneProcess())
    weight = "model.embeddings.word_embeddings.weight"
    assert not torch.equal(fresh.state_dict()[weight], theirs[weight]) and not spiking_stack(fresh).calibrated
    assert fresh.config.to_dict() == model.config.to_dict()


def test_fewer_timesteps_keep_the_first_amplitudes_and_other_neurons_none(recipe, trained):
    whole = spiking_stack(open_start(StartSettings(start=str(trained))).model).amplitudes
    run = task_run(recipe(), 0, 64, 12)
    fewer = open_start(StartSettings(start=str(trained), neuron={"num_timesteps": 2}))
    stack = spiking_stack(build_task_model(fewer, CLASSES, run, OneProcess())[0])
    assert stack.calibrated and torch.equal(stack.amplitudes, whole[:, :2])
    other = open_start(StartSettings(start=str(trained), neuron={"frequency": 1.5}))
    model, remarks = build_task_model(other, CLASSES, run, OneProcess())
    assert not spiking_stack(model).calibrated and model.config.neuron.frequency == 1.5
    assert remarks[-1].startswith("other neurons than the trained model's")
    dropout = open_start(StartSettings(start=str(trained), overrides={"hidden_dropout_prob": 0.3}))
    assert dropout.config.hidden_dropout_prob == 0.3
    named = open_start(StartSettings(start=str(trained), neuron={"preset": "released", "frequency": 1.5}))
    assert named.config.neuron == NeuronConfig(preset="released", frequency=1.5)
    with pytest.raises(ValueError, match="model.neuron.preset is 'publishd': use decoder or released"):
        open_start(StartSettings(start=str(trained), neuron={"preset": "publishd"}))
    with pytest.raises(ValueError, match="model.neuron.num_timesteps is 0"):
        open_start(StartSettings(start=str(trained), neuron={"num_timesteps": 0}))
    with pytest.raises(ValueError, match="model.neuron.frequency: 1.5 has no effect with model.neuron.kind lif"):
        open_start(StartSettings(start=str(trained), neuron={"kind": "lif", "frequency": 1.5}))


def test_a_penalty_on_what_has_no_gradient_is_refused(trained):
    start = open_start(StartSettings(start=str(trained), neuron={"kind": "lif"}))
    refuse_penalty(start, 0.0)
    with pytest.raises(ValueError, match="firing_penalty: 0.1 has no effect with model.neuron.kind lif"):
        refuse_penalty(start, 0.1)


def test_weights_that_are_started_from_are_known_by_their_contents(trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    start, again = (open_start(StartSettings(start=str(folder))) for folder in (trained, moved))
    assert start.fingerprint == again.fingerprint
    weights = load_file(moved / "model.safetensors")
    weights["mlm_head.norm.bias"][3] += 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert open_start(StartSettings(start=str(moved))).fingerprint != start.fingerprint
    assert open_start(StartSettings(start=str(moved), from_scratch=True)).fingerprint is None
    corpora = [replace(make_corpus([0, 1] * 4), start=name) for name in ("a", "b")]
    (difference,) = identity_differences(*(corpus.identity() for corpus in corpora))
    assert difference == "start_fingerprint: 'a' in the checkpoint, 'b' now"


def test_what_cannot_be_started_from_is_told(recipe, trained, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(ValueError, match=r"model.start: .*bare.* holds no tokenizer"):
        open_start(StartSettings(start=str(tmp_path / "bare")))
    with pytest.raises(ValueError, match=r"model.start: .* does not exist"):
        open_start(StartSettings(start=str(tmp_path / "none")))
    shape = {name: value for name, value in CONFIG.items() if "dropout" not in name}
    decoder = SpikeLMForCausalLM(SpikeLMConfig(family="llama", **shape))
    spiking_stack(decoder).calibrated.fill_(True)
    save_with_code(decoder, AUTO_CLASSES, tmp_path / "decoder")
    make_tokenizer().save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"decoder, family 'llama': .*start from an encoder"):
        open_start(StartSettings(start=str(tmp_path / "decoder")))
    with pytest.raises(ValueError, match="model.shards has no effect with model.start .* leave it out"):
        open_start(StartSettings(start=str(trained), shards=("data/demo",)))
    with pytest.raises(ValueError, match="training.length 20: the model has 16 positions; set it to 16 or less"):
        _prepare(recipe("--training.length", "20"), OneProcess2())


class OneProcess2(OneProcess):
    """Its on_main takes what World's takes."""

    def on_main(self, action, may_take_long=False):
        return action()


def test_long_texts_are_cut_off_and_counted(recipe, capsys):
    material = _prepare(recipe("--training.length", "6"), OneProcess2())
    lengths = [len(text.split()) for text in material.data.splits["validation"].texts]
    assert material.truncated["validation"] == sum(length > 4 for length in lengths) > 0
    assert f"validation: {material.truncated['validation']} of 32" in capsys.readouterr().out
    assert material.rows["train"].row_length == 6


def make_corpus(labels, task=CLASSES, batch=4):
    """A corpus of as many rows as labels, whose first token tells the row."""
    count = len(labels)
    length = 2 + np.arange(count) % 9
    arrays = {
        "input_ids": np.where(np.arange(10) < length[:, None], 1 + np.arange(count)[:, None], 0),
        "attention_mask": (np.arange(10) < length[:, None]).astype(np.int32),
        "token_type_ids": np.zeros((count, 10), np.int32),
    }
    rows = {split: EncodedRows(arrays, np.array(labels), "f") for split in ("train", "validation")}
    examples = Examples(["a"] * count, None, np.array(labels), list(range(count)))
    data = TaskData(task, {"train": examples, "validation": examples}, "f")

    class Sizes:
        seed = 3
        training = evaluation = type("Batches", (), {"global_batch_size": batch, "micro_batch_size": batch})

    return TaskCorpus(Sizes, OneProcess(), data, "t", None, rows, TaskObjective.of(task))


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    corpus = make_corpus([0, 1] * 7)
    batches = list(corpus.train_batches(0, 7))
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert sorted(ids[:14].tolist()) == sorted(ids[14:].tolist()) == list(range(14))
    assert ids[:14].tolist() != ids[14:].tolist()
    (later,) = corpus.train_batches(12, 1)
    assert torch.equal(later.sample_ids, ids[12:16])  # an epoch's last batch goes on into the next
    for batch in batches:
        tensors = batch.tensors
        assert torch.equal(tensors["labels"], batch.sample_ids % 2)
        assert torch.equal(tensors["input_ids"][:, 0], batch.sample_ids + 1)
        assert tensors["input_ids"].shape[1] == (8 if tensors["attention_mask"].sum(1).max() <= 8 else 16 - 6)


@pytest.mark.parametrize(("task", "labels"), [(CLASSES, [0, 1, 1, 0, 1]), (NUMBERS, [0.5, -100.0, 2.0, 3.0, 1.0])])
def test_a_loss_sum_is_that_of_the_counted_rows(task, labels):
    corpus = make_corpus(labels, task)
    (loss,) = corpus.objective.losses
    batch = next(corpus.heldout_batches()).tensors
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    kind = {"num_labels": max(len(task.classes), 1)}
    model = make_model({"kind": "none"}, SpikeLMForSequenceClassification, **kind).eval()
    summed = model(**batch)
    assert loss_sums(summed, (loss,)).item() == pytest.approx(summed.loss.item() * len(batch["labels"]), rel=1e-5)
    first = {name: tensor[:1] for name, tensor in batch.items()}
    alone = loss_sums(model(**first), (loss,)).item()
    batch["labels"][1:] = IGNORED if task.classes else float("nan")
    ignored = model(**batch)
    assert count_targets(batch, (loss,)).tolist() == [1]
    assert loss_sums(ignored, (loss,)).item() == pytest.approx(alone, rel=1e-5)
    loss_sums(ignored, (loss,)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert count_targets(without_targets(first), (loss,)).tolist() == [0]


def test_predictions_come_in_the_order_of_rows_each_once():
    corpus = make_corpus([0, 1, 1, 0, 1, 0, 1])
    model = make_model({"kind": "none"}, SpikeLMForSequenceClassification, num_labels=2)
    batches = list(corpus.heldout_batches())
    found = predict(model, reversed(batches), corpus.objective.losses, OneProcess())
    with torch.no_grad():
        outputs = [model.eval()(**batch.tensors) for batch in batches]
    torch.testing.assert_close(torch.tensor(found.scores), torch.cat([output.logits for output in outputs]))
    total = sum(float(output.classification_loss_sum) for output in outputs)
    assert found.loss == pytest.approx(total / 7, rel=1e-6)
    absent = batches[0]._replace(sample_ids=torch.full((4,), -1), tensors=without_targets(batches[0].tensors))
    more = predict(model, [*batches, absent], corpus.objective.losses, OneProcess())
    np.testing.assert_array_equal(more.scores, found.scores)
    assert more.loss == pytest.approx(found.loss) and found.of(CLASSES).shape == (7,)


def test_predictions_that_are_none_are_refused():
    """The largest of NaN logits would be class 0."""
    corpus = make_corpus([0, 1, 1, 0, 1, 0, 1])
    model = make_model({"kind": "none"}, SpikeLMForSequenceClassification, num_labels=2)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="the predictions for 7 of 7 rows are NaN or infinite: train anew"):
        predict(model, corpus.heldout_batches(), corpus.objective.losses, OneProcess())


def test_processes_that_read_different_weights_do_not_begin(recipe, trained):
    class OtherFirst(OneProcess2):
        def on_main(self, action, may_take_long=False):
            return "other weights"

    with pytest.raises(ValueError, match="the processes read different weights: wait until its training has ended"):
        _prepare(recipe(), OtherFirst())


def test_the_search_counts_measures_without_a_better_one():
    search = Search(4, 4, 0.5)
    search = search.after(8, 0.5)
    assert search == Search(8, 4, 0.5, misses=1)
    assert search.after(12, 0.4).misses == 2
    assert search.after(12, 0.6) == Search(12, 12, 0.6)


def test_one_seed_has_no_spread_and_a_regression_no_classes(tmp_path):
    (tmp_path / "seed-5").mkdir()
    result = {"task": "own", "chosen_by": "pearson", "num_timesteps": 2, "rows": {}, "truncated": {}, "best_step": 3}
    result |= {"metrics": {"validation": {"pearson": 0.25}}, "baseline": {"validation": {"pearson": 0.0}}}
    (tmp_path / "seed-5/result.json").write_text(json.dumps(result))
    summary = summarize(tmp_path, [5])
    assert summary == json.loads((tmp_path / "results.json").read_text())
    assert summary["metrics"]["validation"]["pearson"] == {"mean": 0.25, "spread": None, "values": [0.25]}
    assert "validation pearson" in describe_results(summary) and "firing" not in describe_results(summary)
