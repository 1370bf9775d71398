"""Spikes as packed codes, 8/3 bits an element: all that the backward of an elastic neuron needs of its forward.

Three primitives stand behind every spiking layer, each an operator of torch.library with a form for each backend:

    encode             membranes are charged, fire and are reset, over all timesteps: codes, statistics, carry
    decode             what the layer behind the neuron sees
    membrane_backward  from the gradient of that to the gradient of the neuron's input

Triton has the first and the last also with the activation before the neuron in the same launch, so that the
activation's output is never in memory: encode_activated and activated_backward.

An element is in one of six states: 0 silent, 1 and 2 a spike of +1 and -1, 3 and 4 the same beyond the amplitude,
where no gradient passes, 5 not finite (membrane or amplitude), which is decoded as NaN. Byte j of a row holds those of
elements j, j + N and j + 2N, as digits to the base 6. Spikes are found without division: s = +-1 where +-m > 0.5 a,
saturated where |m| > a, which equals the quotient's rounding (models.neuron, whose equations these are) to the bit.

Backends: "torch" runs anywhere; "cpp" is compiled on CPUs at first use; "triton" is for GPUs. "auto" chooses by device.

Legend: T spike timesteps (first), B batch, L tokens, D width, N bytes of a row, F width of an activation's input: D, or
where it is gated 2D: activation(gate) * the other half.
"""

import logging
import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .neuron import AMPLITUDE_FLOOR, compute_dtype

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "cpp", "triton"]
FASTEST = {"cpu": "cpp", "cuda": "triton"}
"""Backends by the type of device that they are meant for; others run plain torch."""

RESETS = ("memoryless", "released", "normalized")
"""What a spike leaves of the membrane: backends are told by the index."""

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
"""Those that encode_activated knows, GELU by erf and by tanh among them: kernels are told by the index."""

# An exported folder's copy of this code has operators of its own: those of two versions must not replace each other.
NAMESPACE = "spikelm" if __name__ == "models.spike_ops" else re.sub(r"\W", "_", __name__)

STATES = 6
NOT_FINITE = 5
FIRST_SATURATED = 3
"""From this state on no gradient passes."""

MEASURED = ("membrane", "positive", "negative", "saturated")
"""What encode sums over each token's elements: |m|, spikes of +1, spikes of -1, elements with |m| > alpha."""


def code_width(width: int) -> int:
    """Bytes of a row: a third of its elements, rounded up to the 16 that vectors like where that stays below half."""
    third = -(-width // 3)
    aligned = -(-third // 16) * 16
    return aligned if 2 * aligned <= width else third


def resolve_backend(backend: Backend, device: torch.device) -> str:
    """The backend that runs on `device`: "torch", "cpp" or "triton".

    "auto" takes the one meant for the device, or plain torch, with a warning that says why. Raises ValueError for an
    unknown name, and for a choice that cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"spike backend is {backend!r}: use one of {', '.join(get_args(Backend))}")
    wanted = FASTEST.get(device.type, "torch") if backend == "auto" else backend
    if wanted == "torch" or (fault := _fault(wanted, device.type)) is None:
        return wanted
    if backend != "auto":
        raise ValueError(f"spike backend {backend!r} cannot run here: {fault}: use auto or torch")
    _warn_once(fault)
    return "torch"


@cache
def _fault(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on such a device; None where it can."""
    if device_type == "meta":
        return None  # nothing is computed there, only shapes are
    try:
        _module(backend).check(device_type)
    except ImportError as fault:
        return f"{fault} (folders of exported models carry plain torch alone: install spikelm for the compiled form)"
    except (OSError, RuntimeError) as fault:
        return str(fault)
    return None


@cache
def _warn_once(fault: str) -> None:
    logger.warning("spikes are computed in plain torch, which is slower: %s", fault)


def _module(backend: str) -> ModuleType:
    """The backend's module, imported when it is needed: one needs a compiler, the other a library.

    Its functions write into the outputs that they are given last. Amplitudes come raw and floored and, like carries, in
    the arithmetic's dtype; all inputs are contiguous, but what is encoded comes with its strides.
    """
    if backend == "cpp":
        from . import spike_ops_cpp as module
    else:
        from . import spike_ops_triton as module
    return module


@torch.library.custom_op(f"{NAMESPACE}::encode", mutates_args=())
def encode(
    x_TBLD: Tensor,
    alpha_T: Tensor,
    carry_BLD: Tensor | None,
    reset: str,
    leak: float,
    backend: str,
    leaves: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, B, L, N] (uint8), MEASURED of each token [4, T, B, L] (fp64), and the carry behind the last timestep.

    Args:
        x_TBLD: what charges the membranes; arithmetic is in at least fp32.
        alpha_T: raw amplitudes; the floor is applied where models.neuron does.
        carry_BLD: what the first timestep adds to its input, in the arithmetic's dtype; None: zero.
        reset: as models.neuron has it; memoryless: every timestep fires on its own input, and the carry is empty.
        leak: share of the membrane that a timestep hands on.
        backend: as resolve_backend gives it.
        leaves: whether the carry that is left is wanted; where not, it is empty.
    """
    _check(x_TBLD, alpha_T, carry_BLD)
    alpha_T = alpha_T.detach().to(compute_dtype(x_TBLD.dtype))
    if backend == "torch":
        return _encode(x_TBLD, alpha_T, carry_BLD, reset, leak, leaves)
    code, measured, carry = _empty_encoded(x_TBLD, reset, leaves)
    given = (*_laid_out(x_TBLD), *_raw_and_floored(alpha_T), _contiguous(carry_BLD, alpha_T.dtype))
    with torch.cuda.device_of(x_TBLD):
        _module(backend).encode(*given, RESETS.index(reset), leak, code, measured, carry)
    return code, measured, carry


@torch.library.custom_op(f"{NAMESPACE}::decode", mutates_args=())
def decode(code_TBLN: Tensor, worth_T: Tensor, width: int, backend: str) -> Tensor:
    """Spikes times what each is worth, [T, B, L, width], in the dtype of `worth_T` (see `worth`)."""
    _check(code_TBLN, worth_T, None, (width,))
    if backend == "torch":
        states_TBLD = unpack(code_TBLN, width)
        return torch.stack([_spikes(state, a) for state, a in zip(states_TBLD, worth_T, strict=True)])
    decoded_TBLD = _empty_decoded(code_TBLN, worth_T, width)
    with torch.cuda.device_of(code_TBLN):
        _module(backend).decode(code_TBLN.contiguous(), worth_T.contiguous(), decoded_TBLD)
    return decoded_TBLD


@torch.library.custom_op(f"{NAMESPACE}::membrane_backward", mutates_args=())
def membrane_backward(
    grad_TBLD: Tensor,
    code_TBLN: Tensor,
    alpha_T: Tensor,
    grad_carry_BLD: Tensor | None,
    reset: str,
    leak: float,
    backend: str,
    leaves: bool = True,
) -> tuple[Tensor, Tensor]:
    """From the gradients of the neuron's output and carry to those of its input [T, B, L, D] and of the carry it got.

    The first has the dtype of `grad_TBLD`, the second that of the arithmetic; memoryless, or not wanted (`leaves`), it
    is empty.
    """
    _check(grad_TBLD, alpha_T, grad_carry_BLD)
    _check(code_TBLN, alpha_T, None, grad_TBLD.shape)
    alpha_T = alpha_T.detach().to(compute_dtype(grad_TBLD.dtype))
    if backend == "torch":
        return _membrane_backward(grad_TBLD, code_TBLN, alpha_T, grad_carry_BLD, reset, leak, leaves)
    grad_x, grad_carry = _empty_backward(grad_TBLD, reset, leaves)
    carry_BLD = _contiguous(grad_carry_BLD, alpha_T.dtype)
    given = (grad_TBLD.contiguous(), code_TBLN.contiguous(), *_raw_and_floored(alpha_T), carry_BLD)
    with torch.cuda.device_of(grad_TBLD):
        _module(backend).membrane_backward(*given, RESETS.index(reset), leak, grad_x, grad_carry)
    return grad_x, grad_carry


@torch.library.custom_op(f"{NAMESPACE}::encode_activated", mutates_args=())
def encode_activated(
    hidden_TBLF: Tensor,
    alpha_T: Tensor,
    carry_BLD: Tensor | None,
    activation: str,
    gated: bool,
    reset: str,
    leak: float,
    leaves: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """As encode, by Triton, of what one of ACTIVATIONS makes of its input, rounded to that input's dtype."""
    x_TBLD = _as_activated(hidden_TBLF, gated)  # of its shape, no more
    _check(x_TBLD, alpha_T, carry_BLD)
    alpha_T = alpha_T.detach().to(compute_dtype(hidden_TBLF.dtype))
    encoded = _empty_encoded(x_TBLD, reset, leaves)
    given = (*_laid_out(hidden_TBLF), *_raw_and_floored(alpha_T), _contiguous(carry_BLD, alpha_T.dtype))
    with torch.cuda.device_of(hidden_TBLF):
        _module("triton").encode(
            *given, RESETS.index(reset), leak, *encoded, activation=ACTIVATIONS.index(activation), gated=gated
        )
    return encoded


@torch.library.custom_op(f"{NAMESPACE}::activated_backward", mutates_args=())
def activated_backward(
    grad_TBLD: Tensor,
    hidden_TBLF: Tensor,
    code_TBLN: Tensor,
    alpha_T: Tensor,
    grad_carry_BLD: Tensor | None,
    activation: str,
    gated: bool,
    reset: str,
    leak: float,
    leaves: bool = True,
) -> tuple[Tensor, Tensor]:
    """As membrane_backward, by Triton, to the gradient of what encode_activated got, [T, B, L, F] in its dtype."""
    if grad_TBLD.shape != (shape := _as_activated(hidden_TBLF, gated).shape):
        raise ValueError(f"a gradient of shape {tuple(grad_TBLD.shape)} for an activation of {tuple(shape)}")
    _check(grad_TBLD, alpha_T, grad_carry_BLD)
    _check(code_TBLN, alpha_T, None, grad_TBLD.shape)
    alpha_T = alpha_T.detach().to(compute_dtype(hidden_TBLF.dtype))
    grads = _empty_activated_backward(hidden_TBLF, gated, reset, leaves)
    carry_BLD = _contiguous(grad_carry_BLD, alpha_T.dtype)
    given = (grad_TBLD.contiguous(), code_TBLN.contiguous(), *_raw_and_floored(alpha_T), carry_BLD)
    how = {"activation": ACTIVATIONS.index(activation), "gated": gated}
    with torch.cuda.device_of(hidden_TBLF):
        _module("triton").membrane_backward(*given, RESETS.index(reset), leak, *grads, *_laid_out(hidden_TBLF), **how)
    return grads


def _as_activated(hidden_TBLF: Tensor, gated: bool) -> Tensor:
    """A view with the shape of the activation's output. Raises ValueError for a gate that has no such half."""
    if gated and hidden_TBLF.shape[-1] % 2:
        raise ValueError(f"a gated activation of {hidden_TBLF.shape[-1]} elements a row: they must be gate and rest")
    return hidden_TBLF[..., : hidden_TBLF.shape[-1] // 2] if gated else hidden_TBLF


def _empty_activated_backward(hidden_TBLF: Tensor, gated: bool, reset: str, leaves: bool) -> tuple[Tensor, Tensor]:
    return hidden_TBLF.new_empty(hidden_TBLF.shape), _empty_carry(_as_activated(hidden_TBLF, gated), reset, leaves)


def _empty_encoded(x_TBLD: Tensor, reset: str, leaves: bool) -> tuple[Tensor, Tensor, Tensor]:
    *shape, width = x_TBLD.shape
    code = x_TBLD.new_empty(*shape, code_width(width), dtype=torch.uint8)
    return code, x_TBLD.new_empty(len(MEASURED), *shape, dtype=torch.float64), _empty_carry(x_TBLD, reset, leaves)


def _empty_decoded(code_TBLN: Tensor, worth_T: Tensor, width: int) -> Tensor:
    return worth_T.new_empty(*code_TBLN.shape[:-1], width)


def _empty_backward(grad_TBLD: Tensor, reset: str, leaves: bool) -> tuple[Tensor, Tensor]:
    return grad_TBLD.new_empty(grad_TBLD.shape), _empty_carry(grad_TBLD, reset, leaves)


def _empty_carry(x_TBLD: Tensor, reset: str, leaves: bool) -> Tensor:
    """For backends to write to; they write none where it is empty."""
    shape = x_TBLD.shape[1:] if leaves and reset != "memoryless" else (0,)
    return x_TBLD.new_empty(shape, dtype=compute_dtype(x_TBLD.dtype))


def _raw_and_floored(alpha_T: Tensor) -> tuple[Tensor, Tensor]:
    return alpha_T.contiguous(), alpha_T.clamp(min=AMPLITUDE_FLOOR)


def _contiguous(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _laid_out(x_TBLD: Tensor) -> tuple[Tensor, int, int]:
    """x, and how far apart in it timesteps and rows are; a copy where rows are not whole or not equally far apart."""
    _, B, L, D = x_TBLD.shape
    apart_t, apart_b, apart_n, apart_d = x_TBLD.stride()
    if L == 1:
        apart_n = apart_b  # of a size of 1 the stride means nothing
    if (D == 1 or apart_d == 1) and (B == 1 or apart_b == L * apart_n):
        return x_TBLD, apart_t, apart_n
    return x_TBLD.contiguous(), B * L * D, D


def _check(x_TBLD: Tensor, alpha_T: Tensor, carry_BLD: Tensor | None, coded: Sequence[int] | None = None) -> None:
    """ValueError for what compiled forms would read beyond its end, or as what it is not.

    Where x holds codes, they are of elements of the shape `coded`, or of rows of its last size.
    """
    if len(alpha_T) != len(x_TBLD):
        raise ValueError(f"{len(alpha_T)} amplitudes for {len(x_TBLD)} timesteps: give one for each")
    if alpha_T.device != x_TBLD.device:
        raise ValueError(f"amplitudes on {alpha_T.device}, spikes on {x_TBLD.device}: move them to one device")
    if coded is not None and code_width(coded[-1]) != x_TBLD.shape[-1]:
        raise ValueError(
            f"codes of {x_TBLD.shape[-1]} bytes a row do not hold {coded[-1]} elements: give their own width"
        )
    if coded is not None and len(coded) > 1 and coded[:-1] != x_TBLD.shape[:-1]:
        raise ValueError(f"codes of shape {tuple(x_TBLD.shape)} for elements of {tuple(coded)}: give their own")
    if carry_BLD is not None and carry_BLD.shape != x_TBLD.shape[1:]:
        raise ValueError(f"a carry of shape {tuple(carry_BLD.shape)} for rows of {tuple(x_TBLD.shape[1:])}")


encode.register_fake(lambda x, alpha, carry, reset, leak, backend, leaves=True: _empty_encoded(x, reset, leaves))
decode.register_fake(lambda code, worth, width, backend: _empty_decoded(code, worth, width))
membrane_backward.register_fake(
    lambda grad, code, alpha, carry, reset, leak, backend, leaves=True: _empty_backward(grad, reset, leaves)
)
encode_activated.register_fake(
    lambda hidden, alpha, carry, activation, gated, reset, leak, leaves=True: _empty_encoded(
        _as_activated(hidden, gated), reset, leaves
    )
)
activated_backward.register_fake(
    lambda grad, hidden, code, alpha, carry, activation, gated, reset, leak, leaves=True: _empty_activated_backward(
        hidden, gated, reset, leaves
    )
)


def _encode(
    x_TBLD: Tensor, alpha_T: Tensor, carry: Tensor | None, reset: str, leak: float, leaves: bool
) -> tuple[Tensor, Tensor, Tensor]:
    states, measured = [], []
    for x_BLD, alpha in zip(x_TBLD, alpha_T, strict=True):
        m = x_BLD.to(alpha.dtype) if carry is None else carry + x_BLD
        a = alpha.clamp(min=AMPLITUDE_FLOOR)
        size = m.abs()
        up, down, beyond = (each.to(torch.uint8) for each in (m > 0.5 * a, m < -0.5 * a, size > a))
        states.append((up + 2 * down + 2 * beyond).masked_fill_(~(m.isfinite() & a.isfinite()), NOT_FINITE))
        counts = [each.sum(-1).double() for each in (up, down, beyond)]
        measured.append(torch.stack([size.sum(-1).double(), *counts]))
        if reset != "memoryless":
            carry = (m * leak) * _left(states[-1], alpha, reset)
    left = carry if leaves and reset != "memoryless" else alpha_T.new_empty(0)
    return pack(torch.stack(states)), torch.stack(measured, dim=1), left


def _membrane_backward(
    grad_TBLD: Tensor, code_TBLN: Tensor, alpha_T: Tensor, d: Tensor | None, reset: str, leak: float, leaves: bool
) -> tuple[Tensor, Tensor]:
    states_TBLD = unpack(code_TBLN, grad_TBLD.shape[-1])
    grads = []
    for grad_BLD, alpha, state in zip(grad_TBLD.flip(0), alpha_T.flip(0), states_TBLD.flip(0), strict=True):
        grad = grad_BLD.to(alpha.dtype) * (state < FIRST_SATURATED)
        if d is not None and reset != "memoryless":
            grad = grad + (d * _left(state, alpha, reset)) * leak
        d = grad
        grads.insert(0, d.to(grad_TBLD.dtype))
    return torch.stack(grads), d if leaves and reset != "memoryless" else alpha_T.new_empty(0)


def worth(alpha_T: Tensor, dtype: torch.dtype) -> Tensor:
    """What a spike is worth to the layer behind it, [T]: the floored amplitude, rounded once, to `dtype`."""
    return alpha_T.detach().to(compute_dtype(dtype)).clamp(min=AMPLITUDE_FLOOR).to(dtype)


def pack(states_TBLD: Tensor) -> Tensor:
    """States 0 to 5 as bytes, [T, B, L, N]."""
    width = states_TBLD.shape[-1]
    bytes_ = code_width(width)
    first, second, third = F.pad(states_TBLD, (0, 3 * bytes_ - width)).unflatten(-1, (3, bytes_)).unbind(-2)
    return first + STATES * second + STATES**2 * third


def unpack(code_TBLN: Tensor, width: int) -> Tensor:
    """The states that were packed, [T, B, L, width] (uint8)."""
    digits = [code_TBLN % STATES, code_TBLN // STATES % STATES, code_TBLN // STATES**2]
    return torch.cat(digits, dim=-1)[..., :width]


def _spikes(state: Tensor, a: Tensor) -> Tensor:
    """What the states are worth where a spike is worth `a`, in its dtype."""
    sign = (state & 1) * 2 - (state != 0).to(torch.uint8)  # 1, 0, or -1 as 255
    spikes = (sign.view(torch.int8).to(a.dtype) * a).masked_fill_(state == NOT_FINITE, torch.nan)
    return spikes.masked_fill_(state == 0, 0)  # 0 times an amplitude that fp16 does not hold is none


def _left(state: Tensor, alpha: Tensor, reset: str) -> Tensor:
    """What the reset leaves of the membrane, as a factor."""
    if reset == "released":
        return alpha - _spikes(state, alpha.clamp(min=AMPLITUDE_FLOOR))
    return (state == 0).to(alpha.dtype)
