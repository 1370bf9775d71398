"""All settings of a pretraining run, as frozen dataclasses: what a recipe holds, named and explained in one place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field as Bounds
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.recipes import BelowOne, FolderName, Rule, Share, load_settings, settings_to_dict, strict
from models.config import FAMILIES, PRESETS, NeuronConfig, SpikeLMConfig
from models.spike_ops import Backend
from pipeline.rules import RULES


@dataclass(frozen=True)
class ModelSettings:
    """The model and where its weights start."""

    preset: str = "encoder-tiny"
    """Size of the model: a name in models.config.PRESETS."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of SpikeLMConfig that differ from the preset, such as num_hidden_layers."""

    neuron: NeuronConfig = NeuronConfig()
    """What stands in front of every linear layer."""

    warm_start: str | None = None
    """Folder of a BERT or, for decoders, LLaMA-shaped model in safetensors to start from, or of an exported model of
    ours; null: random weights."""


@dataclass(frozen=True)
class PhaseSettings:
    """Steps on samples and batches of other sizes, before those of the recipe itself (pipeline.phases)."""

    steps: PositiveInt
    """Optimizer steps of the phase."""

    sample_length: PositiveInt
    """Tokens of its samples: a divisor of the rows' length."""

    global_batch_size: PositiveInt | None = None
    """Samples of one optimizer step, over all processes; null: training.global_batch_size."""

    micro_batch_size: PositiveInt | None = None
    """Samples of one forward in one process; null: training.micro_batch_size."""


@dataclass(frozen=True)
class DataSettings:
    """Which rows, in which order."""

    shards: FolderName | None = None
    """Folder that data_prep.build_shards wrote: manifest.json, tokenizer/, train/, heldout/; or its URL, https://... or
    any of fsspec's, as s3://...; null: see mixture."""

    mixture: dict[FolderName, PositiveFloat] = field(default_factory=dict)
    """Instead, several such folders and their weights, {FOLDER: WEIGHT, ...}: of every few samples each gives its share
    of all weights, however many rows it has, and goes through epochs of its own."""

    shards_recipe: str | None = None
    """Recipe of data_prep.build_shards to build them by where they are missing; null: they must be there."""

    tokenizer_recipe: str | None = None
    """Recipe of data_prep.train_tokenizer that makes the tokenizer which shards_recipe names; null: it is there."""

    sample_length: PositiveInt | None = None
    """Tokens of a sample: causal rows are split into parts of this length when they are read; null: whole rows."""

    phases: tuple[PhaseSettings, ...] = ()
    """Phases of training on samples of other lengths, causal ones, before that on samples of sample_length, which goes
    on to training.total_steps: of each {steps: N, sample_length: N}, and global_batch_size and micro_batch_size where
    they are not those of training. Each goes through the rows in an order and epochs of its own; evaluation is at
    sample_length always."""

    verify: bool = True
    """Read all shards once before training, each process its part, and compare their checksums; false: sizes only."""

    num_workers: NonNegativeInt = 0
    """Loader processes for each training process; 0 reads in the training process, which is fastest for short rows."""

    cache: FolderName = "data/cache"
    """Folder, on each machine's own disk best, that keeps shards which come from a URL."""

    cache_gigabytes: PositiveFloat = 100.0
    """Size up to which shards are kept there; those that were not used for longest go first."""

    order: Literal["auto", "disk", "nfs", "remote"] = "auto"
    """How an epoch is shuffled: disk in full; nfs by runs of 64 rows within windows of 65,536; remote by shards, within
    windows of 8 of them; auto: by where the shards lie, or by the two numbers below."""

    shuffle_run: PositiveInt | None = None
    """Neighbouring rows that are kept together when an epoch is shuffled; more than 1 where random reads are slow."""

    shuffle_window: PositiveInt | None = None
    """Rows within which those runs are then shuffled; null, with shuffle_run: the whole epoch, a full shuffle."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every folder, of one or of several."""
        return self.mixture or {self.shards: 1.0}

    @property
    def named(self) -> str:
        """The field that names the folders, and them."""
        return f"data.mixture of {', '.join(self.mixture)}" if self.mixture else f"data.shards {self.shards}"


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which tokens encoders learn to predict; decoders predict every next one."""

    mask_probability: Annotated[float, Bounds(gt=0, le=1)] = 0.15
    """Share of a row's ordinary tokens that are to be predicted."""

    static_masking: bool = False
    """Mask a row alike in every epoch, as the original BERT did, instead of anew."""

    next_sentence: bool = True
    """Also predict whether the second segment follows the first."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and gradient clipping."""

    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""

    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of the running means of gradient and squared gradient."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the mean squared gradient."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of weights; biases and norms have none."""

    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the steps."""

    warmup_steps: NonNegativeInt
    """Steps in which the rate rises linearly to its peak."""

    kind: Literal["linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up."""

    decay_steps: PositiveInt | None = None
    """Step by which the rate has decayed, where it stays from then on; null: the last step."""

    final_ratio: Share = 0.0
    """Rate after the decay, as a share of the peak."""


@dataclass(frozen=True)
class EngineSettings:
    """How the step is computed; none of it but precision changes what is computed, up to the order of sums."""

    ds_config: str = "ds_configs/zero2.json"
    """DeepSpeed's mechanics: a JSON file with the ZeRO stage, its buckets, profilers."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations in forward and backward; the optimizer's copy of the weights is fp32 always."""

    checkpointing: Literal["none", "layer", "timestep"] = "none"
    """Activations kept for the backward: all; each layer's input, for a second forward; or (timestep) that, and within
    a layer what goes from timestep to timestep, for a third one."""

    checkpointing_timesteps: PositiveInt = 1
    """Timesteps that checkpointing timestep runs again at once: fewer need less memory, more run faster."""

    recompute_hidden: bool = False
    """Compute what an MLP's activation gets once more in the backward, from packed spikes, instead of keeping it."""

    logits_at_once: NonNegativeInt = 4096
    """Positions of a micro-batch of which training makes logits at a time; of all of them (0) they may be the most that
    a large vocabulary needs."""

    spike_backend: Backend = "auto"
    """What computes elastic neurons: plain torch; cpp, compiled on CPUs at first use; triton on GPUs; auto: the fastest
    that runs."""

    timeout_minutes: PositiveFloat = 10
    """How long a process waits for the others before the run fails."""


@dataclass(frozen=True)
class TrainingSettings:
    """Length of the run and sizes of its batches, in rows."""

    total_steps: PositiveInt
    """Optimizer steps of the whole run."""

    global_batch_size: PositiveInt
    """Rows of one optimizer step, over all processes."""

    micro_batch_size: PositiveInt
    """Rows of one forward in one process; the rest of its share is accumulated."""

    firing_penalty: NonNegativeFloat = 0.0
    """Nats a token that a firing rate of 1 would add to what is minimised, in proportion to the mean rate of all sites
    of elastic neurons: the larger, the fewer spikes; 0: none."""

    stop_after_step: PositiveInt | None = None
    """Stop early, with a checkpoint, after this step, to be resumed later; null: do not."""


@dataclass(frozen=True)
class EvaluationSettings:
    """The pass over the held-out rows."""

    every: NonNegativeInt
    """Steps between two passes; 0: only at the end."""

    micro_batch_size: PositiveInt
    """Rows of one forward in one process."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What a run can be resumed from."""

    every: PositiveInt
    """Steps between two checkpoints; the last step is always saved."""

    keep: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""


@dataclass(frozen=True)
class LoggingSettings:
    """What is written about training steps."""

    every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""

    tensorboard: bool = True
    """Write the same figures to tensorboard/ in the run's folder."""

    progress: bool = True
    """Show a progress bar."""


def _objective_faults(name: str, overrides: dict[str, Any], *values: Any) -> Iterator[str]:
    if not is_decoder(ModelSettings(name, overrides)):
        return
    for item, value in zip(fields(ObjectiveSettings), values, strict=True):
        if value != item.default:
            yield (
                f"objective.{item.name}: {value!r} has no effect on {name}, a decoder, which predicts every next "
                "token: leave it out"
            )


OBJECTIVE_RULE = Rule(
    ("model.preset", "model.overrides", *(f"objective.{item.name}" for item in fields(ObjectiveSettings))),
    _objective_faults,
)


def _pair_phase_faults(name: str, overrides: dict[str, Any], phases: Sequence[object]) -> Iterator[str]:
    if phases and not is_decoder(ModelSettings(name, overrides)):
        yield (
            f"data.phases: {name} learns from sentence pairs, which cannot be split: leave it out, and train two runs "
            "on shards of either length, the second with model.warm_start on the export of the first (python -m "
            "pipeline.export) and model.overrides.max_position_embeddings as long as its rows"
        )


PAIR_PHASE_RULE = Rule(("model.preset", "model.overrides", "data.phases"), _pair_phase_faults)


def is_decoder(settings: ModelSettings) -> bool:
    """Whether the model predicts next tokens; False where its family is not known."""
    settled = {"family": SpikeLMConfig.family, **PRESETS.get(settings.preset, {}), **settings.overrides}
    family = FAMILIES.get(str(settled["family"]))
    return family is not None and family.causal


@strict
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Pretrain a SpikeLM encoder or decoder on prepared shards. Run the same command again to resume."""

    name: str
    """Name of the run."""

    output: FolderName = "runs"
    """Folder of runs; this one lives in <output>/<name>."""

    seed: NonNegativeInt = 0
    """Decides initial weights, dropout, order of rows and masks."""

    resume: str = "auto"
    """auto: from this run's newest checkpoint, where there is one; never: afresh, in an empty folder; or a path."""

    threads: PositiveInt | None = None
    """Torch threads of each process; null: what OMP_NUM_THREADS says, else its share of the cores."""

    model: ModelSettings = ModelSettings()
    data: DataSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings
    engine: EngineSettings = EngineSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings = LoggingSettings()


MAY_CHANGE = (
    "name",
    "output",
    "resume",
    "threads",
    "data.shards_recipe",
    "data.tokenizer_recipe",
    "data.shards",  # folders may move: their contents are known by their fingerprints, with which weights are kept
    "data.mixture",
    "data.cache",
    "data.cache_gigabytes",
    "data.order",  # runs and windows are known as the numbers that they come to
    "data.shuffle_run",
    "data.shuffle_window",
    "data.phases.*.micro_batch_size",
    "data.verify",
    "data.num_workers",
    "model.shards",  # of fine-tuning: folders and files may move, as shards may
    "task.data",
    "task.train",
    "task.validation",
    "task.test",
    "engine.ds_config",
    "engine.checkpointing",
    "engine.checkpointing_timesteps",
    "engine.recompute_hidden",
    "engine.logits_at_once",
    "engine.spike_backend",
    "engine.timeout_minutes",
    "training.micro_batch_size",
    "training.stop_after_step",
    "evaluation",
    "checkpoint",
    "logging",
)
"""Fields that may differ between a run and its resumption, * for any number. All others decide what is trained."""


def load_run_config(argv: Sequence[str]) -> RunConfig:
    """The run that `argv` (--recipe FILE and overrides --section.field VALUE) describes; prints the fields for --help.

    Raises ConfigError with all faults together.
    """
    return load_settings(RunConfig, argv, "deepspeed pipeline/pretrain.py", (*RULES, OBJECTIVE_RULE, PAIR_PHASE_RULE))


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line for each field that decides what is trained and has changed; empty where `new` may resume `old`."""
    changes = _changes(settings_to_dict(old), settings_to_dict(new))
    return [
        line for name, line in changes.items() if not any(fnmatchcase(f"{name}.", f"{free}.*") for free in MAY_CHANGE)
    ]


def mixture_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line for each folder of data.mixture that has come, gone, or got another weight, by its name."""
    return list(_changes({"data.mixture": old.data.mixture}, {"data.mixture": new.data.mixture}).values())


def accumulation_steps(config: RunConfig, world_size: int, section: str = "training") -> int:
    """Micro-batches that each of `world_size` processes runs in one step; ValueError where that is no whole number.

    `section` is where the user's recipe says the two sizes.
    """
    training = config.training
    at_once = training.micro_batch_size * world_size
    steps, rest = divmod(training.global_batch_size, at_once)
    if rest:
        nearest = f"{steps * at_once} or {(steps + 1) * at_once}" if steps else f"{at_once}"
        raise ValueError(
            f"{section}.global_batch_size {training.global_batch_size} is not divisible by {section}.micro_batch_size "
            f"{training.micro_batch_size} x {world_size} processes = {at_once}: use a global batch of {nearest}, "
            "another micro-batch, or another number of processes"
        )
    return steps


def build_ds_config(config: RunConfig, world_size: int, run_dir: Path) -> dict[str, Any]:
    """DeepSpeed's configuration: the mechanics that engine.ds_config holds, and what the recipe owns.

    Raises ValueError where the processes do not divide the global batch.
    """
    return {
        **_mechanics(config),
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        # DeepSpeed's monitor joins folder and name.
        "tensorboard": {"enabled": config.logging.tensorboard, "output_path": str(run_dir), "job_name": "tensorboard"},
    }


def zero_stage(config: RunConfig) -> int:
    """Which states DeepSpeed partitions: 1 the optimizer's, 2 also gradients, 3 also weights."""
    return _mechanics(config)["zero_optimization"]["stage"]


def offloads_optimizer(config: RunConfig) -> bool:
    """Whether the optimizer's state rests in the CPU's memory (or on a disk) beside GPUs that train."""
    offload = _mechanics(config)["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _mechanics(config: RunConfig) -> dict[str, Any]:
    return json.loads(Path(config.engine.ds_config).read_text(encoding="utf-8"))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """A line for each leaf that differs, by its dotted name."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return {
        name: f"{name}: {before.get(name, 'not set')!r} in the run, {after.get(name, 'not set')!r} now"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested mapping; mappings in a list have their numbers for names."""
    for key, value in tree.items():
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            yield from _leaves({str(number): item for number, item in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
