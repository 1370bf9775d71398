"""A proof that a model computes with spikes: its layers multiply weights, and attend to, nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.amplitudes import spiking_stack

REAL_BY_DESIGN = ("queries", "the weights of attention", "residual sums, norms and activations", "embeddings")
"""What of a stack never spikes."""


@dataclass(frozen=True)
class SpikeCheck:
    """What a forward has multiplied in its layers.

    Attributes:
        spiking: names of linear layers, keys and values that were spikes: at every timestep of a forward 0, and one
            amplitude with either sign
        silent: names of those of them that no spike was seen of
        faults: one line for each that was not, or that no product was seen of
        real: what stands outside the layers, or does not spike by design
    """

    spiking: tuple[str, ...]
    silent: tuple[str, ...]
    faults: tuple[str, ...]
    real: tuple[str, ...]


def check_spikes(model: nn.Module, inputs: Mapping[str, Tensor]) -> SpikeCheck:
    """Watch a forward of `model` on `inputs`. Raises ValueError for a model whose neurons are of kind none."""
    stack = spiking_stack(model)
    if stack.config.neuron.kind == "none":
        raise ValueError("the model's neurons are of kind none: all its products are of real numbers")
    within = {id(module) for module in stack.modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    watched = {name: module for name, module in linears.items() if id(module) in within}
    expected = [*watched, *(f"{what} of layer {n}" for n in range(len(stack.layers)) for what in ("keys", "values"))]
    watch = _Watch({id(module.weight): name for name, module in watched.items()}, stack.config.num_timesteps)
    with torch.no_grad(), watch:
        model(**inputs)
    unseen = {name: "no product of it was seen" for name in expected if name not in watch.seen}
    found = watch.seen | unseen
    return SpikeCheck(
        spiking=tuple(name for name, fault in found.items() if fault is None),
        silent=tuple(name for name, fault in found.items() if fault is None and name not in watch.fired),
        faults=tuple(f"{name}: {fault}" for name, fault in found.items() if fault is not None),
        real=(*REAL_BY_DESIGN, *(name for name in linears if name not in watched)),
    )


class _Watch(TorchFunctionMode):
    """Looks at what goes into linear layers, by their weights, and into attention, layer after layer."""

    def __init__(self, names: Mapping[int, str], num_timesteps: int) -> None:
        super().__init__()
        self.seen: dict[str, str | None] = {}
        self.fired: set[str] = set()
        self._names = names
        self._num_timesteps = num_timesteps
        self._num_attentions = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and id(args[1]) in self._names:
            self._look(self._names[id(args[1])], args[0])
        elif func is F.scaled_dot_product_attention:
            for what, tensor in (("keys", args[1]), ("values", args[2])):
                self._look(f"{what} of layer {self._num_attentions}", tensor)
            self._num_attentions += 1
        return func(*args, **(kwargs or {}))

    def _look(self, name: str, x: Tensor) -> None:
        """Timesteps come first, as an axis of their own or as the slower part of one."""
        for t, values in enumerate(x.reshape(self._num_timesteps, -1)):
            sizes = values.abs().unique()
            if len(sizes[sizes != 0]) > 1:
                self.seen[name] = f"sees {len(sizes):,} different sizes at timestep {t + 1}, not 0 and one amplitude"
                return
        self.seen.setdefault(name, None)
        if x.any():
            self.fired.add(name)
