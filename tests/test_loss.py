"""The loss whose logits are made some positions at a time, against the one that makes them all."""

import pytest
import torch
import torch.nn.functional as F
from decoders import ready_decoder, token_ids
from tiny import make_batch, make_model

from models.amplitudes import calibrate_amplitudes
from models.loss import TokenHead
from pipeline.tracing import LiveBytes


def problem(dtype=torch.float32, positions=23, width=16, vocabulary=50, bias=True):
    torch.manual_seed(0)
    head = TokenHead(width, vocabulary, bias=bias).to(dtype)
    return head, torch.randn(positions, width).to(dtype).requires_grad_(), torch.randint(vocabulary, (positions,))


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss * 0.37, [hidden, *head.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at_once", [1, 5, 23, 100])
def test_chunks_change_rounding_only(bias, at_once):
    head, hidden, labels = problem(bias=bias)
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    ours = head(hidden, labels, at_once)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    for mine, other in zip(gradients(ours, head, hidden), gradients(expected, head, hidden), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_narrow_weights_and_autocast():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        head, hidden, labels = problem(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
            ours = head(hidden, labels, 7)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)
        for mine, other in zip(gradients(ours, head, hidden), gradients(expected, head, hidden), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, other, rtol=3e-2, atol=1e-2)


def test_doubles_stay_doubles():
    head, hidden, labels = problem(torch.float64)
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    ours = head(hidden, labels, 7)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
    for mine, other in zip(gradients(ours, head, hidden), gradients(expected, head, hidden), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_no_position_at_all_and_gradients_that_are_not_wanted():
    head, hidden, labels = problem()
    nothing = head(hidden[:0], labels[:0], 4)
    assert nothing == 0 and not any(grad.any() for grad in gradients(nothing, head, hidden))
    head.requires_grad_(False)
    head(hidden, labels, 4).backward()
    assert hidden.grad is not None and head.weight.grad is None
    head.requires_grad_(True)
    head(hidden.detach(), labels, 4).backward()
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), labels, reduction="sum"), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_graph_may_be_gone_through_twice_but_not_differentiated_twice():
    head, hidden, labels = problem()
    loss = head(hidden, labels, 4)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative.*logits_at_once to 0"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_logits_of_a_chunk_alone_are_in_memory():
    vocabulary, positions, width = 5000, 64, 8
    peak = {}
    for at_once in (8, positions):
        head, hidden, labels = problem(positions=positions, width=width, vocabulary=vocabulary)
        live = LiveBytes("cpu")
        with live:
            head(hidden, labels, at_once).backward()
        peak[at_once] = live.peak
    logits = 4 * vocabulary
    assert peak[positions] > 2 * positions * logits
    assert peak[8] < 4 * 8 * logits + 5 * 4 * vocabulary * width


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_give_the_same_loss_and_gradients(family):
    if family == "bert":
        model, batch = make_model(), make_batch()
        calibrate_amplitudes(model, batch)
    else:
        model, ids = ready_decoder(), token_ids()
        batch = {"input_ids": ids, "labels": ids}
    model.train()
    found = {}
    for at_once in (0, 3):
        model.logits_at_once = at_once
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert (output.logits is None) == (at_once > 0)
        found[at_once] = [output.loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for ours, expected in zip(found[3], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    model.logits_at_once = 1000
    assert model(**batch).logits is not None, "fewer count: nothing is gained by giving none out"
    model.logits_at_once = 3
    assert model.eval()(**batch).logits is not None
