"""The DeepSpeed engine: process group, optimizer, schedule, and the one place that builds an engine."""

import math
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pipeline.config import RunConfig, ScheduleSettings, build_ds_config
from pipeline.mixing import Choice, mix

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and the device that is its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place, as a collective; every rank must call it."""
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def on_main(self, action: Callable[[], Result]) -> Result:
        """What `action` gives on rank 0, on every rank; no other rank runs it.

        Where it raises ValueError or OSError, rank 0 raises that, and all others end with exit status 2 in silence.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, False]
        error = None
        if self.is_main:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as raised:
                outcome[1], error = True, raised
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1]:
            self.barrier()  # rank 0 must not be gone before the others have heard
        if error is not None:
            raise error
        if outcome[1]:
            raise SystemExit(2)
        return outcome[0]

    def agree(self, ok: bool) -> bool:
        """Whether `ok` is true on every rank."""
        flag = torch.tensor(int(ok), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)


def start_world(timeout_minutes: float, threads: int | None = None) -> World:
    """Join the process group of the launcher, or found one of a single process where there is no launcher."""
    if threads is not None:
        torch.set_num_threads(threads)
    # DeepSpeed calls collectives by names that newer versions of torch deprecate: nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    # DeepSpeed clones its groups with torch's default time limits, whatever init_distributed is given.
    limit = timedelta(minutes=timeout_minutes)
    distributed_c10d.default_pg_timeout = limit
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = limit
    deepspeed.init_distributed(timeout=limit, verbose=False)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        # Not every launcher sets LOCAL_RANK before init_distributed has discovered it.
        device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
        accelerator.set_device(device.index)
    return World(dist.get_rank(), dist.get_world_size(), device)


def seed_weights(seed: int) -> None:
    """Seed the initial weights: alike on every rank."""
    torch.manual_seed(_seed_word(seed, Choice.WEIGHTS, 0))


def seed_dropout(seed: int, rank: int) -> None:
    """Seed what is drawn while training: every rank draws numbers of its own."""
    torch.manual_seed(_seed_word(seed, Choice.DROPOUT, rank))


def _seed_word(*words: int) -> int:
    return int(mix(*words)) & 0xFFFFFFFF  # torch's CPU generator reads no more bits than these


def stop_world() -> None:
    """Leave the process group; harmless where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_engine(model: nn.Module, config: RunConfig, world: World, run_dir: Path) -> DeepSpeedEngine:
    """The engine that trains `model` as `config` says: ZeRO stage and precision, AdamW, schedule, clipping."""
    optimizer = AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    rate_of = learning_rate_factor(config.schedule, config.training.total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda inner: LambdaLR(inner, rate_of),
        config=build_ds_config(config, world.size, run_dir),
        dist_init_required=False,
    )
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: weights decay; biases, and the gains and offsets of norms, do not."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate_factor(settings: ScheduleSettings, total_steps: int) -> Callable[[int], float]:
    """The rate of step 0, 1, ... as a share of the peak.

    Warm-up goes linearly to 1 and starts above 0; the decay (linear or cosine) ends at `final_ratio` one step after
    the last, so that the last step still learns.
    """

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
        remaining = 1 - progress if settings.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return settings.final_ratio + (1 - settings.final_ratio) * remaining

    return factor


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
