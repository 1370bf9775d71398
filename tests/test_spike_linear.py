"""Neuron and product as one function: against plain autograd, in all ways that layers use it, and what is kept."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from decoders import make_decoder, token_ids
from test_spike_ops import DEVICE, HAS_GPU, random
from tiny import fire_and_count, make_batch, make_model, project_by_fire
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.amplitudes import BlockNeurons, calibrate_amplitudes, spiking_stack
from models.config import FAMILIES, SpikeLMConfig
from models.neuron import run_memoryless, run_neuron
from models.spike_linear import Firing, KeptAsCodes, spike, spike_linear
from models.stack import build_block
from pipeline.tracing import LiveBytes
from tests.bench.bench_layer import bytes_kept

T, D, E = 4, 70, 12
ALPHA = torch.tensor([0.5, 0.9, 1.3, 0.7], device=DEVICE)
COMPILED = "triton" if HAS_GPU else "cpp"
RESETS = ("released", "normalized")


def arguments(dtype=torch.float32, carry=False):
    """Input, weight, bias and carry, all of which want gradients."""
    tensors = [random(T, 2, 3, D, seed=0), random(E, D, seed=1), random(E, seed=2), random(2, 3, D, seed=3)]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    if dtype == torch.bfloat16:
        tensors[3] = tensors[3].detach().float().requires_grad_()
    return tensors if carry else [*tensors[:3], None]


def firing(reset="released", backend=COMPILED):
    return Firing(reset, 0.3, backend)


def gated(hidden):
    gate, hidden = hidden.chunk(2, dim=-1)
    return F.silu(gate) * hidden


ACTIVATIONS = {"none": None, "gelu": F.gelu, "gated": gated}


def plain(x, weight, bias, carry, reset, activation):
    spikes, carry = run_neuron(x, ALPHA, leak=0.3, reset=reset, carry=carry)
    product = F.linear(spikes, weight, bias)
    return (product if activation is None else activation(product)), carry


def gradients(outputs, inputs):
    """Of a fixed linear function of the outputs."""
    total = sum((output * random(*output.shape, seed=9)).sum() for output in outputs)
    wanted = [tensor for tensor in inputs if tensor is not None]
    return torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)


def assert_close(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_equals_plain_autograd(reset, activation, recompute, with_carry, dtype, tolerance):
    inputs, activate = arguments(dtype, with_carry), ACTIVATIONS[activation]
    expected, expected_carry = plain(*inputs, reset, activate)
    x, weight, bias, carry = inputs
    ours, _, left = spike_linear(x, weight, bias, ALPHA, carry, firing(reset), activate, recompute)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(left, expected_carry)
    for mine, theirs in (([ours], [expected]), ([ours, left], [expected, expected_carry]), ([left], [expected_carry])):
        assert_close(gradients(mine, inputs), gradients(theirs, inputs), tolerance)


def test_a_neuron_alone_equals_plain_autograd():
    x, *_, carry = arguments(torch.float64, carry=True)
    for theirs, ours in (
        (run_memoryless(x, ALPHA), spike(x, ALPHA, None, firing("memoryless"))[0]),
        (run_neuron(x, ALPHA, leak=0.3, carry=carry)[0], spike(x, ALPHA, carry, firing())[0]),
    ):
        assert torch.equal(ours, theirs)
        assert_close(gradients([ours], [x, carry]), gradients([theirs], [x, carry]), 1e-14)


@pytest.mark.parametrize("backend", ["triton"] if HAS_GPU else ["triton", "cpp"])
def test_backends_agree_to_the_bit(backend):
    x, weight, bias, carry = inputs = arguments(carry=True)
    outputs = [spike_linear(x, weight, bias, ALPHA, carry, firing(backend=each), F.gelu) for each in ("torch", backend)]
    assert all(torch.equal(*pair) for pair in zip(outputs[0][::2], outputs[1][::2], strict=True))
    expected, ours = (gradients([y, left], inputs) for y, _, left in outputs)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_autocast_makes_the_product_narrow_and_leaves_the_neuron_as_it_is():
    x, weight, bias, _ = inputs = arguments()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, expected_carry = plain(*inputs, "released", F.gelu)
        ours, _, left = spike_linear(x, weight, bias, ALPHA, None, firing(), F.gelu)
    assert ours.dtype == torch.bfloat16 and left.dtype == torch.float32
    assert torch.equal(left, expected_carry)
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    mine = gradients([ours], inputs)
    assert [grad.dtype for grad in mine] == [torch.float32] * 3
    assert_close(mine, gradients([expected], inputs), 2e-2)


def test_bfloat16():
    x, weight, bias, carry = inputs = arguments(torch.bfloat16, carry=True)
    expected, expected_carry = plain(*inputs, "normalized", F.gelu)
    ours, _, left = spike_linear(x, weight, bias, ALPHA, carry, firing("normalized"), F.gelu)
    assert ours.dtype == torch.bfloat16 and torch.equal(left, expected_carry)
    torch.testing.assert_close(ours, expected)
    mine, theirs = gradients([ours], inputs), gradients([expected], inputs)
    assert [grad.dtype for grad in mine] == [torch.bfloat16] * 3 + [torch.float32]
    assert_close(mine, theirs, 2e-2)


def test_two_uses_in_one_forward_under_a_checkpoint():
    x, weight, bias, _ = inputs = arguments(torch.float64)
    square = random(D, D, seed=5, dtype=torch.float64).requires_grad_()

    def twice(x):
        for _ in range(2):
            x = spike_linear(x, square, None, ALPHA, None, firing(), F.gelu, True)[0]
        return spike_linear(x, weight, bias, ALPHA, None, firing())[0]

    def plainly(x):
        for _ in range(2):
            x = plain(x, square, None, None, "released", F.gelu)[0]
        return plain(x, weight, bias, None, "released", None)[0]

    expected = gradients([plainly(x)], [*inputs, square])
    assert_close(gradients([twice(x)], [*inputs, square]), expected, 1e-12)
    assert_close(gradients([checkpoint(twice, x, use_reentrant=False)], [*inputs, square]), expected, 1e-12)


def test_no_gradient_is_made_that_is_not_wanted():
    x, weight, bias, _ = (each if each is None else each.detach() for each in arguments())
    ours, *_ = spike_linear(x, weight.requires_grad_(), bias, ALPHA, None, firing())
    with FlopCounterMode(display=False) as counter:
        ours.sum().backward()
    assert counter.get_total_flops() == 2 * weight.numel() * x[..., 0].numel(), "of the weight's gradient alone"
    assert weight.grad is not None and x.grad is None and bias.grad is None
    assert not spike_linear(x, weight.detach(), bias, ALPHA, None, firing())[0].requires_grad


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = arguments()
    for output in (spike_linear(x, weight, bias, ALPHA, None, firing())[0], spike(x, ALPHA, None, firing())[0]):
        with pytest.raises(RuntimeError, match="spikes have no second derivative.*without create_graph"):
            torch.autograd.grad(output.sum(), x, create_graph=True)


# What is kept for the backward


def test_views_of_what_is_kept_as_codes_come_back_as_they_were():
    x, again = random(3, 4, 5, seed=0), random(3, 4, 5, seed=0)
    made = []

    def make():
        made.append(again.clone())
        return made[-1]

    views = [x.transpose(0, 1), x[1:, :, 2:], x.reshape(12, 5)]
    weights = [torch.ones_like(view).requires_grad_() for view in views]
    with KeptAsCodes([(x, make)]):
        total = sum((view * weight).sum() for view, weight in zip(views, weights, strict=True))
    expected = [view.clone() for view in views]
    gone = weakref.ref(x.untyped_storage())
    del x, views
    assert gone() is None
    total.backward()
    assert len(made) == 3 and all(torch.equal(w.grad, view) for w, view in zip(weights, expected, strict=True))


def layer_of(family="bert", checkpointed=False, recompute=False, **overrides):
    """A layer wide enough that what it keeps tells, its amplitudes calibrated, and an input."""
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768, "hidden_dropout_prob": 0.0}
    config = SpikeLMConfig(**{"family": family, "attention_probs_dropout_prob": 0.0, **shape, **overrides})
    layer, amplitudes = build_block(config).to(DEVICE), torch.full((6, T), torch.nan, device=DEVICE)
    x = random(T, 2, 16, 192, seed=1)
    with torch.no_grad():
        layer(x, amplitudes, calibrate=True)
    layer.gradient_checkpointing, layer.mlp.up.recompute = checkpointed, recompute
    return layer.train(), amplitudes, x


def kept_by(layer, amplitudes, x):
    return bytes_kept(lambda: layer(x.requires_grad_().clone(), amplitudes)[0])


def test_a_layer_keeps_codes_and_what_is_real():
    """In units of its input u: q, the attention's output, two norms' inputs, the activation's input (4), and codes."""
    layer, amplitudes, x = layer_of()
    u, code = x.nbytes, x.numel() // 3
    sums = (
        4 * x.numel() // 192 * (2 * 2 + 4)
    )  # of two norms a mean and a deviation, of the attention a sum for each head
    codes = code * (1 + 2 + 1 + 1 + 4)
    assert kept_by(layer, amplitudes, x) == pytest.approx(8 * u + codes + sums, rel=0.01)
    layer.mlp.up.recompute = True
    assert kept_by(layer, amplitudes, x) == pytest.approx(4 * u + codes + sums, rel=0.01)


def tensors_behind(output):
    """All tensors that stand on the nodes of the graph behind `output` beside what save_for_backward keeps."""
    nodes, seen, found = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [each for each in vars(node).values() if isinstance(each, Tensor)] if hasattr(node, "__dict__") else []
        nodes += [following for following, _ in node.next_functions]
    return seen, found


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_rides_on_the_graph_outside_what_autograd_keeps(family):
    layer, amplitudes, x = layer_of(family)
    nodes, riding = tensors_behind(layer(x.requires_grad_(), amplitudes)[0])
    assert riding == []
    products = [node for node in nodes if "SpikeLinear" in type(node).__name__]
    kept = [[each for each in node.saved_tensors if each is not None and each.dim() > 1] for node in products]
    assert len(products) == 4
    for node, tensors in zip(products, kept, strict=True):
        code, weight, *hidden = tensors
        assert code.dtype == torch.uint8 and isinstance(weight, nn.Parameter)
        assert len(hidden) == (node.activation is not None)


@pytest.mark.parametrize(("family", "heads"), [("bert", 4), ("llama", 4), ("llama", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_and_values_that_are_kept_as_codes_give_the_same_gradients(family, heads, dtype):
    shared = {} if family == "bert" else {"num_key_value_heads": heads}
    layer, amplitudes, x = layer_of(family, **shared)
    layer, x = layer.to(dtype), x.to(dtype)
    found, kept = [], []
    for checkpointed in (False, True):  # a checkpoint does its own bookkeeping: there they are kept as they are
        layer.gradient_checkpointing = checkpointed
        layer._gradient_checkpointing_func = lambda function, *args, **kwargs: function(*args, **kwargs)
        kept.append(kept_by(layer, amplitudes, x))
        output, _ = layer(x.requires_grad_(), amplitudes)
        found.append(gradients([output], [x, *layer.parameters()]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert kept[1] - kept[0] == pytest.approx(2 * x.nbytes, rel=0.01)


def test_a_layer_is_let_go_with_its_output():
    """No cycle among what autograd keeps: without the collector, all of it goes when the output does."""
    layer, amplitudes, x = layer_of()
    gc.disable()
    try:
        live = LiveBytes(DEVICE.type)
        with live:
            output = layer(x.requires_grad_(), amplitudes)
        assert live.live > 8 * x.nbytes
        del output
        assert live.live == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neuron", [{}, {"preset": "released"}], ids=["default", "released"])
def test_a_model_has_the_loss_and_gradients_of_plain_autograd(family, neuron, monkeypatch):
    if family == "bert":
        model, batch = make_model(neuron), make_batch()
    else:
        model, ids = make_decoder(neuron), token_ids()
        batch = {"input_ids": ids, "labels": ids}
    calibrate_amplitudes(model, batch)
    amplitudes = spiking_stack(model).amplitudes.clone()
    ours, stats = loss_and_gradients(model.train(), batch)
    monkeypatch.setattr(BlockNeurons, "project", project_by_fire)
    monkeypatch.setattr(BlockNeurons, "fire", fire_and_count)
    expected, counted = loss_and_gradients(model, batch)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0)
    for mine, other in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 * float(other.abs().max()) + 1e-12)
    torch.testing.assert_close(stats, counted, rtol=1e-6, atol=0)
    calibrate_amplitudes(model, batch)
    torch.testing.assert_close(spiking_stack(model).amplitudes, amplitudes, rtol=1e-6, atol=0)


def loss_and_gradients(model, batch):
    output = model(**batch)
    return [output.loss.detach(), *torch.autograd.grad(output.loss, list(model.parameters()))], output.spike_stats
