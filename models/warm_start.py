"""Weights of BERT checkpoints, ordinary or of the released SpikeLM, into our encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .amplitudes import spiking_stack
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
    used: set[str] = set()
    report = WarmStartReport()
    wanted = {name: _source(name, theirs, used) for name, _ in model.named_parameters()}
    _refuse_mismatch(dict(model.named_parameters()), wanted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if wanted[name] is None:
                report.missing.append(name)
            else:
                parameter.copy_(wanted[name])
    if "mlm_head.decoder.bias" in wanted:
        report.remarks += _untied_decoder(theirs)
    _load_amplitudes(spiking_stack(model), theirs, used, report)
    report.unused = sorted(name for name in set(theirs) - used if not name.endswith(_KNOWN_AND_UNUSED))
    return report


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare = ("embeddings.", "encoder.", "pooler.")
    # Checkpoints of TensorFlow's age call the gains and offsets of norms gamma and beta.
    renamed = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for name, tensor in tensors.items()}
    return {("bert." + name if name.startswith(bare) else name): tensor for name, tensor in renamed.items()}


def _source(name: str, theirs: Mapping[str, Tensor], used: set[str]) -> Tensor | None:
    """Their tensor for our parameter `name` (None where they have none)."""
    sources = bert_names(name)
    if not sources or any(source not in theirs for source in sources):
        return None
    used.update(sources)
    return torch.cat([theirs[source] for source in sources])


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


def _refuse_mismatch(parameters: Mapping[str, Tensor], wanted: Mapping[str, Tensor | None]) -> None:
    faults = [
        f"{name}: the checkpoint has {tuple(source.shape)}, the model {tuple(parameters[name].shape)}"
        for name, source in wanted.items()
        if source is not None and source.shape != parameters[name].shape
    ]
    faults += [
        f"{name}: the checkpoint has none" for name, source in wanted.items() if source is None and _is_encoders(name)
    ]
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
