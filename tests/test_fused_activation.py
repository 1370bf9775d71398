"""The activation before a neuron in the neuron's own kernel: against the two apart, and the layers that use it."""

import pytest
import torch
import torch.nn.functional as F
from test_spike_linear import gradients, kept_by, layer_of, tensors_behind
from test_spike_ops import DEVICE, HAS_GPU, LEAK, random, truncated
from tiny import activated

from models.amplitudes import BlockNeurons
from models.neuron import compute_dtype, run_memoryless, run_neuron
from models.spike_ops import (
    ACTIVATIONS,
    RESETS,
    STATES,
    activated_backward,
    encode,
    encode_activated,
    membrane_backward,
    unpack,
)
from pipeline.tracing import LiveBytes

WIDTHS = (1, 5, 100, 33, 7, 64, 2, 257)
"""One for each T from 1 on."""

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def cases(dtype, gated):
    """For T from 1 to 8: what the activation gets, amplitudes, a reset, a gradient, and carries where there are any.

    Dtypes but fp32, which differ from it in how they round alone, are tried at two T.
    """
    for T, width in enumerate(WIDTHS, start=1):
        if dtype != torch.float32 and T not in (2, 4):
            continue
        reset = RESETS[T % 3]
        hidden = 2 * random(T, 2, 3, width * (2 if gated else 1), seed=T, dtype=dtype)
        carries = [random(2, 3, width, seed=seed, dtype=compute_dtype(dtype)) for seed in (7, 8)]
        carries = [None, None] if reset == "memoryless" else carries
        alpha, grad = random(T, seed=9).abs() + 0.3, random(T, 2, 3, width, seed=5, dtype=dtype)
        yield hidden, alpha, reset, grad, *carries


def handed_on(hidden, activation, gated):
    """The activation's output as kernels round it: on its way to the neuron, and before the product with a gate."""
    if HAS_GPU or hidden.dtype != torch.bfloat16:
        return activated(hidden, activation, gated)
    if not gated:
        return truncated(activated(hidden.float(), activation, gated))
    gate, hidden = hidden.float().chunk(2, dim=-1)
    return truncated(truncated(activated(gate, activation, False)).float() * hidden)


def membranes(x, alpha, reset, carry):
    seen = []
    if reset == "memoryless":
        run_memoryless(x, alpha, observe=lambda _, m: seen.append(m))
    else:
        run_neuron(x, alpha, leak=LEAK, reset=reset, carry=carry, observe=lambda _, m: seen.append(m))
    return torch.stack(seen)


def assert_same_but_at_thresholds(ours, theirs, m, alpha, scale, ulp):
    """States may first differ where |m| is within 4 ulp, at `scale`, of where a spike begins or saturates."""
    differ = ours != theirs
    first = differ & (differ.cumsum(0) == 1)
    a = alpha.to(m.dtype).view(-1, 1, 1, 1)
    distance = torch.minimum((m.abs() - a / 2).abs(), (m.abs() - a).abs())
    assert (distance <= 4 * ulp * (scale + a))[first].all()
    return differ


@each_activation
@gated_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_spikes_differ_from_those_of_the_two_apart_at_thresholds_alone(activation, gated, dtype):
    ulp = torch.finfo(dtype).eps
    for hidden, alpha, reset, _, carry, _ in cases(dtype, gated):
        x = handed_on(hidden, activation, gated)
        code, measured, left = encode_activated(hidden, alpha, carry, activation, gated, reset, LEAK)
        expected, expected_measured, expected_left = encode(x, alpha, carry, reset, LEAK, "torch")
        states, theirs = (unpack(each, x.shape[-1]) for each in (code, expected))
        m = membranes(x, alpha, reset, carry)
        differ = assert_same_but_at_thresholds(states, theirs, m, alpha, x.abs().amax(0), ulp)
        counts = [(states == kind) | (states == kind + 2) for kind in (1, 2)] + [states >= 3]
        assert torch.equal(measured[1:], torch.stack(counts).sum(-1).double())
        agreed = ~differ.any(-1)
        assert agreed.double().mean() > 0.9
        torch.testing.assert_close(measured[0][agreed], expected_measured[0][agreed], rtol=8 * ulp, atol=8 * ulp)
        if reset != "memoryless":
            agreed = ~differ.any(0)
            torch.testing.assert_close(left[agreed], expected_left[agreed], rtol=8 * ulp, atol=8 * ulp)


@each_activation
@gated_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_activation_is_rounded_as_if_it_had_been_in_memory(activation, gated, dtype):
    """Rows of one element tell their membranes. In a few the last bits of fp32 decide how it is rounded."""
    hidden = random(1, 4, 32, 2 if gated else 1, seed=0, dtype=dtype)
    alpha = torch.ones(1, device=DEVICE)
    _, measured, _ = encode_activated(hidden, alpha, None, activation, gated, "memoryless", LEAK)
    expected = handed_on(hidden, activation, gated).squeeze(-1).abs().double()
    assert (measured[0] == expected).double().mean() > 0.95


@each_activation
@gated_or_not
def test_spikes_around_a_threshold(activation, gated):
    """Neighbours in fp32 of an input whose activation is half the amplitude, or all of it."""
    for start in (0.37, 1.13, 2.9):
        gate = torch.tensor(start, device=DEVICE).view(torch.int32) + torch.arange(-300, 301, device=DEVICE)
        gate = gate.to(torch.int32).view(torch.float32).view(1, 1, 1, -1)
        hidden = torch.cat([gate, torch.full_like(gate, 0.7)], dim=-1) if gated else gate
        x = activated(hidden, activation, gated)
        for share in (1, 2):
            alpha = share * x[..., 300].flatten()
            code, _, _ = encode_activated(hidden, alpha, None, activation, gated, "memoryless", LEAK)
            expected, _, _ = encode(x, alpha, None, "memoryless", LEAK, "torch")
            states, theirs = unpack(code, 601), unpack(expected, 601)
            assert len(theirs.unique()) == 2
            assert_same_but_at_thresholds(states, theirs, x, alpha, x.abs().amax(0), torch.finfo(torch.float32).eps / 2)


def gradients_of(hidden, grad_x, activation, gated):
    hidden = hidden.detach().requires_grad_()
    return torch.autograd.grad(activated(hidden, activation, gated), hidden, grad_x)[0]


@each_activation
@gated_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_err_at_most_twice_as_much_as_plain_torch(activation, gated, dtype):
    # In fp64 there is nothing more exact: instead of its own error it is given what it errs by.
    errors = {"ours": 0.0, "torch": 32 * torch.finfo(dtype).eps if dtype == torch.float64 else 0.0}
    for hidden, alpha, reset, grad, carry, grad_carry in cases(dtype, gated):
        code, *_ = encode(handed_on(hidden, activation, gated), alpha, carry, reset, LEAK, "torch")
        ours, ours_in = activated_backward(grad, hidden, code, alpha, grad_carry, activation, gated, reset, LEAK)
        plain, plain_in = membrane_backward(grad, code, alpha, grad_carry, reset, LEAK, "torch")
        assert torch.equal(ours_in, plain_in) and ours.dtype == dtype
        exact_carry = None if grad_carry is None else grad_carry.double()
        exact, _ = membrane_backward(grad.double(), code, alpha, exact_carry, reset, LEAK, "torch")
        exact = gradients_of(hidden.double(), exact, activation, gated)
        theirs = gradients_of(hidden, plain, activation, gated)
        if dtype == torch.bfloat16 and not HAS_GPU:
            plain, _ = membrane_backward(grad.float(), code, alpha, grad_carry, reset, LEAK, "torch")
            theirs = truncated(gradients_of(hidden.float(), plain, activation, gated))
        for name, each in (("ours", ours), ("torch", theirs)):
            errors[name] = max(errors[name], float((each.double() - exact).abs().max()))
    assert errors["ours"] <= 2 * errors["torch"]


@each_activation
@gated_or_not
@pytest.mark.parametrize("reset", RESETS)
def test_what_is_not_finite_stays_visible(activation, gated, reset):
    hidden = random(3, 2, 3, 140 if gated else 70, seed=0)
    hidden.view(-1)[::7], hidden.view(-1)[3::11], hidden.view(-1)[5::13] = torch.nan, torch.inf, -torch.inf
    alpha, x = random(3, seed=1).abs() + 0.3, activated(hidden, activation, gated)
    code, *_ = encode_activated(hidden, alpha, None, activation, gated, reset, LEAK)
    expected, *_ = encode(x, alpha, None, reset, LEAK, "torch")
    assert torch.equal(code, expected) and unpack(code, 70)[~x.isfinite()].unique().tolist() == [STATES - 1]
    grad = random(*x.shape, seed=2)
    ours, _ = activated_backward(grad, hidden, code, alpha, None, activation, gated, reset, LEAK)
    plain, _ = membrane_backward(grad, code, alpha, None, reset, LEAK, "torch")
    theirs = gradients_of(hidden, plain, activation, gated)
    assert torch.equal(ours.isfinite(), theirs.isfinite()) and ours.isnan().any()


def test_views_are_read_where_they_lie():
    wide, alpha = random(3, 2, 5, 300, seed=0), random(3, seed=1).abs() + 0.3
    for hidden in (wide[..., 100:200], wide[:1].expand(3, -1, -1, -1), wide.transpose(1, 2), wide[:, :, ::2]):
        how = ("silu", True, "normalized", LEAK)
        code, *_ = encode_activated(hidden, alpha, None, *how)
        assert torch.equal(code, encode_activated(hidden.contiguous(), alpha, None, *how)[0])
        grad = random(*hidden.shape[:-1], hidden.shape[-1] // 2, seed=2)
        ours, theirs = (activated_backward(grad, x, code, alpha, None, *how)[0] for x in (hidden, hidden.contiguous()))
        assert torch.equal(ours, theirs) and ours.is_contiguous()


@gated_or_not
def test_operators_keep_what_they_promise_to_torch(gated):
    hidden, alpha = random(2, 1, 3, 140 if gated else 70, seed=0), torch.tensor([0.5, 1.0], device=DEVICE)
    carry, grad, how = random(1, 3, 70, seed=1), random(2, 1, 3, 70, seed=2), ("gelu", gated, "released", LEAK)
    code, *_ = encode_activated(hidden, alpha, carry, *how)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(encode_activated, (hidden, alpha, carry, *how), test_utils=checks)
    torch.library.opcheck(activated_backward, (grad, hidden, code, alpha, carry, *how), test_utils=checks)


def test_what_does_not_fit_together_is_refused():
    hidden, alpha = random(2, 1, 3, 140, seed=0), torch.tensor([0.5, 1.0], device=DEVICE)
    how = ("silu", True, "released", LEAK)
    code, *_ = encode_activated(hidden, alpha, None, *how)
    with pytest.raises(ValueError, match=r"a carry of shape \(1, 3, 140\) for rows of \(1, 3, 70\)"):
        encode_activated(hidden, alpha, hidden[0], *how)
    with pytest.raises(ValueError, match=r"a gradient of shape \(2, 1, 3, 140\) for an activation of \(2, 1, 3, 70\)"):
        activated_backward(hidden, hidden, code, alpha, None, *how)
    with pytest.raises(ValueError, match="a gated activation of 139 elements a row: they must be gate and rest"):
        encode_activated(hidden[..., 1:], alpha, None, *how)


# Layers


def small_layer_of(*family, **overrides):
    """As layer_of, with rows enough for one program."""
    layer, amplitudes, x = layer_of(*family, **overrides)
    return layer, amplitudes, x[:, :1, :8].contiguous()


def fused_products(output):
    """The nodes behind `output` whose neuron computes the activation before it."""
    nodes, riding = tensors_behind(output)
    assert riding == []
    return [node for node in nodes if getattr(node, "before", None) is not None]


@pytest.mark.parametrize("cell", [None, 2], ids=["whole", "cells"])
@pytest.mark.parametrize(("family", "act"), [("bert", "gelu"), ("bert", "gelu_new"), ("llama", "silu")])
def test_a_layer_has_the_output_and_gradients_of_plain_torch(family, act, cell):
    found = {}
    for backend in ("torch", "triton"):
        layer, amplitudes, x = small_layer_of(family, hidden_act=act)
        layer.spike_backend, layer.timesteps_per_cell = backend, cell
        output, sums = layer(x.requires_grad_(), amplitudes)
        found[backend] = [output, *gradients([output], [x, *layer.parameters()])]
        if cell is None:
            (*_, down) = products = fused_products(output) or [None]
            assert len(products) == 1 and (down is None) == (backend == "torch")
            assert down is None or down.saved_tensors[-1].shape[-1] == layer.mlp.up.out_features
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.detach().abs().max()))


def test_what_cannot_be_fused_is_computed_apart():
    for overrides in ({"hidden_act": "relu"}, {"recompute": True}, {"neuron": {"kind": "lif"}}):
        layer, amplitudes, x = small_layer_of(**overrides)
        layer.spike_backend = "triton"
        assert fused_products(layer(x.requires_grad_(), amplitudes)[0]) == []


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_and_narrow_weights(monkeypatch, weights):
    layer, amplitudes, x = small_layer_of()
    layer.to(weights).spike_backend = "triton"
    x, found = x.to(weights).requires_grad_(), []
    for fuses in (True, False):
        monkeypatch.setattr(BlockNeurons, "fuse_activations", lambda *_, fuses=fuses: fuses)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=weights == torch.float32):
            output, _ = layer(x, amplitudes)
        assert [down.saved_tensors[-1].dtype for down in fused_products(output)] == [torch.bfloat16] * fuses
        found.append(gradients([output], [x, *layer.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == weights
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


def test_the_gradient_of_a_rate_goes_through_a_fused_activation():
    found = {}
    for backend in ("torch", "triton"):
        layer, amplitudes, x = small_layer_of()
        layer.spike_backend, layer.trains_rate = backend, True
        output, sums = layer(x.requires_grad_(), amplitudes)
        assert len(fused_products(output)) == (backend == "triton")
        found[backend] = torch.autograd.grad(sums[..., 2:4].sum(), [x, layer.mlp.up.weight])
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def test_the_activation_is_never_in_memory(monkeypatch):
    """It is no more of the forward's peak, and kept is what was kept before: its input."""
    layer, amplitudes, x = small_layer_of()
    layer.spike_backend = "triton"
    peaks, kept = [], []
    for fuses in (False, True):
        monkeypatch.setattr(BlockNeurons, "fuse_activations", lambda *_, fuses=fuses: fuses)
        neurons = layer._neurons(amplitudes, None)
        live = LiveBytes(DEVICE.type)
        with live:
            layer.mlp(x.requires_grad_(), neurons)
        peaks.append(live.peak)
        kept.append(kept_by(layer, amplitudes, x))
    assert kept[0] == kept[1]
    assert peaks[0] - peaks[1] >= 4 * x.nbytes
