"""A model that is built partitioned: peak memory of each process, on 1 and on 2 of them, with and without offload.

    python -m tests.bench.bench_big --overrides '{"hidden_size": 512, "intermediate_size": 1376}'      (a quick try)

Every process builds its share of the model under ZeRO-3, calibrates, and trains one step. The defaults have the real
width of decoder-7b in two layers and want 20 GB of memory in all. On CPUs offloading moves nothing elsewhere: that it
works is what is seen here. On a GPU, --device_gib is the most that a process may take of its memory.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from models.amplitudes import calibrate_amplitudes, spiking_stack
from models.config import preset
from models.modeling import SpikeLMForCausalLM
from pipeline.config import (
    CheckpointSettings,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    LoggingSettings,
    RunConfig,
    ScheduleSettings,
    TrainingSettings,
    zero_stage,
)
from pipeline.engine import build_engine, partition_weights, seed_weights, start_world
from pipeline.model import draw_weights
from pipeline.world import World, leave_world
from tests.bench.bench_memory import RETURN_AT_ONCE, memory
from tests.bench.tables import format_table, machine
from tests.launcher import launch


def main(arguments: Sequence[str] | None = None) -> None:
    """Launch every case in processes of its own and print one table."""
    options = _parse(arguments)
    if options.folder:
        measure(options)
        return
    rows = [row for ds_config in options.ds_configs for row in _measure_on_each(ds_config, options)]
    print(
        f"{options.preset} with {options.overrides}: {rows[0][-1]} parameters; 1 row of {options.tokens} tokens a "
        f"process, T={options.timesteps}, bf16 and AdamW's state in fp32, checkpointing {options.checkpointing}; "
        f"{machine()}"
    )
    peak = "peak of a process, GB: built"
    columns = ["ds_config", "processes", peak, "engine", "step", "device", "step's share", "step, s"]
    print(format_table(columns, [row[:-1] for row in rows]))


def _measure_on_each(ds_config: str, options: argparse.Namespace) -> list[list[str]]:
    """A row of the table for each number of processes; the last cell is the number of parameters."""
    rows, first = [], None
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            shape = ("preset", "overrides", "tokens", "timesteps", "checkpointing", "device_gib")
            given = [text for name in shape for text in (f"--{name}", str(getattr(options, name)))]
            case = ["--ds_configs", ds_config, "--folder", folder, *given]
            launch("tests/bench/bench_big.py", *case, processes=processes, timeout=3600, **RETURN_AT_ONCE)
            ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        peaks = [max(rank[stage] for rank in ranks) for stage in ("built", "engine", "step")]
        first = first or peaks[-1]
        on_device = max(rank["device"] for rank in ranks)
        gigabytes = [f"{peak / 1e9:.2f}" for peak in peaks] + [f"{on_device / 1e9:.2f}" if on_device else "-"]
        share, seconds = f"{peaks[-1] / first:.2f}", f"{ranks[0]['seconds']:.0f}"
        rows.append([ds_config, str(processes), *gigabytes, share, seconds, f"{ranks[0]['parameters']:,}"])
    return rows


def measure(options: argparse.Namespace) -> None:
    """One rank's peaks over what it holds before it builds, in bytes, as a file in `folder`."""
    world = start_world(timeout_minutes=60)
    if options.device_gib:
        total = torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.device_gib * 2**30 / total)
    config = _run_config(options, world)
    torch.arange(4.0).bfloat16().softmax(0)  # loads what torch loads late
    before, figures = memory("VmRSS"), {}

    with torch.device("meta"):
        model = SpikeLMForCausalLM(
            preset(options.preset, neuron={"num_timesteps": options.timesteps}, **json.loads(options.overrides))
        )
    figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    seed_weights(0)
    partitioned = zero_stage(config) == 3
    draw_weights(model, partial(partition_weights, config=config, world=world) if partitioned else None)
    spiking_stack(model).set_checkpointing(options.checkpointing)
    figures["built"] = memory("VmHWM") - before
    engine = build_engine(model, config, world, Path("unused"))
    figures["engine"] = memory("VmHWM") - before

    ids = torch.randint(5, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(world.device)
    calibrate_amplitudes(engine, {"input_ids": ids})
    start = time.perf_counter()
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    if not loss.isfinite() or not engine.was_step_applied():
        raise RuntimeError(f"the step was not taken: its loss is {float(loss)}")
    on_device = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    figures |= {"step": memory("VmHWM") - before, "seconds": time.perf_counter() - start, "device": on_device}
    (Path(options.folder) / f"rank{world.rank}.json").write_text(json.dumps(figures))
    leave_world()


def _run_config(options: argparse.Namespace, world: World) -> RunConfig:
    (ds_config,) = options.ds_configs
    return RunConfig(
        name="big",
        data=DataSettings(shards="none"),
        schedule=ScheduleSettings(warmup_steps=0),
        engine=EngineSettings(ds_config=ds_config, precision="bf16", checkpointing=options.checkpointing),
        training=TrainingSettings(total_steps=1, global_batch_size=world.size, micro_batch_size=1),
        evaluation=EvaluationSettings(every=0, micro_batch_size=1),
        checkpoint=CheckpointSettings(every=1),
        logging=LoggingSettings(tensorboard=False, progress=False),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="decoder-7b")
    parser.add_argument("--overrides", default='{"num_hidden_layers": 2}', help="fields of SpikeLMConfig, as JSON")
    parser.add_argument("--tokens", type=int, default=16, help="tokens in a row, L")
    parser.add_argument("--timesteps", type=int, default=4, help="spike timesteps, T")
    parser.add_argument("--checkpointing", choices=("none", "layer", "timestep"), default="layer")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ds_configs", nargs="+", default=["ds_configs/zero3.json", "ds_configs/zero3_offload.json"])
    parser.add_argument(
        "--device_gib", type=float, default=0.0, help="most GiB of a GPU that a process may take; 0: all"
    )
    parser.add_argument("--folder", help="measure one case in this process, under the launcher, and write it there")
    parser.add_argument("--local_rank", help="the launcher's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
