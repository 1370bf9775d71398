"""All settings of a fine-tuning, as frozen dataclasses: of the command, and of each of its runs, one for every seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.recipes import FolderName, Rule, Share, load_settings, strict
from models.config import PRESETS, NeuronConfig
from pipeline.config import (
    CheckpointSettings,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    LoggingSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainingSettings,
)
from pipeline.rules import RULES
from pipeline.tasks import PUBLISHED_EPOCHS, TASK_RULE, TaskSettings

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
"""Fields of SpikeLMConfig that may differ from those of the model that is started from."""

LONGEST = 128
"""Tokens of a row where the recipe does not say: as GLUE's results are published, if the model takes as many."""


@dataclass(frozen=True)
class StartSettings:
    """The model that is fine-tuned, and where its weights come from."""

    start: FolderName | None = None
    """A trained model: an exported folder, a run, or one of its checkpoints; null: see preset."""

    shards: tuple[FolderName, ...] = ()
    """Where the shards of that run lie now, if not where its recipe says: its tokenizer is there."""

    from_scratch: bool = False
    """Draw all weights anew: the same model without its pretraining, to compare with."""

    preset: str | None = None
    """Instead of start, a name in models.config.PRESETS: a model of random weights."""

    tokenizer: FolderName | None = None
    """Of a preset: folder of the tokenizer."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of SpikeLMConfig that differ from the preset's; from a trained model's, those of dropout."""

    neuron: dict[str, Any] = field(default_factory=dict)
    """Fields of the neurons that differ, such as num_timesteps: fewer keep the amplitudes of the first timesteps, all
    other changes have amplitudes measured anew."""


@dataclass(frozen=True)
class WarmupSettings:
    """The learning rate over the steps."""

    warmup_share: Share = 0.1
    """Share of the steps in which the rate rises linearly to its peak."""

    kind: Literal["linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up, to the last step."""

    final_ratio: Share = 0.0
    """Rate after the decay, as a share of the peak; 1: it stays."""


@dataclass(frozen=True)
class EpochSettings:
    """Length of the training and sizes of its batches, in rows."""

    epochs: PositiveFloat | None = None
    """Passes over the training rows; null: as published for the task of GLUE."""

    length: PositiveInt | None = None
    """Tokens of a row at most; longer texts are cut off, and counted. null: as many as the model takes, up to 128."""

    global_batch_size: PositiveInt = 32
    """Rows of one optimizer step, over all processes."""

    micro_batch_size: PositiveInt = 32
    """Rows of one forward in one process; the rest of its share is accumulated."""

    firing_penalty: NonNegativeFloat = 0.0
    """What a firing rate of 1 would add to the loss that is minimised, in proportion to the mean rate of all sites of
    elastic neurons: the larger, the fewer spikes; 0: none."""

    stop_after_step: PositiveInt | None = None
    """Stop every seed early, with a checkpoint, after this step, to be resumed later; null: do not."""


@dataclass(frozen=True)
class SelectionSettings:
    """How the best checkpoint is found, by the task's first metric on the validation rows."""

    per_epoch: PositiveInt = 1
    """Evaluations in an epoch; one more follows the last step."""

    early_stopping: NonNegativeInt = 0
    """End after so many evaluations without a better one; 0: go on to the last step."""

    micro_batch_size: PositiveInt = 64
    """Rows of one forward in one process."""


@strict
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a SpikeLM encoder on a task, once for every seed. Run the same command again to resume."""

    name: str
    """Name of the fine-tuning."""

    output: FolderName = "runs"
    """Folder of runs; each seed of this one lives in <output>/<name>/seed-<seed>, what they come to in results.json."""

    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Each decides the weights of the head, dropout and order of rows of a run of its own; they run one by one."""

    threads: PositiveInt | None = None
    """Torch threads of each process; null: what OMP_NUM_THREADS says, else its share of the cores."""

    model: StartSettings
    task: TaskSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: WarmupSettings = WarmupSettings()
    engine: EngineSettings = EngineSettings()
    training: EpochSettings = EpochSettings()
    selection: SelectionSettings = SelectionSettings()
    checkpoint: CheckpointSettings
    logging: LoggingSettings = LoggingSettings()

    @property
    def folder(self) -> Path:
        """Where its seeds and their results lie."""
        return Path(self.output) / self.name


@strict
@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One seed of a fine-tuning: what its checkpoints keep, in the sections that a pretraining has too."""

    name: str
    """seed-<seed>."""

    output: FolderName
    """The folder of the fine-tuning."""

    seed: NonNegativeInt
    """Decides the weights of the head, dropout and order of rows."""

    resume: Literal["auto"] = "auto"
    """A seed goes on from its own newest checkpoint, where it has one."""

    threads: PositiveInt | None = None
    """Torch threads of each process."""

    model: StartSettings
    task: TaskSettings
    data: DataSettings
    """No shards: the rows are the task's, of sample_length tokens at most."""

    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    engine: EngineSettings
    training: TrainingSettings
    selection: SelectionSettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings


def load_finetune_config(argv: Sequence[str]) -> FinetuneConfig:
    """The fine-tuning that `argv` (--recipe FILE and overrides) describes; prints the fields for --help.

    Raises ConfigError with all faults together.
    """
    return load_settings(FinetuneConfig, argv, "deepspeed pipeline/finetune.py", FINETUNE_RULES)


def task_run(config: FinetuneConfig, seed: int, num_rows: int, length: int) -> TaskRun:
    """The run of a seed on so many training rows, of so many tokens at most."""
    training, selection = config.training, config.selection
    epochs = PUBLISHED_EPOCHS[config.task.name] if training.epochs is None else training.epochs
    steps_of_epoch = num_rows / training.global_batch_size
    total_steps = max(1, math.ceil(epochs * steps_of_epoch - 1e-9))
    schedule = config.schedule
    return TaskRun(
        name=f"seed-{seed}",
        output=str(config.folder),
        seed=seed,
        threads=config.threads,
        model=config.model,
        task=config.task,
        data=DataSettings(sample_length=length),
        optimizer=config.optimizer,
        schedule=ScheduleSettings(
            warmup_steps=round(schedule.warmup_share * total_steps),
            kind=schedule.kind,
            final_ratio=schedule.final_ratio,
        ),
        engine=config.engine,
        training=TrainingSettings(
            total_steps=total_steps,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            firing_penalty=training.firing_penalty,
            stop_after_step=training.stop_after_step,
        ),
        selection=selection,
        evaluation=EvaluationSettings(
            every=max(1, round(steps_of_epoch / selection.per_epoch)), micro_batch_size=selection.micro_batch_size
        ),
        checkpoint=config.checkpoint,
        logging=config.logging,
    )


def row_length(training: EpochSettings, positions: int) -> int:
    """Tokens of a row at most, for a model with so many positions. Raises ValueError where it has too few."""
    length = training.length or min(LONGEST, positions)
    if length > positions:
        raise ValueError(
            f"training.length {length}: the model has {positions} positions; set it to {positions} or less, or leave "
            "it out: longer texts are cut off"
        )
    return length


def _seed_faults(seeds: Sequence[int]) -> Iterator[str]:
    if not seeds:
        yield "seeds: none: name one at least, as seeds: [0, 1, 2]"
    for seed in sorted({seed for seed in seeds if list(seeds).count(seed) > 1}):
        yield f"seeds: {seed} stands there twice: name each seed once"


def _start_faults(
    start: str | None, from_scratch: bool, preset: str | None, tokenizer: str | None, overrides: Mapping[str, Any]
) -> Iterator[str]:
    if (start is None) == (preset is None):
        what = "neither is set" if start is None else f"{start!r} stands beside model.preset {preset!r}"
        yield f"model.start: {what}: name a trained model in model.start, or a model to train afresh in model.preset"
        return
    if start is not None:
        yield from _trained_faults(start, tokenizer, overrides)
        return
    if preset not in PRESETS:
        yield f"model.preset: {preset!r} is unknown: known are {', '.join(PRESETS)}"
    if tokenizer is None:
        yield f"model.tokenizer: missing: {preset} has none of its own; name the folder of one"
    elif not Path(tokenizer).is_dir():
        yield f"model.tokenizer: {tokenizer!r} is no folder: name one that holds a tokenizer"
    if from_scratch:
        yield f"model.from_scratch: has no effect on {preset}, which has no pretraining: leave it out"


def _trained_faults(start: str, tokenizer: str | None, overrides: Mapping[str, Any]) -> Iterator[str]:
    if not Path(start).exists():
        yield f"model.start: {start!r} does not exist: name an exported folder, a run, or one of its checkpoints"
    if tokenizer is not None:
        yield f"model.tokenizer: {tokenizer!r} has no effect: the model in {start} has its own; leave it out"
    for name in overrides:
        if name not in DROPOUTS:
            yield (
                f"model.overrides.{name}: the model in {start} says what it is; {', '.join(DROPOUTS)} alone may differ"
            )


def _neuron_faults(neuron: Mapping[str, Any]) -> Iterator[str]:
    known = [each.name for each in fields(NeuronConfig)]
    for name in neuron:
        if name not in known:
            yield f"model.neuron.{name}: unknown field: known are {', '.join(known)}"


def _epoch_faults(epochs: float | None, task: str | None) -> Iterator[str]:
    if epochs is None and task is None:
        yield "training.epochs: missing: only tasks of GLUE have published ones; set it, for instance to 3"


SHARED_RULES = ("name", "engine.ds_config", "engine.checkpointing", "training.global_batch_size")
"""The first fields of those of pipeline.rules that hold for fine-tuning as well."""

FINETUNE_RULES = (
    *(rule for rule in RULES if rule.fields[0] in SHARED_RULES),
    Rule(("seeds",), _seed_faults),
    Rule(
        ("model.start", "model.from_scratch", "model.preset", "model.tokenizer", "model.overrides"),
        _start_faults,
    ),
    Rule(("model.neuron",), _neuron_faults),
    TASK_RULE,
    Rule(("training.epochs", "task.name"), _epoch_faults),
)
