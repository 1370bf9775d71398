"""The loop itself, on one process and around a plain stand-in for the engine."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from models.amplitudes import spiking_stack
from models.config import NeuronConfig
from models.modeling import SpikeLMForMaskedLM
from pipeline.checkpoint import TrainState
from pipeline.ending import NonFiniteError
from pipeline.loader import heldout_batches
from pipeline.metrics import SpikeHealth
from pipeline.objectives import IGNORED, count_targets
from pipeline.stopping import StopRequest
from pipeline.trainer import Trainer
from tests.distributed import reference
from tests.tiny import OneProcess


class PlainEngine(torch.nn.Module):
    """What the trainer needs of an engine, in plain torch; averages over micro-batches as DeepSpeed does."""

    def __init__(self, module, accumulation):
        super().__init__()
        self.module, self.accumulation = module, accumulation
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        self.micro_steps = self.steps = 0
        self.gradient_norm, self.applied = 1.0, True
        self.rows_at_once = None

    def forward(self, **inputs):
        return self.module(**inputs)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def step(self):
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def set_train_micro_batch_size(self, rows):
        self.rows_at_once = rows

    def set_train_batch_size(self, rows):
        self.accumulation = rows // self.rows_at_once

    def get_lr(self):
        return [0.1]

    def get_global_grad_norm(self):
        return self.gradient_norm

    def was_step_applied(self):
        return self.applied


class Corpus:
    """The reference's samples, and its first rows as held-out ones."""

    objective = reference.OBJECTIVE
    is_phased = False

    def train_batches(self, samples_consumed, num_steps):
        return islice(reference.batches(is_phased=self.is_phased), num_steps)

    def heldout_batches(self):
        return heldout_batches(reference.Rows(), reference.loader().make_batch, batch_size=24)


class Recorder:
    """Stands in for metrics and checkpoints alike: remembers what it was called with."""

    def __init__(self):
        self.train, self.heldout, self.health, self.saved, self.nonfinite = [], [], [], [], []

    def log_step(self, step, values):
        self.train.append((step, values))

    def log_evaluation(self, step, values):
        self.heldout.append((step, values))

    def log_health(self, step, warnings):
        self.health.append((step, warnings))

    def write_nonfinite(self, record):
        self.nonfinite.append(record)
        return "nonfinite.json"

    def save(self, engine, state):
        self.saved.append(state)


def make_trainer(kind="none", accumulation=1, module=None, first_accumulation=None, **training):
    config = reference.config(accumulation=accumulation, world_size=1, first_accumulation=first_accumulation)
    config = replace(config, training=replace(config.training, **training))
    module = reference.model(kind) if module is None else module
    recorder = Recorder()
    state = TrainState(0, 0, world_size=1, zero_stage=2, data={})
    engine = PlainEngine(module, accumulation)
    return Trainer(engine, config, OneProcess(), Corpus(), recorder, recorder, state, StopRequest()), recorder


def _weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.engine.parameters()]


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_changes_neither_loss_nor_update(accumulation):
    whole, _ = make_trainer()
    split, _ = make_trainer(accumulation=accumulation)
    batch = next(reference.loader().batches(1))
    losses = [trainer.train_step(batch).losses for trainer in (whole, split)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(_weights(whole), _weights(split), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("first", "last"), [(8, 1), (1, 4), (4, 8)])
def test_phases_change_the_batches_and_their_accumulation_changes_nothing(first, last):
    whole, split = (make_trainer(accumulation=b, first_accumulation=a) for a, b in ((1, 1), (first, last)))
    for trainer, _ in (whole, split):
        trainer.corpus.is_phased = True
        trainer.config = replace(trainer.config, logging=replace(trainer.config.logging, every=1))
        final = trainer.run()
        first_samples = reference.FIRST_STEPS * reference.FIRST_BATCH
        rest = (reference.STEPS - reference.FIRST_STEPS) * reference.GLOBAL_BATCH
        assert final.samples_consumed == first_samples + rest
        assert trainer.engine.steps == final.step == reference.STEPS
    (ours, our_records), (theirs, their_records) = split, whole
    losses = [[values["loss"] for _, values in records.train] for records in (our_records, their_records)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(_weights(ours), _weights(theirs), rtol=1e-4, atol=1e-6)


def test_a_step_without_targets_of_a_kind_still_trains():
    trainer, _ = make_trainer(accumulation=2)
    batch = next(reference.loader().batches(1))
    batch.tensors["labels"][4:] = IGNORED  # the second micro-batch predicts no token
    before = _weights(trainer)
    assert torch.isfinite(trainer.train_step(batch).losses).all()
    assert trainer.engine.steps == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))


def test_a_nonfinite_loss_stops_before_the_update_and_its_samples_are_written_down():
    trainer, recorder = make_trainer(accumulation=2)
    with torch.no_grad():
        trainer.engine.module.next_sentence_head.bias.fill_(math.nan)
    before = _weights(trainer)
    batch = next(reference.loader().batches(1))
    batch.tensors["next_sentence_label"][: len(batch.sample_ids) // 2] = IGNORED  # the first micro-batch knows no pairs
    with pytest.raises(NonFiniteError, match=r"step 1 .*next_sentence nan.*stand in nonfinite.json"):
        trainer.train_step(batch)
    (record,) = recorder.nonfinite
    samples = batch.sample_ids.tolist()
    assert (record["step"], record["what"], record["sample_length"]) == (1, "loss", reference.ROW_LENGTH)
    assert record["ranks"] == [{"samples": samples, "suspects": samples[len(samples) // 2 :]}]
    assert trainer.engine.steps == 0
    for old, new in zip(before, _weights(trainer), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


@pytest.mark.parametrize(("norm", "applied"), [(math.nan, True), (math.inf, True), (1.0, False)])
def test_a_nonfinite_gradient_stops_before_the_amplitudes_move_or_anything_is_saved(norm, applied):
    trainer, recorder = make_trainer("elastic")
    amplitudes = spiking_stack(trainer.engine.module).amplitudes.clone()
    trainer.engine.gradient_norm, trainer.engine.applied = norm, applied
    with pytest.raises(NonFiniteError, match="gradient of step 1 is not finite"):
        trainer.run()
    assert torch.equal(spiking_stack(trainer.engine.module).amplitudes, amplitudes)
    assert not recorder.saved and not recorder.train


def test_masked_tokens_alone_train_and_are_evaluated():
    trainer, recorder = make_trainer(total_steps=2, module=SpikeLMForMaskedLM(reference.model("none").config))
    trainer.losses = ("masked_lm",)
    batches = trainer.corpus.train_batches

    def without_pairs(*arguments):
        for batch in batches(*arguments):
            del batch.tensors["next_sentence_label"]
            yield batch

    trainer.corpus.train_batches = without_pairs
    trainer.corpus.heldout_batches = lambda: without_pairs(0, 3)
    trainer.run()
    assert "next_sentence_loss" not in recorder.train[-1][1] and "next_sentence_loss" not in recorder.heldout[-1][1]


def test_evaluation_equals_one_pass_over_all_rows_by_hand():
    trainer, _ = make_trainer()
    values = trainer.evaluate()
    rows = len(reference.Rows())
    batch = next(heldout_batches(reference.Rows(), reference.loader().make_batch, batch_size=rows)).tensors
    with torch.no_grad():
        output = trainer.engine.module.eval()(**batch)
    masked, pairs = count_targets(batch, reference.OBJECTIVE.losses).tolist()
    targets = batch["labels"][batch["labels"] != IGNORED]
    share = torch.bincount(targets).double() / masked
    assert values["masked_lm_loss"] == pytest.approx(float(output.masked_lm_loss_sum) / masked, rel=1e-5)
    assert values["masked_lm_accuracy"] == pytest.approx(float((output.logits.argmax(-1) == targets).double().mean()))
    assert values["next_sentence_loss"] == pytest.approx(float(output.next_sentence_loss_sum) / pairs, rel=1e-5)
    assert values["unigram_entropy"] == pytest.approx(float(-(share * share.log()).nansum()), rel=1e-6)
    assert "firing_rate" not in values  # ordinary layers have no neurons


def test_run_logs_evaluates_and_saves_when_due():
    trainer, recorder = make_trainer("elastic", total_steps=5)
    trainer.config = replace(
        trainer.config,
        evaluation=replace(trainer.config.evaluation, every=2),
        checkpoint=replace(trainer.config.checkpoint, every=3),
        logging=replace(trainer.config.logging, every=2),
    )
    final = trainer.run()
    assert [step for step, _ in recorder.train] == [2, 4, 5]
    assert [step for step, _ in recorder.heldout] == [0, 2, 4, 5]
    assert [state.step for state in recorder.saved] == [3, 5]
    assert (final.step, final.samples_consumed) == (5, 5 * reference.GLOBAL_BATCH)
    values = recorder.train[-1][1]
    assert values["loss"] == pytest.approx(values["masked_lm_loss"] + values["next_sentence_loss"])
    assert 0 < values["firing_rate"] < 1
    assert list(values["firing_rate_by_site"]) == spiking_stack(trainer.engine.module).site_names


@pytest.mark.parametrize("count_padding", [False, True])
def test_the_penalty_is_on_the_mean_rate_whatever_tokens_count(count_padding):
    model, minimised = reference.model("elastic"), []
    model.config.neuron = replace(model.config.neuron, count_padding=count_padding)
    trainer, _ = make_trainer(module=model, firing_penalty=0.5)
    batch = next(reference.loader().batches(1))
    batch.tensors["attention_mask"][:, 3:] = 0
    backward = trainer.engine.backward
    trainer.engine.backward = lambda loss: minimised.append(loss.item()) or backward(loss)
    result = trainer.train_step(batch)
    rate = float(result.stats.firing_rate.mean())
    assert sum(minimised) == pytest.approx(float(result.losses.sum()) + 0.5 * rate, rel=1e-5) and rate > 0.1


def test_sites_that_hardly_work_are_told_at_logged_steps():
    trainer, recorder = make_trainer("elastic", total_steps=3)
    trainer.config = replace(trainer.config, logging=replace(trainer.config.logging, every=1))
    trainer.health = SpikeHealth(trainer.stack.site_names, NeuronConfig(amplitude="frozen"))
    trainer.stack.amplitudes[-1] *= 1000
    trainer.run()
    lines = [(step, line) for step, told in recorder.health for line in told]
    name = trainer.stack.site_names[-1]
    ((step, drift),) = [(step, line) for step, line in lines if line.startswith(f"{name}, timestep 1, ")]
    assert step == 1 and "times the amplitude" in drift


def test_a_fresh_model_is_calibrated_and_a_calibrated_one_is_not():
    fresh = reference.model("elastic")
    spiking_stack(fresh).reset_amplitudes()
    make_trainer(module=fresh, total_steps=1)[0].run()
    assert spiking_stack(fresh).calibrated

    kept = reference.model("elastic")
    spiking_stack(kept).amplitudes.fill_(0.5)
    trainer, _ = make_trainer(module=kept)
    trainer._start()
    assert (spiking_stack(kept).amplitudes == 0.5).all()


def test_a_request_to_stop_is_followed_after_the_step_with_a_checkpoint():
    trainer, recorder = make_trainer(total_steps=9)
    trainer.config = replace(trainer.config, logging=replace(trainer.config.logging, every=1))
    recorder.log_step = lambda step, values: setattr(trainer.stop, "reason", "SIGTERM" if step == 2 else None)
    assert trainer.run().step == 2
    assert [state.step for state in recorder.saved] == [2]
    assert trainer.stopped_by == "SIGTERM"


def test_a_request_to_stop_before_the_first_step_leaves_everything_as_it_is():
    trainer, recorder = make_trainer(total_steps=9)
    trainer.stop.reason = "SIGTERM"
    assert trainer.run().step == 0
    assert not recorder.saved and not recorder.heldout


def test_a_request_in_the_last_step_comes_too_late_to_stop_it():
    trainer, recorder = make_trainer(total_steps=2)
    recorder.log_step = lambda step, values: setattr(trainer.stop, "reason", "SIGTERM" if step == 2 else None)
    assert trainer.run().step == 2
    assert trainer.stopped_by is None and recorder.heldout[-1][0] == 2


def test_stop_after_step_ends_early_with_a_checkpoint():
    trainer, recorder = make_trainer(total_steps=9, stop_after_step=4)
    assert trainer.run().step == 4
    assert [state.step for state in recorder.saved] == [4]
