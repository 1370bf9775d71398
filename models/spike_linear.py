"""Elastic neurons as autograd functions that keep packed codes: alone, or with the linear layer behind them as one.

Neither the membrane nor the spikes outlive the forward. The backward reads from the codes where gradients pass, what
each reset left, and the spikes that the weight's gradient is made of (models.spike_ops).

Legend: T spike timesteps (first), B batch, L tokens, D width in, E width of the product, F width of the activation.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from .neuron import compute_dtype
from .spike_ops import activated_backward, decode, encode, encode_activated, membrane_backward, worth

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Firing:
    """How a site's neuron fires, apart from its amplitudes: as models.spike_ops takes it."""

    reset: str
    leak: float
    backend: str
    trains_rate: bool = False
    """Whether the counts of spikes have a gradient."""
    leaves: bool = True
    """Whether the carry behind the last timestep is wanted; where not, it is empty."""


@dataclass(frozen=True)
class FusedActivation:
    """An activation before a neuron, in the neuron's own kernel: as spike_ops.encode_activated takes it."""

    name: str
    gated: bool


def spike(
    x_TBLD: Tensor, alpha_T: Tensor, carry_BLD: Tensor | None, firing: Firing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes times amplitude in x's dtype [T, B, L, D]; their codes, spike_ops.MEASURED [4, T, B, L], and the carry.

    Of what is measured the counts of spikes, positive and negative, have a gradient where `firing` trains them:
    straight-through, as the spikes'.
    Raises RuntimeError, in the backward, where a second derivative is asked for.
    """
    return _Spike.apply(x_TBLD, alpha_T, carry_BLD, firing)


def spike_linear(
    x_TBLD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    alpha_T: Tensor,
    carry_BLD: Tensor | None,
    firing: Firing,
    activation: Activation | None = None,
    recompute: bool = False,
    before: FusedActivation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """activation(spikes W^T + b) [T, B, L, F], spike_ops.MEASURED [4, T, B, L] as `spike` gives it, and the carry.

    What the activation gets is kept for the backward in the dtype of the product, or (`recompute`) made again from the
    codes by one more product. `before` makes the neuron's input of x, which is then kept. Under autocast the product
    has autocast's dtype, the neuron at least fp32.
    Raises RuntimeError, in the backward, where a second derivative is asked for.
    """
    return _SpikeLinear.apply(x_TBLD, weight_ED, bias_E, alpha_T, carry_BLD, firing, activation, recompute, before)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of the product of x and weights: autocast's where it is on, else x's."""
    device = x.device.type
    if x.dtype == torch.float64:  # as torch's products, which autocast leaves as they are
        return x.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class KeptAsCodes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, autograd keeps of certain tensors nothing but how to make them again, so that their storage goes.

    Each of `tensors` is given with a function that makes it anew, laid out as it is; views of it count, too.
    Not to be used where a checkpoint runs its function, whose own bookkeeping it would bypass.
    """

    def __init__(self, tensors: Iterable[tuple[Tensor, Callable[[], Tensor]]]) -> None:
        makers = {weakref.ref(tensor.untyped_storage()): make for tensor, make in tensors}

        def pack(tensor: Tensor) -> Any:
            make = makers.get(weakref.ref(tensor.untyped_storage()))
            if make is None:
                return tensor.detach()  # with its history, a kept output would keep itself alive
            return make, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            make, *layout = kept
            return make().as_strided(*layout)

        super().__init__(pack, unpack)


class _Spike(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TBLD: Tensor, alpha_T: Tensor, carry_BLD: Tensor | None, firing: Firing
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        code, measured, carry = _encode(ctx, x_TBLD, alpha_T, carry_BLD, firing)
        ctx.save_for_backward(code, alpha_T)
        ctx.mark_non_differentiable(code, *([] if firing.trains_rate else [measured]))
        return _decode(ctx, code, alpha_T, x_TBLD.dtype), code, measured, carry

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad: Tensor | None, _code: None, grad_measured: Tensor | None, grad_carry: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        code, alpha_T = ctx.saved_tensors
        grad_x, grad_carry_in = _through_membrane(ctx, code, alpha_T, grad, grad_measured, grad_carry)
        return grad_x, None, grad_carry_in, None


class _SpikeLinear(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TBLD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        alpha_T: Tensor,
        carry_BLD: Tensor | None,
        firing: Firing,
        activation: Activation | None,
        recompute: bool,
        before: FusedActivation | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        code, measured, carry = _encode(ctx, x_TBLD, alpha_T, carry_BLD, firing, before)
        ctx.activation, ctx.product_dtype = activation, product_dtype(x_TBLD)
        ctx.recomputes = activation is not None and recompute
        product = _product(ctx, code, alpha_T, weight_ED, bias_E)
        hidden = None if activation is None or recompute else product
        # Kept is the Parameter itself, so that an engine that has partitioned it meanwhile can gather it.
        kept_bias, kept_x = bias_E if ctx.recomputes else None, None if before is None else x_TBLD
        ctx.save_for_backward(code, alpha_T, weight_ED, kept_bias, hidden, kept_x)
        if not firing.trains_rate:
            ctx.mark_non_differentiable(measured)
        return product if activation is None else activation(product), measured, carry

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad: Tensor | None, grad_measured: Tensor | None, grad_carry: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        code, alpha_T, weight, bias, hidden, x = ctx.saved_tensors
        grad_weight = grad_bias = None
        if grad is not None:
            if ctx.recomputes:
                hidden = _product(ctx, code, alpha_T, weight, bias)
            if ctx.activation is not None:
                grad = _through_activation(ctx.activation, hidden, grad)
                del hidden
            grad_2d = grad.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                spikes_2d = _decode(ctx, code, alpha_T, ctx.product_dtype).flatten(0, -2)
                grad_weight = (grad_2d.t() @ spikes_2d).to(weight.dtype)
                del spikes_2d
            if ctx.needs_input_grad[2]:
                grad_bias = grad_2d.sum(0)
        grad_x = grad_carry_in = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            grad = None if grad is None else grad @ weight.to(grad.dtype)
            grad_x, grad_carry_in = _through_membrane(ctx, code, alpha_T, grad, grad_measured, grad_carry, x)
        return grad_x, grad_weight, grad_bias, None, grad_carry_in, None, None, None, None


def _encode(
    ctx: FunctionCtx,
    x_TBLD: Tensor,
    alpha_T: Tensor,
    carry_BLD: Tensor | None,
    firing: Firing,
    before: FusedActivation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """spike_ops.encode, noting on `ctx` what the backward asks for that is no tensor."""
    ctx.firing, ctx.before, ctx.input_dtype = firing, before, x_TBLD.dtype
    ctx.width = x_TBLD.shape[-1] // (2 if before is not None and before.gated else 1)
    ctx.had_carry = carry_BLD is not None
    ctx.set_materialize_grads(False)
    if before is not None:
        return encode_activated(
            x_TBLD, alpha_T, carry_BLD, before.name, before.gated, firing.reset, firing.leak, firing.leaves
        )
    return encode(x_TBLD, alpha_T, carry_BLD, firing.reset, firing.leak, firing.backend, firing.leaves)


def _decode(ctx: FunctionCtx, code: Tensor, alpha_T: Tensor, dtype: torch.dtype) -> Tensor:
    return decode(code, worth(alpha_T, dtype), ctx.width, ctx.firing.backend)


def _through_membrane(
    ctx: FunctionCtx,
    code: Tensor,
    alpha_T: Tensor,
    grad: Tensor | None,
    grad_measured: Tensor | None,
    grad_carry: Tensor | None,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the neuron's input, or of x, of which that was made, and of the carry that it got, if any."""
    if grad is None:
        grad = torch.zeros(*code.shape[:-1], ctx.width, dtype=ctx.input_dtype, device=code.device)
    if grad_measured is not None:
        grad = grad + _through_counts(ctx, code, alpha_T, grad_measured)
    grad, firing, before = grad.to(ctx.input_dtype), ctx.firing, ctx.before
    if x is None:
        grad_x, grad_carry_in = membrane_backward(
            grad, code, alpha_T, grad_carry, firing.reset, firing.leak, firing.backend, ctx.had_carry
        )
    else:
        grad_x, grad_carry_in = activated_backward(
            grad, x, code, alpha_T, grad_carry, before.name, before.gated, firing.reset, firing.leak, ctx.had_carry
        )
    return grad_x, grad_carry_in if ctx.had_carry else None


def _through_counts(ctx: FunctionCtx, code: Tensor, alpha_T: Tensor, grad_measured: Tensor) -> Tensor:
    """What the counts of spikes ask of their output o: a spike counts |s| = |o / alpha|, of slope sign(s) / alpha."""
    dtype = compute_dtype(ctx.input_dtype)
    _, positive, negative, _ = grad_measured[..., None].to(dtype)
    signs = _decode(ctx, code, torch.ones_like(alpha_T), dtype)
    return torch.where(signs > 0, positive, negative) * signs / worth(alpha_T, dtype).view(-1, 1, 1, 1)


def _product(ctx: FunctionCtx, code: Tensor, alpha_T: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = ctx.product_dtype
    spikes = _decode(ctx, code, alpha_T, dtype)
    return F.linear(spikes, weight.to(dtype), None if bias is None else bias.to(dtype))


def _through_activation(activation: Activation, hidden: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(activation(hidden), hidden, grad)[0]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # in a backward: it was asked for create_graph
        raise RuntimeError(
            "spikes have no second derivative: their gradient is a straight-through estimate; "
            "call backward or autograd.grad without create_graph"
        )
