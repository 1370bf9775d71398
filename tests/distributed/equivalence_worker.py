"""Run under the launcher by test_equivalence: the reference training under engine after engine, in one process group.

Writes what each rank saw to <folder>/<case>_rank<r>.safetensors.
"""

import copy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from models.amplitudes import spiking_stack
from pipeline.checkpoint import TrainState
from pipeline.engine import build_engine, build_optimizer, start_world
from pipeline.trainer import Trainer
from pipeline.world import leave_world
from tests.distributed import reference

CLIP_NORM = 5.0  # acts in some of the steps: AdamW would not notice gradients that are all scaled alike

FIRING_PENALTY = 0.5

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
CASES["penalty_zero2_acc4"] = ("elastic", {"stage": 2, "accumulation": 4, "firing_penalty": FIRING_PENALTY})
CASES["penalty_zero3_layer"] = ("elastic", {"stage": 3, "checkpointing": "layer", "firing_penalty": FIRING_PENALTY})
# Where ZeRO-3 keeps no weight that it does not need at the moment.
RELEASED = {"stage": 3, "ds_config": "tests/distributed/zero{}_released.json"}
CASES["elastic_timestep_released"] = ("elastic", {**RELEASED, "checkpointing": "timestep"})
# The optimizer's state, and under ZeRO-3 the weights, rest in the CPU's memory; DeepSpeed's own AdamW updates them.
CASES["none_zero2_offload"] = ("none", {"stage": "2_offload"})
CASES["none_zero3_offload"] = ("none", {"stage": "3_offload", "accumulation": 4})
CASES["elastic_zero3_offload"] = ("elastic", {"stage": "3_offload"})
# Batches and accumulation change behind the first phase.
for stage in ("1", "2", "2_offload", "3", "3_offload"):
    for first, last in ((4, 1), (1, 4)):
        phased = {"stage": stage, "first_accumulation": first, "accumulation": last}
        CASES[f"none_zero{stage}_phases{first}to{last}"] = ("none", phased)
CASES["none_bf16"] = ("none", {"stage": 2, "precision": "bf16"})
CASES["elastic_bf16"] = ("elastic", {"stage": 2, "precision": "bf16"})
CASES["elastic_bf16_zero3"] = ("elastic", {"stage": 3, "precision": "bf16"})


def train(kind, settings, world):
    config = reference.config(**settings)
    model = reference.model(kind)
    spiking_stack(model).set_checkpointing(config.engine.checkpointing)
    engine = build_engine(model, config, world, Path("unused"))
    corpus = SimpleNamespace(objective=reference.OBJECTIVE)
    state = TrainState(0, 0, world.size, zero_stage=0, data={})
    trainer = Trainer(engine, config, world, corpus, checkpointer=None, metrics=None, state=state, stop=None)
    gradients, step, gathers = {}, engine.step, count_gathers(model)

    def step_after_reading_gradients():
        if engine.is_gradient_accumulation_boundary() and not gradients:
            gradients.update({f"grad/{n}": safe_get_full_grad(p).clone() for n, p in model.named_parameters()})
        return step()

    engine.step = step_after_reading_gradients
    losses, amplitudes, gathered = [], [], []
    for batch in reference.batches(world.rank, world.size, is_phased=bool(config.data.phases)):
        trainer._follow_phases()
        losses.append(trainer.train_step(batch).losses.sum())
        amplitudes.append(spiking_stack(model).amplitudes.clone())
        gathered.append([gathers.pop(name, 0) for name, _ in model.named_parameters()])
        trainer.state = trainer.state.after_step(trainer.phase.global_batch_size)
    engine.destroy()
    return {
        "losses": torch.stack(losses),
        "amplitudes": torch.stack(amplitudes),
        "gathers": torch.tensor(gathered),
        **gradients,
    }


def count_gathers(model):
    """How often each parameter is gathered from here on, by name, where ZeRO-3 partitions it."""
    counts, names = Counter(), {id(parameter): name for name, parameter in model.named_parameters()}

    def counting(gather):
        def count_and_gather(parameters, **options):
            parameters = list(parameters)
            counts.update(names[id(parameter)] for parameter in parameters)
            return gather(parameters, **options)

        return count_and_gather

    for parameter in model.parameters():
        if hasattr(parameter, "all_gather_coalesced"):
            parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
    return counts


def take_over():
    """Weights after steps of torch's AdamW alone, and of DeepSpeed's from the middle on, with the state of torch's."""
    torch.manual_seed(0)
    twins = [torch.nn.Linear(64, 64)]
    twins.append(copy.deepcopy(twins[0]))
    first, second = (
        build_optimizer(twin, reference.config(stage=stage))
        for twin, stage in zip(twins, ("2", "2_offload"), strict=True)
    )
    for step in range(6):
        if step == 3:  # as DeepSpeed restores a checkpoint
            twins[1].load_state_dict(twins[0].state_dict())
            for ours, theirs in zip(second.param_groups, first.param_groups, strict=True):
                parameters = ours["params"]
                ours.clear()
                ours.update(copy.deepcopy({**theirs, "params": []}), params=parameters)
            for ours, theirs in zip(twins[1].parameters(), twins[0].parameters(), strict=True):
                second.state[ours] = copy.deepcopy(first.state[theirs])
        for twin, optimizer in zip(twins, (first, second), strict=True):
            gradients = torch.Generator().manual_seed(step)
            for parameter in twin.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=gradients)
            optimizer.step()
    return {"alone": twins[0].weight.detach(), "taken over": twins[1].weight.detach()}


def main():
    folder = Path(sys.argv[-1])  # the launcher puts --local_rank first
    world = start_world(timeout_minutes=2)
    for name, (kind, settings) in CASES.items():
        save_file(train(kind, settings, world), folder / f"{name}_rank{world.rank}.safetensors")
    if world.is_main:
        save_file(take_over(), folder / "take_over.safetensors")
    leave_world()


if __name__ == "__main__":
    main()
