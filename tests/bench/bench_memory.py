"""What a training pass holds: its peak and what it keeps for the backward, by checkpointing and timesteps.

    python -m tests.bench.bench_memory --tokens 32      (a quick try)
    python -m tests.bench.bench_memory --layers 12 --width 768 --timesteps 4 --record

Every figure is of a process of its own, since memory that was free once does not count as a peak. Peaks are over what
the process holds before the pass: model, gradients, libraries. u is 4 T B L D bytes: a layer's input in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.amplitudes import calibrate_amplitudes
from models.config import SpikeLMConfig
from models.modeling import SpikeLMModel
from tests.bench.bench_layer import bytes_kept
from tests.bench.tables import format_table, machine, record

MODES = {
    "none": ("none", False),
    "none, hidden recomputed": ("none", True),
    "layer": ("layer", False),
    "layer, hidden recomputed": ("layer", True),
    "timestep": ("timestep", False),
}
"""Checkpointing, and whether what the MLP's activation gets is computed again."""

VOCAB_SIZE = 1000
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""The allocator then gives every tensor's memory back where it is freed, and peaks are the program's own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every mode at every T, each in a fresh process, and print one table."""
    options = _parse(arguments)
    if options.measure:
        print(json.dumps(measure(options)))
        return
    setting = f"{options.layers} layers of {options.family} D={options.width} B={options.rows} L={options.tokens} fp32"
    rows = []
    for timesteps in options.timesteps:
        unit = 4 * timesteps * options.rows * options.tokens * options.width
        for mode in MODES:
            figures = _in_fresh_process(options, mode, timesteps)
            cells = str(options.cell) if mode == "timestep" else "-"
            sizes = (figures["peak"] / 1e6, figures["peak"] / unit, figures["kept"] / 1e6, figures["kept"] / unit)
            rows.append([mode, str(timesteps), cells, *(f"{size:.1f}" for size in sizes), f"{figures['seconds']:.2f}"])
            if options.record:
                for name in ("peak", "kept"):
                    record("memory", f"{setting} T={timesteps}", f"bytes, {name}", {mode: [figures[name]]})
    print(f"{setting}, no dropout; forward and backward in a fresh process; {machine()}")
    columns = ["checkpointing", "T", "timesteps a cell", "peak, MB", "peak, u", "kept, MB", "kept, u", "CPU-s"]
    print(format_table(columns, rows))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Bytes at the peak of one pass (over those before it) and kept behind its forward, and its CPU time."""
    model = build_model(options)
    batch = torch.randint(5, VOCAB_SIZE, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0))

    def forward(ids: Tensor = batch) -> Tensor:
        return model(ids).last_hidden_state.square().mean()

    forward(batch[:1, :2]).backward()  # allocates the gradients, loads what torch loads late
    before, start = memory("VmRSS"), time.process_time()
    forward().backward()
    seconds, peak = time.process_time() - start, memory("VmHWM") - before
    return {"peak": peak, "kept": bytes_kept(forward), "seconds": seconds}


def build_model(options: argparse.Namespace) -> SpikeLMModel:
    """A bare model, calibrated, in training mode, checkpointed as the options say."""
    torch.manual_seed(0)
    config = SpikeLMConfig(
        family=options.family,
        vocab_size=VOCAB_SIZE,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
        max_position_embeddings=options.tokens,
        hidden_act="gelu" if options.family == "bert" else "silu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        neuron={"num_timesteps": options.timesteps[0]},
    )
    model = SpikeLMModel(config)
    calibrate_amplitudes(model, {"input_ids": torch.arange(5, 5 + min(64, options.tokens)).view(1, -1)})
    mode, recompute_hidden = MODES[options.mode]
    model.stack.set_checkpointing(mode, options.cell, recompute_hidden)
    return model.train()


def _in_fresh_process(options: argparse.Namespace, mode: str, timesteps: int) -> dict[str, float]:
    shape = ("family", "width", "layers", "rows", "tokens", "cell")
    arguments = [text for name in shape for text in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, "-m", __spec__.name, "--measure", "--mode", mode, "--timesteps", str(timesteps)]
    environment = {**os.environ, **RETURN_AT_ONCE}
    done = subprocess.run([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def memory(name: str) -> int:
    """A line of this process's status, in bytes: VmRSS what it has in memory, VmHWM the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("bert", "llama"), default="bert")
    parser.add_argument("--width", type=int, default=256, help="width of the model, D; heads are 64 wide")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8, help="rows in the batch, B")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row, L")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, 4, 8], help="spike timesteps, T")
    parser.add_argument("--cell", type=int, default=1, help="timesteps of a cell")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    parser.add_argument("--measure", action="store_true", help="one case, in this process, as JSON")
    parser.add_argument("--mode", choices=MODES, default="none", help="the case's checkpointing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
