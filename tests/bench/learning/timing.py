"""What a training step of each variant costs: CPU time of forward and backward, variants in alternation."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_prep.files import read_json, write_json
from models.amplitudes import calibrate_amplitudes, spiking_stack
from pipeline.config import RunConfig, is_decoder
from pipeline.footprint import empty_model
from pipeline.model import draw_weights
from tests.bench.learning.results import FOLDER, sizes
from tests.bench.learning.variants import EVERYTHING, VARIANTS, Variant, run_config, variants_of
from tests.bench.tables import cpu_seconds, machine

TIMES = FOLDER / "times.json"
ROUNDS = 5


def measure_times(recipes: Sequence[str]) -> None:
    """Write the median time of a token, relative to the twin's, of each variant that pipeline/pretrain.py trains."""
    torch.set_num_threads(1)
    times = read_times()
    for recipe in recipes:
        names = [name for name in variants_of(recipe) if VARIANTS[name].command == Variant.command]
        steps = {name: _step(run_config(recipe, name)) for name in names}
        seconds = {name: statistics.median(each) for name, each in cpu_seconds(steps, ROUNDS).items()}
        relative = {name: value / seconds[EVERYTHING] for name, value in seconds.items()}
        times[recipe] = {"machine": machine(), "relative": relative}
    write_json(TIMES, times)


def read_times() -> dict[str, dict[str, Any]]:
    """By recipe: on which machine, and relative to the twin by variant; empty before anything is."""
    return read_json(TIMES) if TIMES.exists() else {}


def _step(config: RunConfig) -> Callable[[], object]:
    """Forward and backward of a micro-batch of made-up rows."""
    data, penalty = sizes(config), config.training.firing_penalty
    model = empty_model(config, data.vocab_size)
    draw_weights(model)
    ids = torch.randint(5, data.vocab_size, (config.training.micro_batch_size, data.sample_length))
    counted = torch.rand(ids.shape) < (1 if is_decoder(config.model) else config.objective.mask_probability)
    batch = {"input_ids": ids, "labels": torch.where(counted, ids, -100)}
    calibrate_amplitudes(model, batch)
    spiking_stack(model).train_firing_rate(penalty > 0)

    def step() -> None:
        output = model.train()(**batch)
        (output.loss + penalty * output.firing_sum / ids.numel() if penalty else output.loss).backward()
        model.zero_grad()

    return step
