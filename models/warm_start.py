"""Weights of other models into ours: BERT and the released SpikeLM into encoders, LLaMA into decoders."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from .amplitudes import spiking_stack
from .config import NeuronConfig, SpikeLMConfig
from .stack import SpikeStack

_BERT_NAMES = {
    "model.embeddings.norm": "bert.embeddings.LayerNorm",
    "model.embeddings": "bert.embeddings",
    "model.pooler": "bert.pooler.dense",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "mlm_head.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "mlm_head.decoder.bias": "cls.predictions.bias",
    "next_sentence_head": "cls.seq_relationship",
}
"""Our prefixes and BERT's; the first that fits is taken."""

_BERT_LAYER_NAMES = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_RELEASED_AMPLITUDES = {
    "qkv": "attention.self.query.act_clip_val",
    "key": "attention.self.clip_key",
    "value": "attention.self.clip_value",
    "attention_output": "attention.output.dense.act_clip_val",
    "mlp_up": "intermediate.dense.act_clip_val",
    "mlp_down": "output.dense.act_clip_val",
}
_KNOWN_AND_UNUSED = (
    "position_ids",
    "weight_clip_val",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
)


_LLAMA_NAMES = {"model.embeddings.word_embeddings": "model.embed_tokens", "model.stack.norm": "model.norm"}
_LLAMA_LAYER_NAMES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "attention_norm": ("input_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "mlp_norm": ("post_attention_layernorm",),
}
_SHAPE_NAMES = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "hidden_act", "rms_norm_eps", "initializer_range"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
}
"""What LLaMA's configuration and ours call alike."""

_SHAPING_NAMES = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "rms_norm_eps", "rope_parameters"),
)
_LLAMA_TYPES = ("llama", "mistral")

_LLAMA_HEAD, _LLAMA_WORDS = "lm_head.weight", "model.embed_tokens.weight"
_LLAMA_UNUSED = ("rotary_emb.inv_freq",)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointTensors(Mapping[str, Tensor]):
    """The tensors of a transformers folder by name, in one file or many; each is read when it is asked for.

    Raises ValueError where the folder holds no weights in safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if (folder / WEIGHTS_INDEX).is_file():
            names = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: folder / file for name, file in names.items()}
        elif (folder / WEIGHTS).is_file():
            with _opened(folder / WEIGHTS) as file:
                self._files = dict.fromkeys(file.keys(), folder / WEIGHTS)
        else:
            raise ValueError(f"{folder} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}: save the model in safetensors")

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
        with _opened(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}: fetch it again") from error


@dataclass
class WarmStartReport:
    """What a warm start did: names of ours that got nothing, names of theirs that were not used, and remarks."""

    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def load_bert(model: nn.Module, tensors: Mapping[str, Tensor]) -> WarmStartReport:
    """Copy the weights of a BERT or released SpikeLM checkpoint into `model`, and its amplitudes where it has them.

    `model` is one of models.modeling, or a SpikeStack alone, which needs no embeddings.
    `tensors` are named as BertForPreTraining's state dict; the prefix "bert." may be absent. A site counts as
    calibrated unless all its amplitudes are exactly 1 (the released code's own mark); where any site is not, or has
    fewer timesteps than the model, the whole model is left uncalibrated, whatever it was before. Raises ValueError,
    before anything is copied, where shapes do not match or weights of the encoder, embeddings included, are absent.
    """
    theirs = _with_prefix(tensors)
    report, used = _copy(model, theirs, bert_names, _is_encoders)
    if any(name == "mlm_head.decoder.bias" for name, _ in model.named_parameters()):
        report.remarks += _untied_decoder(theirs)
    _load_amplitudes(spiking_stack(model), theirs, used, report)
    report.unused = sorted(name for name in set(theirs) - used if not name.endswith(_KNOWN_AND_UNUSED))
    return report


def llama_config(settings: Mapping[str, Any], neuron: NeuronConfig) -> SpikeLMConfig:
    """Our configuration for the config.json of a LLaMA or Mistral, with these neurons.

    Raises ValueError where the model is another, or computes otherwise: biases, wider heads, windows of attention.
    """
    kind = settings.get("model_type")
    if kind not in _LLAMA_TYPES:
        # Others have the same names of weights, but scale, offset or leave out what LLaMA does not.
        raise ValueError(f"config.json has model_type {kind!r}: only {' and '.join(_LLAMA_TYPES)} compute as ours do")
    settings = AutoConfig.for_model(**settings).to_dict()  # what the file leaves out
    wanted = {
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "sliding_window": (None,),
        "head_dim": (None, settings["hidden_size"] // settings["num_attention_heads"]),
    }
    if faults := [f"{name} {settings[name]}" for name, ours in wanted.items() if settings.get(name) not in ours]:
        raise ValueError(f"config.json asks for {', '.join(faults)}, which our decoder has not")
    shape = {name: settings[name] for name in _SHAPE_NAMES}
    return SpikeLMConfig(family="llama", neuron=neuron, **shape)


def llama_differences(model: SpikeLMConfig, settings: Mapping[str, Any]) -> list[str]:
    """In what `model` would be another network than the LLaMA of that config.json, beyond vocabulary and head."""
    theirs = llama_config(settings, model.neuron)
    return [
        f"{name} is {getattr(model, name)!r}, the checkpoint's {getattr(theirs, name)!r}"
        for name in _SHAPING_NAMES
        if getattr(model, name) != getattr(theirs, name)
    ]


def load_llama(model: nn.Module, tensors: Mapping[str, Tensor]) -> WarmStartReport:
    """Copy the weights of a LLaMA-shaped checkpoint into `model`, a decoder of ours, and leave it uncalibrated.

    `tensors` are named as LlamaForCausalLM's state dict, as Mistral's are. Raises ValueError, before anything is
    copied, where shapes do not match, weights are absent, or the checkpoint has weights that ours has no place for:
    without biases of its layers, or with its head tied to the words, it would be another network.
    """
    if _LLAMA_WORDS not in tensors:
        raise ValueError(f"this checkpoint has no LLaMA's shape: it lacks {_LLAMA_WORDS}")
    untied = _LLAMA_HEAD in tensors and not torch.equal(tensors[_LLAMA_HEAD], tensors[_LLAMA_WORDS])
    if untied and not any(name == _LLAMA_HEAD for name, _ in model.named_parameters()):
        raise ValueError(f"{_LLAMA_HEAD} differs from {_LLAMA_WORDS}: set the model's tie_word_embeddings to false")
    known = {name for own, _ in model.named_parameters() for name in llama_names(own, tensors)} | {_LLAMA_HEAD}
    if unused := sorted(name for name in set(tensors) - known if not name.endswith(_LLAMA_UNUSED)):
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise ValueError(f"this checkpoint has no LLaMA's shape: no place for {', '.join(unused[:3])}{more}")
    report, _ = _copy(model, tensors, lambda name: llama_names(name, tensors), lambda name: True)
    spiking_stack(model).reset_amplitudes()  # those of other weights mean nothing for these
    return report


def llama_names(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """LLaMA's names for our parameter; the head is the words where the checkpoint has none of its own."""
    if name == _LLAMA_HEAD:
        return [_LLAMA_HEAD if _LLAMA_HEAD in tensors else _LLAMA_WORDS]
    part, kind = name.rsplit(".", 1)
    if part in _LLAMA_NAMES:
        return [f"{_LLAMA_NAMES[part]}.{kind}"]
    index, _, part = part.removeprefix("model.stack.layers.").partition(".")
    return [f"model.layers.{index}.{theirs}.{kind}" for theirs in _LLAMA_LAYER_NAMES[part]]


def _copy(
    model: nn.Module,
    theirs: Mapping[str, Tensor],
    names_of: Callable[[str], list[str]],
    is_needed: Callable[[str], bool],
) -> tuple[WarmStartReport, set[str]]:
    """Copy what `theirs` has for the model's parameters; returns a report and the names of theirs that were used.

    One parameter's tensors are read at a time, so that a large checkpoint need not fit into memory beside the model.
    """
    report, used = WarmStartReport(), set()
    sources = {name: names_of(name) for name, _ in model.named_parameters()}
    report.missing = [name for name, names in sources.items() if not _has(theirs, names)]
    shapes = {name: _joined_shape(theirs, names) for name, names in sources.items() if name not in report.missing}
    _refuse_mismatch(model, shapes, [name for name in report.missing if is_needed(name)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in shapes:
                parameter.copy_(_joined(theirs, sources[name]))
                used.update(sources[name])
    return report, used


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare = ("embeddings.", "encoder.", "pooler.")
    # Checkpoints of TensorFlow's age call the gains and offsets of norms gamma and beta.
    renamed = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for name, tensor in tensors.items()}
    return {("bert." + name if name.startswith(bare) else name): tensor for name, tensor in renamed.items()}


def _has(theirs: Mapping[str, Tensor], names: list[str]) -> bool:
    """Whether the checkpoint has all of these; a parameter for which it has no name has none."""
    return bool(names) and all(name in theirs for name in names)


def _joined(theirs: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """Their tensors of these names as one, along the first axis."""
    return theirs[names[0]] if len(names) == 1 else torch.cat([theirs[name] for name in names])


def _joined_shape(theirs: Mapping[str, Tensor], names: list[str]) -> tuple[int, ...]:
    shape_of = theirs.shape if isinstance(theirs, CheckpointTensors) else lambda name: tuple(theirs[name].shape)
    (first, *rest), *others = map(shape_of, names)
    return sum([first, *(other[0] for other in others)]), *rest


def bert_names(name: str) -> list[str]:
    """BERT's names for our parameter: three for the fused q, k, v."""
    name = f"stack.{name}" if name.startswith("layers.") else name  # of a stack alone
    name = name if name.startswith(("model.", "mlm_head.", "next_sentence_head.")) else f"model.{name}"
    if name.startswith("model.stack.layers."):
        index, rest = name.removeprefix("model.stack.layers.").split(".", 1)
        part, kind = rest.rsplit(".", 1)
        if part == "attention.qkv":
            return [f"bert.encoder.layer.{index}.attention.self.{which}.{kind}" for which in ("query", "key", "value")]
        return [f"bert.encoder.layer.{index}.{_BERT_LAYER_NAMES[part]}.{kind}"]
    for ours, theirs in _BERT_NAMES.items():
        if name.startswith(ours):
            return [theirs + name.removeprefix(ours)]
    return []


def _refuse_mismatch(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], absent: list[str]) -> None:
    faults = [
        f"{name}: the checkpoint has {shapes[name]}, the model {tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if name in shapes and shapes[name] != tuple(parameter.shape)
    ]
    faults += [f"{name}: the checkpoint has none" for name in absent]
    if faults:
        remedy = "change the model's shape, or take another checkpoint"
        raise ValueError("\n  ".join([f"this checkpoint does not fit the model; {remedy}:", *faults]))


def _is_encoders(name: str) -> bool:
    return any(source.startswith(("bert.encoder.", "bert.embeddings.")) for source in bert_names(name))


def _untied_decoder(theirs: Mapping[str, Tensor]) -> list[str]:
    decoder = theirs.get("cls.predictions.decoder.weight")
    if decoder is None or torch.equal(decoder, theirs["bert.embeddings.word_embeddings.weight"]):
        return []
    return ["cls.predictions.decoder.weight: differs from the word embeddings, which are taken in its place"]


def _load_amplitudes(stack: SpikeStack, theirs: Mapping[str, Tensor], used: set[str], report: WarmStartReport) -> None:
    kinds = set(_RELEASED_AMPLITUDES.values()) | {f"attention.self.{which}.act_clip_val" for which in ("key", "value")}
    amplitudes = {name for name in theirs if any(f".{kind}." in name for kind in kinds)}
    used.update(amplitudes)
    stack.reset_amplitudes()  # those of other weights mean nothing for these
    if not amplitudes or not stack.amplitudes.numel():
        return
    report.remarks += _differing_copies(theirs)
    T = stack.config.num_timesteps
    sites = [_site_amplitudes(theirs, site_name) for site_name in stack.site_names]
    if any(len(site) < T for site in sites):
        report.remarks.append("the checkpoint has amplitudes for fewer timesteps: calibrate_amplitudes is needed")
        return
    if any(bool((site == 1).all()) for site in sites):
        report.remarks.append("the checkpoint's amplitudes are not calibrated (all 1): calibrate_amplitudes is needed")
        return
    stack.amplitudes.copy_(torch.stack([site[:T] for site in sites]))
    stack.calibrated.fill_(True)


def _site_amplitudes(theirs: Mapping[str, Tensor], site_name: str) -> Tensor:
    """The checkpoint's amplitudes of a site, first timestep first, for as many timesteps as it has."""
    layer, site = site_name.split(".")
    prefix = f"bert.encoder.layer.{layer.removeprefix('layer')}.{_RELEASED_AMPLITUDES[site]}"
    values: list[Tensor] = []
    while (name := f"{prefix}.{len(values)}") in theirs:
        values.append(theirs[name].reshape(1))
    return torch.cat(values) if values else torch.empty(0)


def _differing_copies(theirs: Mapping[str, Tensor]) -> list[str]:
    """The released code keeps three copies of the shared neuron's amplitudes, of which query's is taken."""
    remarks = []
    for name in theirs:
        if "self.query.act_clip_val" not in name:
            continue
        for which in ("key", "value"):
            copy = theirs.get(name.replace("self.query", f"self.{which}"))
            if copy is not None and not torch.equal(copy, theirs[name]):
                remarks.append(f"{name}: {float(theirs[name]):.6g} is taken, {which}'s copy {float(copy):.6g} differs")
    return remarks
