"""One small training, written down once: what the engines must reproduce, and plain torch to compare them with."""

import numpy as np
import torch

from models.amplitudes import SpikeStats, calibrate_amplitudes, spiking_stack, update_amplitudes
from models.config import NeuronConfig, SpikeLMConfig
from models.modeling import SpikeLMForPreTraining
from pipeline.config import (
    CheckpointSettings,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    LoggingSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PhaseSettings,
    RunConfig,
    ScheduleSettings,
    TrainingSettings,
)
from pipeline.loader import ElasticLoader
from pipeline.objectives import MaskedTokens, SpecialTokens, count_targets, loss_sums
from pipeline.order import OrderState

STEPS = 10
GLOBAL_BATCH = 8
VOCABULARY = 61
ROW_LENGTH = 12
TOKENS = SpecialTokens(mask=4, special=(0, 1, 2, 3, 4), vocab_size=VOCABULARY)
OBJECTIVE = MaskedTokens(seed=0, settings=ObjectiveSettings(), tokens=TOKENS)
RATE = 2e-3
FIRST_STEPS = 3
FIRST_BATCH = 16
"""A phase that comes first in some trainings: its steps, and the samples of one."""


class Rows:
    """A reader of made-up sentence pairs of very different lengths, so that targets differ by rank and micro-batch."""

    fingerprint = "made up"
    samples_ahead = 0

    def __len__(self):
        return 64

    def read(self, sample_ids):
        rows = [self._row(int(number)) for number in sample_ids]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number):
        random = np.random.default_rng(number)
        length = int(random.integers(5, ROW_LENGTH + 1))
        ids = random.integers(5, VOCABULARY, ROW_LENGTH)
        ids[0], ids[3], ids[length - 1], ids[length:] = 2, 3, 3, 0
        values = {"ids": ids, "length": length, "first_length": 4, "next_sentence_label": number % 2}
        return {name: np.asarray(value) for name, value in values.items()}


def config(
    *,
    stage=2,
    accumulation=1,
    precision="fp32",
    checkpointing="none",
    world_size=2,
    clip_norm=0.0,
    firing_penalty=0.0,
    ds_config="ds_configs/zero{}.json",
    first_accumulation=None,
):
    """A recipe; with `first_accumulation` there is a phase before that of `accumulation`."""
    phases = ()
    if first_accumulation is not None:
        at_once = FIRST_BATCH // (world_size * first_accumulation)
        phases = (PhaseSettings(FIRST_STEPS, ROW_LENGTH, FIRST_BATCH, at_once),)
    return RunConfig(
        name="equivalence",
        data=DataSettings(shards="made up", phases=phases),
        objective=ObjectiveSettings(),
        optimizer=OptimizerSettings(learning_rate=RATE, weight_decay=0.01, clip_norm=clip_norm),
        schedule=ScheduleSettings(warmup_steps=2),
        engine=EngineSettings(ds_config=ds_config.format(stage), precision=precision, checkpointing=checkpointing),
        training=TrainingSettings(
            total_steps=STEPS,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=GLOBAL_BATCH // (world_size * accumulation),
            firing_penalty=firing_penalty,
        ),
        evaluation=EvaluationSettings(every=0, micro_batch_size=4),
        checkpoint=CheckpointSettings(every=STEPS),
        logging=LoggingSettings(tensorboard=False, progress=False),
    )


def loader(rank=0, world_size=1, global_batch=GLOBAL_BATCH):
    order = OrderState(seed=0, num_samples=len(Rows()))
    return ElasticLoader(
        Rows(), OBJECTIVE.make_batch, order=order, global_batch_size=global_batch, rank=rank, world_size=world_size
    )


def batches(rank=0, world_size=1, is_phased=False):
    """This rank's batches of all steps."""
    first = FIRST_STEPS if is_phased else 0
    yield from loader(rank, world_size, FIRST_BATCH).batches(first)
    yield from loader(rank, world_size).batches(STEPS - first)


def model_config(kind):
    return SpikeLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=ROW_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        neuron=NeuronConfig(kind=kind, frequency=1.4),
    )


def model(kind):
    """The same weights in every process; elastic amplitudes calibrated on the first global batch."""
    # With these weights no spike lies near its threshold: perturbations up to 1e-6 flip none in STEPS steps.
    torch.manual_seed(17)
    built = SpikeLMForPreTraining(model_config(kind))
    if kind == "elastic":
        calibrate_amplitudes(built, next(loader().batches(1)).tensors)
    return built


def train_plainly(kind, perturbation=0.0, seed=0, clip_norm=0.0, firing_penalty=0.0, is_phased=False):
    """STEPS steps on one process without an engine: losses [STEPS] (sum of both means), first gradients, amplitudes.

    `perturbation` changes every weight by that relative amount, up or down at random. `clip_norm` 0: no clipping;
    the first gradients are those before it.
    """
    trained = model(kind)
    spiking_stack(trained).train_firing_rate(firing_penalty > 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + perturbation * sign)
    optimizer = torch.optim.AdamW(_groups(trained), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / 3 if step < 2 else 1 - (step - 2) / (STEPS - 2)
    )
    losses, first_gradients = [], {}
    for batch in batches(is_phased=is_phased):
        output = trained(**batch.tensors)
        counts = count_targets(batch.tensors, OBJECTIVE.losses)
        loss = (loss_sums(output, OBJECTIVE.losses) / counts).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        if firing_penalty:
            loss = loss + firing_penalty * output.firing_sum / batch.tensors["attention_mask"].sum()
        loss.backward()
        if not first_gradients:
            first_gradients = {name: p.grad.clone() for name, p in trained.named_parameters()}
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(trained.parameters(), clip_norm)
        optimizer.step()
        schedule.step()
        update_amplitudes(trained, SpikeStats(output.spike_stats))
    return np.array(losses), first_gradients, spiking_stack(trained).amplitudes.clone()


def _groups(trained):
    decayed = [p for name, p in trained.named_parameters() if p.dim() > 1]
    others = [p for name, p in trained.named_parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
