"""What the benchmarks share: timing of variants in alternation, tables of text, and the file of raw figures."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("commit", "device", "torch", "transformers", "benchmark", "setting", "case", "unit", "values")


def cpu_seconds(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU-seconds of all threads for one call of each variant, over `rounds` alternations after one call to warm up.

    In alternation, a machine that slows down meanwhile slows all variants alike.
    """
    return seconds(variants, rounds, torch.device("cpu"))


def seconds(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """As cpu_seconds; on a GPU it is the time that passes until the device has done all.

    Every other round goes backwards: a variant pays for the memory and caches that the one before it leaves.
    """
    clock = time.process_time if device.type == "cpu" else _device_time
    for run in variants.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, run in list(variants.items())[:: -1 if turn % 2 else 1]:
            start = clock()
            run()
            taken[name].append(clock() - start)
    return taken


def _device_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def median_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """'median (lowest-highest)'."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio_and_spread(values: Sequence[float], base: Sequence[float]) -> str:
    """'median (lowest-highest)' of the quotients within each alternation."""
    return median_and_spread([value / other for value, other in zip(values, base, strict=True)], 2)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text: the first column to the left, the others to the right, as wide as their widest cell."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


def machine(device: torch.device | None = None) -> str:
    """On what was measured: every table says it."""
    return f"{_device_name(device)}, torch {torch.__version__}"


def record(
    benchmark: str, setting: str, unit: str, raw: Mapping[str, Sequence[float]], device: torch.device | None = None
) -> None:
    """Append the raw figures of a benchmark's cases to results.csv, with commit, device and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    versions = [commit, _device_name(device), torch.__version__, transformers.__version__]
    is_new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for case, values in raw.items():
            writer.writerow([*versions, benchmark, setting, case, unit, " ".join(f"{value:.6g}" for value in values)])


def _device_name(device: torch.device | None) -> str:
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
