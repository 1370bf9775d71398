"""The spiking neurons as pure functions: no module, no state, no configuration.

Legend: T spike timesteps (time first), B batch, L tokens, D width; alpha_t the amplitude of timestep t (one scalar).
Arithmetic is in at least fp32 whatever the input's dtype; the output has the input's dtype, rounded once at the end.

Elastic bi-spiking (Xing et al., ICML 2024), with a_t = max(alpha_t, 1e-5):

    charge  m_t = carry_{t-1} + x_t
    fire    s_t = clamp(round_half_even(m_t / a_t), -1, 1),   o_t = s_t * a_t
    carry   (m_t * leak) * (alpha_t - o_t)        reset "released": with the raw alpha; a spike of -1 does not reset
            m_t * leak * (1 - |s_t|)              reset "normalized": a spike of either sign resets, free of scale

    backward  do_t/dm_t = 1 where -1 <= m_t/a_t <= 1, else 0 (straight-through); alpha gets no gradient, and neither
              does the reset factor of the carry.

Wherever the membrane is NaN or infinite the output is NaN: silence, or an ordinary spike, would hide divergence.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

AMPLITUDE_FLOOR = 1e-5
LIF_THRESHOLD = 1.0

Observer = Callable[[int, Tensor], None]
"""Called with (t, m_BLD) after charging and before firing; may fill in alpha_T[t], which is read afterwards."""


def run_neuron(
    x_TBLD: Tensor,
    alpha_T: Tensor,
    *,
    leak: float = 0.25,
    reset: Literal["released", "normalized"] = "released",
    carry: Tensor | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Elastic neuron over T timesteps: returns (o_TBLD, carry_BLD).

    `carry` is what the next timestep adds to its input (None: zero) and is differentiable, so that T may be run in
    chunks: the carry returned by one chunk goes into the next.
    """
    compute = compute_dtype(x_TBLD.dtype)
    outputs = []
    for t, x_BLD in enumerate(x_TBLD.unbind(0)):
        m = x_BLD.to(compute) if carry is None else carry + x_BLD
        if observe is not None:
            observe(t, m.detach())
        alpha = alpha_T[t].detach().to(compute)
        o = _TernarySpike.apply(m, alpha.clamp(min=AMPLITUDE_FLOOR))
        carry = _carry(m, o.detach(), alpha, leak, reset)
        outputs.append(o.to(x_TBLD.dtype))
    return torch.stack(outputs), carry


def run_memoryless(x_TBLD: Tensor, alpha_T: Tensor, *, observe: Observer | None = None) -> Tensor:
    """Elastic neuron without membrane (keys and values): every timestep fires on its own input. Returns o_TBLD."""
    compute = compute_dtype(x_TBLD.dtype)
    x = x_TBLD.to(compute)
    if observe is not None:
        for t, x_BLD in enumerate(x.detach().unbind(0)):
            observe(t, x_BLD)
    amplitude = alpha_T.to(compute).clamp(min=AMPLITUDE_FLOOR).view(-1, 1, 1, 1)
    return _TernarySpike.apply(x, amplitude).to(x_TBLD.dtype)


def run_lif(
    x_TBLD: Tensor,
    *,
    leak: float = 0.5,
    memoryless: bool = False,
    carry: Tensor | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Leaky integrate-and-fire, the field's baseline: returns binary spikes s_TBLD and the carry.

    m_t = leak * v_{t-1} + x_t,  s_t = 1 where m_t >= 1,  v_t = m_t * (1 - s_t) with s detached; arctangent surrogate
    gradient (Fang et al. 2021). `memoryless`: m_t = x_t, and the carry is None.
    """
    compute = compute_dtype(x_TBLD.dtype)
    spikes = []
    for t, x_BLD in enumerate(x_TBLD.unbind(0)):
        m = x_BLD.to(compute) if carry is None else carry + x_BLD
        if observe is not None:
            observe(t, m.detach())
        s = _BinarySpike.apply(m)
        carry = None if memoryless else leak * (m * (1 - s.detach()))
        spikes.append(s.to(x_TBLD.dtype))
    return torch.stack(spikes), carry


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of membranes and carries for inputs of `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _carry(m: Tensor, o: Tensor, alpha: Tensor, leak: float, reset: str) -> Tensor:
    if reset == "released":
        return (m * leak) * (alpha - o)
    return (m * leak) * (o == 0)


def _poisoned(spikes: Tensor, m: Tensor) -> Tensor:
    """`spikes`, in place, with NaN wherever m is not finite: 0 * m is 0 or NaN."""
    return spikes.add_(m, alpha=0)


class _TernarySpike(torch.autograd.Function):
    """o = clamp(round(m/a), -1, 1) * a with the straight-through gradient inside |m/a| <= 1."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, m: Tensor, amplitude: Tensor) -> Tensor:
        scaled = m / amplitude
        # Compared in floating point and then narrowed: on CPUs far quicker than comparing into bool.
        ctx.save_for_backward(scaled.abs().le_(1).to(torch.int8))
        return _poisoned(scaled.round_().clamp_(-1, 1).mul_(amplitude), m)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return grad * passes, None


class _BinarySpike(torch.autograd.Function):
    """s = 1 where m >= 1, with the arctangent surrogate ds/dm = 1 / (1 + (pi * (m - 1))^2)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return _poisoned((m >= LIF_THRESHOLD).to(m.dtype), m)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return grad / (1 + (math.pi * (m - LIF_THRESHOLD)).square())
