"""DeepSpeed: how its processes start, the optimizer and its schedule, and the one place that builds an engine."""

import ctypes
import math
import os
import warnings
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from models.layers import SpikeBlock
from pipeline.build_locks import clear_stale_locks
from pipeline.config import RunConfig, ScheduleSettings, build_ds_config, offloads_optimizer, zero_stage
from pipeline.ending import first_line
from pipeline.mixing import Choice, mix
from pipeline.world import Place, World, join_world


def start_world(timeout_minutes: float, threads: int | None = None) -> World:
    """Join the processes of the launcher, or stand alone where there is no launcher.

    Raises ValueError where the machine has fewer GPUs than processes; errors of join_world.
    """
    # DeepSpeed calls collectives by names that newer versions of torch deprecate: nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "RANK" not in os.environ:
        _discover()
    place = Place.from_environment()
    _share_cores(place, threads)
    if place.local_rank == 0:
        clear_stale_locks()
    accelerator = get_accelerator()
    device = torch.device("cpu")
    if accelerator.device_name() == "cpu":
        keep_heap()
    else:
        if place.local_rank >= accelerator.device_count():
            raise ValueError(
                f"{place.local_size} processes on this machine, which has {accelerator.device_count()} GPU(s): lower "
                "slots in the hostfile, --num_gpus or PROCESSES"
            )
        device = torch.device(accelerator.device_name(place.local_rank))
        accelerator.set_device(device.index)
    world = join_world(place, device, accelerator.communication_backend_name(), timedelta(minutes=timeout_minutes))
    # Shared memory for inference: DeepSpeed would compile it now, and leave 66 MB a process in /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return world


HEAP_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30), "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1)}
"""Of glibc's malloc: the variable by which a user sets one, its number in malloc.h, and bytes that suit training."""


def keep_heap() -> None:
    """Keep the memory that a step frees for the next one, unless the environment says what malloc shall do.

    Otherwise glibc returns large blocks and asks for them anew, and the kernel clears their pages every time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    is_told = HEAP_SETTINGS.keys() & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is not None and not is_told:
        for number, size in HEAP_SETTINGS.values():
            if not mallopt(number, size):  # older ones take no more than this
                mallopt(number, 32 << 20)


def _discover() -> None:
    """Set the variables that DeepSpeed's launcher sets, for mpirun or for a process of its own.

    On one machine Open MPI's own variables tell all. For several, DeepSpeed asks MPI (mpi4py) for rank 0's address.
    """
    size, local_size = (os.environ.get(f"OMPI_COMM_WORLD_{name}", "1") for name in ("SIZE", "LOCAL_SIZE"))
    # A port that all processes of a job know without asking, and other jobs hardly have.
    port = 20000 + zlib.crc32(os.environ.get("PMIX_NAMESPACE", "").encode()) % 20000
    if size != local_size:
        deepspeed.comm.mpi_discovery(distributed_port=int(os.environ.get("MASTER_PORT", port)), verbose=False)
        os.environ["LOCAL_SIZE"] = local_size
        return
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_SIZE=local_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def _share_cores(place: Place, threads: int | None) -> None:
    """Give torch `threads`, or this process's share of the cores where neither recipe nor launcher says anything."""
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // place.local_size)
    if threads is not None:
        torch.set_num_threads(threads)


def seed_weights(seed: int) -> None:
    """Seed the initial weights: alike on every rank."""
    torch.manual_seed(_seed_word(seed, Choice.WEIGHTS, 0))


def seed_dropout(seed: int, rank: int) -> None:
    """Seed what is drawn while training: every rank draws numbers of its own."""
    torch.manual_seed(_seed_word(seed, Choice.DROPOUT, rank))


def _seed_word(*words: int) -> int:
    return int(mix(*words)) & 0xFFFFFFFF  # torch's CPU generator reads no more bits than these


def partition_weights(module: nn.Module, config: RunConfig, world: World) -> None:
    """Keep this rank's share of the weights that `module` itself holds, as ZeRO-3 does; its buffers stay whole.

    All ranks call it, with the same weights, which take the recipe's precision here as build_engine gives it to others.
    """
    own = nn.ParameterList(module.parameters(recurse=False))
    if config.engine.precision == "bf16":
        for parameter in own:
            parameter.data = parameter.data.to(torch.bfloat16)
    # Around a constructor, deepspeed.zero.Init would round our buffers, and leave weights as transformers draws them
    # unset; given weights that are there, it touches nothing else.
    deepspeed.zero.Init(module=own, config_dict_or_path=build_ds_config(config, world.size, Path()))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(world.device))


def build_engine(model: nn.Module, config: RunConfig, world: World, run_dir: Path) -> DeepSpeedEngine:
    """The engine that trains `model` as `config` says: ZeRO stage and precision, AdamW, schedule, clipping."""
    if zero_stage(config) == 3 and any(isinstance(module, SpikeBlock) for module in model.modules()):
        # A layer's weights are gathered once a pass; linear layer by linear layer it would be once a timestep.
        set_z3_leaf_modules(model, [SpikeBlock])
    rate_of = learning_rate_factor(config.schedule, config.training.total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        lr_scheduler=lambda inner: LambdaLR(inner, rate_of),
        config=build_ds_config(config, world.size, run_dir),
        dist_init_required=False,
    )
    return engine


def set_batch_sizes(engine: DeepSpeedEngine, config: RunConfig) -> None:
    """Between two steps: from the next one on batches have the sizes of `config`, whatever the engine was built for."""
    engine.set_train_micro_batch_size(config.training.micro_batch_size)
    engine.set_train_batch_size(config.training.global_batch_size)  # with the former it gives the accumulation
    engine.micro_steps = 0  # by this count it knows a step's last micro-batch


def build_optimizer(model: nn.Module, config: RunConfig) -> AdamW | DeepSpeedCPUAdam:
    """AdamW as the recipe has it: torch's, or where its state rests in the CPU's memory DeepSpeed's, which works there.

    Raises ValueError where DeepSpeed's cannot be compiled.
    """
    settings = config.optimizer
    groups = parameter_groups(model, settings.weight_decay)
    numbers = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if not offloads_optimizer(config):
        return AdamW(groups, **numbers)
    try:
        optimizer = DeepSpeedCPUAdam(groups, **numbers)
    except RuntimeError as error:
        raise ValueError(
            f"engine.ds_config: {config.engine.ds_config!r} offloads the optimizer, whose operator DeepSpeed cannot "
            f"compile ({first_line(error.__cause__ or error)}): install g++ and ninja, or take a ds_config without "
            "offload_optimizer"
        ) from error
    optimizer.register_step_pre_hook(_complete_state)
    return optimizer


def _complete_state(optimizer: DeepSpeedCPUAdam, *_: Any) -> None:
    """Make a state that torch's AdamW left in a checkpoint one that DeepSpeed's goes on from."""
    for group in optimizer.param_groups:
        group.setdefault("bias_correction", True)
    for state in optimizer.state.values():
        if state:  # there is none yet before the first step
            state["step"] = int(state["step"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: weights decay; biases, and the gains and offsets of norms, do not."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate_factor(settings: ScheduleSettings, total_steps: int) -> Callable[[int], float]:
    """The rate of step 0, 1, ... as a share of the peak.

    Warm-up goes linearly to 1 and starts above 0; the decay (linear or cosine) ends at `final_ratio` one step after
    the last of its steps, so that this one still learns.
    """
    end = settings.decay_steps or total_steps

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        progress = min(1.0, (step - settings.warmup_steps) / max(1, end - settings.warmup_steps))
        remaining = 1 - progress if settings.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return settings.final_ratio + (1 - settings.final_ratio) * remaining

    return factor
