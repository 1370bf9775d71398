"""What fields of a recipe must fulfil together, or with the files and models that they name."""

import difflib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from data_prep.files import is_path
from data_prep.recipes import Rule
from models.config import NEURON_PRESETS, PRESETS, NeuronConfig, SpikeLMConfig, preset

OWNED_BY_RECIPE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "tensorboard": "logging.tensorboard",
}
"""Keys that a ds_config must leave to the recipe, and the fields that decide there."""

UNSERVICEABLE = {
    "activation_checkpointing": (
        "DeepSpeed's own checkpointing is reentrant and reduces a gradient twice where one weight serves several "
        "timesteps, and its partition_activations empties the input of a layer that the residual still needs: set "
        "engine.checkpointing to layer or timestep instead"
    ),
}
"""Keys that no recipe can have, and why."""

MECHANICS = (
    "aio",
    "communication_data_type",
    "comms_logger",
    "data_types",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""Keys that a ds_config may hold. DeepSpeed itself passes over a key that it does not know without a word."""

OF_ELASTIC = ("frequency", "site_frequencies", "amplitude", "momentum", "reset")
"""Fields of neurons that elastic ones alone have."""

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""Of a saved model in one file, or in many."""


def _name_faults(name: str) -> Iterator[str]:
    if name in (".", "..") or "/" in name or not is_path(name):
        yield f"name: {name!r} cannot name a folder: use letters, digits, - and _, and choose its place by output"


def _resume_faults(resume: str) -> Iterator[str]:
    if resume not in ("auto", "never") and not os.path.exists(resume):
        yield f"resume: {resume!r} is neither auto nor never, and no such path exists"


def _preset_faults(name: str) -> Iterator[str]:
    if name not in PRESETS:
        yield f"model.preset: {name!r} is unknown: {_nearest(name, PRESETS)}"


def _override_faults(name: str, overrides: Mapping[str, Any]) -> Iterator[str]:
    """Fields that SpikeLMConfig lacks, values of wrong type, and combinations that it refuses."""
    types = inspect.get_annotations(SpikeLMConfig, eval_str=True)
    del types["neuron"]  # has a section of its own
    faults = []
    for field, value in overrides.items():
        if field not in types:
            faults.append(f"model.overrides.{field}: unknown field, with value {value!r}: {_nearest(field, types)}")
            continue
        try:
            TypeAdapter(types[field]).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            faults.append(f"model.overrides.{field}: {value!r} {reason}")
    if not faults and name in PRESETS:
        try:
            preset(name, **overrides)
        except ValueError as error:
            faults.append(f"model.overrides: {error}")
    yield from faults


def _warm_start_faults(folder: str | None) -> Iterator[str]:
    if folder is not None and not any(os.path.isfile(Path(folder) / name) for name in WEIGHT_FILES):
        yield (
            f"model.warm_start: {folder!r} holds no {WEIGHT_FILES[0]}: name the folder of a saved BERT or LLaMA model"
        )


def _source_faults(shards: str | None, mixture: Mapping[str, float]) -> Iterator[str]:
    if shards is None and not mixture:
        yield "data.shards: missing: name a folder of shards, or several with their weights in data.mixture"
    if shards is not None and mixture:
        yield f"data.shards: {shards!r} has no effect beside data.mixture: leave one of them out, or set it to null"


def _builder_faults(shards: str | None, shards_recipe: str | None, tokenizer_recipe: str | None) -> Iterator[str]:
    recipes = {"data.shards_recipe": shards_recipe, "data.tokenizer_recipe": tokenizer_recipe}
    for name, recipe in recipes.items():
        if recipe is not None and not os.path.isfile(recipe):
            yield f"{name}: {recipe!r} does not exist: name a recipe, such as those of launch/recipes/data"
    if tokenizer_recipe is not None and shards_recipe is None:
        yield f"data.tokenizer_recipe: {tokenizer_recipe!r} has no effect without data.shards_recipe: name that, too"
    if shards_recipe is not None and shards is None:
        yield f"data.shards_recipe: {shards_recipe!r} builds data.shards, which is not set: name it, or leave this out"
    elif shards_recipe is not None and os.path.isfile(shards_recipe):
        built = _output_of(shards_recipe)
        if built is not None and Path(built) != Path(shards):
            yield (
                f"data.shards: {shards!r}, but data.shards_recipe {shards_recipe!r} builds {built!r}: name that, or "
                "set data.shards_recipe and data.tokenizer_recipe to null"
            )


def _output_of(recipe: str) -> str | None:
    """Where a recipe of data_prep builds; None where it does not say so: the command that reads it will tell."""
    try:
        tree = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    output = tree.get("output") if isinstance(tree, dict) else None
    return output if isinstance(output, str) else None


def _shuffle_faults(order: str, run: int | None, window: int | None) -> Iterator[str]:
    if (run or 1) > 1 and window is None:
        yield (
            f"data.shuffle_run: {run} has no effect when the whole epoch is shuffled: set data.shuffle_window, "
            f"for instance to {1024 * run}, or leave both out"
        )
    elif order != "auto" and (run, window) != (None, None):
        yield f"data.order: {order!r} has no effect beside data.shuffle_run and data.shuffle_window: leave it out"


def _ds_config_faults(path: str) -> Iterator[str]:
    try:
        mechanics = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"engine.ds_config: {path!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        return
    if not isinstance(mechanics, dict):
        yield f"engine.ds_config: {path!r} holds no JSON object"
        return
    for key, value in mechanics.items():
        if key in OWNED_BY_RECIPE:
            what = f"{key} to {json.dumps(value)}"
            yield f"engine.ds_config: {path!r} sets {what}, which {OWNED_BY_RECIPE[key]} decides: remove it there"
        elif key in UNSERVICEABLE:
            yield f"engine.ds_config: {path!r} sets {key}, which cannot serve here: {UNSERVICEABLE[key]}"
        elif key not in MECHANICS:
            yield f"engine.ds_config: {path!r} has the unknown key {key}: {_nearest(key, MECHANICS)}"
    zero = mechanics.get("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero, dict) and not isinstance(zero.get(name, {}), dict):
            what = f"zero_optimization.{name} {json.dumps(zero[name])}"
            yield f'engine.ds_config: {path!r} has {what}, which is no object: write {{"device": "cpu"}}'
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (1, 2, 3):  # true is no 1
        yield f"engine.ds_config: {path!r} has zero_optimization.stage {stage!r}: use 1, 2 or 3"


def _checkpointing_faults(mode: str, timesteps: int) -> Iterator[str]:
    if timesteps > 1 and mode != "timestep":
        yield (
            f"engine.checkpointing_timesteps: {timesteps} has no effect with engine.checkpointing {mode}: set that to "
            "timestep, or leave this out"
        )


def _spike_faults(kind: str, recompute_hidden: bool, backend: str) -> Iterator[str]:
    if kind == "elastic":
        return
    for name, value, default in (("recompute_hidden", recompute_hidden, False), ("spike_backend", backend, "auto")):
        if value != default:
            yield (
                f"engine.{name}: {value!r} has no effect with model.neuron.kind {kind}, whose spikes are not "
                "packed: leave it out"
            )


def idle_neuron_faults(kind: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Fields that neurons of this kind do not have. A preset's as a whole may stand: a recipe serves every kind."""
    given = {name: given[name] for name in OF_ELASTIC if given.get(name) not in (None, getattr(NeuronConfig, name))}
    presets = [{name: table[name] for name in OF_ELASTIC if table.get(name)} for table in NEURON_PRESETS.values()]
    if kind == "elastic" or {name: value for name, value in given.items() if value} in presets:
        return
    for name, value in given.items():
        yield (
            f"model.neuron.{name}: {value!r} has no effect with model.neuron.kind {kind}: elastic neurons alone have "
            "it; leave it out, or set it to null"
        )


def penalty_faults(kind: str, overrides: Mapping[str, Any], firing_penalty: float) -> Iterator[str]:
    """What speaks against training the firing rate of such neurons, in a model with such overrides."""
    effect = f"training.firing_penalty: {firing_penalty} has no effect"
    if firing_penalty and kind != "elastic":
        yield (
            f"{effect} with model.neuron.kind {kind}: elastic neurons alone have a gradient of their firing rate; "
            "leave it out, or set it to 0"
        )
    if firing_penalty and overrides.get("num_hidden_layers") == 0:
        yield f"{effect} with model.overrides.num_hidden_layers 0, where nothing fires: leave one of them out"


def _batch_faults(global_batch_size: int, micro_batch_size: int) -> Iterator[str]:
    if global_batch_size % micro_batch_size:
        yield (
            f"training.global_batch_size: {global_batch_size} is not divisible by training.micro_batch_size "
            f"{micro_batch_size}: change one of them"
        )


def _phase_faults(
    phases: Sequence[Mapping[str, int | None]], total_steps: int, global_batch_size: int, micro_batch_size: int
) -> Iterator[str]:
    steps = sum(phase["steps"] for phase in phases)
    if phases and steps >= total_steps:
        yield (
            f"data.phases: {steps} steps, which leave none of training.total_steps {total_steps} to the recipe's own "
            "data.sample_length: lower their steps, or train longer"
        )
    for number, phase in enumerate(phases):
        whole, part = phase.get("global_batch_size"), phase.get("micro_batch_size")
        if (whole, part) != (None, None) and (whole or global_batch_size) % (part or micro_batch_size):
            yield (
                f"data.phases.{number}.global_batch_size: {whole or global_batch_size} is not divisible by its "
                f"micro_batch_size {part or micro_batch_size}: change one of them"
            )


def _schedule_faults(warmup_steps: int, decay_steps: int | None, total_steps: int) -> Iterator[str]:
    if decay_steps is not None and not warmup_steps <= decay_steps <= total_steps:
        yield (
            f"schedule.decay_steps: {decay_steps} does not lie between schedule.warmup_steps {warmup_steps} and "
            f"training.total_steps {total_steps}: leave it out, so that the rate decays to the last step"
        )
    if warmup_steps > total_steps:
        yield (
            f"schedule.warmup_steps: {warmup_steps} is more than training.total_steps {total_steps}, so that the peak "
            "rate is never reached: use about a tenth of the steps"
        )


def _stop_faults(stop_after_step: int | None, total_steps: int) -> Iterator[str]:
    if stop_after_step is not None and stop_after_step > total_steps:
        yield (
            f"training.stop_after_step: {stop_after_step} comes after the last of training.total_steps {total_steps}: "
            "leave it out, or train longer"
        )


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


RULES = (
    Rule(("name",), _name_faults),
    Rule(("resume",), _resume_faults),
    Rule(("model.preset",), _preset_faults),
    Rule(("model.preset", "model.overrides"), _override_faults),
    Rule(("model.warm_start",), _warm_start_faults),
    Rule(("data.shards", "data.mixture"), _source_faults),
    Rule(("data.shards", "data.shards_recipe", "data.tokenizer_recipe"), _builder_faults),
    Rule(("data.order", "data.shuffle_run", "data.shuffle_window"), _shuffle_faults),
    Rule(("engine.ds_config",), _ds_config_faults),
    Rule(("engine.checkpointing", "engine.checkpointing_timesteps"), _checkpointing_faults),
    Rule(("model.neuron.kind", "engine.recompute_hidden", "engine.spike_backend"), _spike_faults),
    Rule(
        ("model.neuron.kind", *(f"model.neuron.{name}" for name in OF_ELASTIC)),
        lambda kind, *values: idle_neuron_faults(kind, dict(zip(OF_ELASTIC, values, strict=True))),
    ),
    Rule(("model.neuron.kind", "model.overrides", "training.firing_penalty"), penalty_faults),
    Rule(("training.global_batch_size", "training.micro_batch_size"), _batch_faults),
    Rule(
        ("data.phases", "training.total_steps", "training.global_batch_size", "training.micro_batch_size"),
        _phase_faults,
    ),
    Rule(("schedule.warmup_steps", "schedule.decay_steps", "training.total_steps"), _schedule_faults),
    Rule(("training.stop_after_step", "training.total_steps"), _stop_faults),
)
"""Everything about a run that one field's type cannot say."""
