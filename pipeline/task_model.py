"""Models with a head for a task: started from a trained model or afresh, and read from the runs that trained them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from data_prep.tokenization import load_tokenizer, vocabulary_size
from models.amplitudes import keep_timesteps
from models.config import NeuronConfig, SpikeLMConfig, preset
from models.modeling import SpikeLMForSequenceClassification, SpikeLMPreTrainedModel
from pipeline.engine import seed_weights
from pipeline.finetune_config import StartSettings, TaskRun
from pipeline.model import MODEL_FOLDER, draw_weights, open_model, set_execution
from pipeline.rules import idle_neuron_faults, penalty_faults
from pipeline.tasks import Task
from pipeline.world import World


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from: configuration, tokenizer and, unless it starts from scratch, the trained model."""

    config: SpikeLMConfig
    tokenizer: PreTrainedTokenizerBase
    model: SpikeLMPreTrainedModel | None
    fingerprint: str | None
    """xxh3-128 of the trained weights, in hexadecimal: a run that has gone on since has others."""


def open_start(settings: StartSettings) -> Start:
    """What the recipe's section `model` names, with its overrides.

    Raises ValueError where there is no such model or tokenizer, or it has no head for tasks: decoders.
    """
    if settings.start is None:
        tokenizer = load_tokenizer(settings.tokenizer)
        of_tokenizer = {"vocab_size": vocabulary_size(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        neuron = NeuronConfig(**settings.neuron)
        config = preset(settings.preset, neuron=neuron, **{**of_tokenizer, **settings.overrides})
        model = None
    else:
        try:
            model, tokenizer, run = open_model(Path(settings.start), settings.shards or None)
        except ValueError as error:
            raise type(error)(f"model.start: {error}") from error
        if settings.shards and run is None:
            raise ValueError(
                f"model.shards has no effect with model.start {settings.start}, which holds its own tokenizer: leave "
                "it out"
            )
        if model.config.traits.causal:
            raise ValueError(
                f"model.start {settings.start} is a decoder, family {model.config.family!r}: tasks are learned by a "
                "head on the first token, which only encoders have; start from an encoder"
            )
        config = _with_overrides(model, settings)
        model = None if settings.from_scratch else model
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise ValueError(
            f"model.tokenizer {settings.tokenizer} has {vocabulary_size(tokenizer)} ids, the model "
            f"{config.vocab_size}: leave model.overrides.vocab_size out"
        )
    if not SpikeLMForSequenceClassification.fits(config):
        raise ValueError(f"model.preset {settings.preset} is a decoder: tasks are learned by encoders; name one")
    for fault in idle_neuron_faults(config.neuron.kind, settings.neuron):
        raise ValueError(fault)
    return Start(config, tokenizer, model, None if model is None else _fingerprint(model))


def refuse_penalty(start: Start, firing_penalty: float) -> None:
    """ValueError where a penalty on the firing rate would change nothing."""
    layers = {"num_hidden_layers": start.config.num_hidden_layers}
    for fault in penalty_faults(start.config.neuron.kind, layers, firing_penalty):
        raise ValueError(fault)


def build_task_model(
    start: Start, task: Task, config: TaskRun, world: World
) -> tuple[SpikeLMForSequenceClassification, list[str]]:
    """The model of one seed, whose head is drawn anew, and what there is to remark about it."""
    seed_weights(config.seed)
    with torch.device("meta"):
        model = SpikeLMForSequenceClassification(_for_task(start.config, task))
    draw_weights(model)
    set_execution(model, config.engine, world.device)
    if start.model is None:
        return model, ["starts from random weights"]
    return model, _copy_body(model, start.model)


def save_description(model: SpikeLMForSequenceClassification, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write down what the weights of the run's checkpoints belong to."""
    model.config.save_pretrained(run / MODEL_FOLDER)
    tokenizer.save_pretrained(run / MODEL_FOLDER)


def _with_overrides(model: SpikeLMPreTrainedModel, settings: StartSettings) -> SpikeLMConfig:
    """The model's configuration with overrides. Where timesteps alone become fewer, the model itself loses the last."""
    was = model.config.neuron
    try:
        neuron = was.changed(**settings.neuron)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    if neuron == replace(was, num_timesteps=neuron.num_timesteps) and neuron.num_timesteps < was.num_timesteps:
        keep_timesteps(model, neuron.num_timesteps)
    return _changed(model.config, neuron=asdict(neuron), **settings.overrides)


def _for_task(config: SpikeLMConfig, task: Task) -> SpikeLMConfig:
    """With the head that the task needs: one number, or a logit for each class."""
    names = dict(enumerate(task.classes)) or {0: "LABEL_0"}
    kind = "single_label_classification" if task.classes else "regression"
    return _changed(
        config,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type=kind,
        architectures=[SpikeLMForSequenceClassification.__name__],
    )


def _changed(config: SpikeLMConfig, **values: Any) -> SpikeLMConfig:
    return SpikeLMConfig.from_dict({**config.to_dict(), **values})


def _copy_body(model: SpikeLMForSequenceClassification, trained: SpikeLMPreTrainedModel) -> list[str]:
    """Copy what stands below the heads; remarks on what was not there."""
    own, theirs = model.state_dict(keep_vars=True), trained.state_dict()
    body = {name: tensor for name, tensor in own.items() if name.startswith("model.")}
    same_neuron = model.config.neuron == trained.config.neuron
    if not same_neuron:
        body = {name: tensor for name, tensor in body.items() if not _is_amplitude(name)}
    with torch.no_grad():
        for name in body.keys() & theirs.keys():
            body[name].copy_(theirs[name])
    remarks = [f"{name} starts from random weights" for name in sorted(body.keys() - theirs.keys())]
    if not same_neuron:
        remarks.append("other neurons than the trained model's: amplitudes are measured anew")
    return remarks


def _fingerprint(model: SpikeLMPreTrainedModel) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_amplitude(name: str) -> bool:
    return name.rpartition(".")[2] in ("amplitudes", "calibrated")
