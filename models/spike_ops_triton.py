"""The primitives of spike_ops for GPUs: one launch each for all timesteps, membranes in registers.

A program has BLOCK_N rows and BLOCK_H of their bytes, with three elements each. Without a GPU they run in Triton's
interpreter (TRITON_INTERPRET=1), which is how they are tested.

What charges the membranes may be an activation, computed from its input in the same launch. It is rounded to the dtype
of its input, in which an activation in a launch of its own would hand it on; so is a gate's before the product.

Legend: T spike timesteps, N rows (of all batches and tokens), D width, H bytes of a row, F width of the activation's
input: D, or where it is gated 2D, gate first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MEMORYLESS, RELEASED, NORMALIZED = (tl.constexpr(index) for index in range(3))
GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1)
NOT_FINITE, FIRST_SATURATED = tl.constexpr(5), tl.constexpr(3)

BLOCK_H = 128
BLOCK_BYTES = 1024
"""Bytes of a program, so that the membranes of their elements fit into its registers."""


def check(device_type: str) -> None:
    """Raise RuntimeError where kernels cannot run on such a device."""
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"it runs on GPUs, and the tensors are on {device_type}")


def encode(
    x_TBLD: Tensor,
    apart_t: int,
    apart_n: int,
    alpha_T: Tensor,
    floored_T: Tensor,
    carry_BLD: Tensor | None,
    reset: int,
    leak: float,
    code_TBLN: Tensor,
    measured: Tensor,
    left_BLD: Tensor,
    activation: int | None = None,
    gated: bool = False,
) -> None:
    """As spike_ops.encode, or (`activation`) as spike_ops.encode_activated, of whose input x then is."""
    T, N, D, H = _sizes(x_TBLD, code_TBLN)
    D = D // 2 if gated else D
    grid, blocks = _grid(N, H)
    partial = alpha_T.new_empty(*measured.shape[:2], N, grid[1])
    _encode[grid](
        *(x_TBLD, alpha_T, floored_T, x_TBLD if carry_BLD is None else carry_BLD),
        *(left_BLD, code_TBLN, partial, apart_t, apart_n, N, D, H),
        *(T, reset, leak, carry_BLD is not None, left_BLD.numel() > 0, activation, gated, *blocks),
        enable_fp_fusion=False,  # the order of roundings is the reference's
    )
    measured.copy_(partial.sum(-1, dtype=torch.float64).view_as(measured))


def decode(code_TBLN: Tensor, worth_T: Tensor, decoded_TBLD: Tensor) -> None:
    """As spike_ops.decode."""
    T, N, D, H = _sizes(decoded_TBLD, code_TBLN)
    grid, blocks = _grid(T * N, H)
    _decode[grid](code_TBLN, worth_T, decoded_TBLD, T * N, N, D, H, *blocks)


def membrane_backward(
    grad_TBLD: Tensor,
    code_TBLN: Tensor,
    alpha_T: Tensor,
    floored_T: Tensor,
    grad_carry_BLD: Tensor | None,
    reset: int,
    leak: float,
    grad_x_TBLD: Tensor,
    grad_left_BLD: Tensor,
    hidden_TBLF: Tensor | None = None,
    apart_t: int = 0,
    apart_n: int = 0,
    activation: int | None = None,
    gated: bool = False,
) -> None:
    """As spike_ops.membrane_backward, or (`activation`, and the input that it got) as spike_ops.activated_backward."""
    T, N, D, H = _sizes(grad_TBLD, code_TBLN)
    grid, blocks = _grid(N, H)
    _membrane_backward[grid](
        *(grad_TBLD, code_TBLN, alpha_T, floored_T, grad_TBLD if grad_carry_BLD is None else grad_carry_BLD),
        *(grad_TBLD if hidden_TBLF is None else hidden_TBLF, grad_x_TBLD, grad_left_BLD, apart_t, apart_n, N, D, H),
        *(T, reset, leak, grad_carry_BLD is not None, grad_left_BLD.numel() > 0, activation, gated, *blocks),
        enable_fp_fusion=False,
    )


def _sizes(x_TBLD: Tensor, code_TBLN: Tensor) -> tuple[int, int, int, int]:
    T, B, L, D = x_TBLD.shape
    return T, B * L, D, code_TBLN.shape[-1]


def _grid(rows: int, bytes_: int) -> tuple[tuple[int, int], tuple[int, int]]:
    block_h = min(BLOCK_H, triton.next_power_of_2(bytes_))
    block_n = BLOCK_BYTES // block_h
    # A grid without programs is refused; one without rows has nothing to write.
    return (max(1, triton.cdiv(rows, block_n)), triton.cdiv(bytes_, block_h)), (block_n, block_h)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh_argument(x):
    """Twice what GELU takes the tanh of: (1 + tanh(u)) / 2 is the sigmoid of 2u."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == GELU_TANH:
        return x * _sigmoid(_tanh_argument(x))
    return x * _sigmoid(x)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    if ACTIVATION == GELU_TANH:
        share = _sigmoid(_tanh_argument(x))
        return share + x * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    share = _sigmoid(x)
    return share * (1.0 + x * (1.0 - share))


@triton.jit
def _charge(row, within, D, compute: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """What elements of a row add to their membranes."""
    x = tl.load(row, within, 0.0)
    if ACTIVATION is None:
        return x.to(compute)
    activated = _activated(x.to(compute), ACTIVATION).to(x.dtype)
    if GATED:
        activated = (activated.to(compute) * tl.load(row + D, within, 0.0).to(compute)).to(x.dtype)
    return activated.to(compute)


@triton.jit
def _fire(m, alpha, a, RESET: tl.constexpr, LEAK: tl.constexpr):
    """States of membranes, and what they leave to the next timestep."""
    size = tl.abs(m)
    up, down, beyond = (m > 0.5 * a).to(tl.int32), (m < -0.5 * a).to(tl.int32), (size > a).to(tl.int32)
    # An amplitude that is not finite must not pass for silence.
    finite = size + (a - a) < float("inf")
    state = tl.where(finite, up + 2 * down + 2 * beyond, NOT_FINITE)
    if RESET == RELEASED:
        o = tl.where(finite, (up - down).to(m.dtype) * a, float("nan"))
        carry = (m * LEAK) * (alpha - o)
    else:
        carry = (m * LEAK) * (state == 0).to(m.dtype)
    return state, carry, up, down, beyond


@triton.jit
def _encode(
    x_ptr, alpha_ptr, floored_ptr, carry_ptr, left_ptr, code_ptr, partial_ptr, stride_t, stride_n, N, D, H,
    T: tl.constexpr, RESET: tl.constexpr, LEAK: tl.constexpr, HAS_CARRY: tl.constexpr, LEAVES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    inside = (n < N) & (h < H)
    compute = alpha_ptr.dtype.element_ty
    zero = tl.zeros((BLOCK_N, BLOCK_H), compute)
    in_0, in_1, in_2 = inside & (h < D), inside & (H + h < D), inside & (2 * H + h < D)
    carry_0, carry_1, carry_2 = zero, zero, zero
    if HAS_CARRY:
        carry_0 = tl.load(carry_ptr + n * D + h, in_0, 0.0).to(compute)
        carry_1 = tl.load(carry_ptr + n * D + H + h, in_1, 0.0).to(compute)
        carry_2 = tl.load(carry_ptr + n * D + 2 * H + h, in_2, 0.0).to(compute)
    for t in tl.static_range(T):
        alpha, a = tl.load(alpha_ptr + t), tl.load(floored_ptr + t)
        row = x_ptr + tl.full((1, 1), t, tl.int64) * stride_t + n * stride_n + h
        m_0 = carry_0 + _charge(row, in_0, D, compute, ACTIVATION, GATED)
        m_1 = carry_1 + _charge(row + H, in_1, D, compute, ACTIVATION, GATED)
        m_2 = carry_2 + _charge(row + 2 * H, in_2, D, compute, ACTIVATION, GATED)
        state_0, carry_0, up_0, down_0, beyond_0 = _fire(m_0, alpha, a, RESET, LEAK)
        state_1, carry_1, up_1, down_1, beyond_1 = _fire(m_1, alpha, a, RESET, LEAK)
        state_2, carry_2, up_2, down_2, beyond_2 = _fire(m_2, alpha, a, RESET, LEAK)
        if RESET == MEMORYLESS:
            carry_0, carry_1, carry_2 = zero, zero, zero
        code = (state_0 + 6 * state_1 + 36 * state_2).to(tl.uint8)
        tl.store(code_ptr + (t * N + n) * H + h, code, inside)
        membrane = tl.sum(tl.abs(m_0) + tl.abs(m_1) + tl.abs(m_2), 1)
        up, down = tl.sum(up_0 + up_1 + up_2, 1), tl.sum(down_0 + down_1 + down_2, 1)
        beyond = tl.sum(beyond_0 + beyond_1 + beyond_2, 1)
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        blocks = tl.num_programs(1)
        into, apart = partial_ptr + (t * N + rows) * blocks + tl.program_id(1), T * N * blocks
        tl.store(into, membrane, rows < N)
        tl.store(into + apart, up.to(compute), rows < N)
        tl.store(into + 2 * apart, down.to(compute), rows < N)
        tl.store(into + 3 * apart, beyond.to(compute), rows < N)
    if LEAVES:
        tl.store(left_ptr + n * D + h, carry_0, in_0)
        tl.store(left_ptr + n * D + H + h, carry_1, in_1)
        tl.store(left_ptr + n * D + 2 * H + h, carry_2, in_2)


@triton.jit
def _worth(state, a):
    spike = tl.where(state % 2 == 1, a, -a)
    return tl.where(state == 0, 0.0, tl.where(state == NOT_FINITE, float("nan"), spike))


@triton.jit
def _decode(code_ptr, worth_ptr, out_ptr, rows, N, D, H, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    inside = (n < rows) & (h < H)
    # Widened: constants would otherwise make half-precision numbers of doubtful type.
    a = tl.load(worth_ptr + n // N, n < rows, 0.0)
    a = a.to(tl.float64) if worth_ptr.dtype.element_ty == tl.float64 else a.to(tl.float32)
    code = tl.load(code_ptr + n * H + h, inside, 0).to(tl.int32)
    out = out_ptr + n * D + h
    tl.store(out, _worth(code % 6, a).to(out_ptr.dtype.element_ty), inside & (h < D))
    tl.store(out + H, _worth(code // 6 % 6, a).to(out_ptr.dtype.element_ty), inside & (H + h < D))
    tl.store(out + 2 * H, _worth(code // 36, a).to(out_ptr.dtype.element_ty), inside & (2 * H + h < D))


@triton.jit
def _back(grad, d, state, alpha, a, RESET: tl.constexpr, LEAK: tl.constexpr, CHAINED: tl.constexpr):
    """One timestep back: the gradient of the membrane."""
    grad = grad * (state < FIRST_SATURATED).to(grad.dtype)
    if CHAINED and RESET == RELEASED:
        grad = grad + (d * (alpha - _worth(state, a))) * LEAK
    if CHAINED and RESET == NORMALIZED:
        grad = grad + (d * (state == 0).to(grad.dtype)) * LEAK
    return grad


@triton.jit
def _pass_on(d, hidden, into, within, D, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Write the gradient of what charged membranes, or of what its activation got."""
    out = into.dtype.scalar.element_ty
    if ACTIVATION is not None:
        x = tl.load(hidden, within, 0.0).to(d.dtype)
        if GATED:
            tl.store(into + D, (d * _activated(x, ACTIVATION)).to(out), within)
            d = d * tl.load(hidden + D, within, 0.0).to(d.dtype)
        d = d * _slope(x, ACTIVATION)
    tl.store(into, d.to(out), within)


@triton.jit
def _membrane_backward(
    grad_ptr, code_ptr, alpha_ptr, floored_ptr, carry_ptr, hidden_ptr, grad_x_ptr, left_ptr, stride_t, stride_n,
    N, D, H,
    T: tl.constexpr, RESET: tl.constexpr, LEAK: tl.constexpr, HAS_CARRY: tl.constexpr, LEAVES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    inside = (n < N) & (h < H)
    compute = alpha_ptr.dtype.element_ty
    in_0, in_1, in_2 = inside & (h < D), inside & (H + h < D), inside & (2 * H + h < D)
    d_0 = tl.zeros((BLOCK_N, BLOCK_H), compute)
    d_1, d_2 = d_0, d_0
    if HAS_CARRY:
        d_0 = tl.load(carry_ptr + n * D + h, in_0, 0.0).to(compute)
        d_1 = tl.load(carry_ptr + n * D + H + h, in_1, 0.0).to(compute)
        d_2 = tl.load(carry_ptr + n * D + 2 * H + h, in_2, 0.0).to(compute)
    for back in tl.static_range(T):
        t = T - 1 - back
        # Without a gradient of the carry nothing comes from behind the last timestep, not even 0 * NaN.
        chained = tl.constexpr(HAS_CARRY or back > 0)
        alpha, a = tl.load(alpha_ptr + t), tl.load(floored_ptr + t)
        code = tl.load(code_ptr + (t * N + n) * H + h, inside, 0).to(tl.int32)
        row = (t * N + n) * D + h
        d_0 = _back(tl.load(grad_ptr + row, in_0, 0.0).to(compute), d_0, code % 6, alpha, a, RESET, LEAK, chained)
        d_1 = _back(
            tl.load(grad_ptr + row + H, in_1, 0.0).to(compute), d_1, code // 6 % 6, alpha, a, RESET, LEAK, chained
        )
        d_2 = _back(
            tl.load(grad_ptr + row + 2 * H, in_2, 0.0).to(compute), d_2, code // 36, alpha, a, RESET, LEAK, chained
        )
        hidden = hidden_ptr + tl.full((1, 1), t, tl.int64) * stride_t + n * stride_n + h
        into = grad_x_ptr + (t * N + n) * (2 * D if GATED else D) + h
        _pass_on(d_0, hidden, into, in_0, D, ACTIVATION, GATED)
        _pass_on(d_1, hidden + H, into + H, in_1, D, ACTIVATION, GATED)
        _pass_on(d_2, hidden + 2 * H, into + 2 * H, in_2, D, ACTIVATION, GATED)
    if LEAVES:
        tl.store(left_ptr + n * D + h, d_0, in_0)
        tl.store(left_ptr + n * D + H + h, d_1, in_1)
        tl.store(left_ptr + n * D + 2 * H + h, d_2, in_2)
