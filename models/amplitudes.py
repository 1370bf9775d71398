"""The amplitude table: how the spike amplitudes of all sites are measured, calibrated and tracked.

A site is a place where a neuron stands; the stack owns one fp32 buffer `amplitudes` [sites, T] and a flag `calibrated`.
alpha = k * mean|m| (elastic neurons, Xing et al., ICML 2024), where the mean is over all counted elements of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import NeuronConfig
from .neuron import AMPLITUDE_FLOOR, LIF_THRESHOLD, run_lif, run_memoryless, run_neuron

STATISTICS = ("membrane", "count", "positive", "negative", "saturated")
"""What is summed per site and timestep: |m|, elements, spikes of +1, spikes of -1, elements with |m| > alpha."""


@dataclass(frozen=True)
class SpikeStats:
    """Sums over the counted elements of one or more forwards: `sums` [sites, T, 5], fp64, ordered as STATISTICS."""

    sums: Tensor

    @classmethod
    def zeros(cls, sites: int, num_timesteps: int, device: torch.device | None = None) -> SpikeStats:
        """Statistics of no forward at all, to add to."""
        return cls(torch.zeros(sites, num_timesteps, len(STATISTICS), dtype=torch.float64, device=device))

    def __add__(self, other: SpikeStats) -> SpikeStats:
        return SpikeStats(self.sums + other.sums)

    def all_reduced(self) -> SpikeStats:
        """The sums over all ranks: one collective, in which every rank must take part."""
        return SpikeStats(_all_reduce_sum(self.sums.clone()))

    @property
    def mean_membrane(self) -> Tensor:
        """mean|m|, [sites, T]."""
        return self._share(self.sums[..., 0])

    @property
    def firing_rate(self) -> Tensor:
        """Share of elements that spike, of either sign, [sites, T]."""
        return self._share(self.sums[..., 2] + self.sums[..., 3])

    @property
    def saturated_share(self) -> Tensor:
        """Share of elements whose membrane lies beyond the amplitude, where no gradient passes, [sites, T]."""
        return self._share(self.sums[..., 4])

    def spikes_per_token(self, width: int) -> float:
        """Spikes of either sign at all sites and timesteps for each counted token; `width` is the first site's."""
        return float(self.sums[..., 2:4].sum() * width / self.sums[0, 0, 1].clamp(min=1))

    def _share(self, total: Tensor) -> Tensor:
        return total / self.sums[..., 1].clamp(min=1)


class BlockNeurons:
    """The neurons of one block during one forward: fires site after site and keeps each site's statistics.

    Args:
        config: which neuron.
        amplitudes: the block's rows of the table, [sites, T]; filled in site by site where `calibrate` is set.
        counted_BL: which tokens count in the statistics (None: all).
        calibrate: measure the amplitudes instead of reading them. Every rank must take part.
        carries: where T is run in chunks, what each site's membrane leaves to the next chunk, by site; updated by fire.
    """

    def __init__(
        self,
        config: NeuronConfig,
        amplitudes: Tensor,
        counted_BL: Tensor | None,
        calibrate: bool = False,
        carries: dict[int, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.amplitudes = amplitudes
        self.counted_BL = counted_BL
        self.calibrate = calibrate
        self.carries = carries
        self._sums: list[list[Tensor]] = []

    def fire(self, site: int, x_TBLD: Tensor, *, memoryless: bool = False) -> Tensor:
        """What the linear layer behind `site` sees: spikes times amplitude, or x itself for kind none."""
        config = self.config
        if config.kind == "none":
            return x_TBLD
        self._sums.append([])
        carry = None if self.carries is None else self.carries.get(site)
        if config.kind == "lif":
            spikes_TBLD, carry = run_lif(
                x_TBLD, leak=config.leak, memoryless=memoryless, carry=carry, observe=self._observe_lif
            )
            return self._leave(site, spikes_TBLD, carry)
        alpha_T = self.amplitudes[site]

        def observe(t: int, m_BLD: Tensor) -> None:
            if self.calibrate:
                alpha_T[t] = self._calibrated_amplitude(m_BLD)
            self._sums[-1].append(_measure(m_BLD, alpha_T[t], self.counted_BL))

        if memoryless:
            return run_memoryless(x_TBLD, alpha_T, observe=observe)
        spikes_TBLD, carry = run_neuron(
            x_TBLD, alpha_T, leak=config.leak, reset=config.reset, carry=carry, observe=observe
        )
        return self._leave(site, spikes_TBLD, carry)

    def worth(self, site: int, dtype: torch.dtype) -> Tensor | None:
        """What a spike of `site` is worth in `fire`'s output, to the bit, [T]; None for kind none."""
        if self.config.kind == "none":
            return None
        if self.config.kind == "lif":
            return torch.ones(self.config.num_timesteps, dtype=dtype, device=self.amplitudes.device)
        compute = torch.promote_types(dtype, torch.float32)
        return self.amplitudes[site].to(compute).clamp(min=AMPLITUDE_FLOOR).to(dtype)

    def stats(self) -> Tensor:
        """The sums of SpikeStats for the sites that have fired, [sites, T, 5]; for kind none [0, T, 5]."""
        if not self._sums:
            return torch.zeros(0, self.config.num_timesteps, len(STATISTICS), dtype=torch.float64)
        return torch.stack([torch.stack(per_timestep) for per_timestep in self._sums])

    def _leave(self, site: int, spikes_TBLD: Tensor, carry: Tensor | None) -> Tensor:
        if self.carries is not None and carry is not None:
            self.carries[site] = carry
        return spikes_TBLD

    def _observe_lif(self, t: int, m_BLD: Tensor) -> None:
        self._sums[-1].append(_measure_lif(m_BLD, self.counted_BL))

    def _calibrated_amplitude(self, m_BLD: Tensor) -> Tensor:
        total = m_BLD.abs().sum(-1, dtype=torch.float64)
        width = torch.full_like(total, m_BLD.shape[-1])
        sums = _all_reduce_sum(_sum_counted([total, width], self.counted_BL))
        return self.config.frequency * sums[0] / sums[1]


def calibrate_amplitudes(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Measure all amplitudes on `batch`, in the order of the flow, over all ranks, and mark them as calibrated.

    `model` is a model of ours or an engine around it; all ranks call it, each with its own share of the batch, which
    may be empty. Labels may be given and save the head most of its work. Dropout is off meanwhile and no random number
    is drawn. A calibrated model is calibrated anew.
    Raises ValueError where the batch has no token that counts, or activations that are not finite.
    """
    stack = spiking_stack(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(**batch, calibrate=True)
    finally:
        for module, training in modes.items():
            module.training = training
    if not stack.amplitudes.isfinite().all():
        stack.calibrated.fill_(False)
        raise ValueError(
            "calibration gave amplitudes that are not finite: "
            "give a batch with tokens that are not padding, and weights that are finite"
        )


def update_amplitudes(model: nn.Module, stats: SpikeStats) -> SpikeStats:
    """Once per optimizer step: move tracked amplitudes towards k * mean|m|; returns the statistics of all ranks.

    `stats` holds this rank's sums over all micro-batches of the step; one all-reduce makes them global, so that the
    amplitudes stay bit-equal on all ranks: alpha <- alpha + (1 - momentum) * (k * mean|m| - alpha), in fp64.
    """
    stack = spiking_stack(model)
    total = stats.all_reduced()
    config: NeuronConfig = stack.config.neuron
    if config.kind == "elastic" and config.amplitude == "tracked":
        alpha = stack.amplitudes.double()
        target = config.frequency * total.mean_membrane
        moved = alpha + (1 - config.momentum) * (target - alpha)
        stack.amplitudes.copy_(torch.where(total.sums[..., 1] > 0, moved, alpha))
    return total


def keep_timesteps(model: nn.Module, num_timesteps: int) -> None:
    """Let a model of ours run over its first `num_timesteps` timesteps only, with the amplitudes that these have.

    Raises ValueError for none, and for more than there are: those would need amplitudes, and so a calibration.
    """
    stack = spiking_stack(model)
    neuron = stack.config.neuron
    if not 1 <= num_timesteps <= neuron.num_timesteps:
        raise ValueError(
            f"num_timesteps is {num_timesteps}, but the model has amplitudes for {neuron.num_timesteps}: use 1 to "
            f"{neuron.num_timesteps}, or build a model with more and calibrate it"
        )
    stack.config.neuron = replace(neuron, num_timesteps=num_timesteps)
    for layer in stack.layers:
        layer.neuron = stack.config.neuron
    stack.amplitudes = stack.amplitudes[:, :num_timesteps].clone()


def spiking_stack(model: nn.Module) -> nn.Module:
    """The one submodule of `model` that owns the amplitude table; ValueError where there is none."""
    for module in model.modules():
        if "amplitudes" in module._buffers:
            return module
    raise ValueError(f"{type(model).__name__} has no spiking stack: pass a SpikeLM model or an engine around one")


def _measure(m_BLD: Tensor, alpha: Tensor, counted_BL: Tensor | None) -> Tensor:
    """STATISTICS of one site and timestep, [5] in fp64."""
    a = alpha.to(m_BLD.dtype).clamp(min=AMPLITUDE_FLOOR)
    size = m_BLD.abs()
    membrane = size.sum(-1)
    # Counted as sums of 0 and 1 in one reused buffer: on CPUs far quicker than comparing into bool.
    saturated = size.gt_(a).sum(-1)
    positive = torch.gt(m_BLD, 0.5 * a, out=size).sum(-1)
    negative = torch.lt(m_BLD, -0.5 * a, out=size).sum(-1)
    width = torch.full_like(membrane, m_BLD.shape[-1])
    return _sum_counted([membrane, width, positive, negative, saturated], counted_BL)


def _measure_lif(m_BLD: Tensor, counted_BL: Tensor | None) -> Tensor:
    size = m_BLD.abs()
    membrane = size.sum(-1)
    spikes = torch.ge(m_BLD, LIF_THRESHOLD, out=size).sum(-1)
    none = torch.zeros_like(spikes)
    width = torch.full_like(spikes, m_BLD.shape[-1])
    return _sum_counted([membrane, width, spikes, none, none], counted_BL)


def _sum_counted(per_token: list[Tensor], counted_BL: Tensor | None) -> Tensor:
    """Sums of [B, L] statistics over the counted tokens, in fp64."""
    values = torch.stack([value.double() for value in per_token])
    if counted_BL is not None:
        # where, not a product: a pad that is NaN or inf must not enter the sums.
        values = torch.where(counted_BL, values, 0.0)
    return values.sum(dim=(1, 2))


def _all_reduce_sum(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
