"""The amplitude table: how the spike amplitudes of all sites are measured, calibrated and tracked.

A site is a place where a neuron stands; the stack owns one fp32 buffer `amplitudes` [sites, T] and a flag `calibrated`.
alpha = k * mean|m| (elastic neurons, Xing et al., ICML 2024), where the mean is over all counted elements of all ranks
and k is the site's (NeuronConfig.frequency_of).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SITES, NeuronConfig
from .neuron import LIF_THRESHOLD, run_lif, run_memoryless, run_neuron
from .spike_linear import Activation, Firing, FusedActivation, KeptAsCodes, spike, spike_linear
from .spike_ops import Backend, decode, resolve_backend, worth

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


def firing_sum(sums: Tensor, width: int) -> Tensor | None:
    """The mean firing rate of all sites and timesteps, summed over the counted tokens; None where nothing spikes.

    Args:
        sums: of SpikeStats, [sites, T, 5], with the gradient that the counts have (SpikeStack.train_firing_rate).
        width: of the first site's input.
    """
    if not len(sums):
        return None
    count = sums[..., 1].detach().clamp(min=1)
    return (sums[..., 2:4].sum(-1) / count).mean() * (count[0, 0] / width)


class BlockNeurons:
    """The neurons of one block during one forward: fires site after site and keeps each site's statistics.

    Args:
        config: which neuron.
        amplitudes: the block's rows of the table, [sites, T]; filled in site by site where `calibrate` is set.
        counted_BL: which tokens count in the statistics (None: all).
        calibrate: measure the amplitudes instead of reading them. Every rank must take part.
        carries: where T is run in chunks, what each site's membrane leaves to the next chunk, by site; updated by fire.
        backend: by what elastic neurons are computed (models.spike_ops).
        checkpointed: the forward is run again for its backward, by a checkpoint that keeps the books of what is kept.
        trains_rate: the statistics' counts of spikes have a gradient.
    """

    def __init__(
        self,
        config: NeuronConfig,
        amplitudes: Tensor,
        counted_BL: Tensor | None,
        calibrate: bool = False,
        carries: dict[int, Tensor] | None = None,
        backend: Backend = "auto",
        checkpointed: bool = False,
        trains_rate: bool = False,
    ) -> None:
        self.config = config
        self.trains_rate = trains_rate
        self.amplitudes = amplitudes
        self.counted_BL = counted_BL
        self.calibrate = calibrate
        self.carries = carries
        self.backend = backend
        self.checkpointed = checkpointed
        self._fire_again: dict[int, Callable[[], Tensor]] = {}
        self._sums: list[Tensor] = []

    def fire(self, site: int, x_TBLD: Tensor, *, memoryless: bool = False) -> Tensor:
        """What stands behind `site` sees: spikes times amplitude, or x itself for kind none."""
        config, carry = self.config, self._carry(site)
        if config.kind == "none":
            return x_TBLD
        if config.kind == "lif":
            sums: list[Tensor] = []
            spikes_TBLD, carry = run_lif(
                x_TBLD,
                leak=config.leak,
                memoryless=memoryless,
                carry=carry,
                observe=lambda t, m_BLD: sums.append(_measure_lif(m_BLD, self.counted_BL)),
            )
            self._sums.append(torch.stack(sums))
            return self._leave(site, spikes_TBLD, carry)
        firing = self._ready(site, x_TBLD, memoryless)
        spikes_TBLD, code, measured, carry = spike(x_TBLD, self.amplitudes[site], carry, firing)
        amplitude_T, width = self.worth(site, x_TBLD.dtype), x_TBLD.shape[-1]
        self._fire_again[site] = partial(decode, code, amplitude_T, width, firing.backend)
        self._count(measured, width)
        return self._leave(site, spikes_TBLD, carry)

    def project(
        self,
        site: int,
        x_TBLD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
        recompute: bool = False,
        before: FusedActivation | None = None,
    ) -> Tensor:
        """The linear layer behind `site`, and the activation behind that: as spike_linear where spikes are elastic.

        `before` is for neurons that fuse activations alone.
        """
        if self.config.kind != "elastic":
            product = F.linear(self.fire(site, x_TBLD), weight, bias)
            return product if activation is None else activation(product)
        firing = self._ready(site, x_TBLD)
        output, measured, carry = spike_linear(
            x_TBLD, weight, bias, self.amplitudes[site], self._carry(site), firing, activation, recompute, before
        )
        self._count(measured, weight.shape[-1])
        return self._leave(site, output, carry)

    def fuse_activations(self, device: torch.device) -> bool:
        """Whether the neuron's own kernel can compute what stands before it; calibration must see its output."""
        if self.config.kind != "elastic" or self.calibrate:
            return False
        return resolve_backend(self.backend, device) == "triton"

    def keeping_codes(
        self, fired: Mapping[int, Tensor], shaped: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[object]:
        """Within it autograd keeps codes of what was fired at some sites, given by site as `shaped` has made it."""
        if self.checkpointed or not self._fire_again.keys() >= fired.keys():
            return nullcontext()
        again = {site: self._fire_again[site] for site in fired}
        return KeptAsCodes([(x, lambda site=site: shaped(again[site]())) for site, x in fired.items()])

    def worth(self, site: int, dtype: torch.dtype) -> Tensor | None:
        """What a spike of `site` is worth in `fire`'s output, to the bit, [T]; None for kind none."""
        if self.config.kind == "none":
            return None
        if self.config.kind == "lif":
            return torch.ones(self.config.num_timesteps, dtype=dtype, device=self.amplitudes.device)
        return worth(self.amplitudes[site], dtype)

    def stats(self) -> Tensor:
        """The sums of SpikeStats for the sites that have fired, [sites, T, 5]; for kind none [0, T, 5]."""
        if not self._sums:
            return torch.zeros(0, self.config.num_timesteps, len(STATISTICS), dtype=torch.float64)
        return torch.stack(self._sums)

    def _ready(self, site: int, x_TBLD: Tensor, memoryless: bool = False) -> Firing:
        """How an elastic neuron fires, its amplitudes calibrated where that is asked for."""
        reset = "memoryless" if memoryless else self.config.reset
        if self.calibrate:
            self._calibrate(site, x_TBLD, memoryless)
        backend = resolve_backend(self.backend, x_TBLD.device)
        return Firing(reset, self.config.leak, backend, self.trains_rate, leaves=self.carries is not None)

    def _calibrate(self, site: int, x_TBLD: Tensor, memoryless: bool) -> None:
        alpha_T, frequency = self.amplitudes[site], self.config.frequency_of(SITES[site])

        def observe(t: int, m_BLD: Tensor) -> None:
            total = m_BLD.abs().sum(-1, dtype=torch.float64)
            width = torch.full_like(total, m_BLD.shape[-1])
            sums = _all_reduce_sum(_sum_counted(torch.stack([total, width]), self.counted_BL))
            alpha_T[t] = frequency * sums[0] / sums[1]

        if memoryless:
            run_memoryless(x_TBLD, alpha_T, observe=observe)
        else:
            run_neuron(x_TBLD, alpha_T, leak=self.config.leak, reset=self.config.reset, observe=observe)

    def _carry(self, site: int) -> Tensor | None:
        return None if self.carries is None else self.carries.get(site)

    def _leave(self, site: int, output: Tensor, carry: Tensor | None) -> Tensor:
        if self.carries is not None and carry is not None and carry.numel():
            self.carries[site] = carry
        return output

    def _count(self, measured: Tensor, width: int) -> None:
        """Keep a site's statistics, given spike_ops.MEASURED of each token [4, T, B, L]."""
        membrane, *spikes = measured
        per_token = torch.stack([membrane, torch.full_like(membrane, width), *spikes], dim=-4)
        self._sums.append(_sum_counted(per_token, self.counted_BL).t())


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
        k = alpha.new_tensor([config.frequency_of(name) for name in stack.site_names])[:, None]
        target = k * total.mean_membrane
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


def _measure_lif(m_BLD: Tensor, counted_BL: Tensor | None) -> Tensor:
    size = m_BLD.abs()
    membrane = size.sum(-1)
    spikes = torch.ge(m_BLD, LIF_THRESHOLD, out=size).sum(-1)
    none = torch.zeros_like(spikes)
    width = torch.full_like(spikes, m_BLD.shape[-1])
    return _sum_counted(torch.stack([membrane, width, spikes, none, none]), counted_BL)


def _sum_counted(per_token: Tensor, counted_BL: Tensor | None) -> Tensor:
    """Sums of statistics [..., B, L] over the counted tokens, in fp64."""
    per_token = per_token.double()
    if counted_BL is not None:
        # where, not a product: a pad that is NaN or inf must not enter the sums.
        per_token = torch.where(counted_BL, per_token, 0.0)
    return per_token.sum(dim=(-2, -1))


def _all_reduce_sum(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
