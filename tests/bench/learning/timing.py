"""What a training step of each variant costs: CPU time of forward and backward, variants in alternation."""

import statistics
from collections.abc import Callable, Sequence

import torch

from data_prep.files import read_json, write_json
from models.amplitudes import calibrate_amplitudes, spiking_stack
from pipeline.config import is_decoder
from pipeline.footprint import empty_model
from pipeline.model import draw_weights
from tests.bench.learning.results import ROOT, sizes
from tests.bench.learning.variants import EVERYTHING, VARIANTS, run_config
from tests.bench.tables import cpu_seconds, machine

TIMES = ROOT / "tests" / "bench" / "learning" / "times.json"
ROUNDS = 5
MASKED = 0.15


def measure_times(recipes: Sequence[str]) -> None:
    """Write the median time of a token, relative to the twin's, of each variant."""
    torch.set_num_threads(1)
    times = read_times()
    for recipe in recipes:
        steps = {name: _step(recipe, name) for name, variant in VARIANTS.items() if variant.length == 1}
        seconds = {name: statistics.median(each) for name, each in cpu_seconds(steps, ROUNDS).items()}
        times[recipe] = {name: value / seconds[EVERYTHING] for name, value in seconds.items()}
        times[recipe]["machine"] = machine()
    write_json(TIMES, times)


def read_times() -> dict[str, dict[str, float | str]]:
    """By recipe and variant; empty where nothing was measured yet."""
    return read_json(TIMES) if TIMES.exists() else {}


def _step(recipe: str, variant: str) -> Callable[[], object]:
    """Forward and backward of a micro-batch of made-up rows."""
    config = run_config(recipe, variant)
    data = sizes(config)
    model = empty_model(config, data.vocab_size)
    draw_weights(model)
    ids = torch.randint(5, data.vocab_size, (config.training.micro_batch_size, data.sample_length))
    counted = torch.rand(ids.shape) < (1 if is_decoder(config.model) else MASKED)
    batch = {"input_ids": ids, "labels": torch.where(counted, ids, -100)}
    calibrate_amplitudes(model, batch)
    assert spiking_stack(model).calibrated

    def step() -> None:
        model.train()(**batch).loss.backward()
        model.zero_grad()

    return step
