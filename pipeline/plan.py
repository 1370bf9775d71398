"""Say what a recipe needs before there is a device: memory, days, and what to change where it does not fit.

    python -m pipeline.plan --recipe launch/recipes/encoder-base.yaml --memory 80 --nodes 1 --devices 8

Takes every option of pipeline.pretrain as well. Vocabulary and sample length are those of the shards, where they exist.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote

from data_prep.manifest import MANIFEST_NAME, Manifest
from data_prep.recipes import run_command
from pipeline.config import RunConfig, load_run_config, offloads_optimizer, zero_stage
from pipeline.corpus import open_folders
from pipeline.footprint import (
    Cluster,
    Data,
    Footprint,
    Traces,
    changed,
    count_parameters,
    empty_model,
    largest_phase,
    pass_bytes,
    phases_as_runs,
    run_work,
)

GIB = 2**30
DAY = 24 * 60 * 60
TIMESTEPS = (1, 2, 4, 8)
MODES = {
    "none": {"checkpointing": "none", "recompute_hidden": False},
    "none, hidden recomputed": {"checkpointing": "none", "recompute_hidden": True},
    "layer": {"checkpointing": "layer", "recompute_hidden": False},
    "timestep": {"checkpointing": "timestep", "recompute_hidden": False},
}
"""What the table of activations compares; the second is for elastic neurons alone."""

RESERVES = {"gpu": 2.0, "cpu": 0.6}
"""GiB of a device that libraries take: on a GPU the context, communication and what falls between allocations."""

DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"

PLACEMENTS = {
    "zero3": "weights are gathered for every pass",
    "zero2_offload": "the optimizer runs on the host's cores",
    "zero3_offload": "weights come from the host, where the optimizer runs",
}
"""Of ds_configs those that hold less on the device than another, the cheaper first, and what they cost."""

MOMENTS = {
    "forward": "forward",
    "head": "head, loss",
    "backward": "backward",
    "end": "end of it",
    "step": "step",
}

PARTS = {
    "weights": "weights",
    "gathered": "weights gathered by ZeRO-3",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buckets": "buckets of gradients",
    "activations": "activations",
    "logits": "logits and their gradient",
    "libraries": "libraries (assumed)",
}


@dataclass(frozen=True)
class Change:
    """A way to need less memory: the changed settings, as options of the command line, and what they cost."""

    config: RunConfig
    options: tuple[str, ...]
    costs: tuple[str, ...]

    def by(self, section: str, option: str, value: str | int | bool, cost: str) -> "Change":
        """This change and one more."""
        config = changed(self.config, section, **{option: value})
        word = json.dumps(value) if isinstance(value, bool) else value
        return Change(config, (*self.options, f"--{section}.{option} {word}"), (*self.costs, cost))


def find_data(config: RunConfig, vocab_size: int | None, sample_length: int | None) -> Data:
    """Vocabulary and (the last phase's) sample length: those given, else the recipe's, else those of its shards.

    Raises ValueError where nothing tells them, and where the model has too few positions for any phase.
    """
    roots = [folder.root for folder in open_folders(config.data)]
    manifest = next((Manifest.load(root) for root in roots if (root / MANIFEST_NAME).exists()), None)
    ids = vocab_size or config.model.overrides.get("vocab_size") or (manifest and manifest.vocab_size)
    length = sample_length or config.data.sample_length or (manifest and manifest.row_length)
    if missing := [name for name, value in (("--vocab-size", ids), ("--sample-length", length)) if not value]:
        options = " and ".join(f"{name} NUMBER" for name in missing)
        raise ValueError(
            f"{config.data.named} holds no {MANIFEST_NAME} yet, and nothing else says how large its "
            f"vocabulary and samples are: give {options}, or build the shards"
        )
    positions = empty_model(config, ids).config.max_position_embeddings
    longest = max([length, *(phase.sample_length for phase in config.data.phases)])
    if positions < longest:
        raise ValueError(
            f"samples of {longest} tokens, but the model has {positions} positions: raise "
            "model.overrides.max_position_embeddings, or use shorter samples"
        )
    return Data(ids, length)


def placements(config: RunConfig, data: Data) -> Iterator[list[Change]]:
    """Ways to need less memory, the cheaper first: by where DeepSpeed puts what it holds, and in each, the last least.

    Within a placement smaller micro-batches cost more than a second or third forward, which come with each of them.
    """
    unchanged = Change(config, (), ())
    placed = [unchanged]
    stage = zero_stage(config)
    for name, cost in PLACEMENTS.items():
        path = os.path.relpath(DS_CONFIGS / f"{name}.json")
        if zero_stage(changed(config, "engine", ds_config=path)) >= stage and path != config.engine.ds_config:
            placed.append(unchanged.by("engine", "ds_config", path, cost))
    for change in placed:
        yield [leaner for smaller in _micro_batches(change, data) for leaner in _modes(smaller)]


def _micro_batches(change: Change, data: Data) -> Iterator[Change]:
    """Each halves the micro-batch that has the most tokens of those of all phases."""
    yield change
    runs = phases_as_runs(change.config, data)
    sizes, lengths = [run.training.micro_batch_size for run, _ in runs], [samples.sample_length for _, samples in runs]
    while max(sizes) > 1:
        most = max(range(len(sizes)), key=lambda i: sizes[i] * lengths[i] if sizes[i] > 1 else 0)
        sizes[most] = sizes[most] // 2 if sizes[most] % 2 == 0 else 1
        yield _with_micro_batches(change, sizes)


def _with_micro_batches(change: Change, sizes: Sequence[int]) -> Change:
    """Micro-batches of these sizes in the phases: an option for the last one, and one for each before it."""
    *others, last = sizes
    earlier = change.config.data.phases
    phases = tuple(replace(phase, micro_batch_size=size) for phase, size in zip(earlier, others, strict=True))
    config = changed(changed(change.config, "training", micro_batch_size=last), "data", phases=phases)
    options = [f"--data.phases {quote(json.dumps(asdict(phase)))}" for phase in phases]
    return Change(
        config,
        (*change.options, f"--training.micro_batch_size {last}", *options),
        (*change.costs, "more and smaller micro-batches"),
    )


def _modes(change: Change) -> Iterator[Change]:
    yield change
    mode, neuron = change.config.engine.checkpointing, change.config.model.neuron
    if mode == "none" and neuron.kind == "elastic" and not change.config.engine.recompute_hidden:
        yield change.by("engine", "recompute_hidden", True, "a second product into each MLP")
    if mode == "none":
        yield change.by("engine", "checkpointing", "layer", "a second forward of the layers")
    if mode != "timestep" and neuron.num_timesteps > 1:
        yield change.by("engine", "checkpointing", "timestep", "a second and a third forward of the layers")


def cheapest_fit(config: RunConfig, data: Data, cluster: Cluster) -> tuple[Change, Footprint] | None:
    """The first of all changes with which the run fits, and what it then needs; None where none helps."""
    traces: Traces = {}

    def need(change: Change) -> Footprint:
        return largest_phase(change.config, data, cluster, traces)[0]

    for candidates in placements(config, data):
        if need(candidates[-1]).peak > cluster.memory:
            continue  # and so do all others of this placement
        return next((change, needed) for change in candidates if (needed := need(change)).peak <= cluster.memory)
    return None


def more_devices(config: RunConfig, data: Data, cluster: Cluster) -> tuple[int, str, Sequence[str]] | None:
    """How many devices hold the run without offloading anything: their number, GiB at the peak, and the options.

    None where no number that divides the global batch does.
    """
    leanest = [each[-1] for each in placements(config, data) if not offloads_optimizer(each[-1].config)]
    if not leanest:
        return None
    change = leanest[-1]
    traces: Traces = {}
    sizes = [run.training.global_batch_size for run, _ in phases_as_runs(config, data)]
    nodes = cluster.nodes * 2
    while all(size % (nodes * cluster.devices) == 0 for size in sizes):
        more = replace(cluster, nodes=nodes)
        peak = largest_phase(change.config, data, more, traces)[0].peak
        if peak <= cluster.memory:
            return more.size, _gib(peak), change.options
        nodes *= 2
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, whether it fits or not; 2 for a recipe that cannot be planned."""
    options, rest = _parser().parse_known_args(arguments)
    return run_command(lambda: _run(options, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan",
        description=__doc__.partition("\n")[0],
        epilog="Every field of a recipe may be given as well: deepspeed pipeline/pretrain.py --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", type=float, required=True, metavar="GIB", help="memory of a device")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--devices", type=int, default=8, help="devices of a machine (default: 8)")
    parser.add_argument("--kind", choices=RESERVES, default="gpu", help="what the devices are (default: gpu)")
    parser.add_argument("--reserve", type=float, metavar="GIB", help="memory of a device that libraries take")
    parser.add_argument("--peak-tflops", type=float, default=989, help="a device's peak (default: 989, H100, bf16)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    parser.add_argument("--vocab-size", type=int, help="ids of the tokenizer (default: of the shards)")
    parser.add_argument("--sample-length", type=int, help="tokens of a sample (default: of the shards)")
    return parser


def _run(options: argparse.Namespace, recipe: Sequence[str]) -> None:
    for name in ("memory", "nodes", "devices", "peak_tflops", "mfu", "vocab_size", "sample_length"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be positive")
    if options.mfu > 1:
        raise ValueError(f"--mfu is {options.mfu}: it is a share of the peak, 1 at most")
    config = load_run_config(recipe)
    data = find_data(config, options.vocab_size, options.sample_length)
    reserve = RESERVES[options.kind] if options.reserve is None else options.reserve
    cluster = Cluster(options.nodes, options.devices, options.memory * GIB, reserve * GIB, options.kind)
    print("\n\n".join(describe(config, data, cluster, options.peak_tflops * 1e12 * options.mfu)))


def describe(config: RunConfig, data: Data, cluster: Cluster, flops_per_second: float) -> Iterator[str]:
    """Paragraphs: the run, its memory, the verdict, activations by checkpointing and T, operations and days."""
    needed, largest, samples = largest_phase(config, data, cluster)
    yield _describe_run(config, data, cluster)
    if config.data.phases:
        yield f"Memory is that of the phase which needs the most, on samples of {samples.sample_length} tokens."
    yield _describe_memory(needed, cluster)
    yield _describe_verdict(config, data, cluster, needed)
    yield _describe_activations(largest, samples, cluster)
    yield _describe_work(config, data, cluster, flops_per_second)


def _describe_run(config: RunConfig, data: Data, cluster: Cluster) -> str:
    model = empty_model(config, data.vocab_size)
    shape = model.config
    devices = f"{cluster.nodes} x {cluster.devices} devices" if cluster.nodes > 1 else f"{cluster.devices} device(s)"
    batches = []
    for run, samples in phases_as_runs(config, data):
        training = run.training
        steps = f"{training.total_steps:,} steps: " if config.data.phases else ""
        batches.append(
            f"{steps}{training.global_batch_size} rows of {samples.sample_length} tokens a step, "
            f"{training.micro_batch_size} at once"
        )
    joined = ",\n".join(batches)
    return (
        f"{config.name}: {config.model.preset}, {_count(count_parameters(model))} parameters "
        f"({shape.num_hidden_layers} layer(s), D={shape.hidden_size}, V={data.vocab_size}), T={shape.num_timesteps}\n"
        f"{joined} on each of {devices}; {config.engine.precision}, {config.engine.ds_config}, "
        f"checkpointing {config.engine.checkpointing}"
    )


def _describe_memory(needed: Footprint, cluster: Cluster) -> str:
    rows = []
    for part, label in PARTS.items():
        sizes = [parts.get(part, 0) for parts in needed.moments.values()]
        if any(sizes):
            rows.append([label, *map(_gib, sizes)])
    rows.append(["together", *map(_gib, needed.totals.values())])
    lines = _table(["GiB on a device", *(MOMENTS[moment] for moment in needed.moments)], rows)
    if needed.host:
        parts = ", ".join(f"{PARTS[part]} {_gib(size * cluster.devices)}" for part, size in needed.host.items())
        total = _gib(sum(needed.host.values()) * cluster.devices)
        lines += f"\nand in the memory of each machine {total} GiB: {parts}"
    return lines


def _describe_verdict(config: RunConfig, data: Data, cluster: Cluster, needed: Footprint) -> str:
    spare = cluster.memory - needed.peak
    if spare >= 0:
        return f"It fits: {_gib(needed.peak)} of {_gib(cluster.memory)} GiB at the peak, {_gib(spare)} to spare."
    verdict = f"It does not fit: {_gib(needed.peak)} GiB at the peak, {_gib(-spare)} more than {_gib(cluster.memory)}."
    if cluster.reserve >= cluster.memory:
        reserve = _gib(cluster.reserve)
        return f"{verdict}\nLibraries alone are assumed to take {reserve} GiB: use larger devices, or lower --reserve."
    found = cheapest_fit(config, data, cluster)
    if found is None:
        return f"{verdict}\nNeither a setting nor more devices make it fit: use a smaller model, or shorter samples."
    change, less = found
    advice = (
        f"The cheapest change: {' '.join(change.options)}\n"
        f"makes it {_gib(less.peak)} GiB at the peak, for: {'; '.join(change.costs)}."
    )
    if less.host:
        advice += f"\nIt then needs {_gib(sum(less.host.values()) * cluster.devices)} GiB of each machine's own memory."
        if elsewhere := more_devices(config, data, cluster):
            devices, peak, options = elsewhere
            by = f", by {' '.join(options)}" if options else ""
            advice += f"\nWithout it: {devices} devices, {peak} GiB at the peak of each{by}"
    return f"{verdict}\n{advice}"


def _describe_activations(config: RunConfig, data: Data, cluster: Cluster) -> str:
    neuron = config.model.neuron
    timesteps = (1,) if neuron.kind == "none" else TIMESTEPS
    rows = []
    for name, mode in MODES.items():
        if mode["recompute_hidden"] and neuron.kind != "elastic":
            continue
        row = [name]
        for T in timesteps:
            engine = replace(config.engine, **mode, checkpointing_timesteps=1)
            model = replace(config.model, neuron=replace(neuron, num_timesteps=T))
            row.append(_gib(pass_bytes(replace(config, engine=engine, model=model), data, cluster.kind).peak))
        rows.append(row)
    columns = ["activations, GiB, by checkpointing", *(f"T={T}" for T in timesteps)]
    return _table(columns, rows)


def _describe_work(config: RunConfig, data: Data, cluster: Cluster, flops_per_second: float) -> str:
    work, steps, tokens = run_work(config, data), config.training.total_steps, 0
    for run, samples in phases_as_runs(config, data):
        tokens += run.training.total_steps * run.training.global_batch_size * samples.sample_length
    days = work.total / (cluster.size * flops_per_second) / DAY
    shares = {
        "layers": work.layers,
        "attention": work.attention,
        "recomputed by checkpointing": work.recomputed,
        "head": work.head,
    }
    parts = ", ".join(f"{name} {share / work.total:.0%}" for name, share in shares.items() if share)
    return (
        f"{_count(tokens)} tokens in {steps:,} steps: {work.total:.3g} operations ({parts}),\n{days:.3g} days "
        f"({24 * days:.3g} hours) at {flops_per_second / 1e12:.3g} TFLOP/s on each of {cluster.size} device(s)"
    )


def _count(number: float) -> str:
    scale, unit = next((scale, unit) for scale, unit in ((1e9, "B"), (1e6, "M"), (0, "")) if number >= scale)
    return f"{number / scale:.4g} {unit}" if scale else f"{number:,.0f}"


def _gib(size: float) -> str:
    """Three digits, and where it is small no more than three behind the point."""
    gib = size / GIB
    return f"{gib:.3f}" if gib < 1 else f"{gib:.2f}" if gib < 100 else f"{gib:.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    return "\n".join(map(line, (columns, *rows)))


if __name__ == "__main__":
    sys.exit(main())
