"""Training with more timesteps than the four that the released equations bear."""

import pytest
import torch
from tiny import make_batch, make_model

from models.amplitudes import SpikeStats, calibrate_amplitudes, update_amplitudes


def calibrated(neuron):
    model, batch = make_model(neuron), make_batch()
    calibrate_amplitudes(model, batch)
    return model, batch


@pytest.mark.parametrize("num_timesteps", [8, 16])
def test_the_default_neuron_trains_stably(num_timesteps):
    model, batch = calibrated({"num_timesteps": num_timesteps})
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(30):
        output = model(**batch)
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        stats = update_amplitudes(model, SpikeStats(output.spike_stats))
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    amplitudes = model.model.stack.amplitudes
    assert (amplitudes.amax(1) < 1.5 * amplitudes.amin(1)).all()  # alike at all timesteps
    assert stats.firing_rate.min() > 0.2 and stats.firing_rate.max() < 0.9


def test_the_released_neuron_explodes():
    model, _ = calibrated({"preset": "released", "num_timesteps": 8})
    amplitudes = model.model.stack.amplitudes
    assert amplitudes[:, -1].max() > 100 * amplitudes[:, 0].max()
