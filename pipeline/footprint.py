"""What a run needs, from its recipe alone: memory by part and moment, and operations. No weight is made, none is read.

Activations are traced (pipeline.tracing). What DeepSpeed holds is written down here from version 0.19.8's
stage_1_and_2.py and stage3.py, and held against engines that ran by tests.bench.bench_plan.

Legend: B batch, L tokens, D width, V vocabulary, N positions that count, T spike timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.amplitudes import spiking_stack
from models.config import preset
from models.modeling import (
    SpikeLMForCausalLM,
    SpikeLMForMaskedLM,
    SpikeLMForPreTraining,
    SpikeLMPreTrainedModel,
)
from pipeline.config import RunConfig, accumulation_steps, build_ds_config, is_decoder
from pipeline.phases import phases_of
from pipeline.tracing import DeviceKind, PassBytes, trace_pass

MASTER, MOMENTS = 4, 8
"""Bytes that AdamW needs for a weight in any precision: its fp32 copy, and the two running means."""

STEP_SPACE: dict[DeviceKind, int] = {"gpu": 4, "cpu": 8}
"""Bytes for a weight while torch's AdamW updates it: the root of a running mean, on CPUs also its quotient."""

SPECIAL_TOKENS = 3
"""Of a row of sentence pairs those are never masked: [CLS] and twice [SEP]."""


TRACED_LAYERS = 3
"""The first layer's input is one timestep's; from the second on they are alike."""


@dataclass(frozen=True)
class Data:
    """What of the shards decides a model's size and its batches; of several phases the last one's samples."""

    vocab_size: int
    sample_length: int


@dataclass(frozen=True)
class Cluster:
    """Machines to train on: `memory` and `reserve` are bytes of a device, the latter what libraries take of it."""

    nodes: int
    devices: int
    memory: float
    reserve: float
    kind: DeviceKind

    @property
    def size(self) -> int:
        """Devices, and so processes, altogether."""
        return self.nodes * self.devices


Parts = dict[str, float]
"""Bytes by what they hold."""


@dataclass(frozen=True)
class Footprint:
    """Memory of one process: on its device, at each moment of a step, and on the host beside it."""

    moments: dict[str, Parts]
    host: Parts

    @property
    def totals(self) -> dict[str, float]:
        """Bytes on the device by moment."""
        return {moment: sum(parts.values()) for moment, parts in self.moments.items()}

    @property
    def peak(self) -> float:
        """The most bytes that the device has to hold at once."""
        return max(self.totals.values())


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a step over all devices, a product and its sum as two."""

    layers: float
    recomputed: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.recomputed + self.attention + self.head

    def repeated(self, steps: int) -> Work:
        """That of so many steps."""
        return Work(*(steps * part for part in astuple(self)))


def empty_model(config: RunConfig, vocab_size: int) -> SpikeLMPreTrainedModel:
    """The recipe's model on the meta device: shapes without memory."""
    settings = config.model
    model_config = preset(settings.preset, neuron=settings.neuron, **{"vocab_size": vocab_size, **settings.overrides})
    masked = SpikeLMForPreTraining if config.objective.next_sentence else SpikeLMForMaskedLM
    with torch.device("meta"):
        return (SpikeLMForCausalLM if model_config.traits.causal else masked)(model_config)


def count_parameters(model: nn.Module) -> int:
    """Weights, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def counted_positions(config: RunConfig, sample_length: int) -> int:
    """Positions of a micro-batch whose loss counts, where all rows are full: more are never."""
    if is_decoder(config.model):
        each = sample_length - 1
    else:
        each = max(1, round(config.objective.mask_probability * (sample_length - SPECIAL_TOKENS)))
    return config.training.micro_batch_size * each


def pass_bytes(config: RunConfig, data: Data, device: DeviceKind) -> PassBytes:
    """What forward and backward of a micro-batch hold over weights and gradients, in one process."""
    layers = empty_model(config, data.vocab_size).config.num_hidden_layers
    traced = min(layers, TRACED_LAYERS)
    overrides = {**config.model.overrides, "num_hidden_layers": traced}
    return _traced(changed(config, "model", overrides=overrides), data, device).with_layers(layers - traced)


def step_work(config: RunConfig, data: Data) -> Work:
    """The operations of one optimizer step.

    A product of matrices costs 2 for each weight and token in the forward and 4 in the backward; the layers' weights
    see T timesteps. Scores and their use cost 4 L D a token, timestep and layer, whatever the mask hides.
    """
    model = empty_model(config, data.vocab_size)
    stack, (D, T) = spiking_stack(model), (model.config.hidden_size, model.config.num_timesteps)
    rows = config.training.global_batch_size
    passes = rows * data.sample_length * T
    products = 2 * passes * sum(module.weight.numel() for module in stack.modules() if isinstance(module, nn.Linear))
    scores = 4 * passes * data.sample_length * D * len(stack.layers)
    counted = counted_positions(config, data.sample_length) * rows // config.training.micro_batch_size
    head = model.lm_head if is_decoder(config.model) else model.mlm_head
    weights = sum(module.weight.numel() for module in head.modules() if isinstance(module, nn.Linear))
    recomputed = recomputed_forwards(config, T) * (products + scores)
    if config.engine.recompute_hidden:
        recomputed += 2 * passes * sum(layer.mlp.up.weight.numel() for layer in stack.layers)
    return Work(3 * products, recomputed, 3 * scores, 6 * counted * weights)


def phases_as_runs(config: RunConfig, data: Data) -> list[tuple[RunConfig, Data]]:
    """Every phase of a run as a recipe and the data of its own, which the other functions here take."""
    *earlier, last = [phase.config for phase in phases_of(config)]
    return [*((each, replace(data, sample_length=each.data.sample_length)) for each in earlier), (last, data)]


def run_work(config: RunConfig, data: Data) -> Work:
    """The operations of all steps of all phases."""
    of_phases = [step_work(*run).repeated(run[0].training.total_steps) for run in phases_as_runs(config, data)]
    return Work(*map(sum, zip(*map(astuple, of_phases), strict=True)))


Traces = dict[tuple[int, int, str, bool], PassBytes]
"""What passes of one model were found to hold, by micro-batch, sample length and what is run again."""


def largest_phase(
    config: RunConfig, data: Data, cluster: Cluster, traces: Traces | None = None
) -> tuple[Footprint, RunConfig, Data]:
    """What the phase needs whose peak is the highest, its recipe and its data; `traces` are used, and added to.

    Raises ValueError where the devices do not divide a global batch.
    """
    traces = {} if traces is None else traces

    def need(own: RunConfig, samples: Data) -> Footprint:
        engine = own.engine
        rows = own.training.micro_batch_size
        key = (rows, samples.sample_length, engine.checkpointing, engine.recompute_hidden)
        if key not in traces:
            traces[key] = pass_bytes(own, samples, cluster.kind)
        return footprint(own, samples, cluster, traces[key])

    needs = [(need(*run), *run) for run in phases_as_runs(config, data)]
    return max(needs, key=lambda phase: phase[0].peak)


def recomputed_forwards(config: RunConfig, num_timesteps: int) -> float:
    """How often checkpointing runs the layers' forward again: of cells all but the last one twice."""
    mode, cell = config.engine.checkpointing, config.engine.checkpointing_timesteps
    if mode == "none":
        return 0.0
    if mode == "layer" or cell >= num_timesteps:
        return 1.0
    last = num_timesteps % cell or cell
    return 2 - last / num_timesteps


def footprint(config: RunConfig, data: Data, cluster: Cluster, traced: PassBytes | None = None) -> Footprint:
    """What each process of the run holds; `traced` is what pass_bytes gives, where that is known.

    Raises ValueError where the devices do not divide the global batch.
    """
    states = held_states(config, data, cluster)
    traced = traced or pass_bytes(config, data, cluster.kind)
    standing = {**states.standing, "libraries": cluster.reserve}
    # Activations go as gradients come; but a layer that runs again peaks again, at last beside almost all gradients.
    growing = {} if config.engine.checkpointing == "none" else states.growing
    moments = {
        "forward": {**standing, "activations": traced.forward},
        "head": {**standing, "activations": traced.kept, "logits": traced.head - traced.kept},
        "backward": _sum(standing, states.backward, growing, {"activations": traced.backward}),
        "end": _sum(standing, states.backward, states.reduced, {"activations": traced.embeddings}),
        "step": {**states.step, "libraries": cluster.reserve},
    }
    host = states.host
    if cluster.kind == "cpu":  # the same memory
        moments = {moment: _sum(parts, host) for moment, parts in moments.items()}
        host = {}
    return Footprint(moments, host)


@dataclass(frozen=True)
class States:
    """What DeepSpeed holds in a process.

    Attributes:
        standing: during all passes
        backward: besides, throughout the backward
        growing: besides, what comes while the backward goes on; all of it, as before the last layers
        reduced: besides, what has come at its end
        step: during the optimizer's step, in all
        host: in the memory beside the device, always
    """

    standing: Parts
    backward: Parts
    growing: Parts
    reduced: Parts
    step: Parts
    host: Parts


def held_states(config: RunConfig, data: Data, cluster: Cluster) -> States:
    """The states of a process, from the recipe's ZeRO stage, precision and number of processes."""
    zero = build_ds_config(config, cluster.size, Path())["zero_optimization"]
    width = 2 if config.engine.precision == "bf16" else 4
    model = empty_model(config, data.vocab_size)
    sizes = _sizes(model)
    accumulates = accumulation_steps(config, cluster.size) > 1
    keeps_views = config.engine.checkpointing == "none" and model.config.neuron.kind != "elastic"
    partitioned = _Partitioned(zero, width, sizes, cluster, accumulates, keeps_views)
    return partitioned.weights_too() if zero["stage"] == 3 else partitioned.optimizer()


@dataclass(frozen=True)
class _Sizes:
    total: int
    largest: int
    block: int


def _sizes(model: SpikeLMPreTrainedModel) -> _Sizes:
    sizes = [parameter.numel() for parameter in model.parameters()]
    blocks = [count_parameters(layer) for layer in spiking_stack(model).layers]
    return _Sizes(sum(sizes), max(sizes), max(blocks, default=0))


@dataclass(frozen=True)
class _Partitioned:
    zero: Mapping[str, Any]
    width: int
    sizes: _Sizes
    cluster: Cluster
    accumulates: bool
    keeps_views: bool

    @property
    def share(self) -> float:
        """Weights of one process."""
        return math.ceil(self.sizes.total / self.cluster.size)

    def optimizer(self) -> States:
        """Stages 1 and 2: whole weights; optimizer and (2) gradients partitioned."""
        width, share, whole = self.width, self.share, self.sizes.total * self.width
        bucket = self._bucket_size() * width * (2 if self.zero.get("overlap_comm", False) else 1)
        if self._offloads("offload_optimizer"):
            spare = self.sizes.largest * width  # through which gradients go, on both sides
            device = {"weights": whole, "buckets": spare}
            host = {
                "weights": share * width,
                "gradients": share * (MASTER + (width if self.accumulates else 0)) + spare,
                "optimizer": share * (MASTER + MOMENTS),
            }
            return States(device, {"buckets": bucket + self._flattened()}, {}, {}, device, host)
        device = {"weights": whole, "optimizer": share * (MASTER + MOMENTS)}
        reduced = {"gradients": share * width}
        step = _sum(device, reduced, self._step_space(share))
        if self.zero["stage"] == 2:
            standing = _sum(device, reduced) if self.accumulates else device
            growing = reduced if self.sizes.total > self._bucket_size() else {}
            return States(standing, {"buckets": bucket + self._flattened()}, growing, reduced, step, {})
        unreduced = {"gradients": whole, "buckets": bucket}  # wait for the last micro-batch, and so does the bucket
        copied = {"buckets": self._flattened()}
        if self.accumulates:
            return States(_sum(device, unreduced), copied, {}, reduced, step, {})
        growing = {"gradients": whole}
        return States(device, {"buckets": bucket}, growing, _sum(growing, copied, reduced), step, {})

    def weights_too(self) -> States:
        """Stage 3: all partitioned; weights are gathered for a layer's passes."""
        width, share = self.width, self.share
        optimizer_offloaded, weights_offloaded = self._offloads("offload_optimizer"), self._offloads("offload_param")
        device, host = {"buckets": self._bucket_size() * width}, {}
        (host if weights_offloaded else device)["weights"] = share * width
        (host if optimizer_offloaded else device)["gradients"] = share * width
        (host if optimizer_offloaded else device)["optimizer"] = share * (MASTER + MOMENTS)
        if optimizer_offloaded:
            host["gradients"] += share * MASTER
            step = dict(device)
        else:
            step = _sum(device, self._step_space(min(share, self.zero.get("sub_group_size", 1e9))))
        standing = {**device, "gathered": self._gathered(weights_offloaded)}
        return States(standing, {"buckets": self._flattened()}, {}, {}, step, host)

    def _step_space(self, weights: float) -> Parts:
        """What AdamW needs for so many weights at once: their gradient in fp32, and space."""
        return {"gradients": weights * MASTER, "optimizer": weights * STEP_SPACE[self.cluster.kind]}

    def _gathered(self, weights_offloaded: bool) -> float:
        """Weights that are whole on the device in a pass. A process of its own uses what it has there as it is.

        DeepSpeed lets go of a layer's weights behind its forward, but torch's products keep views of them for the
        backward: all of them, unless layers run again. Behind elastic neurons they keep the parameter, not its weights.
        """
        if self.cluster.size == 1 and (self.cluster.kind == "cpu" or not weights_offloaded):
            return 0
        if self.keeps_views:
            return self.width * self.sizes.total
        ahead = self.zero.get("stage3_prefetch_bucket_size", 5e7) if self.cluster.kind == "gpu" else 0
        return self.width * min(self.sizes.total, max(self.sizes.block, self.sizes.largest) + ahead)

    def _bucket_size(self) -> int:
        return int(self.zero.get("reduce_bucket_size", 5e8))

    def _flattened(self) -> float:
        """The copy of a bucket that is summed over processes."""
        if self.cluster.size == 1:
            return 0
        return self.width * min(self.sizes.total, max(self._bucket_size(), self.sizes.largest))

    def _offloads(self, what: str) -> bool:
        return (self.zero.get(what) or {}).get("device", "none") != "none"


def _sum(*several: Parts) -> Parts:
    result: Parts = {}
    for parts in several:
        for name, size in parts.items():
            result[name] = result.get(name, 0) + size
    return result


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """A recipe with other values in one of its sections."""
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _traced(config: RunConfig, data: Data, device: DeviceKind) -> PassBytes:
    model = empty_model(config, data.vocab_size)
    if config.engine.precision == "bf16":
        model = model.to(torch.bfloat16)
    engine, stack = config.engine, spiking_stack(model)
    stack.set_checkpointing(engine.checkpointing, engine.checkpointing_timesteps, engine.recompute_hidden)
    is_triton = device == "gpu" and engine.spike_backend == "auto"
    stack.set_spike_backend("triton" if is_triton else engine.spike_backend, torch.device("meta"))
    stack.train_firing_rate(config.training.firing_penalty > 0)
    model.logits_at_once = engine.logits_at_once
    batch, losses = _batch(config, data.sample_length)
    return trace_pass(model, batch, losses, counted_positions(config, data.sample_length), device)


def _batch(config: RunConfig, sample_length: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A micro-batch without memory, as pipeline.objectives makes it, and its losses."""
    rows = config.training.micro_batch_size
    names, losses = ["input_ids", "attention_mask", "labels"], ("masked_lm",)
    names += ["position_ids"] if is_decoder(config.model) else ["token_type_ids"]
    ids = torch.empty(rows, sample_length, dtype=torch.long, device="meta")
    batch = dict.fromkeys(names, ids)
    if is_decoder(config.model):
        return batch, ("causal_lm",)
    if config.objective.next_sentence:
        batch["next_sentence_label"], losses = ids[:, 0], ("masked_lm", "next_sentence")
    return batch, losses
