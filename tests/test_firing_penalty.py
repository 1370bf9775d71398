"""The firing rate as something to train: what it is of a batch, and where its gradient goes."""

import pytest
import torch
from tiny import make_batch, make_model, rows_of

from models.amplitudes import SpikeStats, calibrate_amplitudes, firing_sum, spiking_stack
from models.config import NeuronConfig
from models.neuron import run_memoryless, run_neuron
from models.spike_linear import Firing, spike, spike_linear
from pipeline.config import load_run_config

T, B, L, D = 3, 2, 5, 9


def slopes(reset, alpha_T, x_TBLD, spikes):
    """The gradient of weighted counts of spikes: of the autograd functions, and of |o| / alpha by plain autograd."""
    weights = torch.rand(2, T, B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, plain = (x_TBLD.clone().requires_grad_() for _ in range(2))
    measured = spikes(ours, alpha_T)
    (weights * measured[1:3]).sum().backward()
    if reset == "memoryless":
        o_TBLD = run_memoryless(plain, alpha_T)
    else:
        o_TBLD, _ = run_neuron(plain, alpha_T, leak=0.25, reset=reset)
    signs = o_TBLD / alpha_T.view(-1, 1, 1, 1)
    counts = torch.stack([torch.relu(signs).sum(-1), torch.relu(-signs).sum(-1)])  # of slope 0 at silent elements
    (weights * counts).sum().backward()
    return ours.grad, plain.grad


@pytest.mark.parametrize("reset", ["memoryless", "released", "normalized"])
@pytest.mark.parametrize("with_product", [False, True])
def test_counts_of_spikes_have_the_gradient_of_the_spikes_themselves(reset, with_product):
    x_TBLD = torch.randn(T, B, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_T, firing = torch.tensor([0.9, 1.1, 1.3], dtype=torch.float64), Firing(reset, 0.25, "torch", trains_rate=True)
    weight = torch.ones(4, D, dtype=torch.float64)
    if with_product:
        ours, plain = slopes(reset, alpha_T, x_TBLD, lambda x, a: spike_linear(x, weight, None, a, None, firing)[1])
    else:
        ours, plain = slopes(reset, alpha_T, x_TBLD, lambda x, a: spike(x, a, None, firing)[2])
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert (plain != 0).any()


def test_the_sum_is_the_mean_rate_of_all_sites_over_the_counted_tokens():
    model, batch = make_model(NeuronConfig()), make_batch(row_lengths=(10, 7, 4, 9))
    calibrate_amplitudes(model, batch)
    output = model.eval()(**batch)
    assert not output.spike_stats.requires_grad
    whole = float(output.firing_sum.detach())
    rate = SpikeStats(output.spike_stats).firing_rate.mean()
    assert whole == pytest.approx(float(rate) * int(batch["attention_mask"].sum()), rel=1e-12)
    parts = [model(**rows_of(batch, slice(row, row + 1))).firing_sum.detach() for row in range(4)]
    assert float(sum(parts)) == pytest.approx(whole, rel=1e-5)
    assert firing_sum(torch.zeros(0, 4, 5), 8) is None


@pytest.mark.parametrize("checkpointing", ["none", "layer", "timestep"])
def test_it_can_be_lowered_by_its_gradient(checkpointing):
    """And alike where layers run again for their backward."""
    model, batch = make_model(NeuronConfig()), make_batch()
    calibrate_amplitudes(model, batch)
    spiking_stack(model).set_checkpointing(checkpointing)
    model.train()
    assert not model(**batch).firing_sum.requires_grad
    spiking_stack(model).train_firing_rate()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    rates = []
    for _ in range(8):
        output = model(**batch)
        rates.append(float(output.firing_sum.detach()))
        optimizer.zero_grad()
        output.firing_sum.backward()
        optimizer.step()
    assert rates[-1] < 0.97 * rates[0]


def test_neurons_without_that_gradient_are_refused():
    lif = ["--recipe", "tests/distributed/tiny.yaml", "--model.neuron.kind", "lif", "--training.firing_penalty", "0.1"]
    with pytest.raises(ValueError, match="firing_penalty: 0.1 has no effect with .*kind lif: .*; leave it out"):
        load_run_config(lif)
    empty = [*lif[:2], "--model.overrides.num_hidden_layers", "0", "--training.firing_penalty", "0.1"]
    with pytest.raises(ValueError, match="firing_penalty: 0.1 has no effect with .*num_hidden_layers 0, where nothing"):
        load_run_config(empty)
