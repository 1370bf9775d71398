"""Run under the launcher by test_partitioned_building: a model built partitioned under ZeRO-3.

Writes to <folder>/<precision>_rank<r>.safetensors the weights as gathered, what this rank held, and the amplitudes.
"""

import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

from models.amplitudes import calibrate_amplitudes
from models.modeling import SpikeLMForPreTraining
from pipeline.engine import build_engine, partition_weights, seed_weights, start_world
from pipeline.model import draw_weights
from pipeline.world import leave_world
from tests.distributed import reference

SEED = 3


def built(finish=None):
    with torch.device("meta"):
        model = SpikeLMForPreTraining(reference.model_config("elastic"))
    seed_weights(SEED)
    draw_weights(model, finish)
    return model


def build(precision, world):
    config = reference.config(stage=3, precision=precision)
    model = built(partial(partition_weights, config=config, world=world))
    held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(model, config, world, Path("unused"))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {f"weights/{name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    calibrate_amplitudes(engine, next(reference.loader(world.rank, world.size).batches(1)).tensors)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    counts = {"held": torch.tensor(held), "whole": torch.tensor(whole), "tied": torch.tensor(tied)}
    engine.destroy()
    return {"amplitudes": model.model.stack.amplitudes, **counts, **weights}


def main():
    folder = Path(sys.argv[-1])  # the launcher puts --local_rank first
    world = start_world(timeout_minutes=2)
    for precision in ("fp32", "bf16"):
        save_file(build(precision, world), folder / f"{precision}_rank{world.rank}.safetensors")
    leave_world()


if __name__ == "__main__":
    main()
