"""How many bytes a training pass holds, by phase: counted on tensors that have no memory (torch's meta device).

The model's own code runs, forward and backward, so that nothing here repeats what it keeps. Only two things are not its
own: kernels, which are those of a kind of device, and which positions count, of which there is a number alone.

Legend: B batch, L tokens, D width, H heads, V vocabulary, N positions that count, T spike timesteps.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.amplitudes import spiking_stack

DeviceKind = Literal["gpu", "cpu"]


class LiveBytes(TorchDispatchMode):
    """While it is active, counts the bytes of all storages that operators make, from when they are made to their end.

    Only those on devices of type `device` count, and none that were there before, such as weights, though operators
    return views of them. Memory that an operator takes and frees within itself is not seen.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.live = 0
        self.peak = 0
        self._sizes: dict[weakref.ref, int] = {}

    def restart_peak(self) -> int:
        """The peak since the last restart; the next begins at what lives now."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(args, kwargs):
            self._count(storage, 0)  # where it is not known, it was there before
        for storage in self._storages(result):
            self._count(storage, storage.nbytes())
        return result

    def _storages(self, *values: Any) -> Iterator[torch.UntypedStorage]:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.device.type == self.device:
                yield value.untyped_storage()

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        reference = weakref.ref(storage, self._release)
        if reference not in self._sizes:
            self._sizes[reference] = size
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, reference: weakref.ref) -> None:
        self.live -= self._sizes.pop(reference, 0)


@contextmanager
def kernels_of(device: DeviceKind) -> Iterator[None]:
    """Meanwhile attention and dropout are the operators that they are on the device, of which meta has its own.

    On GPUs both are fused: of the attention the output and a sum for each query are kept, of dropout a byte an element.
    On CPUs the attention is fused where it has no dropout; with dropout torch forms its weights.
    """
    # No TorchFunctionMode: torch switches it off within backward, which runs checkpointed layers again.
    own = F.scaled_dot_product_attention, F.dropout
    F.scaled_dot_product_attention = _attend_on_gpu if device == "gpu" else partial(_attend_on_cpu, own[0])
    F.dropout = _drop_on_gpu if device == "gpu" else own[1]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = own


def _attend_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # the kernel knows only what is added to scores
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, True, dropout_p, is_causal)[0]


def _attend_on_cpu(
    own: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> Tensor:
    if dropout_p:
        return own(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


def _drop_on_gpu(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


class CountedPositions(TorchDispatchMode):
    """Where a mask picks elements, picks `number` of them: how many it is depends on data, which there is none of."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            source, (mask, *_) = args
            return source.new_empty(self.number, *source.shape[mask.dim() :])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class PassBytes:
    """What a forward and backward holds over weights, batch included: bytes.

    Of gradients only those that are being made are counted. `kept` lives behind the layers' forward, `last_layer` of it
    since the layer before the last; the others are peaks: of the layers' forward; of the head, forward and backward; of
    the layers' backward; and of what is behind that, the embeddings' backward.
    """

    kept: float
    forward: float
    head: float
    backward: float
    embeddings: float
    last_layer: float

    @property
    def peak(self) -> float:
        return max(self.forward, self.head, self.backward, self.embeddings)

    def with_layers(self, more: int) -> PassBytes:
        """The same with so many layers more, each of which keeps what the last one does.

        All peaks but the last fall where everything is kept; there nothing of the layers is left.
        """
        kept = more * self.last_layer
        peaks = {name: getattr(self, name) + kept for name in ("kept", "forward", "head", "backward")}
        return replace(self, **peaks)


def trace_pass(
    model: nn.Module, batch: Mapping[str, Tensor], losses: tuple[str, ...], counted: int, device: DeviceKind
) -> PassBytes:
    """Run a model on the meta device, forward and backward, and count.

    Args:
        model: in the types that are trained, with checkpointing and backend set; a model of ours, fresh. Where its
            firing rate is trained, that is part of what is differentiated.
        batch: tensors on the meta device, as pipeline.objectives makes them.
        losses: names of pipeline.objectives.LABELS.
        counted: how many labels count.
    """
    stack = spiking_stack(model)
    stack.calibrated = torch.tensor(True)  # read by the model, and so in real memory
    model.train()
    live, marks, behind_layers = LiveBytes("meta"), {}, [0, 0]

    def leave(parameter: nn.Parameter) -> None:
        parameter.grad = None  # goes into a bucket

    def mark(name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            marks[name] = live.restart_peak()

        return note

    def behind_stack(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        marks["kept"] = live.live
        mark("forward")()
        output[0].register_hook(mark("head"))

    def behind_embeddings(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(mark("backward"))

    hooks = [parameter.register_post_accumulate_grad_hook(leave) for parameter in model.parameters()]
    hooks += [stack.register_forward_hook(behind_stack)]
    hooks += [layer.register_forward_hook(lambda *_: behind_layers.append(live.live)) for layer in stack.layers]
    hooks += [model.model.embeddings.register_forward_hook(behind_embeddings)]
    with kernels_of(device), CountedPositions(counted), live:
        output = model(**{name: tensor.clone() for name, tensor in batch.items()})
        sums = [getattr(output, f"{name}_loss_sum") for name in losses]
        if output.firing_sum is not None and output.firing_sum.requires_grad:
            sums.append(output.firing_sum.to(sums[0].dtype))
        torch.stack(sums).sum().backward()
        mark("embeddings")()
    for hook in hooks:
        hook.remove()
    return PassBytes(**marks, last_layer=behind_layers[-1] - behind_layers[-2])
