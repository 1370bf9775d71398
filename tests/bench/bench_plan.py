"""What pipeline.plan predicts beside what steps of small models take: through the real engine and the trainer's step.

    python -m tests.bench.bench_plan --cases 2      (a quick try)

Measured twice, each case in fresh processes: every storage that torch's operators make, counted, which is what is
predicted; and the most memory that the process ever had (VmHWM), over what was not counted of it between two steps.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.recipes import settings_from_dict
from models.amplitudes import calibrate_amplitudes
from pipeline.config import RunConfig, is_decoder, zero_stage
from pipeline.engine import build_engine, partition_weights, start_world
from pipeline.footprint import Cluster, Data, counted_positions, empty_model, footprint
from pipeline.loader import Batch
from pipeline.model import draw_weights
from pipeline.tracing import LiveBytes
from pipeline.trainer import Trainer
from pipeline.world import World, leave_world
from tests.bench.bench_memory import RETURN_AT_ONCE, memory
from tests.bench.tables import format_table, machine
from tests.launcher import free_port

ENCODER = {"preset": "encoder-tiny", "ds_config": "zero2", "precision": "fp32", "checkpointing": "none"}
DECODER = {**ENCODER, "preset": "decoder-tiny"}
CASES = [
    ENCODER,
    {**ENCODER, "precision": "bf16", "checkpointing": "layer", "accumulation": 2},
    {**ENCODER, "ds_config": "zero1", "checkpointing": "timestep", "accumulation": 2},
    {**DECODER, "precision": "bf16"},
    {**DECODER, "precision": "bf16", "recompute_hidden": True},
    {**DECODER, "checkpointing": "layer", "ds_config": "zero3"},
    {**DECODER, "checkpointing": "timestep", "precision": "bf16"},
    {**DECODER, "tokens": 16, "rows": 1},  # AdamW needs more than the passes
    {**DECODER, "processes": 2, "precision": "bf16", "accumulation": 2},
    {**DECODER, "processes": 2, "precision": "bf16", "ds_config": "zero3"},
    {**DECODER, "processes": 2, "precision": "bf16", "ds_config": "zero3", "zero": {"stage3_max_live_parameters": 0}},
    {**DECODER, "processes": 2, "precision": "bf16", "ds_config": "zero3", "checkpointing": "layer"},
    {**DECODER, "ds_config": "zero2_offload", "precision": "bf16", "checkpointing": "layer"},
    {**DECODER, "ds_config": "zero3_offload", "precision": "bf16", "checkpointing": "layer"},
]
DEFAULTS = {
    "tokens": 128,
    "rows": 4,
    "accumulation": 1,
    "processes": 1,
    "bucket": 1_000_000,
    "zero": {},
    "recompute_hidden": False,
}
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 4}
VOCAB_SIZE = 1000
STEPS_BEFORE = 3  # DeepSpeed's ZeRO-3 learns in the first ones which weights follow which
ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict and measure every case, and print one table."""
    options = _parse(arguments)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    rows = []
    for case in CASES[: options.cases]:
        predicted, measured = predict(case), in_fresh_processes(case)
        megabytes = [predicted, measured["counted"], measured["resident"]]
        rows.append([describe(case), *(f"{size / 1e6:.1f}" for size in megabytes), f"{predicted / megabytes[1]:.3f}"])
    print(
        f"{SHAPE['num_hidden_layers']} layers, D={SHAPE['hidden_size']}, V={VOCAB_SIZE}, B=4, L=128, T=4 where nothing "
        f"else is said, on CPUs; MB of a process at the peak of an optimizer step; {machine()}"
    )
    print(format_table(["recipe", "predicted", "counted", "resident", "predicted / counted"], rows))


def describe(case: dict[str, Any]) -> str:
    """A case as words: what it says, the values it leaves out apart."""
    numbers = [f"{name} {case[name]}" for name in DEFAULTS if name in case]
    return ", ".join([case["preset"], case["ds_config"], case["precision"], case["checkpointing"], *numbers])


def recipe(case: dict[str, Any], folder: Path) -> RunConfig:
    """The case's settings. Buckets are as small as the model, as its folder's copy of the ds_config has them.

    Memory that nobody touches, as most of a large bucket would be, is not resident.
    """
    case = {**DEFAULTS, **case}
    mechanics = json.loads((ROOT / "ds_configs" / f"{case['ds_config']}.json").read_text())
    mechanics["zero_optimization"] |= {"reduce_bucket_size": case["bucket"], **case["zero"]}
    path = folder / "ds_config.json"
    path.write_text(json.dumps(mechanics))
    positions = {"max_position_embeddings": case["tokens"]}
    rows = case["rows"]
    return settings_from_dict(
        RunConfig,
        {
            "name": "case",
            "model": {"preset": case["preset"], "overrides": {**SHAPE, **positions}},
            "data": {"shards": "none"},
            "schedule": {"warmup_steps": 1},
            "engine": {
                "ds_config": str(path),
                "precision": case["precision"],
                "checkpointing": case["checkpointing"],
                "recompute_hidden": case["recompute_hidden"],
            },
            "training": {
                "total_steps": 4,
                "global_batch_size": rows * case["accumulation"] * case["processes"],
                "micro_batch_size": rows,
            },
            "evaluation": {"every": 0, "micro_batch_size": 1},
            "checkpoint": {"every": 4},
            "logging": {"tensorboard": False},
        },
    )


def predict(case: dict[str, Any]) -> float:
    """Bytes at the peak of a step, of one process."""
    full = {**DEFAULTS, **case}
    cluster = Cluster(nodes=1, devices=full["processes"], memory=0, reserve=0, kind="cpu")
    with TemporaryDirectory() as folder:
        return footprint(recipe(case, Path(folder)), Data(VOCAB_SIZE, full["tokens"]), cluster).peak


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Bytes at the peak of a step behind the first ones, in this process of the case's: counted, and resident."""
    world = start_world(timeout_minutes=5)
    live = LiveBytes("cpu")
    with TemporaryDirectory() as folder:
        config = recipe(case, Path(folder))
        tensors = batch_of(config, {**DEFAULTS, **case}["tokens"], world.size)
        with live:
            model = build(config, world)
            engine = build_engine(model, config, world, Path(folder))
            calibrate_amplitudes(engine, {name: tensor[:1] for name, tensor in tensors.items()})
            losses = ("causal_lm",) if is_decoder(config.model) else ("masked_lm", "next_sentence")
            corpus = SimpleNamespace(objective=SimpleNamespace(losses=losses))
            trainer = Trainer(engine, config, world, corpus, None, None, None, None)
            samples = torch.zeros(len(tensors["input_ids"]), dtype=torch.long)
            for _ in range(STEPS_BEFORE):
                trainer.train_step(Batch(tensors, samples, samples))
            live.restart_peak()
            libraries = memory("VmRSS") - live.live
            trainer.train_step(Batch(tensors, samples, samples))
    resident = memory("VmHWM") - libraries
    leave_world()
    return {"counted": live.peak, "resident": resident}


def build(config: RunConfig, world: World) -> nn.Module:
    """The recipe's model with weights, partitioned where they are to be, and its checkpointing set."""
    model = empty_model(config, VOCAB_SIZE)
    draw_weights(model, partial(partition_weights, config=config, world=world) if zero_stage(config) == 3 else None)
    engine = config.engine
    model.model.stack.set_checkpointing(engine.checkpointing, engine.checkpointing_timesteps, engine.recompute_hidden)
    model.logits_at_once = config.engine.logits_at_once
    return model


def batch_of(config: RunConfig, tokens: int, processes: int) -> dict[str, Tensor]:
    """A process's share of a global batch of full rows, as its objective makes it."""
    rows = config.training.global_batch_size // processes
    ids = torch.randint(5, VOCAB_SIZE, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    counted = counted_positions(config, tokens) // config.training.micro_batch_size
    position = torch.arange(tokens).expand(rows, tokens)
    if is_decoder(config.model):
        return {**batch, "position_ids": position.clone(), "labels": ids.masked_fill(position == 0, -100)}
    batch |= {"token_type_ids": torch.zeros_like(ids), "labels": ids.masked_fill(position >= counted, -100)}
    return {**batch, "next_sentence_label": torch.arange(rows) % 2}


def in_fresh_processes(case: dict[str, Any]) -> dict[str, float]:
    """What the case's first process measures."""
    size, port = {**DEFAULTS, **case}["processes"], str(free_port())
    command = [sys.executable, "-m", "tests.bench.bench_plan", "--measure", json.dumps(case)]
    place = {"WORLD_SIZE": str(size), "LOCAL_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(size):
        environment = {**os.environ, **RETURN_AT_ONCE, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process of {describe(case)} failed")
    return json.loads(outputs[0].splitlines()[-1])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    parser.add_argument("--measure", help="one case as JSON, in this process")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
