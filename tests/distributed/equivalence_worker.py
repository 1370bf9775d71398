"""Run under the launcher by test_equivalence: the reference training under engine after engine, in one process group.

Writes what each rank saw to <folder>/<case>_rank<r>.safetensors.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from models.amplitudes import spiking_stack
from pipeline.engine import build_engine, start_world
from pipeline.trainer import Trainer
from pipeline.world import leave_world
from tests.distributed import reference

CLIP_NORM = 5.0  # acts in some of the steps: AdamW would not notice gradients that are all scaled alike

CASES = {
    f"{kind}_zero{stage}_acc{accumulation}": (kind, {"stage": stage, "accumulation": accumulation})
    for kind in ("none", "elastic")
    for stage in (1, 2, 3)
    for accumulation in (1, 4)
    if stage > 1 or (kind, accumulation) == ("none", 4)
}
CASES["none_zero2_acc4_clip"] = ("none", {"stage": 2, "accumulation": 4, "clip_norm": CLIP_NORM})
CASES["none_zero3_acc1_clip"] = ("none", {"stage": 3, "clip_norm": CLIP_NORM})
CASES["elastic_layer"] = ("elastic", {"stage": 2, "checkpointing": "layer"})
CASES["none_bf16"] = ("none", {"stage": 2, "precision": "bf16"})
CASES["elastic_bf16"] = ("elastic", {"stage": 2, "precision": "bf16"})
CASES["elastic_bf16_zero3"] = ("elastic", {"stage": 3, "precision": "bf16"})


def train(kind, settings, world):
    config = reference.config(**settings)
    model = reference.model(kind)
    spiking_stack(model).set_checkpointing(config.engine.checkpointing)
    engine = build_engine(model, config, world, Path("unused"))
    corpus = SimpleNamespace(objective=reference.OBJECTIVE)
    trainer = Trainer(engine, config, world, corpus, checkpointer=None, metrics=None, state=None, stop=None)
    gradients, step = {}, engine.step

    def step_after_reading_gradients():
        if engine.is_gradient_accumulation_boundary() and not gradients:
            gradients.update({f"grad/{n}": safe_get_full_grad(p).clone() for n, p in model.named_parameters()})
        return step()

    engine.step = step_after_reading_gradients
    losses, amplitudes = [], []
    for batch in reference.loader(world.rank, world.size).batches(reference.STEPS):
        losses.append(trainer.train_step(batch).losses.sum())
        amplitudes.append(spiking_stack(model).amplitudes.clone())
    engine.destroy()
    return {"losses": torch.stack(losses), "amplitudes": torch.stack(amplitudes), **gradients}


def main():
    folder = Path(sys.argv[-1])  # the launcher puts --local_rank first
    world = start_world(timeout_minutes=2)
    for name, (kind, settings) in CASES.items():
        save_file(train(kind, settings, world), folder / f"{name}_rank{world.rank}.safetensors")
    leave_world()


if __name__ == "__main__":
    main()
