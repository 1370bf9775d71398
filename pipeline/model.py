"""The model that a recipe describes: untrained, as its training starts, or as one of its checkpoints has it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from data_prep.files import read_json
from data_prep.manifest import Manifest
from data_prep.recipes import settings_from_dict
from data_prep.tokenization import load_tokenizer, vocabulary_size
from models.amplitudes import spiking_stack
from models.config import SpikeLMConfig, preset
from models.modeling import (
    SpikeLMForCausalLM,
    SpikeLMForMaskedLM,
    SpikeLMForPreTraining,
    SpikeLMForSequenceClassification,
    SpikeLMPreTrainedModel,
)
from models.warm_start import CheckpointTensors, WarmStartReport, llama_differences, load_bert, load_llama
from pipeline.checkpoint import (
    CheckpointError,
    TrainState,
    intact_checkpoint,
    read_state,
    read_weights,
    resolve_checkpoint,
    step_folder,
)
from pipeline.config import DataSettings, EngineSettings, RunConfig, is_decoder, zero_stage
from pipeline.corpus import Corpus, open_folders, open_tokenizer
from pipeline.engine import partition_weights
from pipeline.model_folder import read_model_folder
from pipeline.remote import RemoteError
from pipeline.shard_cache import ShardFolder
from pipeline.world import World

POSITIONS = "position_embeddings.weight"
MODEL_FOLDER = "model"
"""Beside the checkpoints of a fine-tuned run: config.json and tokenizer of its model."""


def build_model(config: RunConfig, corpus: Corpus, world: World) -> tuple[SpikeLMPreTrainedModel, list[str]]:
    """The recipe's model for the corpus: freshly initialised, or with the weights of model.warm_start.

    Under ZeRO-3 no process ever holds more of a fresh model than its share and one module; a warm start is read whole.
    Also returns what a warm start has to remark. Raises ValueError, with all faults, where the corpus does not fit, and
    for a spike backend that cannot run.
    """
    with torch.device("meta"):
        model = _untrained(config, corpus.tokenizer)
    _refuse_misfit(model.config, corpus)
    is_own = config.model.warm_start is not None and _is_own(Path(config.model.warm_start))
    if config.model.warm_start and not is_own:
        _refuse_other_llama(model.config, Path(config.model.warm_start))
    partitioned = zero_stage(config) == 3 and not config.model.warm_start
    draw_weights(model, partial(partition_weights, config=config, world=world) if partitioned else None)
    set_execution(model, config.engine, world.device)
    if not config.model.warm_start:
        return model, []
    load = load_own if is_own else load_llama if model.config.traits.causal else load_bert
    report = load(model, CheckpointTensors(config.model.warm_start))
    if is_own:
        report.remarks += _settle_differences(model, Path(config.model.warm_start))
    parts = {"starts from random weights": report.missing, "is in the checkpoint but not in the model": report.unused}
    remarks = [f"{', '.join(names)} {what}" for what, names in parts.items() if names]
    return model, remarks + report.remarks + other_tokens(Path(config.model.warm_start), corpus.tokenizer)


def load_own(model: SpikeLMPreTrainedModel, tensors: CheckpointTensors) -> WarmStartReport:
    """Copy the weights and amplitudes of an exported model of ours into `model`.

    Learned positions may be of another number: the first ones are copied, those beyond stay as they were drawn. Raises
    ValueError, before anything is copied, where any other shape differs or weights are absent.
    """
    own, report = model.state_dict(keep_vars=True), WarmStartReport()
    faults = []
    for name, tensor in own.items():
        if name in tensors:
            theirs, ours = tensors.shape(name), tuple(tensor.shape)
            rest = (theirs[1:], ours[1:]) if name.endswith(POSITIONS) else (theirs, ours)
            faults += [f"{name} is {list(theirs)}, expected {list(ours)}"] if rest[0] != rest[1] else []
        elif not any(tensor is own[other] for other in own.keys() & set(tensors)):  # tied to one that is there
            is_body = name.startswith(("model.embeddings.", "model.stack."))
            faults += [f"{name} is absent from it"] if is_body else []
            report.missing.append(name)
    if faults:
        raise ValueError(
            f"model.warm_start: {'; '.join(faults)}: set model.preset, model.overrides and model.neuron to those of "
            "the exported model"
        )
    with torch.no_grad():
        for name in own.keys() & set(tensors):
            ours, theirs = own[name], tensors[name]
            if name.endswith(POSITIONS):
                if len(theirs) < len(ours):
                    report.remarks.append(f"positions from {len(theirs)} on start from random weights")
                ours, theirs = ours[: len(theirs)], theirs[: len(ours)]
            ours.copy_(theirs)
    report.unused = sorted(set(tensors) - own.keys())
    return report


NETWORK = (
    *("family", "num_attention_heads", "num_key_value_heads", "hidden_act", "mlm_head_act"),
    *("layer_norm_eps", "rms_norm_eps", "rope_parameters"),
)
"""What of a configuration decides what a model computes, and shows in no shape."""


def _settle_differences(model: SpikeLMPreTrainedModel, folder: Path) -> list[str]:
    """Remarks on another neuron than the exported model's, whose amplitudes then do not count.

    Raises ValueError where the model would be another network than the exported one.
    """
    theirs, ours = read_json(folder / CONFIG_NAME), model.config.to_dict()
    faults = [
        f"{name} is {ours[name]!r}, was {theirs.get(name)!r}" for name in NETWORK if ours[name] != theirs.get(name)
    ]
    if faults:
        raise ValueError(
            f"model.warm_start {folder}: {'; '.join(faults)}: set model.overrides, as by --model.overrides.NAME VALUE, "
            "to the exported model's"
        )
    was = theirs.get("neuron", {})
    changed = [name for name, value in ours["neuron"].items() if was.get(name) != value]
    if changed:
        spiking_stack(model).reset_amplitudes()
        return [f"another neuron than the exported one's ({', '.join(changed)}): amplitudes are measured anew"]
    return []


def _is_own(folder: Path) -> bool:
    settings = folder / CONFIG_NAME
    return settings.is_file() and read_json(settings).get("model_type") == SpikeLMConfig.model_type


def set_execution(model: SpikeLMPreTrainedModel, engine: EngineSettings, device: torch.device) -> None:
    """How the model computes what it computes. Raises ValueError for a spike backend that cannot run on `device`."""
    stack = spiking_stack(model)
    stack.set_checkpointing(engine.checkpointing, engine.checkpointing_timesteps, engine.recompute_hidden)
    stack.set_spike_backend(engine.spike_backend, device)
    model.logits_at_once = engine.logits_at_once


def other_tokens(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A remark where the ids of the tokenizer in the checkpoint's folder stand for other tokens than `tokenizer`'s."""
    try:
        theirs = load_tokenizer(checkpoint).get_vocab()
    except ValueError:
        return []  # weights alone, as many checkpoints are
    ours = tokenizer.get_vocab()
    moved = sum(theirs.get(token) != number for token, number in ours.items())
    if not moved:
        return []
    return [
        f"{moved} of the shards' {len(ours)} tokens have other ids in the checkpoint's tokenizer, and start from other "
        f"tokens' embeddings: to have their own, build the shards with the tokenizer in {checkpoint}"
    ]


def _refuse_other_llama(config: SpikeLMConfig, checkpoint: Path) -> None:
    """ValueError where a decoder would be another network than the checkpoint's config.json describes."""
    settings = checkpoint / CONFIG_NAME
    if config.traits.causal and settings.is_file() and (faults := llama_differences(config, read_json(settings))):
        raise ValueError(
            f"model.warm_start {checkpoint}: {'; '.join(faults)}: set model.overrides, as by --model.overrides.NAME "
            "VALUE, to the checkpoint's"
        )


def draw_weights(model: PreTrainedModel, finish: Callable[[nn.Module], None] | None = None) -> None:
    """Give a model that was made on the meta device its weights, drawn in the order of its modules, and its buffers.

    The same generator gives the same weights whatever becomes of them: `finish` is called with each module once its own
    weights are drawn, and may leave a share of them only. All of them must be _init_weights' business.
    """
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            if empty not in drawn:
                drawn[empty] = nn.Parameter(torch.empty_like(empty, device="cpu"), empty.requires_grad)
            setattr(module, name, drawn[empty])
        for name, empty in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(empty, device="cpu"))
        model._init_weights(module)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # where another module shares it, transformers leaves it as it is
        if finish:
            finish(module)
    for parameter in drawn.values():
        del parameter._is_hf_initialized


def _refuse_misfit(config: SpikeLMConfig, corpus: Corpus) -> None:
    faults = []
    if config.vocab_size < vocabulary_size(corpus.tokenizer):
        faults.append(
            f"model.overrides.vocab_size is {config.vocab_size}, the tokenizer has {vocabulary_size(corpus.tokenizer)} "
            "ids: leave it out, or make it as large"
        )
    if config.max_position_embeddings < corpus.longest_sample:
        faults.append(
            f"the samples have {corpus.longest_sample} tokens, the model {config.max_position_embeddings} positions: "
            "raise model.overrides.max_position_embeddings, or build shorter rows (causal ones: set data.sample_length)"
        )
    if faults:
        raise ValueError("; ".join(faults))


def trained_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> SpikeLMPreTrainedModel:
    """The recipe's model with the fp32 weights and the amplitudes of its checkpoint, ready for use.

    Raises CheckpointError where the checkpoint is of another model.
    """
    return _with_weights(_untrained(config, tokenizer), checkpoint)


def open_data(folders: Sequence[ShardFolder], state: TrainState) -> tuple[dict[str, Manifest], PreTrainedTokenizerBase]:
    """Manifest of each folder of the shards that `state` was trained on, by the folder's name, and their tokenizer."""
    for folder in folders:
        if not folder.root.is_dir():
            raise ValueError(
                f"the run's shards {folder.name} do not exist: give the folder that holds them now by --shards FOLDER"
            )
    opened = {folder.name: open_tokenizer(folder.root) for folder in folders}
    manifests = {name: manifest for name, (manifest, _) in opened.items()}
    if " ".join(sorted(manifest.indexes["train"] for manifest in manifests.values())) != state.data["fingerprint"]:
        raise ValueError(
            f"the run was not trained on the shards in {', '.join(manifests)}: give those that it was by --shards "
            "FOLDER, of a mixture all of them, each by its own"
        )
    return manifests, next(tokenizer for _, tokenizer in opened.values())


def open_model(
    given: Path, shards: Sequence[str] | None = None
) -> tuple[SpikeLMPreTrainedModel, PreTrainedTokenizerBase, RunConfig | None]:
    """A trained model, its tokenizer and, where it is a run's, the run's settings.

    Args:
        given: an exported folder, or what best_checkpoint takes.
        shards: where the shards of a run may lie, if not where its recipe says.

    Raises ValueError where there is no such model; CheckpointError for a damaged one.
    """
    if not (given / CONFIG_NAME).is_file():
        checkpoint = best_checkpoint(given)
        state = read_state(checkpoint)
        if is_fine_tuned(state):
            return *fine_tuned_model(checkpoint), None
        config = settings_from_dict(RunConfig, state.recipe)
        _, tokenizer = open_data(_folders_of(config.data, shards or ()), state)
        return trained_model(config, tokenizer, checkpoint), tokenizer, config
    return *read_model_folder(given), None


def is_fine_tuned(state: TrainState) -> bool:
    """Whether a checkpoint is one of pipeline.finetune."""
    return "task" in state.recipe


def best_checkpoint(given: Path) -> Path:
    """The checkpoint that `given` names (see resolve_checkpoint); of a fine-tuned run not the newest, but the best."""
    checkpoint = resolve_checkpoint(given)
    search = read_state(checkpoint).search
    if search is None or checkpoint.resolve() == given.resolve():
        return checkpoint
    return intact_checkpoint(step_folder(checkpoint.parent, search.best_step))


def fine_tuned_model(checkpoint: Path) -> tuple[SpikeLMForSequenceClassification, PreTrainedTokenizerBase]:
    """The model of a fine-tuned run's checkpoint, ready for use, and its tokenizer.

    Raises CheckpointError where the checkpoint does not lie in its run, or is of another model.
    """
    folder = checkpoint.resolve().parent.parent / MODEL_FOLDER
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{checkpoint} lies outside its run, whose {MODEL_FOLDER}/ it needs: name it there")
    model = SpikeLMForSequenceClassification(SpikeLMConfig.from_pretrained(folder, local_files_only=True))
    return _with_weights(model, checkpoint), load_tokenizer(folder)


def _with_weights(model: SpikeLMPreTrainedModel, checkpoint: Path) -> SpikeLMPreTrainedModel:
    try:
        model.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit the model of its recipe: {error}") from error
    return model.eval()


def _folders_of(data: DataSettings, others: Sequence[str]) -> list[ShardFolder]:
    """The folders of a run's shards, or, where these are gone, others."""
    try:
        own = open_folders(data)
    except RemoteError:
        if not others:
            raise
        return open_folders(data, others)
    are_there = all(folder.root.is_dir() for folder in own)
    return own if are_there else open_folders(data, others) or own


def _untrained(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> SpikeLMPreTrainedModel:
    settings = config.model
    of_tokenizer = {"vocab_size": vocabulary_size(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if is_decoder(settings):  # so that generation knows where to begin and to end
        of_tokenizer |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_config = preset(settings.preset, neuron=settings.neuron, **{**of_tokenizer, **settings.overrides})
    if model_config.traits.causal:
        return SpikeLMForCausalLM(model_config)
    heads = SpikeLMForPreTraining if config.objective.next_sentence else SpikeLMForMaskedLM
    return heads(model_config)
